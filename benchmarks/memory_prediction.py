"""How near the predicted peak memory of an agent comes to the measured one, net by net and batch by batch.

    python -m benchmarks.memory_prediction --out benchmarks/results/memory-prediction.json

Every row is a fresh process that does what an agent does: imports, samples, bundle, session, three rounds of
two perturbations, each on a batch of its own, and their replay. Its peak is the system's own count of
resident memory; a second count, begun after the session was opened, shows what passes and batches take.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent
_KERNELS = ("numpy", "avx2", "native")
NETS: Mapping[str, tuple[tuple[int, ...], str]] = {
    "lenet": ((1, 28, 28), "uint8"),
    "resnet20": ((3, 32, 32), "uint8"),
    "mlp": ((784,), "float32"),
    "separable": ((3, 32, 32), "uint8"),
    "pools": ((3, 32, 32), "uint8"),
    "transformer": ((512,), "float32"),
}
"""Shape of a sample, and the type in which a board holds it."""


def build(name: str) -> Any:
    """Return a net that nothing else is fitted to, or one of the reference nets."""
    from torch import nn

    from pruning.models import build_model

    shape = NETS[name][0]
    if name in ("lenet", "resnet20"):
        return build_model(name, sample_shape=shape, classes=10)
    if name == "mlp":
        return build_model(name, sample_shape=shape, classes=10, hidden=(512, 256))
    if name == "pools":  # no norms; channels of whole blocks, of half blocks, and of neither
        return nn.Sequential(
            *(nn.Conv2d(3, 24, 5, 1, 2), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(24, 48, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(48, 20, 3, 1, 1), nn.ReLU(), nn.AvgPool2d(2)),
            *(nn.Flatten(), nn.Linear(320, 100), nn.ReLU(), nn.Linear(100, 10)),
        )
    if name == "separable":

        def separable(inside: int, outside: int, stride: int) -> list[nn.Module]:
            each = nn.Conv2d(inside, inside, 3, stride, 1, groups=inside, bias=False)
            joined = nn.Conv2d(inside, outside, 1, bias=False)
            norms = nn.BatchNorm2d(inside), nn.BatchNorm2d(outside)
            return [each, norms[0], nn.ReLU6(), joined, norms[1], nn.ReLU6()]

        return nn.Sequential(
            *(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6()),
            *separable(16, 32, 1),
            *separable(32, 64, 2),
            *separable(64, 64, 1),
            *separable(64, 128, 2),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10)),
        )
    return _transformer()


def _transformer() -> Any:
    import torch
    from torch import nn
    from torch.nn import functional

    class Layer(nn.Module):
        def __init__(self, width: int, heads: int, inner: int) -> None:
            super().__init__()
            self.heads = heads
            self.q, self.v, self.out = (nn.Linear(width, width) for _ in range(3))
            self.k = nn.Linear(width, width, bias=False)
            self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)
            self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            n, tokens, width = x.shape
            inside = self.norm1(x)
            q, k, v = (
                f(inside).view(n, tokens, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v)
            )
            mixed = (q @ k.transpose(-1, -2) / (width // self.heads) ** 0.5).softmax(-1) @ v
            x = x + self.out(mixed.transpose(1, 2).reshape(n, tokens, width))
            return x + self.down(functional.gelu(self.up(self.norm2(x))))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(16, 128)
            self.layers = nn.Sequential(Layer(128, 4, 512), Layer(128, 4, 512))
            self.head = nn.Linear(128, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.layers(self.first(x.view(-1, 32, 16))).mean(1))

    return Net()


def write(root: Path, names: Sequence[str]) -> dict[str, Path]:
    """Write the nets' bundles, and return their folders by name."""
    import torch

    from profiles.cost import graph_cost
    from pruning.export import export_bundle

    folders = {}
    for name in names:
        torch.manual_seed(0)
        folders[name] = root / name
        export_bundle(
            build(name),
            folders[name],
            model=name,
            sample_shape=NETS[name][0],
            classes=10,
            pruning={},
            cost=lambda graph: graph_cost(graph).as_dict(),
        )
    return folders


