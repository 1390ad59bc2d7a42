"""What pruning is worth: accuracy under zeroth-order training. What it saves is in ``benchmarks/forward.py``.

    python -m benchmarks.pruning train digits --out benchmarks/results/pruning-digits.jsonl
    python -m benchmarks.pruning train lenet --data mnist.npz --out benchmarks/results/pruning-lenet.jsonl
    python -m benchmarks.pruning table benchmarks/results/pruning-lenet.jsonl

``train``: every net is trained with the same rounds, perturbations and samples. Its learning rate is sought
by steps of two, until the best has a worse one on either side, by two runs on four fifths of the training
samples that are judged on the last fifth; then it is run on other seeds with all of them and judged on the
test samples. The estimator, the noise and the replay are those of a fleet; a cohort's batches are joined
into one, which gives the mean of its scalars in exact arithmetic. Every run is a line of the file, and a
command that was cut off goes on where it stopped.
"""

import argparse
import functools
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coordinator.partition import partition
from edge_agent.bundle import Bundle
from edge_agent.data import load_samples, to_inputs
from edge_agent.estimator import estimate
from edge_agent.forward import Forward
from edge_agent.optimizer import METHODS as OPTIMIZERS
from edge_agent.plan import RoundPlan
from edge_agent.replay import apply_record
from edge_agent.wire import RoundRecord
from profiles.cost import graph_cost
from profiles.errors import EstimateError

_ROOT = Path(__file__).resolve().parent.parent
_TUNING_SEEDS = (100, 101)
_STRUCTURED = ("uniform", "ntk-widths", "random", "erk", "synflow", "ntk")
_MASKS = ("random", "synflow", "ntk")
_NET_FIELDS = ("mode", "method", "unit", "fraction")


@dataclass(frozen=True)
class Task:
    """What is learned, and with what effort.

    Attributes:
        model: Net.
        rounds: Rounds of a run.
        perturbations: P.
        batch_size: Samples of an agent's batch; eight agents, four asked.
        rate: Learning rate that is tried first.
        pool: Images are averaged over squares of this side.
        method: Update rule.
        exact: Exact scalars of the last layer, where the rule has them and the layer so many weights.
    """

    model: str
    rounds: int
    perturbations: int
    batch_size: int
    rate: float
    pool: int = 1
    method: str = "decomfl"
    exact: int = 0


TASKS = {
    "digits": Task("mlp", 300, 16, 16, 0.08),
    "lenet": Task("lenet", 400, 10, 16, 0.04),
    "lenet-headstep": Task("lenet", 150, 10, 16, 0.02, method="headstep", exact=64),
    "resnet20": Task("resnet20", 200, 10, 8, 0.08, pool=2),
    "resnet20-headstep": Task("resnet20", 400, 10, 8, 0.02, pool=2, method="headstep", exact=650),
}


@dataclass(frozen=True)
class Data:
    """Inputs as the graph takes them, and labels."""

    x: NDArray[np.float32]
    y: NDArray[np.int64]

    def pick(self, indices: NDArray[np.int64]) -> "Data":
        """Return some of the samples."""
        return Data(self.x[indices], self.y[indices])


@dataclass(frozen=True)
class Net:
    """A row of the table: how the net was made small, and to what."""

    mode: str
    method: str
    unit: str
    fraction: float

    @property
    def name(self) -> str:
        """The row's name."""
        return "dense" if self.method == "none" else f"{self.mode} {self.method}"


def nets(fractions: Sequence[float], units: Sequence[str], *, masks: bool) -> list[Net]:
    """Return all rows."""
    rows = [Net("narrow", "none", "params", 1.0)]
    for unit, fraction in itertools.product(units, fractions):
        rows += [Net("narrow", method, unit, fraction) for method in _STRUCTURED]
        if unit == "macs":
            rows += [Net("blind", method, unit, fraction) for method in ("synflow", "ntk")]
        if masks and unit == "params":
            rows += [Net("mask", method, unit, fraction) for method in _MASKS]
    return rows


