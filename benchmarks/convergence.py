"""Rounds, forwards and bytes to an accuracy: every method tuned with the same budget, on paired seeds.

    python -m benchmarks.convergence digits --out benchmarks/results/convergence-digits.json
    python -m benchmarks.convergence mnist --data mnist.npz

For every method the same number of settings is tried on one seed and judged on a fifth of the training
samples that no agent has. The setting that reaches the task's target first (or ends best, if none does)
is run on other seeds with all training samples and judged on the test samples. Every run is a simulation:
the protocol and the bits of a fleet. The accuracy is looked at every five rounds; an accuracy is reached
in the first of these rounds in which it is at least that.
"""

import argparse
import itertools
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w

from coordinator.actions import Commit
from coordinator.config import load_experiment
from coordinator.evaluation import Evaluator
from coordinator.experiment import Experiment
from coordinator.open_run import rounds_of
from coordinator.progress import Silence
from coordinator.simulate import Spending, deal, play
from coordinator.testbed import make_bundle
from edge_agent.data import Samples, load_samples

__all__ = ["ALIASES", "TASKS", "Run", "Task", "compare", "main", "run_once", "tune"]

_ROOT = Path(__file__).resolve().parent.parent
_EVERY = 5
_TUNING_SEED = 100

ALIASES: Mapping[str, Mapping[str, Any]] = {"normalised": {"name": "decomfl", "smoothing": 0.9}}
"""Rows of the table that are a method with constants of its own."""


@dataclass(frozen=True)
class Task:
    """What is learned, and how each method is tuned.

    Attributes:
        experiment: Tables of the experiment file.
        rounds: Where a run ends.
        tuning_rounds: Where a run of the tuning ends.
        targets: Accuracies to reach, ascending; a run ends with the last.
        tuned_for: The one that the tuning looks at.
        grids: By method, the settings that are tried: as many for each.
        data: The samples, if they travel with the project.
    """

    experiment: Mapping[str, Any]
    rounds: int
    tuning_rounds: int
    targets: tuple[float, ...]
    tuned_for: float
    grids: Mapping[str, Sequence[Mapping[str, float]]]
    data: str = ""


@dataclass
class Run:
    """One run. Each list has one entry for a look at the accuracy.

    Attributes:
        rounds: Rounds that were closed then.
        accuracy: Of the samples that no agent has.
        forwards: Forward passes of an agent that was asked every time.
        bytes_up: Payload bytes of such an agent's replies.
    """

    settings: Mapping[str, float]
    seed: int
    rounds: list[int] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    forwards: list[int] = field(default_factory=list)
    bytes_up: list[int] = field(default_factory=list)
    digest: str = ""

    def reached(self, target: float) -> int | None:
        """Return the first round with that accuracy, None if there is none."""
        return next((r for r, a in zip(self.rounds, self.accuracy, strict=True) if a >= target), None)


def _grid(**axes: Sequence[float]) -> list[dict[str, float]]:
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def _doubling(first: float, count: int = 6) -> list[float]:
    return [first * 2**n for n in range(count)]


_DIGITS: Mapping[str, Any] = {
    "model": {"name": "mlp", "hidden": [32]},
    "data": {"split": "dirichlet", "alpha": 1.0},
    "pruning": {"method": "none"},
    "fleet": {"cohort": 4},
    "devices": [{"profile": "pi-4-2gb", "count": 8}],
}
_DIGITS_GRIDS = {
    "decomfl": _grid(learning_rate=_doubling(0.0025)),
    "hiso": [
        {"learning_rate": rate, "nu": nu, "floor": floor}
        for rate in _doubling(0.005, 3)
        for nu, floor in ((0.05, 1e-4), (0.1, 1e-2))
    ],
    "normalised": _grid(learning_rate=_doubling(0.005)),
    "headstep": _grid(learning_rate=_doubling(0.01, 3), head_rate=[1.0, 2.0]),
}

_DIGITS_P20_GRIDS = {  # a mean of more perturbations bears longer steps
    **_DIGITS_GRIDS,
    "decomfl": _grid(learning_rate=_doubling(0.01)),
    "hiso": [
        {"learning_rate": rate, "nu": nu, "floor": floor}
        for rate in _doubling(0.02, 3)
        for nu, floor in ((0.05, 1e-4), (0.1, 1e-2))
    ],
}

_MNIST: Mapping[str, Any] = {
    "model": {"name": "lenet"},
    "data": {"split": "dirichlet", "alpha": 1.0},
    "pruning": {"method": "none"},
    "devices": [{"profile": "pi-4-2gb", "count": 8}],
}

