"""Tests of what the agent gives back after its start: less memory, and nothing lost."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from edge_agent.footprint import _code

ROOT = Path(__file__).parent.parent
linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells which pages are clean")

GIVE_BACK = """
import hashlib, json
from pathlib import Path
import numpy as np, onnxruntime
from edge_agent.footprint import give_back
from profiles.memory import current_rss_mib

def relocated():
    # What the loader or the program changed lies in no file: all of it must still be there.
    text = Path("/proc/self/smaps_rollup").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("Anonymous:"))

square = np.full((64, 64), 0.5, np.float32)
before, kept = current_rss_mib(), relocated()
product = (square @ square).tobytes()
give_back()
after, still = current_rss_mib(), relocated()
same = (square @ square).tobytes() == product and hashlib.sha256(b"abc").hexdigest()[:8] == "ba7816bf"
print(json.dumps([before, after, kept, still, same]))
"""

# Reads all code of ONNX Runtime once, in a call that leaves Python: tens of milliseconds.
GIVING_BACK = """
import contextlib, ctypes, hashlib, json, sys
from pathlib import Path
import onnxruntime
from edge_agent.footprint import give_back, giving_back
from profiles.memory import current_rss_mib, peak_rss_mib
spans = [line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines()
         if "onnxruntime_pybind11_state" in line and " r-xp " in line]
start, stop = max(((int(a, 16), int(b, 16)) for a, b in spans), key=lambda span: span[1] - span[0])
code = (ctypes.c_char * (stop - start)).from_address(start)
give_back()
Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
before = current_rss_mib()
with giving_back() if sys.argv[1] == "giving" else contextlib.nullcontext():
    for _ in range(3):
        hashlib.sha512(code).digest()
print(json.dumps([len(code) / 2**20, peak_rss_mib() - before]))
"""


def run(script, *words):
    """Return what a script prints, run in a process of its own."""
    command = [sys.executable, "-c", script, *words]
    return json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)


@linux
def test_the_code_of_the_start_is_given_back_and_nothing_else():
    """At least 10 MiB of the imports' pages go, what is in no file stays, and the libraries still work."""
    before, after, kept, still, same = run(GIVE_BACK)
    assert after < before - 10
    assert still > kept - 2048  # KiB; the allocator may give back what it holds unused
    assert same


@linux
def test_code_that_is_read_once_makes_no_peak():
    """Reading all code of ONNX Runtime makes most of it resident; giving back meanwhile, not half of that."""
    size, plain = run(GIVING_BACK, "plain")
    _, giving = run(GIVING_BACK, "giving")
    assert plain > 0.8 * size
    assert giving < 0.5 * plain


@linux
def test_an_agent_starts_small():
    """The imports of the agent never hold more than 48 MiB at once, where they take 59 in the plain way."""
    script = (
        "import json, ssl, edge_agent.__main__; from profiles.memory import peak_rss_mib as p; print(p())"
    )
    assert run(script) < 48


def test_an_emulators_smaps_are_not_believed(tmp_path, monkeypatch):
    """Where smaps say that nothing is resident, nothing is dropped: qemu says so of written pages too."""
    mapping = (
        "7f00-7f10 r--p 0 08:01 1 /lib/a.so\nRss: {kib} kB\nAnonymous: 0 kB\nSwap: 0 kB\nVmFlags: rd mr\n"
    )
    monkeypatch.setattr("edge_agent.footprint._SMAPS", tmp_path / "smaps")
    for kib, expected in ((0, []), (4, [(0x7F00, 0x7F10), (0x7F00, 0x7F10)])):
        (tmp_path / "smaps").write_text(mapping.format(kib=0) + mapping.format(kib=kib), encoding="utf-8")
        assert _code(resident=False) == expected
