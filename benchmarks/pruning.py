"""What pruning is worth: accuracy under zeroth-order training, and bytes, time and memory of a forward.

    python benchmarks/pruning.py train digits --out benchmarks/results/pruning-digits.json
    python benchmarks/pruning.py train mnist --data mnist.npz --out benchmarks/results/pruning-mnist.json
    python benchmarks/pruning.py forward --out benchmarks/results/pruning-forward.json

``train``: every net is trained with the same rounds, perturbations and samples, three learning rates are
judged on a fifth of the training samples with a seed of their own, and the best one is run on other seeds
with all of them and judged on the test samples. The estimator, the noise and the replay are those of a
fleet; a cohort's batches are joined into one, which gives the mean of its scalars in exact arithmetic.

``forward``: each figure is taken in a fresh process, ours with ONNX Runtime and the weights as inputs,
the peer's with torch and backpropagation. Imports count on both sides.
"""

import argparse
import itertools
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coordinator.partition import partition
from edge_agent.bundle import Bundle, read_bundle
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
_TUNING_SEED = 100
_STRUCTURED = ("uniform", "random", "erk", "synflow", "ntk")
_MASKS = ("random", "synflow", "ntk")


@dataclass(frozen=True)
class Task:
    """What is learned, and with what effort.

    Attributes:
        model: Net.
        rounds: Rounds of a run.
        perturbations: P.
        batch_size: Samples of an agent's batch; eight agents, four asked.
        rates: Learning rates that are tried.
        pool: Images are averaged over squares of this side.
    """

    model: str
    rounds: int
    perturbations: int
    batch_size: int
    rates: tuple[float, ...]
    pool: int = 1