TASKS: Mapping[str, Task] = {
    "digits": Task(
        {**_DIGITS, "method": {"perturbations": 5, "batch_size": 16, "exact": 66}},
        rounds=1000,
        tuning_rounds=600,
        targets=(0.60, 0.70, 0.80, 0.85, 0.90),
        tuned_for=0.85,
        grids=_DIGITS_GRIDS,
        data="examples/digits.npz",
    ),
    "digits-p20": Task(
        {**_DIGITS, "method": {"perturbations": 20, "batch_size": 16, "exact": 66}},
        rounds=300,
        tuning_rounds=200,
        targets=(0.80, 0.85, 0.88),
        tuned_for=0.88,
        grids=_DIGITS_P20_GRIDS,
        data="examples/digits.npz",
    ),
    "mnist": Task(
        {**_MNIST, "method": {"perturbations": 10, "batch_size": 32, "exact": 1000}},
        rounds=300,
        tuning_rounds=150,
        targets=(0.60, 0.70, 0.80, 0.85),
        tuned_for=0.80,
        grids={
            "decomfl": _grid(learning_rate=[0.008, 0.012, 0.016]),
            "hiso": _grid(learning_rate=[0.004, 0.008, 0.016]),
            "normalised": _grid(learning_rate=[0.005, 0.01, 0.02]),
            "deepstep": [
                {"learning_rate": 0.02, "head_rate": 3.0},
                {"learning_rate": 0.03, "head_rate": 3.0},
                {"learning_rate": 0.03, "head_rate": 4.0},
            ],
            "fanstep": [
                {"learning_rate": 0.014, "head_rate": 4.0},
                {"learning_rate": 0.02, "head_rate": 4.0},
                {"learning_rate": 0.02, "head_rate": 8.0},
            ],
            "headstep": [
                {"learning_rate": 0.007, "head_rate": 2.0},
                {"learning_rate": 0.01, "head_rate": 2.0},
                {"learning_rate": 0.01, "head_rate": 4.0},
            ],
        },
    ),
    "mnist-150": Task(  # the same with a rate that falls to nothing in 150 rounds
        {
            **_MNIST,
            "method": {"perturbations": 10, "batch_size": 32, "exact": 1000, "schedule": "cosine"},
        },
        rounds=150,
        tuning_rounds=150,
        targets=(0.70, 0.80, 0.85),
        tuned_for=0.85,
        grids={
            "headstep": [
                {"learning_rate": 0.014, "head_rate": 2.0},
                {"learning_rate": 0.014, "head_rate": 4.0},
                {"learning_rate": 0.02, "head_rate": 4.0},
            ],
            "decomfl": _grid(learning_rate=[0.004, 0.008, 0.016]),
        },
    ),
}


def run_once(
    task: Task,
    method: str,
    settings: Mapping[str, float],
    *,
    seed: int,
    data: Path,
    tuning: bool,
    until: float,
    enough: Callable[[Run], bool] = lambda run: False,
) -> Run:
    """Simulate one run and return what happened in it.

    Args:
        task: What is learned.
        method: A row of the table.
        settings: Keys of the experiment's method.
        seed: Of the net, the deal of the samples, the noise and the batches.
        data: The samples.
        tuning: Judge by a part of the training samples that no agent has; else by the test samples.
        until: The accuracy that ends the run.
        enough: Asked after every look; True ends the run.
    """
    with tempfile.TemporaryDirectory() as folder:
        experiment = _experiment(task, method, settings, seed, data, tuning, Path(folder))
        train, judged = load_samples(data, "train"), load_samples(data, "test")
        if tuning:
            train, judged = _held_out(train)
        bundle = make_bundle(experiment, Path(folder) / "bundle", train, Silence())
        replica = bundle.replica()
        judge = Evaluator(bundle, replica, judged)
        rounds = rounds_of(experiment, bundle, replica, epoch=1)
        run, spent = Run(settings, seed), Spending()

        def on_commit(action: Commit) -> None:
            done = action.record.plan.round + 1
            if done % _EVERY == 0:
                run.rounds.append(done)
                run.accuracy.append(judge()[1])
                run.forwards.append(round(done * spent.forwards / spent.replies))
                run.bytes_up.append(round(done * spent.bytes_up / spent.replies))

        def stop() -> bool:
            return bool(run.rounds) and (run.accuracy[-1] >= until or enough(run))

        play(rounds, bundle, train, deal(experiment, train), on_commit=on_commit, spent=spent, stop=stop)
        run.digest = f"{replica.digest():016x}"
    return run


def _experiment(
    task: Task,
    method: str,
    settings: Mapping[str, float],
    seed: int,
    data: Path,
    tuning: bool,
    folder: Path,
) -> Experiment:
    tables: dict[str, Any] = dict(task.experiment)
    tables["name"], tables["seed"] = "convergence", seed
    tables["rounds"] = task.tuning_rounds if tuning else task.rounds
    tables["data"] = {**tables["data"], "path": str(data.resolve())}
    tables["method"] = {**tables["method"], "name": method, **ALIASES.get(method, {}), **settings}
    path = folder / "experiment.toml"
    path.write_text(tomli_w.dumps(tables), encoding="utf-8")
    return load_experiment(path)


