"""Fine-tuning a pretrained net: HiSo's lead at an equal, small learning rate, and at rates of their own.

    python benchmarks/finetuning.py --out benchmarks/results/finetuning.json

A small net is pretrained on upright digits by backpropagation, and then fine-tuned by a simulated fleet on
the same digits shifted by a pixel. All methods start from the same weights, on the same seeds. Printed are
rounds to an accuracy on shifted test digits, for every method and learning rate.
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
from coordinator.simulate import Spending, deal, play
from coordinator.testbed import rounds_of
from edge_agent.bundle import Bundle
from edge_agent.data import Samples, load_samples, to_inputs
from pruning.export import export_bundle
from pruning.models import build_model, standardisation

__all__ = ["main", "pretrained", "rounds_to", "shifted"]

_ROOT = Path(__file__).resolve().parent.parent
_EVERY = 5
_ROWS: Sequence[tuple[str, Mapping[str, Any], Sequence[float]]] = (
    ("decomfl", {"name": "decomfl"}, (0.002, 0.01, 0.04)),
    ("hiso", {"name": "hiso"}, (0.002, 0.01, 0.04)),
    ("headstep", {"name": "headstep", "exact": 66}, (0.02, 0.04)),
    ("head alone", {"name": "headstep", "exact": 66}, (0.0,)),
)


def shifted(samples: Samples) -> Samples:
    """Return 8x8 digits shifted to the right by a pixel."""
    return Samples(np.roll(samples.x.reshape(-1, 8, 8), 1, axis=2).reshape(-1, 64), samples.y)


def pretrained(folder: Path, train: Samples, *, seed: int = 0, epochs: int = 30) -> Bundle:
    """Train an MLP on upright digits by backpropagation and write it as a bundle."""
    inputs = to_inputs(train.x)
    net = build_model(
        "mlp", sample_shape=(64,), classes=10, hidden=(32,), standardise=standardisation(inputs), seed=seed
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
        net, folder, model="mlp", sample_shape=(64,), classes=10, pruning={}, cost=lambda graph: {}
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
    parser.add_argument("--seeds", type=int, default=3, help="runs of each row (%(default)s)")
    parser.add_argument("--rounds", type=int, default=400, help="where a run ends (%(default)s)")
    parser.add_argument("--out", type=Path, help="where the figures go as JSON")
    options = parser.parse_args(arguments)
    data = _ROOT / "examples" / "digits.npz"
    targets = (0.60, 0.70, 0.80, 0.85)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        train = load_samples(data, "train")
        bundle = pretrained(Path(folder) / "bundle", train)
        test = shifted(load_samples(data, "test"))
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
                        shifted(train),
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
