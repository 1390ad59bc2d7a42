"""Fine-tuning a pretrained net: HiSo's lead at an equal, small learning rate, and at rates of their own.

    python -m benchmarks.finetuning --out benchmarks/results/finetuning.json
    python -m benchmarks.finetuning --data mnist.npz --pixels 4 --epochs 2 --out mnist.json

A net is pretrained on digits as they are by backpropagation (an MLP on 8x8 ones, a LeNet on MNIST's), and
fine-tuned by a simulated fleet on the same digits shifted to the right. All methods start from the same
weights, on the same seeds. Printed are rounds to an accuracy on shifted test digits, per method and rate.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from coordinator.actions import Commit
from coordinator.config import load_experiment
from coordinator.evaluation import Evaluator
from coordinator.open_run import rounds_of
from coordinator.simulate import Spending, deal, play
from edge_agent.bundle import Bundle
from edge_agent.data import Samples, load_samples, to_inputs
from pruning.export import export_bundle
from pruning.models import build_model, standardisation

__all__ = ["main", "pretrained", "rounds_to", "shifted"]

_ROOT = Path(__file__).resolve().parent.parent
_EVERY = 5
_ROWS: Sequence[tuple[str, Mapping[str, Any], Sequence[float]]] = (
    ("decomfl", {"name": "decomfl", "smoothing": 0}, (0.0005, 0.002, 0.01, 0.04)),
    ("hiso", {"name": "hiso", "nu": 0.05, "floor": 1e-4, "smoothing": 0}, (0.0005, 0.002, 0.01, 0.04)),
    ("normalised", {"name": "decomfl", "smoothing": 0.9}, (0.0005, 0.002, 0.01)),
    ("headstep", {"name": "headstep", "exact": 66}, (0.02, 0.04)),
    ("head alone", {"name": "headstep", "exact": 66}, (0.0,)),
)


def shifted(samples: Samples, pixels: int) -> Samples:
    """Return digits shifted to the right: images, or rows of 64 features that are 8x8 images."""
    images = samples.x.reshape(len(samples), -1, 8 if samples.x.ndim == 2 else samples.x.shape[-1])
    return Samples(np.roll(images, pixels, axis=2).reshape(samples.x.shape), samples.y)


def pretrained(folder: Path, train: Samples, *, seed: int = 0, epochs: int = 30) -> Bundle:
    """Train an MLP or a LeNet on digits as they are by backpropagation and write it as a bundle."""
    inputs = to_inputs(train.x)
    shape = inputs.shape[1:]
    model, hidden = ("mlp", (32,)) if len(shape) == 1 else ("lenet", None)
    net = build_model(
        model, sample_shape=shape, classes=10, hidden=hidden, standardise=standardisation(inputs), seed=seed
    )
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.from_numpy(inputs), torch.from_numpy(train.y)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(y), generator=generator).split(32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
    return export_bundle(
        net, folder, model=model, sample_shape=shape, classes=10, pruning={}, cost=lambda graph: {}
    )


def rounds_to(
    bundle: Bundle,
    train: Samples,
    test: Samples,
    method: Mapping[str, Any],
    *,
    seed: int,
    rounds: int,
    targets: Sequence[float],
) -> list[int | None]:
    """Return the first round with each of the accuracies, None where there is none."""
    overrides = [
        f"seed={seed}",
        f"rounds={rounds}",
        "fleet.cohort=4",
        'devices=[{profile="pi-4-2gb", count=8}]',
        "data.alpha=1.0",
        "method.perturbations=5",
        "method.batch_size=16",
        *(f"method.{key}={value}" for key, value in method.items()),
    ]
    experiment = load_experiment(_ROOT / "examples" / "digits.toml", overrides)
    replica = bundle.replica()
    judge = Evaluator(bundle, replica, test)
    found: list[int | None] = [None] * len(targets)

    def on_commit(action: Commit) -> None:
        done = action.record.plan.round + 1
        if done % _EVERY == 0:
            accuracy = judge()[1]
            for place, target in enumerate(targets):
                if found[place] is None and accuracy >= target:
                    found[place] = done

    play(
        rounds_of(experiment, bundle, replica, epoch=1),
        bundle,
        train,
        deal(experiment, train),
        on_commit=on_commit,
        spent=Spending(),
        stop=lambda: found[-1] is not None,
    )
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Fine-tune with every method and rate, print a table, and write all figures as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, default=_ROOT / "examples" / "digits.npz", help="the samples")
    parser.add_argument("--pixels", type=int, default=1, help="by which the digits are shifted (%(default)s)")
    parser.add_argument("--epochs", type=int, default=30, help="of the pretraining (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each row (%(default)s)")
    parser.add_argument("--rounds", type=int, default=400, help="where a run ends (%(default)s)")
    parser.add_argument("--out", type=Path, help="where the figures go as JSON")
    options = parser.parse_args(arguments)
    targets = (0.60, 0.70, 0.80, 0.85)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        train = load_samples(options.data, "train")
        bundle = pretrained(Path(folder) / "bundle", train, epochs=options.epochs)
        test = shifted(load_samples(options.data, "test"), options.pixels)
        replica = bundle.replica()
        first = Evaluator(bundle, replica, test)()[1]
        print(f"pretrained: {first:.1%} on shifted digits before the first round")
        print("| method | learning rate", *(f"{target:.0%}" for target in targets), sep=" | ", end=" |\n")
        for name, method, rates in _ROWS:
            for rate in rates:
                # A rate of zero is no experiment; one of 1e-9 leaves every body weight where it is.
                settings = {**method, "learning_rate": rate or 1e-9}
                found = [
                    rounds_to(
                        bundle,
                        shifted(train, options.pixels),
                        test,
                        settings,
                        seed=seed,
                        rounds=options.rounds,
                        targets=targets,
                    )
                    for seed in range(1, options.seeds + 1)
                ]
                columns = list(zip(*found, strict=True))
                cells = [
                    f"{statistics.mean(c):.0f}" if None not in c else f"> {options.rounds}"  # type: ignore[arg-type]
                    for c in columns
                ]
                print(f"| {name} | {rate:g} | {' | '.join(cells)} |", flush=True)
                rows.append(
                    {
                        "method": name,
                        "learning_rate": rate,
                        "rounds": dict(zip(targets, columns, strict=True)),
                    }
                )
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
