"""Tests of what pruning saves on the machine: bytes, CPU time and memory, each in a fresh process."""

import json
import math
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.forward import measure_fresh, write_batch
from benchmarks.memory_prediction import find_block
from benchmarks.memory_prediction import measure as train_fresh
from edge_agent.native.kernel import find_kernel
from profiles.cost import graph_cost
from pruning.fit import MemoryBudget, fit_memory
from pruning.models import model_structure
from pruning.plan import Allowance
from pruning.prune import Pruned, prune_model, write_pruned

ROOT = Path(__file__).parent.parent
SHAPE = (3, 32, 32)
MEASURE = """
import json, sys, time
from pathlib import Path
import numpy as np
from edge_agent.bundle import read_bundle
from edge_agent.forward import Forward
from profiles.memory import current_rss_mib, peak_rss_mib
bundle = read_bundle(Path(sys.argv[1]))
weights = bundle.replica().weights
forward = Forward(bundle, weights)
x = np.random.default_rng(0).standard_normal((32, 3, 32, 32)).astype(np.float32)
y = np.arange(32) % 10
before = current_rss_mib()
Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
times = []
for _ in range(12):
    start = time.process_time()
    forward.loss(x, y)
    times.append(time.process_time() - start)
print(json.dumps({"seconds": min(times), "mib": peak_rss_mib() - before + weights.nbytes / 2**20}))
"""


def measure(folder, kernel="numpy"):
    """Return CPU seconds of the best of twelve forwards, and the memory beyond the imports, in MiB."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "SCALARFED_KERNEL": kernel},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def bytes_of(folder):
    """Return what the graph and the weights take on disk."""
    return sum((folder / name).stat().st_size for name in ("graph.onnx", "weights.f32"))


def cost(graph):
    """Return what the manifest keeps."""
    return graph_cost(graph).as_dict()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return the bundles of a ResNet-20: dense, with 90 % zeros, and narrow at a quarter of its MACs."""
    root = tmp_path_factory.mktemp("bundles")
    options = {"sample_shape": SHAPE, "classes": 10}
    dense = prune_model("resnet20", **options, method="none")
    quarter = Allowance("macs", 0.25 * dense.macs_dense)
    narrow = prune_model("resnet20", **options, method="uniform", allowance=quarter)
    zeroed = Pruned(**vars(prune_model("resnet20", **options, method="none")))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in zeroed.module.parameters():
            if parameter.dim() > 1:
                parameter *= torch.rand(parameter.shape, generator=generator) < 0.1
    nets = {"dense": dense, "zeroed": zeroed, "narrow": narrow}
    for name, net in nets.items():
        write_pruned(net, root / name, cost=cost)
    return {name: root / name for name in nets}


def test_a_narrow_net_is_smaller_faster_and_lighter(folders):
    """At a quarter of the MACs: under a third of the bytes, under 0.7 of the time, 1.5 MiB less memory."""
    dense, narrow = (measure(folders[name]) for name in ("dense", "narrow"))
    assert bytes_of(folders["narrow"]) < bytes_of(folders["dense"]) / 3
    assert narrow["seconds"] < 0.7 * dense["seconds"]
    assert narrow["mib"] < dense["mib"] - 1.5


@pytest.mark.skipif(find_kernel() is None, reason="needs the compiled kernel")
def test_a_narrow_net_is_faster_with_the_kernel_and_no_heavier(folders):
    """Under 0.7 of the CPU time; no memory is saved, since blocks of 16 channels pad narrow layers."""
    dense, narrow = (measure(folders[name], "native") for name in ("dense", "narrow"))
    assert narrow["seconds"] < 0.7 * dense["seconds"]
    assert narrow["mib"] < dense["mib"] + 2


def test_a_narrow_forward_against_torchs_backpropagation(folders, tmp_path):
    """At a quarter of the MACs: 3 times less CPU time, 8.5 times less peak memory, imports on both sides."""
    write_batch(tmp_path, 32)
    ours, torchs = (measure_fresh(tmp_path, folder) for folder in (folders["narrow"], None))
    assert torchs["seconds"] > 3 * ours["seconds"]
    assert torchs["peak_mib"] > 8.5 * ours["peak_mib"]


def test_zeros_save_nothing(folders):
    """The negative control: with 90 % zeros, bytes, CPU time and memory are the dense net's within 20 %."""
    zeros = np.fromfile(folders["zeroed"] / "weights.f32", "<f4") == 0
    assert zeros.mean() > 0.85
    dense, zeroed = (measure(folders[name]) for name in ("dense", "zeroed"))
    assert bytes_of(folders["zeroed"]) == bytes_of(folders["dense"])
    assert zeroed["seconds"] == pytest.approx(dense["seconds"], rel=0.2)
    assert zeroed["mib"] == pytest.approx(dense["mib"], rel=0.2)


@pytest.mark.parametrize("kernel", ["numpy", "native"])
@pytest.mark.parametrize(
    ("model", "shape", "batch", "hidden"),
    [
        ("lenet", (1, 28, 28), 256, None),
        ("resnet20", SHAPE, 64, None),
        ("mlp", (784,), 64, (3072, 2048)),
        pytest.param("wrn10_2", SHAPE, 500, None, marks=pytest.mark.slow),
    ],
    ids=["lenet", "resnet20", "mlp", "wrn10_2"],
)
def test_a_fitted_net_needs_the_memory_that_was_allowed(model, shape, batch, hidden, kernel, tmp_path):
    """A process that trains a net fitted between narrowest and dense peaks at .95 to 1.02 of the budget."""
    if kernel == "native" and find_kernel() is None:
        pytest.skip("needs the compiled kernel")
    options = {"sample_shape": shape, "classes": 10, "hidden": hidden}
    board = {
        "batch_size": batch,
        "data_bytes": batch * (math.prod(shape) + 8),
        "arch": platform.machine(),
        "kernel": kernel == "native",
        "image_block": find_block() or None,
    }
    structure = model_structure(model, **options)
    predict = fit_memory(MemoryBudget(1e3, **board), model, **options).spend
    allowed = (predict(structure.narrowest) + predict(structure.dense)) / 2
    allowance = fit_memory(MemoryBudget(allowed, **board), model, **options)
    write_pruned(prune_model(model, **options, method="uniform", allowance=allowance), tmp_path, cost=cost)
    measured = train_fresh(tmp_path, batch, kernel=kernel, threads=1, dtype="uint8")["peak"]

    assert 0.95 * allowed <= measured <= 1.02 * allowed
