"""What boards with room for different widths learn together, against the narrowest net trained alone.

    python benchmarks/nested.py --out benchmarks/results/nested.json

Four boards of optical digits. In one fleet they have memory for full, 3/4, 1/2 and 1/4 width of one MLP; in
the other all of them have memory for the quarter alone. Learning rates by steps of two on seed 100; accuracy
on the test samples.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from coordinator.config import load_experiment
from coordinator.experiment import Experiment
from coordinator.family import deal_levels, read_family
from coordinator.progress import Silence
from coordinator.simulate import deal, simulate
from coordinator.testbed import make_bundle, read_samples

_ROOT = Path(__file__).resolve().parent.parent
_DIGITS = _ROOT / "examples" / "digits.toml"
_SETTINGS = (
    "model.hidden=[16, 16]",
    "data.alpha=1.0",
    "pruning.method=none",
    "pruning.widths=[0.25, 0.5, 0.75]",
    "method.name=nested",
    "method.perturbations=16",
    "method.batch_size=16",
    "method.schedule=cosine",
    'devices=[{profile="pi-zero-2w", count=4}]',
)
_TUNING_SEED = 100


def with_room(experiment: Experiment, levels: Sequence[int]) -> Experiment:
    """Return the experiment with boards whose memory holds just these widths, the narrowest being 0."""
    train, _ = read_samples(experiment)
    parts = deal(experiment, train)
    slices = {a.name: train.pick(p) for a, p in zip(experiment.agents, parts, strict=True)}
    device = experiment.devices[0]
    with tempfile.TemporaryDirectory() as folder:
        make_bundle(experiment, Path(folder) / "bundle", train, Silence())
        family = read_family(Path(folder) / "bundle")
        roomy = replace(experiment, devices=(replace(device, memory_mib=1e6),))
        needed = [deal_levels(roomy, [bundle], slices).predictions for bundle in family]
    devices = tuple(
        replace(device, count=1, name=f"board{number}", memory_mib=needed[level][number].total_mib)
        for number, level in enumerate(levels)
    )
    return replace(experiment, devices=devices)


def accuracies(levels: Sequence[int], rate: float, seed: int, rounds: int) -> list[float]:
    """Return the accuracy of every width, the narrowest first."""
    settings = [*_SETTINGS, f"method.learning_rate={rate}", f"seed={seed}", f"rounds={rounds}"]
    experiment = with_room(load_experiment(_DIGITS, settings), levels)
    with tempfile.TemporaryDirectory() as folder:
        summary = simulate(experiment, out=Path(folder) / "run", observer=Silence())
    held = [sum(level == number for level in levels) for number in range(4)]
    if [width["agents"] for width in summary["widths"]] != held:
        raise ValueError(f"the boards hold {summary['widths']}, not the widths {levels}")
    return [width["test_accuracy"] for width in summary["widths"]]


def main() -> None:
    """Run what the command line says."""
    # A neighbour of this file has the name of a package: this folder must not be searched first.
    sys.path[:] = [str(_ROOT), *(p for p in sys.path if Path(p).resolve() != _ROOT / "benchmarks")]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=600)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rates", type=float, nargs="+", default=[0.02, 0.04, 0.08])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    found = {}
    for name, levels, judged in (("together", (3, 2, 1, 0), 3), ("quarter alone", (0, 0, 0, 0), 0)):
        tried = {
            rate: accuracies(levels, rate, _TUNING_SEED, arguments.rounds)[judged] for rate in arguments.rates
        }
        rate = max(tried, key=lambda one: tried[one])
        runs = [accuracies(levels, rate, seed, arguments.rounds) for seed in arguments.seeds]
        found[name] = {"rate": rate, "tuning": tried, "accuracy": runs}
        means = [f"{100 * statistics.mean(column):.1f}" for column in zip(*runs, strict=True)]
        print(f"{name:14} rate {rate:<5g} widths 1/4 to 1: {', '.join(means)}", flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
