"""A small storm over real processes; `make chaos` is the large one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from coordinator.broker import find_mosquitto

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
@pytest.mark.skipif(find_mosquitto() is None or os.name != "posix", reason="needs mosquitto and SIGKILL")
def test_no_round_is_lost_in_a_storm():
    """Every kind of fault twice in 50 rounds: one digest everywhere, that of the run without faults."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "benchmarks.chaos",
            *["--seed", "11", "--rounds", "50", "--faults", "16", "--limit-s", "240"],
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=290,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["digests"] == [result["fault_free_digest"]]
    assert (result["rounds_done"], result["rounds_lost"], result["faults"]) == (50, 0, 16)
    assert result["replicas"] == 8
