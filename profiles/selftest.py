"""Measures the machine it runs on, in about five seconds, so that estimates in its profile can go.

What a board does when it is installed, and ``scalarfed profile measure`` on demand. Needs numpy, onnxruntime
and psutil, which every agent has; they are imported when a measurement starts. Holds about 40 MiB meanwhile.
Knows nothing of what the figures are used for.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from profiles.device import FIGURES, Figure, Profile
from profiles.errors import ProfileError

__all__ = ["main", "measure", "profile_of_this_machine", "temperature_c", "with_measurements"]

_SOURCE = "scalarfed profile measure"
_SIDE = 768
_COPY_MIB = 16

# A model with one MatMul of two (n, n) float32 inputs a and b into c, opset 13, as an ONNX file has it.
# Written out, since an agent has no onnx package.
_VALUE = b"\n\x01%b\x12\x10\n\x0e\x08\x01\x12\n\n\x03\x12\x01n\n\x03\x12\x01n"
_NODE = b'\n\x11\n\x01a\n\x01b\x12\x01c"\x06MatMul\x12\x01m'
_VALUES = b"Z\x15%bZ\x15%bb\x15%b" % (_VALUE % b"a", _VALUE % b"b", _VALUE % b"c")
_MATMUL = b"\x08\x08:[" + _NODE + _VALUES + b"B\x04\n\x00\x10\r"


def measure(*, seconds: float = 5.0, threads: int | None = None, root: Path = Path("/")) -> dict[str, float]:
    """Return what this machine reaches, by the names of a profile's figures.

    ``fp32_gflops`` is the mean rate of a 768 x 768 matrix product in onnxruntime, ``bandwidth_gbs`` that of
    copying 16 MiB in numpy with one thread, bytes read and written both counted, ``ram_mib`` what the system
    sees, ``cores`` those that this process may use. ``clock_ghz`` and ``temperature_c`` (after the work) are
    there where the system tells them.

    Args:
        seconds: How long to measure, half of it for each rate, > 0.
        threads: Of the matrix product; all cores where left out.
        root: Where ``/sys`` lies.
    """
    import numpy as np
    import psutil

    from profiles.runtime import ort

    cores = _cores()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or cores
    options.log_severity_level = 3
    session = ort.InferenceSession(_MATMUL, options, providers=["CPUExecutionProvider"])
    square = np.full((_SIDE, _SIDE), 1e-3, np.float32)
    feed = {"a": square, "b": square}
    products = _rate(lambda: session.run(None, feed), seconds / 2)
    source = np.ones(_COPY_MIB * 2**20, np.uint8)
    target = np.empty_like(source)
    copies = _rate(lambda: np.copyto(target, source), seconds / 2)
    found: dict[str, float | None] = {
        "ram_mib": psutil.virtual_memory().total / 2**20,
        "cores": cores,
        "clock_ghz": _clock_ghz(root),
        "fp32_gflops": products * 2 * _SIDE**3 / 1e9,
        "bandwidth_gbs": copies * 2 * source.nbytes / 1e9,
        "temperature_c": temperature_c(root=root),
    }
    return {name: round(value, 3) for name, value in found.items() if value is not None}


def temperature_c(*, root: Path = Path("/")) -> float | None:
    """Return the processor's temperature in degrees Celsius, or None where the system does not tell.

    The first thermal zone that is called after a CPU, else the first of all.

    Args:
        root: Where ``/sys`` lies.
    """
    zones = sorted((root / "sys/class/thermal").glob("thermal_zone*"), key=lambda zone: int(zone.name[12:]))
    found: list[tuple[bool, float]] = []
    for zone in zones:
        try:
            reading = int((zone / "temp").read_text())
            kind = (zone / "type").read_text().lower()
        except (OSError, ValueError):  # a zone whose sensor is off answers with an error
            continue
        found.append(("cpu" not in kind, reading / 1000))
    return min(found, key=lambda pair: pair[0])[1] if found else None


def with_measurements(profile: Profile, measured: Mapping[str, float], *, date: str) -> Profile:
    """Return the profile with every figure replaced that was measured.

    Args:
        profile: Of the same kind of board.
        measured: As :func:`measure` returns it; names that are no figures are left out.
        date: ISO date of the measurement.

    Raises:
        ProfileError: A number is not plausible for its figure.
    """
    figures: dict[str, Figure] = {}
    for name, value in measured.items():
        if name not in FIGURES:
            continue
        meaning, least, most = FIGURES[name]
        if not least <= value <= most:
            raise ProfileError(
                f"Measured `{name}` is {value:g}; it must lie in {least:g} to {most:g} ({meaning}).",
                hint="Measure again on an idle board.",
            )
        figures[name] = Figure(value, _SOURCE, "measured", date)
    return dataclasses.replace(profile, **figures)  # type: ignore[arg-type]  # the names are those of figures


def profile_of_this_machine(measured: Mapping[str, float], *, name: str, date: str) -> Profile:
    """Return a new profile for the machine that was measured, with half of its free RAM as the budget.

    Args:
        measured: As :func:`measure` returned it here.
        name: What to call it.
        date: ISO date of the measurement.

    Raises:
        ProfileError: A number is not plausible for its figure.
    """
    unknown = Figure(1.0, "not told by the system", "estimate", date)
    budget = max(32.0, (measured["ram_mib"] - 256) // 2)
    bare = Profile(
        name=name,
        title=platform.node() or name,
        arch={"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine()),
        os=_system(),
        python=(".".join(platform.python_version_tuple()[:2]),),
        flash=("ssh", "local"),
        memory_mib=Figure(budget, "half of the RAM beyond 256 MiB for the system", "estimate", date),
        ram_mib=unknown,
        cores=unknown,
        clock_ghz=unknown,
        fp32_gflops=unknown,
        bandwidth_gbs=unknown,
    )
    return with_measurements(bare, measured, date=date)


def _rate(work: Callable[[], object], seconds: float) -> float:
    """Return how often a second ``work`` was done, its first time left out."""
    work()
    times, begin = 0, time.perf_counter()
    while (passed := time.perf_counter() - begin) < seconds or times == 0:
        work()
        times += 1
    return times / passed


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS and Windows
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _clock_ghz(root: Path) -> float | None:
    highest = 0
    for path in (root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/cpuinfo_max_freq"):
        try:
            highest = max(highest, int(path.read_text()))
        except (OSError, ValueError):
            continue
    return highest / 1e6 if highest else None


def _system() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return f"{platform.system()} {platform.release()}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure into a file: ``python -m profiles.selftest FILE [SECONDS]``; return 0."""
    path, *seconds = sys.argv[1:] if arguments is None else arguments
    found = measure(seconds=float(seconds[0]) if seconds else 5.0)
    beside = Path(f"{path}.new")
    beside.write_text(json.dumps(found) + "\n", encoding="ascii")
    beside.replace(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