def measure(folder: Path, batch: int, *, kernel: str, threads: int, dtype: str) -> dict[str, Any]:
    """Return what an agent's process measures of itself, in MiB."""
    words = ["-m", "benchmarks.memory_prediction", "--work", str(folder), str(batch), str(threads), dtype]
    environment = {**os.environ, "PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": "1"}
    environment["SCALARFED_KERNEL"] = kernel
    done = subprocess.run(
        [sys.executable, *words], cwd=_ROOT, env=environment, capture_output=True, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def work(folder: Path, batch: int, threads: int, dtype: str) -> dict[str, Any]:
    """Train in this process, and return its peak, what it held before the first pass, and the peak since."""
    import numpy as np

    import edge_agent.__main__  # noqa: F401 - what an agent holds
    from edge_agent.bundle import read_bundle
    from edge_agent.cohort import Cohort
    from edge_agent.data import Samples
    from edge_agent.footprint import give_back
    from edge_agent.measure import forward_for, measure
    from edge_agent.native.kernel import find_kernel
    from edge_agent.optimizer import METHODS
    from edge_agent.plan import RoundPlan
    from edge_agent.replay import apply_record
    from edge_agent.wire import RoundOpen, RoundRecord
    from profiles.memory import current_rss_mib, peak_rss_mib

    give_back()
    bundle = read_bundle(folder)
    x = np.ones((batch, *bundle.sample_shape), dtype)
    samples = Samples(x, np.zeros(batch, np.int64))
    replica = bundle.replica()
    method = METHODS["decomfl"]

    def plan_of(number: int) -> RoundPlan:
        return RoundPlan(number, 1, method.code, 1, 2, 1e-3, 1e-3, method.values({"smoothing": 0.9}))

    forward = forward_for(bundle, replica, plan_of(0), threads=threads)
    opened_mib, started_mib = current_rss_mib(), peak_rss_mib()
    Path("/proc/self/clear_refs").write_text("5")  # the system counts its peak anew
    for number in range(3):
        plan = plan_of(number)
        opened = RoundOpen(plan, 0, 0, batch, True, False, 10_000, Cohort())
        found = measure(forward, samples, replica, opened, 0)
        apply_record(replica, RoundRecord(plan, 0, False, found.scalars, 0), check=False)
    kernel = find_kernel()
    return {
        "peak": max(started_mib, peak_rss_mib()),
        "started": started_mib,
        "opened": opened_mib,
        "passes": peak_rss_mib() - opened_mib,
        "variant": getattr(forward, "variant", ""),
        "block": 0 if kernel is None else kernel.image_block,
        "data_bytes": x.nbytes + samples.y.nbytes,
    }


def predict(folder: Path, batch: int, *, kernel: bool, block: int, threads: int, data_bytes: int) -> Any:
    """Return the prediction for a board whose processor is known."""
    from edge_agent.bundle import read_bundle
    from profiles.budget import predict_peak_mib
    from profiles.cost import Cost
    from profiles.passes import runnable_passes

    bundle = read_bundle(folder)
    return predict_peak_mib(
        Cost.from_dict(bundle.cost, params=bundle.params),
        batch_size=batch,
        passes=runnable_passes(
            bundle.passes, arch=platform.machine(), kernel=kernel, image_block=block or None
        ),
        threads=threads,
        data_bytes=data_bytes,
        graph_bytes=bundle.graph_path.stat().st_size,
    )


def compare(
    names: Sequence[str],
    batches: Sequence[int],
    *,
    kernels: Sequence[str],
    threads: Sequence[int],
    on_row: Callable[[dict[str, Any]], None],
) -> list[dict[str, Any]]:
    """Return a row for every net, batch, kernel and number of threads."""
    rows = []
    block = find_block()
    with tempfile.TemporaryDirectory() as root:
        for name, folder in write(Path(root), names).items():
            for batch in batches:
                for kernel in kernels:
                    for count in threads:
                        rows.append(_row(name, folder, batch, kernel, count, block))
                        on_row(rows[-1])
    return rows


def find_block() -> int:
    """Return the channels that this machine's processor lays out side by side."""
    from edge_agent.native.kernel import kernels

    return max((kernel.image_block for kernel in kernels().values()), default=0)


def _row(name: str, folder: Path, batch: int, kernel: str, threads: int, block: int) -> dict[str, Any]:
    measured = measure(folder, batch, kernel=kernel, threads=threads, dtype=NETS[name][1])
    known = {"threads": threads, "data_bytes": measured["data_bytes"]}
    predicted = predict(folder, batch, kernel=kernel != "numpy", block=block, **known)
    return {
        "net": name,
        "batch": batch,
        "kernel": kernel,
        "threads": threads,
        "variant": measured["variant"] or "plain",
        "predicted_mib": round(predicted.total_mib, 2),
        "measured_mib": round(measured["peak"], 2),
        "ratio": round(predicted.total_mib / measured["peak"], 3),
        "passes_predicted_mib": round(predicted.activations + predicted.batch, 2),
        "passes_measured_mib": round(measured["passes"], 2),
        "started_mib": round(measured["started"], 2),
        "opened_mib": round(measured["opened"], 2),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print a table, or do one process's work."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=list(NETS))
    parser.add_argument("--batches", nargs="+", type=int, default=[8, 32, 48, 64, 256, 1000])
    parser.add_argument("--kernels", nargs="+", default=["numpy", "native"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", nargs=4, metavar=("FOLDER", "BATCH", "THREADS", "DTYPE"))
    options = parser.parse_args(arguments)
    if options.work:
        folder, batch, threads, dtype = options.work
        print(json.dumps(work(Path(folder), int(batch), int(threads), dtype)))
        return 0
    head = ("net", "batch", "kernel", "threads", "variant", "predicted_mib", "measured_mib", "ratio")
    more = ("passes_predicted_mib", "passes_measured_mib", "started_mib", "opened_mib")
    print("| " + " | ".join((*head, *more)) + " |")

    def show(row: dict[str, Any]) -> None:
        print("| " + " | ".join(str(row[key]) for key in (*head, *more)) + " |", flush=True)

    rows = compare(
        options.nets, options.batches, kernels=options.kernels, threads=options.threads, on_row=show
    )
    worst = max(rows, key=lambda row: abs(row["ratio"] - 1))
    print(f"worst: {worst['net']} at {worst['batch']}, {worst['variant']}: {worst['ratio']:.3f}")
    if options.out:
        machine = {"processor": platform.machine(), "python": platform.python_version()}
        options.out.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
