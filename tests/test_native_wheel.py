"""An install carries the compiled kernel, and goes through without one."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from edge_agent.native.library import library_name

ROOT = Path(__file__).parent.parent
MEMBER = f"edge_agent/native/{library_name()}"


def wheel(folder: Path, **environment: str) -> Path:
    """Build a wheel from a copy of the sources and return it."""
    source = folder / "source"
    ignored = shutil.ignore_patterns(".*", "runs", "build", "*.egg-info", "*.so", "__pycache__")
    shutil.copytree(ROOT, source, ignore=ignored)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-build-isolation",
        "--no-deps",
        "-w",
        str(folder),
        str(source),
    ]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | environment)
    return next(folder.glob("*.whl"))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs cc")
def test_a_wheel_carries_the_kernel_for_any_python(tmp_path: Path):
    """A wheel built where there is a compiler holds the library and is tagged py3-none-<platform>."""
    built = wheel(tmp_path)

    assert "-py3-none-" in built.name
    assert "-any" not in built.name
    assert MEMBER in zipfile.ZipFile(built).namelist()


@pytest.mark.slow
def test_a_failed_compilation_fails_no_install(tmp_path: Path):
    """Where the compiler fails, the wheel comes without the library."""
    built = wheel(tmp_path, CC="false")

    assert MEMBER not in zipfile.ZipFile(built).namelist()
    assert "edge_agent/native/kernel.py" in zipfile.ZipFile(built).namelist()


@pytest.mark.slow
def test_a_wheel_for_boards_insists_on_the_kernel(tmp_path: Path):
    """With SCALARFED_MACHINE a compiler that fails is an error: the wheel's name promises a kernel."""
    with pytest.raises(subprocess.CalledProcessError):
        wheel(tmp_path, CC="false", SCALARFED_MACHINE="aarch64")
