"""A measurement in a process of its own: how it is started, and how it says what it found.

The child prints one JSON object on its last line. Knows no measurement.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from profiles.errors import BenchError

__all__ = ["measure_apart", "tell"]


def tell(found: Mapping[str, Any]) -> None:
    """Say what a measurement found, in the child."""
    print(json.dumps(dict(found)), flush=True)


def measure_apart(module: str, *arguments: str, limit_s: float) -> dict[str, Any]:
    """Run ``python -m module arguments`` on one thread and return what it told.

    Raises:
        BenchError: It failed, took too long, or told nothing.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path) or "."
    what = " ".join([module.rsplit(".", 1)[-1], *arguments[:2]])
    try:
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            env=environment,
            capture_output=True,
            text=True,
            timeout=limit_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise BenchError(
            f"the measurement `{what}` did not end within {limit_s:g} s",
            hint="Measure fewer nets with --model, or give it longer with --limit-s.",
        ) from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        missing = last.startswith("ModuleNotFoundError")
        raise BenchError(
            f"the measurement `{what}` failed: {last}",
            hint="Install what builds the nets: pip install 'scalarfed[prune]'."
            if missing
            else BenchError.hint,
        )
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found
