"""Transformers of known shapes with random weights, to measure time and memory by.

``minilm`` has the layers of MiniLM-L6 (Wang et al., arXiv 2002.10957): an encoder of 22 M parameters
whose mean output is classified. ``opt125m`` has those of OPT-125M (Zhang et al., arXiv 2205.01068): a
causal decoder of 125 M parameters with the embedding tied to the head, asked for the word after the
last. A sample is a row of token numbers as float32, which are counted modulo the vocabulary.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["SHAPES", "Shape", "Transformer"]


@dataclass(frozen=True)
class Shape:
    """The sizes of a transformer.

    Attributes:
        layers: Blocks.
        width: Of the residual stream.
        heads: Of the attention.
        inner: Width between the two layers of a block's second half.
        vocabulary: Tokens.
        positions: Longest sequence.
        causal: A decoder whose head is its embedding; else an encoder with ``classes`` logits.
        classes: Logits; the vocabulary of a decoder.
    """

    layers: int
    width: int
    heads: int
    inner: int
    vocabulary: int
    positions: int
    causal: bool
    classes: int


SHAPES = {
    "minilm": Shape(6, 384, 12, 1536, 30522, 512, False, 2),
    "opt125m": Shape(12, 768, 12, 3072, 50272, 2050, True, 50272),
}
"""The shapes by name."""


class _Block(nn.Module):
    def __init__(self, shape: Shape, length: int) -> None:
        super().__init__()
        width = shape.width
        self.length, self.width = length, width  # not read off x, so that the graph holds plain numbers
        self.heads, self.causal = shape.heads, shape.causal
        self.query, self.value, self.mix = (nn.Linear(width, width) for _ in range(3))
        self.key = nn.Linear(width, width, bias=False)  # softmax would not see it: all scores move alike
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, shape.inner), nn.Linear(shape.inner, width)

    def attend(self, x: Tensor) -> Tensor:
        """Mix the positions of x, (n, t, width)."""
        length, width = self.length, self.width
        q, k, v = (
            layer(x).reshape(-1, length, self.heads, width // self.heads).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        scores = q @ k.transpose(2, 3) / math.sqrt(width // self.heads)
        if self.causal:
            scores = scores + torch.full((length, length), -1e9).triu(1)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(-1, length, width)
        output: Tensor = self.mix(mixed)
        return output

    def forward(self, x: Tensor) -> Tensor:
        if self.causal:  # norms come first, ReLU between
            x = x + self.attend(self.norm1(x))
            output: Tensor = x + self.down(functional.relu(self.up(self.norm2(x))))
            return output
        x = self.norm1(x + self.attend(x))
        output = self.norm2(x + self.down(functional.gelu(self.up(x))))
        return output


class Transformer(nn.Module):
    """A transformer of some shape with weights drawn by torch's defaults.

    Args:
        shape: One of SHAPES, or another.
        length: Tokens of a sample.
    """

    def __init__(self, shape: Shape, *, length: int) -> None:
        super().__init__()
        self.shape = shape
        self.tokens = nn.Embedding(shape.vocabulary, shape.width)
        self.places = nn.Embedding(shape.positions, shape.width)
        self.register_buffer("order", torch.arange(length), persistent=False)
        self.norm = nn.LayerNorm(shape.width)
        self.blocks = nn.ModuleList(_Block(shape, length) for _ in range(shape.layers))
        if not shape.causal:
            self.head = nn.Linear(shape.width, shape.classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of samples (n, length): of a class, or of the word after the last."""
        tokens = x.abs().long() % self.shape.vocabulary
        stream = self.tokens(tokens) + self.places(self.order)
        if not self.shape.causal:
            stream = self.norm(stream)
        for block in self.blocks:
            stream = block(stream)
        if self.shape.causal:
            return self.norm(stream[:, -1]) @ self.tokens.weight.T
        output: Tensor = self.head(stream.mean(1))
        return output
