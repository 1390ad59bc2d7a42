"""What pruning saves on the machine: bytes, time and memory of a forward, against torch's backpropagation.

    python -m benchmarks.forward --out benchmarks/results/pruning-forward.json

Every figure is taken in a fresh process, by turns, the median of several. Ours opens a bundle as an agent
does: ONNX Runtime, the weights as inputs, pages of code given back during its start, the batch in pieces.
The peer trains the dense net with torch: forward, backpropagation, SGD. Imports count on both sides, neither
imports what it does not need, and both read the same batch from a file.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

_ROOT = Path(__file__).resolve().parent.parent
_SHAPE = (3, 32, 32)
_CLASSES = 10
_TORCH = "torch backprop, dense"


def write_bundles(root: Path) -> dict[str, Path]:
    """Write the nets that are compared, and return their folders by name."""
    from profiles.cost import graph_cost
    from pruning.masked import mask_model, write_masked
    from pruning.prune import Allowance, prune_model, write_pruned

    def cost(graph: bytes) -> dict[str, int]:
        return graph_cost(graph).as_dict()

    dense = prune_model("resnet20", sample_shape=_SHAPE, classes=_CLASSES, method="none")
    quarter = Allowance("macs", 0.25 * dense.macs_dense)
    nets = {"dense": dense}
    for method in ("uniform", "ntk"):
        nets[f"a quarter of the MACs, {method}"] = prune_model(
            "resnet20", sample_shape=_SHAPE, classes=_CLASSES, method=method, allowance=quarter, draws=3
        )
    folders = {}
    for number, (name, net) in enumerate(nets.items()):
        folders[name] = root / str(number)
        write_pruned(net, folders[name], cost=cost)
    masked = mask_model("resnet20", sample_shape=_SHAPE, classes=_CLASSES, method="ntk", density=0.1, draws=3)
    folders["mask of 10 %, ntk"] = root / "mask"
    write_masked(masked, root / "mask", cost=cost)
    return folders


def compare(batch: int, repeats: int) -> list[dict[str, Any]]:
    """Return a row per net: bytes of its files, seconds of the best pass, and peak memory."""
    with tempfile.TemporaryDirectory() as text:
        root = Path(text)
        folders = write_bundles(root)
        write_batch(root, batch)
        found: dict[str, list[dict[str, float]]] = {name: [] for name in (*folders, _TORCH)}
        for _ in range(repeats):
            for name, runs in found.items():
                runs.append(measure_fresh(root, folders.get(name)))
        rows = []
        for name, runs in found.items():
            files = folders[name].iterdir() if name in folders else ()
            size = sum(f.stat().st_size for f in files if f.name in ("graph.onnx", "weights.f32"))
            middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
            rows.append({"name": name, "bytes": size, **middle})
        return rows


def write_batch(root: Path, size: int) -> None:
    """Write the samples of a pass, for both sides."""
    draw = np.random.default_rng(0)
    np.save(root / "x.npy", draw.standard_normal((size, *_SHAPE)).astype(np.float32))
    np.save(root / "y.npy", draw.integers(0, _CLASSES, size))


def measure_fresh(root: Path, bundle: Path | None) -> dict[str, float]:
    """Measure in a process of its own: a bundle, or torch where there is none."""
    words = [sys.executable, "-m", "benchmarks.forward_process", str(root), str(bundle or "")]
    environment = {"PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin"}
    done = subprocess.run(words, cwd=_ROOT, env=environment, capture_output=True, text=True, check=True)
    return {key: float(value) for key, value in json.loads(done.stdout).items()}


def main(words: Sequence[str] | None = None) -> int:
    """Run what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(words)
    rows = compare(arguments.batch, arguments.repeats)
    peer = rows[-1]
    print("| | bytes | ms | times less | peak, MiB | of the imports | times less |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['name']} | {row['bytes']:,} | {1e3 * row['seconds']:.1f} "
            f"| {peer['seconds'] / row['seconds']:.1f} | {row['peak_mib']:.1f} "
            f"| {row['peak_imports_mib']:.1f} | {peer['peak_mib'] / row['peak_mib']:.1f} |"
        )
    if arguments.out:
        machine = f"{platform.machine()}, {platform.system()}, Python {platform.python_version()}"
        found = {"task": "forward", "batch": arguments.batch, "machine": machine, "rows": rows}
        arguments.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