def _held_out(train: Samples) -> tuple[Samples, Samples]:
    order = np.random.default_rng(0).permutation(len(train))
    return train.pick(order[len(train) // 5 :]), train.pick(order[: len(train) // 5])


def tune(task: Task, method: str, data: Path) -> list[Run]:
    """Return the runs of all settings, the best first; one that cannot win any more is cut short."""
    found: list[Run] = []
    best = task.tuning_rounds
    for settings in task.grids[method]:
        limit = best

        def late(run: Run, limit: int = limit) -> bool:
            return run.rounds[-1] > limit

        run = run_once(
            task,
            method,
            settings,
            seed=_TUNING_SEED,
            data=data,
            tuning=True,
            until=task.tuned_for,
            enough=late,
        )
        found.append(run)
        best = min(best, run.reached(task.tuned_for) or best)
    return sorted(found, key=lambda run: (run.reached(task.tuned_for) or 10**9, -max(run.accuracy)))


def compare(task: Task, data: Path, seeds: Sequence[int], tell: Callable[[str], None]) -> dict[str, Any]:
    """Tune and run every method of a task; return all figures."""
    result: dict[str, Any] = {}
    for method in task.grids:
        began = time.monotonic()
        tuned = tune(task, method, data)
        chosen = tuned[0].settings
        runs = [
            run_once(task, method, chosen, seed=seed, data=data, tuning=False, until=task.targets[-1])
            for seed in seeds
        ]
        result[method] = {
            "settings": chosen,
            "tuning": [
                {**run.settings, "reached": run.reached(task.tuned_for), "best": max(run.accuracy)}
                for run in tuned
            ],
            "targets": {f"{target:.2f}": _figures(runs, target) for target in task.targets},
            "best": [max(run.accuracy) for run in runs],
            "runs": [
                {"seed": run.seed, "digest": run.digest, "accuracy": [round(a, 4) for a in run.accuracy]}
                for run in runs
            ],
        }
        tell(_row(method, result[method], task) + f"  ({time.monotonic() - began:.0f} s)")
    return result


def _figures(runs: Sequence[Run], target: float) -> dict[str, Any]:
    rounds = [run.reached(target) for run in runs]
    figures: dict[str, Any] = {"rounds": rounds}
    for name in ("forwards", "bytes_up"):
        figures[name] = [
            None if reached is None else getattr(run, name)[run.rounds.index(reached)]
            for run, reached in zip(runs, rounds, strict=True)
        ]
    return figures


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "never"
    return f"{statistics.mean(known):.0f}" + ("" if len(known) == len(values) else f" ({len(known)} runs)")


def _row(method: str, figures: Mapping[str, Any], task: Task) -> str:
    cells = [_mean(figures["targets"][f"{target:.2f}"]["rounds"]) for target in task.targets]
    last = figures["targets"][f"{task.tuned_for:.2f}"]
    settings = ", ".join(f"{name} {value:g}" for name, value in figures["settings"].items())
    forwards, sent = _mean(last["forwards"]), _mean(last["bytes_up"])
    return f"| {method} ({settings}) | {' | '.join(cells)} | {forwards} | {sent} |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a task, print its table, and write all figures as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("task", choices=sorted(TASKS))
    parser.add_argument("--data", type=Path, help="the .npz of a task whose data do not travel along")
    parser.add_argument("--seeds", type=int, default=3, help="test runs of each method (%(default)s)")
    parser.add_argument("--methods", nargs="*", help="only these rows")
    parser.add_argument("--out", type=Path, help="where the figures go as JSON")
    options = parser.parse_args(arguments)
    task = TASKS[options.task]
    data = options.data or (_ROOT / task.data if task.data else None)
    if data is None:
        parser.error(f"{options.task} needs --data")
    if options.methods:
        grids = {method: task.grids[method] for method in options.methods}
        task = Task(**{**vars(task), "grids": grids})
    print(f"| {options.task}: rounds to", *(f"{target:.0%}" for target in task.targets), sep=" | ", end="")
    print(f" | forwards to {task.tuned_for:.0%} | bytes up to {task.tuned_for:.0%} |")
    figures = compare(task, data, range(1, options.seeds + 1), lambda line: print(line, flush=True))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        machine = {"processor": platform.machine(), "system": platform.system()}
        report = {"task": options.task, "machine": machine, "seeds": options.seeds, "methods": figures}
        options.out.write_text(json.dumps(report) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
