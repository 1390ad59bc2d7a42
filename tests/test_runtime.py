"""Tests of what ONNX Runtime tells others: nothing, and it leaves no mark of the device."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A model with one MatMul, as profiles/selftest.py has it, opened and run.
SCRIPT = """
import sys
from profiles.selftest import measure
measure(seconds=0.02, threads=1)
print(",".join(sorted(name for name in sys.modules if name == "onnxruntime")))
"""


def files_of_a_session(home, **environment):
    """Return the files that a process leaves in its home after it has run a session."""
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "LD_LIBRARY_PATH")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=ROOT,
        env={**kept, "HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "onnxruntime"
    return [path.name for path in home.rglob("*") if path.is_file()]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it keeps its records elsewhere")
def test_a_session_leaves_no_records_for_its_vendor(tmp_path):
    """No database of telemetry and no identifier of the device appear, even where a user allowed them."""
    assert files_of_a_session(tmp_path, ORT_DISABLE_TELEMETRY="0") == []
