"""The process that :mod:`benchmarks.forward` measures: its imports are as few as the work needs.

    python -m benchmarks.forward_process FOLDER_OF_THE_BATCH [BUNDLE]

Without a bundle, torch trains the dense net.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

_PASSES = 15


def measure(root: Path, bundle: str) -> dict[str, float]:
    """Return CPU seconds of the best pass and peaks of resident memory, here and now."""
    from profiles.memory import peak_rss_mib

    step, imported = _torch_step(root) if not bundle else _our_step(root, Path(bundle))
    opened = peak_rss_mib()
    times = []
    for _ in range(_PASSES):
        start = time.process_time()
        step()
        times.append(time.process_time() - start)
    return {
        "seconds": min(times),
        "peak_imports_mib": imported,
        "peak_opened_mib": opened,
        "peak_mib": peak_rss_mib(),
    }


def _our_step(root: Path, folder: Path) -> tuple[Callable[[], float], float]:
    from edge_agent.bundle import read_bundle
    from edge_agent.footprint import give_back
    from edge_agent.forward import Forward
    from profiles.memory import peak_rss_mib

    imported = peak_rss_mib()
    give_back()
    bundle = read_bundle(folder)
    x, y = (np.load(root / name) for name in ("x.npy", "y.npy"))
    forward = Forward(bundle, bundle.replica().weights)
    return lambda: forward.loss(x, y), imported


def _torch_step(root: Path) -> tuple[Callable[[], float], float]:
    import torch

    from profiles.memory import peak_rss_mib
    from pruning.models import build_model

    imported = peak_rss_mib()
    torch.set_num_threads(1)
    net = build_model("resnet20", sample_shape=(3, 32, 32), classes=10).train()
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    x, y = (torch.from_numpy(np.load(root / name)) for name in ("x.npy", "y.npy"))

    def step() -> float:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step, imported


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]), sys.argv[2])))
