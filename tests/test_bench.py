"""Tests of ``scalarfed bench``: the figures are there, and they are what they say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from coordinator.bench.child import measure_apart
from coordinator.bench.passes import medians
from profiles.errors import BenchError

ROOT = Path(__file__).parent.parent
linux = pytest.mark.skipif(sys.platform != "linux", reason="peaks are measured on Linux")


def bench(*words: str, **environment: str) -> dict:
    """Run a bench in a process of its own and return its JSON."""
    done = subprocess.run(
        [sys.executable, "-m", "coordinator.cli", "bench", *words, "--json"],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("kernel", ["", "numpy"])
def test_the_kernels_figures_are_ratios_of_its_own_times(kernel):
    """A perturbation and a replay of 16, over a pass; with the kernel and without it."""
    found = bench("kernel", "--weights", "1048576", "--seconds", "0.2", SCALARFED_KERNEL=kernel)
    assert found["perturb_over_memory_pass"] == pytest.approx(found["perturb_s"] / found["pass_s"], rel=0.02)
    assert found["replay16_over_memory_pass"] == pytest.approx(found["replay_s"] / found["pass_s"], rel=0.02)
    assert 0.2 < found["perturb_over_memory_pass"] < found["replay16_over_memory_pass"]
    assert (found["kernel"] == "numpy") == (kernel == "numpy")


@pytest.mark.slow
def test_a_step_is_dearer_than_its_forwards_and_cheaper_than_torchs():
    """The keys of an evaluation, with LeNet's figures in a plausible range on a machine at work."""
    found = bench("step", "--model", "lenet", "--seconds", "0.3")
    assert 0.9 < found["step_over_forwards"]["lenet"] < 2
    assert 0.3 < found["forward_over_constant"]["lenet"] < 3
    assert found["torch_cpu_over_own"]["lenet"] > 1
    assert found["detail"]["lenet"]["batch_size"] == 32


@linux
def test_an_agent_holds_no_more_than_inference():
    """LeNet's peak of training is at most 1.05 times that of ONNX Runtime that only infers."""
    found = bench("memory", "--model", "lenet")
    assert found["train_rss_over_inference"]["lenet"] <= 1.05
    assert 30 < found["train_peak_rss_mib"]["lenet"] < 75


def test_a_short_work_is_repeated_and_a_median_taken():
    """Each work has its turn as often as the others, and its time is that of one time."""
    ticks = iter(range(10**6))
    done: list[str] = []
    found = medians(
        {"a": lambda: done.append("a"), "b": lambda: done.append("b")},
        seconds=0,
        clock=lambda: float(next(ticks)),
        least=3,
    )
    assert found.keys() == {"a", "b"}
    assert all(0 < time_s <= 1 for time_s in found.values())
    assert done.count("a") > 4


def test_a_measurement_that_fails_is_told():
    """The last line of what went wrong, and a hint."""
    with pytest.raises(BenchError, match=r"nothing.*failed.*No module") as caught:
        measure_apart("coordinator.bench.nothing", limit_s=100)
    assert caught.value.hint


def test_a_bench_of_steps_without_torch_names_the_extra(tmp_path, monkeypatch):
    """Where torch is not installed, the error says what to install."""
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\")")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(BenchError, match="No module named 'torch'") as caught:
        measure_apart("coordinator.bench.steps", "lenet", "1", "0.1", limit_s=100)
    assert "scalarfed[prune]" in (caught.value.hint or "")