def load(path: Path, part: str, pool: int) -> Data:
    """Read a part of an .npz, pooled."""
    samples = load_samples(path, part)
    x = to_inputs(samples.x)
    if pool > 1:
        n, c, h, w = x.shape
        x = x.reshape(n, c, h // pool, pool, w // pool, pool).mean(axis=(3, 5))
    return Data(np.ascontiguousarray(x, np.float32), samples.y)


def make_bundle(net: Net, task: Task, data: Data, seed: int, folder: Path) -> Bundle:
    """Prune and export one row's net."""
    from pruning.masked import mask_model, write_masked
    from pruning.models import model_structure, standardisation
    from pruning.prune import Allowance, prune_model, write_pruned

    classes = int(data.y.max()) + 1
    options: dict[str, Any] = {
        "sample_shape": data.x.shape[1:],
        "classes": classes,
        "method": net.method,
        "seed": seed,
        "draws": 3,
        "standardise": standardisation(data.x),
    }
    if net.mode == "mask":
        return write_masked(mask_model(task.model, **options, density=net.fraction), folder, cost=_cost)
    structure = model_structure(task.model, sample_shape=data.x.shape[1:], classes=classes)
    amount = net.fraction * getattr(structure, net.unit)(structure.dense)
    allowance = Allowance(net.unit, amount, tolerance=0.02)
    if net.mode == "blind":  # the saliency does not hear what the allowance counts
        allowance = Allowance("MACs", amount, structure.macs, tolerance=0.02)
    return write_pruned(prune_model(task.model, **options, allowance=allowance), folder, cost=_cost)


def train(bundle: Bundle, data: Data, test: Data, task: Task, *, rate: float, seed: int) -> float:
    """Train a bundle for the task's rounds and return the accuracy on ``test``; NaN if it diverged."""
    replica = bundle.replica()
    forward = Forward(bundle, replica.weights)
    parts = partition(data.y, 8, split="dirichlet", alpha=1.0, min_samples=task.batch_size, seed=seed)
    rng = np.random.default_rng(seed)
    method = OPTIMIZERS[task.method]
    exact = min(task.exact, sum(tensor.size for tensor in bundle.tensors if tensor.name in bundle.head))
    for number in range(task.rounds):
        asked = rng.choice(8, 4, replace=False)
        falling = 1 - number / task.rounds
        plan = RoundPlan(
            round=number,
            seed=seed,
            method=method.code,
            steps=1,
            perturbations=task.perturbations,
            epsilon=1e-3,
            learning_rate=rate * falling,
            constants=method.values({"smoothing": 0.9, "head_rate": falling}),
            exact=exact,
        )

        def loss_of(_: int, asked: NDArray[np.int64] = asked) -> Callable[[], float]:
            batch = data.pick(np.concatenate([rng.choice(parts[a], task.batch_size) for a in asked]))
            return lambda: forward.loss(batch.x, batch.y, head=exact > 0)

        try:
            measured = estimate(replica, plan, loss_of, central=True, head_gradient=forward.head_gradient)
        except EstimateError:
            return float("nan")
        apply_record(replica, RoundRecord(plan, 0, False, measured.scalars, 0), check=False)
    right = sum(
        forward.evaluate(test.x[i : i + 200], test.y[i : i + 200])[1] for i in range(0, len(test.y), 200)
    )
    return right / len(test.y)


class Journal:
    """Runs by what they were, in a file with one line a run; a run that it holds is not made again."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path and path.exists() else []
        self.runs = [json.loads(line) for line in lines]

    def accuracy(self, key: Mapping[str, Any], make: Callable[[], Mapping[str, float]]) -> float:
        """Return the accuracy of a run, from the file or by making it."""
        for run in self.runs:
            if all(run[name] == value for name, value in key.items()):
                return float(run["accuracy"])
        self.runs.append({**key, **make()})
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(self.runs[-1]) + "\n")
        return float(self.runs[-1]["accuracy"])


def row(
    net: Net, name: str, data: Data, test: Data, journal: Journal, *, seeds: int, tuning_seeds: Sequence[int]
) -> None:
    """Seek the learning rate of one row of the table, and make its runs."""
    task = TASKS[name]
    order = np.random.default_rng(_TUNING_SEEDS[0]).permutation(len(data.y))
    held, rest = data.pick(order[: len(order) // 5]), data.pick(order[len(order) // 5 :])
    with tempfile.TemporaryDirectory() as folder:
        bundles: dict[int, Bundle] = {}

        def run(phase: str, seed: int, rate: float) -> float:
            def make() -> dict[str, float]:
                if seed not in bundles:
                    bundles[seed] = make_bundle(net, task, data, seed, Path(folder) / str(seed))
                bundle = bundles[seed]
                known, judge = (rest, held) if phase == "tune" else (data, test)
                return {
                    "accuracy": train(bundle, known, judge, task, rate=rate, seed=seed),
                    "params": bundle.params / bundle.pruning["params_dense"],
                    "flops": bundle.cost["forward_flops"] / bundle.pruning["forward_flops_dense"],
                }

            return journal.accuracy(
                {"task": name, **vars(net), "phase": phase, "seed": seed, "rate": rate}, make
            )

        @functools.cache
        def tried(step: int) -> float:
            found = [run("tune", seed, task.rate * 2.0**step) for seed in tuning_seeds]
            return -1.0 if np.isnan(found).any() else statistics.mean(found)

        best = 0
        while tried(best + 1) > tried(best):
            best += 1
        while tried(best - 1) > tried(best):
            best -= 1
        for seed in range(seeds):
            run("test", seed, task.rate * 2.0**best)


def run_training(arguments: argparse.Namespace) -> None:
    """Make the runs of a task that the file does not hold yet, and print the table."""
    task = TASKS[arguments.task]
    path = arguments.data or _ROOT / "examples" / "digits.npz"
    data, test = (load(path, part, task.pool) for part in ("train", "test"))
    journal = Journal(arguments.out)
    for net in nets(arguments.fractions, arguments.units, masks=not arguments.no_masks):
        if arguments.only and net.name not in arguments.only:
            continue
        start = time.perf_counter()
        tuning_seeds = _TUNING_SEEDS[: arguments.tuning_seeds]
        row(net, arguments.task, data, test, journal, seeds=arguments.seeds, tuning_seeds=tuning_seeds)
        lines = table([run for run in journal.runs if Net(*map(run.get, _NET_FIELDS)) == net])
        print(lines[-1], f"{time.perf_counter() - start:5.0f} s", flush=True)


def table(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line of Markdown for each net that was run on the test samples."""
    lines = [
        "| of the | stays | net | parameters | FLOPs | rate | accuracy | each run |",
        "|---|---|---|---|---|---|---|---|",
    ]
    tested: dict[Net, list[Mapping[str, Any]]] = {}
    for run in runs:
        if run["phase"] == "test":
            tested.setdefault(Net(*(run[name] for name in _NET_FIELDS)), []).append(run)
    for net, found in tested.items():
        accuracy = [100 * run["accuracy"] for run in found]
        spread = statistics.stdev(accuracy) if len(accuracy) > 1 else 0.0
        params, flops = (statistics.mean(run[name] for run in found) for name in ("params", "flops"))
        lines.append(
            f"| {net.unit} | {net.fraction:.0%} | {net.name} | {params:.1%} | {flops:.1%} "
            f"| {found[0]['rate']:g} | **{statistics.mean(accuracy):.1f}** +- {spread:.1f} "
            f"| {', '.join(f'{a:.1f}' for a in sorted(accuracy))} |"
        )
    return lines


def _cost(graph: bytes) -> Mapping[str, int]:
    return graph_cost(graph).as_dict()


def main(words: Sequence[str] | None = None) -> int:
    """Run what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train")
    training.add_argument("task", choices=TASKS)
    training.add_argument("--data", type=Path)
    training.add_argument("--seeds", type=int, default=5)
    training.add_argument("--tuning-seeds", type=int, default=len(_TUNING_SEEDS), choices=[1, 2])
    training.add_argument("--fractions", type=float, nargs="+", default=[0.5, 0.25, 0.1])
    training.add_argument("--units", nargs="+", default=["params"], choices=["params", "macs"])
    training.add_argument("--only", nargs="+", help="Names of rows, such as 'narrow ntk'.")
    training.add_argument("--no-masks", action="store_true")
    tables = commands.add_parser("table")
    tables.add_argument("files", type=Path, nargs="+")
    training.add_argument("--out", type=Path)
    arguments = parser.parse_args(words)
    if arguments.command == "train":
        run_training(arguments)
    else:
        for path in arguments.files:
            print("\n".join(table(Journal(path).runs)), end="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