TASKS = {
    "digits": Task("mlp", 300, 16, 16, (0.04, 0.08, 0.16)),
    "mnist": Task("lenet", 300, 10, 16, (0.03, 0.06, 0.12), pool=2),
    "mnist-resnet20": Task("resnet20", 150, 10, 8, (0.02, 0.04, 0.08), pool=2),
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
    method = OPTIMIZERS["decomfl"]
    for number in range(task.rounds):
        asked = rng.choice(8, 4, replace=False)
        batch = data.pick(np.concatenate([rng.choice(parts[a], task.batch_size) for a in asked]))
        plan = RoundPlan(
            round=number,
            seed=seed,
            method=method.code,
            steps=1,
            perturbations=task.perturbations,
            epsilon=1e-3,
            learning_rate=rate * (1 - number / task.rounds),
            constants=method.values({"smoothing": 0.9}),
        )
        try:
            measured = estimate(
                replica, plan, lambda _, b=batch: lambda: forward.loss(b.x, b.y), central=True
            )
        except EstimateError:
            return float("nan")
        apply_record(replica, RoundRecord(plan, 0, False, measured.scalars, 0), check=False)
    right = sum(
        forward.evaluate(test.x[i : i + 200], test.y[i : i + 200])[1] for i in range(0, len(test.y), 200)
    )
    return right / len(test.y)


def row(net: Net, task: Task, data: Data, test: Data, seeds: int) -> dict[str, Any]:
    """Tune and run one row of the table."""
    order = np.random.default_rng(_TUNING_SEED).permutation(len(data.y))
    held, rest = data.pick(order[: len(order) // 5]), data.pick(order[len(order) // 5 :])
    with tempfile.TemporaryDirectory() as folder:
        bundle = make_bundle(net, task, data, _TUNING_SEED, Path(folder))
        tried = {r: train(bundle, rest, held, task, rate=r, seed=_TUNING_SEED) for r in task.rates}
        rate = max(tried, key=lambda r: -1.0 if np.isnan(tried[r]) else tried[r])
        found, params, flops = [], [], []
        for seed in range(seeds):
            bundle = make_bundle(net, task, data, seed, Path(folder) / str(seed))
            found.append(train(bundle, data, test, task, rate=rate, seed=seed))
            params.append(bundle.params / bundle.pruning["params_dense"])
            flops.append(bundle.cost["forward_flops"] / bundle.pruning["forward_flops_dense"])
    return {
        **vars(net),
        "name": net.name,
        "rate": rate,
        "tuning": tried,
        "accuracy": found,
        "params": statistics.mean(params),
        "flops": statistics.mean(flops),
    }


def run_training(arguments: argparse.Namespace) -> dict[str, Any]:
    """Make the table of accuracies."""
    task = TASKS[arguments.task]
    path = arguments.data or _ROOT / "examples" / "digits.npz"
    data, test = (load(path, part, task.pool) for part in ("train", "test"))
    rows = []
    chosen = nets(arguments.fractions, arguments.units, masks=not arguments.no_masks)
    for net in chosen:
        if arguments.only and net.name not in arguments.only:
            continue
        start = time.perf_counter()
        rows.append(row(net, task, data, test, arguments.seeds))
        print(_line(rows[-1]), f"{time.perf_counter() - start:5.0f} s", flush=True)
    return {"task": arguments.task, **vars(task), "seeds": arguments.seeds, "rows": rows}


def _line(entry: Mapping[str, Any]) -> str:
    accuracy = [100 * a for a in entry["accuracy"]]
    spread = statistics.stdev(accuracy) if len(accuracy) > 1 else 0.0
    return (
        f"{entry['unit']:6} {entry['fraction']:5.0%} {entry['name']:16} params {entry['params']:6.1%} "
        f"flops {entry['flops']:6.1%} rate {entry['rate']:<5g} "
        f"{statistics.mean(accuracy):5.1f} +- {spread:4.1f}"
    )


def run_forward(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure forwards of ResNet-20 in fresh processes, and a torch backpropagation step."""
    rows = []
    data = Data(
        np.random.default_rng(0).standard_normal((64, 3, 32, 32)).astype(np.float32),
        np.arange(64, dtype=np.int64) % 10,
    )
    task = Task("resnet20", 0, 0, 0, ())
    kinds = {
        "dense": Net("narrow", "none", "params", 1.0),
        "mask ntk 10 %": Net("mask", "ntk", "params", 0.1),
        "narrow ntk 25 % of MACs": Net("narrow", "ntk", "macs", 0.25),
        "narrow uniform 25 % of MACs": Net("narrow", "uniform", "macs", 0.25),
    }
    with tempfile.TemporaryDirectory() as root:
        for name, net in kinds.items():
            folder = Path(root) / name.replace(" ", "_").replace("%", "")
            make_bundle(net, task, data, 0, folder)
            size = sum(p.stat().st_size for p in folder.iterdir() if p.suffix in (".onnx", ".f32"))
            rows.append({"name": name, "bytes": size, **_fresh("ort", str(folder), arguments.batch)})
    rows.append({"name": "torch backprop, dense", "bytes": 0, **_fresh("torch", "", arguments.batch)})
    for entry in rows:
        print(
            f"{entry['name']:28} {entry['bytes']:9,} B  {1e3 * entry['seconds']:7.2f} ms  "
            f"peak {entry['peak_mib']:6.1f} MiB, beyond imports {entry['beyond_mib']:6.1f}"
        )
    return {"task": "forward", "batch": arguments.batch, "rows": rows}


def _fresh(kind: str, folder: str, batch: int) -> dict[str, float]:
    """Run a measurement in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "measure", kind, folder, str(batch)],
        cwd=_ROOT,
        env={"PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    return {k: float(v) for k, v in json.loads(done.stdout).items()}


def measure(kind: str, folder: str, batch: int) -> dict[str, float]:
    """Return seconds of the best step, peak memory and what of it came after the imports, here and now."""
    from profiles.memory import current_rss_mib, peak_rss_mib

    rng = np.random.default_rng(0)
    x = rng.standard_normal((batch, 3, 32, 32)).astype(np.float32)
    y = rng.integers(0, 10, batch)
    if kind == "ort":
        imports = current_rss_mib()
        bundle = read_bundle(Path(folder))
        replica = bundle.replica()
        forward = Forward(bundle, replica.weights)
        step = lambda: forward.loss(x, y)
    else:
        import torch

        from pruning.models import build_model

        torch.set_num_threads(1)
        imports = current_rss_mib()
        net = build_model("resnet20", sample_shape=(3, 32, 32), classes=10).train()
        optimizer = torch.optim.SGD(net.parameters(), 0.01)
        inputs, labels = torch.from_numpy(x), torch.from_numpy(y)

        def step() -> float:
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(net(inputs), labels)
            loss.backward()
            optimizer.step()
            return float(loss.detach())

    times = []
    for _ in range(15):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return {"seconds": min(times), "peak_mib": peak_rss_mib(), "beyond_mib": peak_rss_mib() - imports}


def _cost(graph: bytes) -> Mapping[str, int]:
    return graph_cost(graph).as_dict()


def main(words: Sequence[str] | None = None) -> int:
    """Run what the command line says."""
    # This file has the name of the package that it measures: its own folder must not be searched first.
    sys.path[:] = [str(_ROOT), *(p for p in sys.path if Path(p).resolve() != _ROOT / "benchmarks")]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train")
    training.add_argument("task", choices=TASKS)
    training.add_argument("--data", type=Path)
    training.add_argument("--seeds", type=int, default=3)
    training.add_argument("--fractions", type=float, nargs="+", default=[0.5, 0.25, 0.1])
    training.add_argument("--units", nargs="+", default=["params"], choices=["params", "macs"])
    training.add_argument("--only", nargs="+", help="Names of rows, such as 'narrow ntk'.")
    training.add_argument("--no-masks", action="store_true")
    forwards = commands.add_parser("forward")
    forwards.add_argument("--batch", type=int, default=32)
    for command in (training, forwards):
        command.add_argument("--out", type=Path)
    one = commands.add_parser("measure")
    one.add_argument("kind", choices=["ort", "torch"])
    one.add_argument("folder")
    one.add_argument("batch", type=int)
    arguments = parser.parse_args(words)
    if arguments.command == "measure":
        print(json.dumps(measure(arguments.kind, arguments.folder, arguments.batch)))
        return 0
    found = run_training(arguments) if arguments.command == "train" else run_forward(arguments)
    found["machine"] = f"{platform.machine()}, {platform.system()}, Python {platform.python_version()}"
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
