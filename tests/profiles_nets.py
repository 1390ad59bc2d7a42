"""The nets on which profiles' predictions are held against torch and against real processes.

Written for these tests alone, so that the lowest floor is tested without the floors above it. Every net is
exported as a bundle's graph: weights as graph inputs, loss and correct count inside.
"""

from pathlib import Path

import onnx
import torch
from torch import nn
from torch.nn import functional


class LeNet(nn.Module):
    """28 x 28 grey images, 10 classes, 27 k parameters."""

    sample_shape = (1, 28, 28)

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Conv2d(1, 8, 5, 2, 2), nn.GroupNorm(2, 8), nn.Hardswish()),
            *(nn.Conv2d(8, 16, 3, 2, 1), nn.GroupNorm(2, 16), nn.Hardswish()),
            *(nn.Flatten(), nn.Linear(784, 32), nn.Hardswish(), nn.Linear(32, 10)),
        )

    def forward(self, x):
        """Return what comes out."""
        return self.layers(x)


class Block(nn.Module):
    """Two 3 x 3 convolutions and a way around them."""

    def __init__(self, inside, outside, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.norm1 = nn.GroupNorm(4, outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.norm2 = nn.GroupNorm(4, outside)
        same = stride == 1 and inside == outside
        self.around = nn.Identity() if same else nn.Conv2d(inside, outside, 1, stride, bias=False)

    def forward(self, x):
        """Return what comes out."""
        y = self.norm2(self.conv2(functional.hardswish(self.norm1(self.conv1(x)))))
        return functional.hardswish(y + self.around(x))


class ResNet20(nn.Module):
    """32 x 32 colour images, 10 classes, 272 k parameters (He et al. 2015, with GroupNorm and Hardswish)."""

    sample_shape = (3, 32, 32)

    def __init__(self):
        super().__init__()
        layers = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.GroupNorm(4, 16), nn.Hardswish()]
        inside = 16
        for outside, stride in ((16, 1), (32, 2), (64, 2)):
            for place in range(3):
                layers.append(Block(inside, outside, stride if place == 0 else 1))
                inside = outside
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        """Return what comes out."""
        return self.head(self.body(x).mean((2, 3)))


class Layer(nn.Module):
    """One transformer layer; post-norm as BERT has it, or pre-norm and causal as OPT has it."""

    def __init__(self, width, heads, inner, causal):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def attend(self, x):
        """Return what attention adds."""
        n, t, width = x.shape
        q, k, v = (f(x).view(n, t, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        scores = q @ k.transpose(-1, -2) / (width // self.heads) ** 0.5
        if self.causal:
            scores = scores + torch.full((t, t), -1e4).triu(1)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(n, t, width))

    def forward(self, x):
        """Return what comes out."""
        if self.causal:
            x = x + self.attend(self.norm1(x))
            return x + self.down(functional.relu(self.up(self.norm2(x))))
        x = self.norm1(x + self.attend(x))
        return self.norm2(x + self.down(functional.gelu(self.up(x))))


class Transformer(nn.Module):
    """Token ids (as float32, the data's own form) in, two classes out."""

    def __init__(self, *, vocabulary, width, layers, heads, inner, tokens, causal=False):
        super().__init__()
        self.sample_shape = (tokens,)
        self.causal = causal
        self.words = nn.Embedding(vocabulary, width)
        self.places = nn.Parameter(torch.randn(tokens, width) * 0.02)
        self.layers = nn.ModuleList(Layer(width, heads, inner, causal) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 2)

    def forward(self, x):
        """Return what comes out."""
        h = self.words(x.long()) + self.places
        for layer in self.layers:
            h = layer(h)
        h = self.norm(h)
        return self.head(h[:, -1] if self.causal else h.mean(1))


def minilm():
    """The shape of MiniLM-L6: 22.7 M parameters, 64 tokens."""
    return Transformer(vocabulary=30522, width=384, layers=6, heads=12, inner=1536, tokens=64)


def opt125m():
    """The shape of OPT-125M: 123.8 M parameters, 64 tokens, the loss at the last one."""
    return Transformer(vocabulary=50272, width=768, layers=12, heads=12, inner=3072, tokens=64, causal=True)


NETS = {"lenet": LeNet, "resnet20": ResNet20, "minilm": minilm, "opt125m": opt125m}


class _WithLoss(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, y):
        """Return what comes out."""
        logits = self.net(x)
        return functional.cross_entropy(logits, y), (logits.argmax(1) == y).sum(), logits


def sample(net, batch):
    """Return a batch of raw values and labels that the net accepts."""
    if isinstance(net, Transformer):
        x = torch.randint(0, net.words.num_embeddings, (batch, *net.sample_shape)).float()
    else:
        x = torch.randn(batch, *net.sample_shape)
    return x, torch.zeros(batch, dtype=torch.int64)


def export(net, path: Path) -> Path:
    """Write the graph of a bundle: x, y and every weight are inputs, the batch axis is free."""
    whole = _WithLoss(net).eval()
    with torch.no_grad():  # the exporter merges parameters of equal value, such as the ones of two norms
        for parameter in whole.parameters():
            parameter += 1e-3 * torch.randn_like(parameter)
    names = ["x", "y", *(name for name, _ in whole.named_parameters())]
    torch.onnx.export(
        whole,
        sample(net, 2),
        str(path),
        dynamo=False,
        export_params=False,
        do_constant_folding=False,
        input_names=names,
        output_names=["loss", "correct", "logits"],
        dynamic_axes={"x": {0: "n"}, "y": {0: "n"}, "logits": {0: "n"}},
        opset_version=18,
    )
    found = {entry.name for entry in onnx.load(path).graph.input}
    assert set(names) == found, set(names) ^ found
    return path
