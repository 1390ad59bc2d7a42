"""The kernel of this processor, and one for aarch64 under emulation, replay to numpy's digests."""

import functools
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from edge_agent import digest
from edge_agent.grid import Segment
from edge_agent.native.build import SOURCES, build
from edge_agent.plan import RoundPlan
from edge_agent.replay import Replica, apply_record
from edge_agent.wire import RoundRecord

PROGRAM = Path(__file__).with_name("native_bits.c")
SIZE, STEPS, PERTURBATIONS = 9008, 2, 5
SEGMENTS = [Segment(0, 1008, 2), Segment(1008, 8208, 4), Segment(8208, SIZE, 7)]
ROOT = Path("/usr/aarch64-linux-gnu")


@functools.cache
def numpy_sums(rounds: int, curved: bool) -> tuple[int, int]:
    """Return the digest sums of weights and curvature after the log of native_bits.c."""
    replica = Replica(np.zeros(SIZE, np.float32), SEGMENTS)
    constants = (0.05, 1e-4, 0.0) if curved else (0.0,)
    for r in range(rounds):
        plan = RoundPlan(r, 7, 2 if curved else 1, STEPS, PERTURBATIONS, 1e-3, 0.25, constants)
        wholes = [
            [
                16256 if p == r % PERTURBATIONS else (r * 3001 + k * 977 + p * 7919) % 32513 - 16256
                for p in range(PERTURBATIONS)
            ]
            for k in range(STEPS)
        ]
        scalars = (np.array(wholes) / 4096).astype(np.float32)
        apply_record(replica, RoundRecord(plan, 0, False, scalars, 0), check=False)
    curvature = np.full(SIZE, 0x3F80, np.uint16) if replica.curvature is None else replica.curvature
    return digest.fold(replica.weights.view(np.uint32)), digest.fold(curvature.view(np.uint32))


def run_program(
    folder: Path, rounds: int, *, compiler: Sequence[str], machine: str, emulator: Sequence[str]
) -> str:
    """Compile the kernel and the program, run it, and return what it prints."""
    library, program = folder / "libscalarfed.so", folder / "native_bits"
    build(library, compiler=compiler, machine=machine)
    link = [f"-I{SOURCES}", str(PROGRAM), str(library), "-Wl,-rpath,$ORIGIN", "-o", str(program)]
    subprocess.run([*compiler, *link], check=True, capture_output=True)
    return subprocess.run(
        [*emulator, program, str(rounds)], check=True, capture_output=True, text=True
    ).stdout


def check_against_numpy(printed: str, rounds: int, names: set[str]) -> None:
    """Check that every path printed numpy's digests and that the expected paths ran."""
    lines = [line.split() for line in printed.splitlines()]

    assert names <= {name for name, *_ in lines}
    for name, curved, weights, curvature in lines:
        assert (name, int(weights, 16), int(curvature, 16)) == (name, *numpy_sums(rounds, curved == "1"))


@pytest.fixture(autouse=True)
def _numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package computes the reference with numpy."""
    monkeypatch.setenv("SCALARFED_KERNEL", "numpy")


@pytest.mark.skipif(shutil.which("cc") is None or sys.platform != "linux", reason="needs cc on Linux")
def test_every_path_of_this_processor_has_numpys_digest(tmp_path: Path):
    """30 records of two steps, with and without curvature, undone perturbations between."""
    printed = run_program(tmp_path, 30, compiler=["cc"], machine="", emulator=[])

    check_against_numpy(printed, 30, {"scalar"})


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("cc") is None or sys.platform != "linux", reason="needs cc on Linux")
def test_a_thousand_records_have_numpys_digest_on_every_path(tmp_path: Path):
    """1000 records end in the same bits on every path of this processor and with numpy."""
    printed = run_program(tmp_path, 1000, compiler=["cc"], machine="", emulator=[])

    check_against_numpy(printed, 1000, {"scalar"})


AARCH64_COMPILERS = {
    "gcc": (["aarch64-linux-gnu-gcc"], shutil.which("aarch64-linux-gnu-gcc") is not None),
    "zig": (
        [sys.executable, "-m", "ziglang", "cc", "-target", "aarch64-linux-gnu.2.17"],
        importlib.util.find_spec("ziglang") is not None,
    ),
}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", AARCH64_COMPILERS)
def test_an_emulated_aarch64_has_numpys_digest(tmp_path: Path, name: str):
    """1000 records end in the same bits on an aarch64 with NEON and byte products, by either compiler."""
    compiler, present = AARCH64_COMPILERS[name]
    if not present or shutil.which("qemu-aarch64") is None or not ROOT.exists():
        pytest.skip(f"needs {name} for aarch64, qemu-user and the aarch64 C library")
    emulator = ["qemu-aarch64", "-cpu", "max,pauth-impdef=on", "-L", str(ROOT)]
    printed = run_program(tmp_path, 1000, compiler=compiler, machine="aarch64", emulator=emulator)

    check_against_numpy(printed, 1000, {"scalar", "neon", "dotprod"})
