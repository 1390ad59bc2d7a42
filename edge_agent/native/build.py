"""Compiles the kernel: each path from the same sources, by whatever GCC or Clang there is.

Run as ``python -m edge_agent.native.build`` to have it in a checkout; an install does the same and
goes on without a kernel where it fails. Knows compilers and flags, not what the kernel computes.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from edge_agent.native.library import library_name

__all__ = ["SOURCES", "build", "main"]

SOURCES = Path(__file__).parent
"""Where the sources lie, and the kernel of a checkout."""

_FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-fvisibility=hidden")
# Bits are the same everywhere only if nothing is fused; that no error is noticed lets loops vectorise.
_EXACT = ("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
_WARNINGS = ("-Wall", "-Wextra", "-Wno-missing-braces", "-Wno-unknown-pragmas", "-Wno-psabi")
_AVX512 = (*(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl")), "-mprefer-vector-width=512")
_AVX512_BYTES = (*_AVX512, *(f"-mavx512{part}" for part in ("vnni", "vbmi", "vbmi2", "bitalg")))

# Name of a path, numbers in a vector, whether it multiplies bytes, flags; the best path comes last.
_SCALAR = ("scalar", 1, 0, ("-fno-tree-vectorize", "-fno-tree-slp-vectorize"))
_PATHS: dict[str, tuple[tuple[str, int, int, tuple[str, ...]], ...]] = {
    "x86_64": (
        _SCALAR,
        ("sse2", 4, 0, ("-msse2",)),
        ("avx2", 8, 0, ("-mavx2",)),
        ("avx512", 16, 0, _AVX512),
        ("avx512vnni", 16, 1, _AVX512_BYTES),
    ),
    "aarch64": (_SCALAR, ("neon", 4, 0, ()), ("dotprod", 4, 1, ("-mcpu=generic+dotprod",))),
}
_ELSEWHERE = (_SCALAR, ("vector4", 4, 0, ()))
_ALIASES = {"amd64": "x86_64", "arm64": "aarch64"}


def build(target: Path, *, compiler: Sequence[str] = (), machine: str = "") -> None:
    """Compile and link the kernel.

    Args:
        target: The library to write.
        compiler: Command of a C compiler with its first arguments; otherwise $CC, cc, gcc or clang.
        machine: Processor that the compiler compiles for; this machine's where left out.

    Raises:
        OSError: There is no compiler.
        subprocess.CalledProcessError: It refused a source; its words are in ``stderr``.
    """
    command = [*(compiler or _compiler()), *_FLAGS, *_EXACT, *_WARNINGS]
    machine = (machine or platform.machine()).lower()
    with tempfile.TemporaryDirectory() as folder:
        objects = []
        for name, lanes, dot, flags in _PATHS.get(_ALIASES.get(machine, machine), _ELSEWHERE):
            objects.append(f"{folder}/{name}.o")
            defines = (f"-DPATH={name}", f"-DLANES={lanes}", f"-DDOT={dot}")
            _run([*command, *flags, *defines, "-c", str(SOURCES / "path.c"), "-o", objects[-1]])
        for name in ("kernel", "ops"):
            objects.append(f"{folder}/{name}.o")
            _run([*command, "-c", str(SOURCES / f"{name}.c"), "-o", objects[-1]])
        linked = Path(folder) / target.name
        _run([*command, "-shared", "-s", *objects, "-lm", "-o", str(linked)])
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{target.name}.{os.getpid()}")
        shutil.copyfile(linked, partial)
        os.replace(partial, target)  # a process may have the old one mapped


def _compiler() -> list[str]:
    if chosen := os.environ.get("CC"):
        return shlex.split(chosen)
    for name in ("cc", "gcc", "clang"):
        if found := shutil.which(name):
            return [found]
    raise FileNotFoundError("there is no C compiler: neither $CC nor cc, gcc or clang")


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def main() -> int:
    """Build the kernel beside its sources; return 0, or 1 where that fails."""
    target = SOURCES / library_name()
    try:
        build(target)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"no kernel: {getattr(error, 'stderr', '') or error}", file=sys.stderr)
        return 1
    print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
