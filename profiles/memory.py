"""What a process really uses: resident, proportional, at its peak, and in the kernel's cgroup accounts.

Everything is in MiB (2**20 bytes) and for one process, this one unless a pid is given. Knows nothing of
what a process may use (``limit``) or should need (``budget``).

Three traps. ``ru_maxrss`` of a child starts at its parent's peak on Linux, so the peak comes from
``VmHWM``. RSS counts a shared library in every process that maps it; PSS shares it out, and is the honest
figure for many agents on one machine. ``memory.peak`` needs Linux 5.19.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "CgroupMemory",
    "MemoryUse",
    "cgroup_memory",
    "current_rss_mib",
    "data_mib",
    "memory_use",
    "peak_rss_mib",
    "pss_mib",
]

_MIB = 2**20
_NO_LIMIT = 2**60  # cgroup v1 writes a number near 2**63 where v2 writes "max"


@dataclass(frozen=True)
class CgroupMemory:
    """The memory account of the cgroup in which a process lives.

    Attributes:
        version: 1 or 2.
        folder: The cgroup's folder.
        current_mib: Charged now, page cache included.
        peak_mib: Most ever charged; None where the kernel does not keep it.
        limit_mib: The tightest limit on the way to the root; None without one.
    """

    version: int
    folder: Path
    current_mib: float
    peak_mib: float | None
    limit_mib: float | None


@dataclass(frozen=True)
class MemoryUse:
    """All figures of one process at one moment; None where this system does not tell."""

    rss_mib: float
    peak_rss_mib: float
    pss_mib: float | None
    cgroup: CgroupMemory | None


def memory_use(pid: int | None = None) -> MemoryUse:
    """Return every figure that this system offers.

    Raises:
        ProcessLookupError: There is no such process.
    """
    return MemoryUse(current_rss_mib(pid), peak_rss_mib(pid), pss_mib(pid), cgroup_memory(pid))


def current_rss_mib(pid: int | None = None) -> float:
    """Return the resident set: pages of the process that are in RAM now, shared ones counted in full.

    Raises:
        ProcessLookupError: There is no such process.
    """
    if sys.platform == "linux":
        pages = int(_proc(pid, "statm").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / _MIB
    return _psutil_memory(pid, "rss")


def peak_rss_mib(pid: int | None = None) -> float:
    """Return the greatest resident set since the program was started.

    On macOS another process's peak is not told: there its present resident set is returned.

    Raises:
        ProcessLookupError: There is no such process.
    """
    if sys.platform == "linux":
        return _status_mib(pid, "VmHWM")
    if sys.platform == "win32":
        return _psutil_memory(pid, "peak_wset")
    if pid is None or pid == os.getpid():
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / _MIB  # bytes on macOS
    return _psutil_memory(pid, "rss")


def pss_mib(pid: int | None = None) -> float | None:
    """Return the proportional set: each page divided by the number of processes that share it.

    Costs about a millisecond. None off Linux, on kernels before 4.14, and for processes of other users.

    Raises:
        ProcessLookupError: There is no such process.
    """
    if sys.platform != "linux":
        return None
    try:
        text = _proc(pid, "smaps_rollup")
    except PermissionError:
        return None
    except ProcessLookupError:
        _proc(pid, "statm")  # raises again if it is the process that is gone, not the file
        return None
    return next((int(line.split()[1]) / 1024 for line in text.splitlines() if line.startswith("Pss:")), None)


def data_mib(pid: int | None = None) -> float | None:
    """Return the private writable memory that was asked for, touched or not: what RLIMIT_DATA counts.

    None off Linux.

    Raises:
        ProcessLookupError: There is no such process.
    """
    return _status_mib(pid, "VmData") if sys.platform == "linux" else None


def cgroup_memory(pid: int | None = None, *, root: Path = Path("/")) -> CgroupMemory | None:
    """Return the memory account of the process's cgroup, version 2 if it has one, else version 1.

    None where the kernel keeps no such account: off Linux, and on Raspberry Pi OS unless
    ``cgroup_enable=memory`` stands in ``cmdline.txt``.

    Args:
        pid: The process; this one where left out.
        root: Where ``/`` lies; another folder lets a recorded file tree be read.
    """
    proc = root / "proc" / ("self" if pid is None else str(pid))
    try:
        memberships = (proc / "cgroup").read_text().splitlines()
        mounts = (proc / "mountinfo").read_text().splitlines()
    except OSError:
        return None
    names = {2: ("memory.current", "memory.peak", "memory.max")}
    names[1] = ("memory.usage_in_bytes", "memory.max_usage_in_bytes", "memory.limit_in_bytes")
    for version in (2, 1):
        place = _cgroup_folder(version, memberships, mounts, root)
        if place is None:
            continue
        mount, folder = place
        current, peak, limit = names[version]
        charged = _number(folder / current)
        if charged is None:
            continue
        way = [folder, *(parent for parent in folder.parents if parent.is_relative_to(mount))]
        limits = [value for value in (_number(step / limit) for step in way) if value is not None]
        highest = _number(folder / peak)
        return CgroupMemory(
            version=version,
            folder=folder,
            current_mib=charged / _MIB,
            peak_mib=None if highest is None else highest / _MIB,
            limit_mib=min(limits) / _MIB if limits else None,
        )
    return None


def _cgroup_folder(
    version: int, memberships: list[str], mounts: list[str], root: Path
) -> tuple[Path, Path] | None:
    """Return the mount point and the process's folder of the hierarchy that accounts for memory."""
    path = None
    for line in memberships:  # "0::/a.slice/b.scope" or "4:memory,hugetlb:/a"
        number, controllers, where = line.split(":", 2)
        if (number == "0" and not controllers) if version == 2 else "memory" in controllers.split(","):
            path = where
    if path is None:
        return None
    for line in mounts:  # "30 24 0:26 ROOT MOUNTPOINT options [tags] - FSTYPE source superoptions"
        left, _, right = line.partition(" - ")
        kind, _, options = right.split(" ", 2)
        if kind != ("cgroup2" if version == 2 else "cgroup"):
            continue
        if version == 1 and "memory" not in options.split(","):
            continue
        base, mount = left.split(" ")[3:5]
        # In a container the membership may name a place above what is mounted: then its top is ours.
        inside = path[len(base.rstrip("/")) :] if path.startswith(base) else ""
        top = root / mount.lstrip("/")
        return top, top / inside.lstrip("/")
    return None


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() and int(text) < _NO_LIMIT else None


def _proc(pid: int | None, name: str) -> str:
    process = "self" if pid is None else str(pid)
    try:
        return Path(f"/proc/{process}/{name}").read_text()
    except FileNotFoundError as error:
        raise ProcessLookupError(f"There is no process {process}.") from error


def _status_mib(pid: int | None, field: str) -> float:
    for line in _proc(pid, "status").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    return 0.0  # a zombie has no memory, and no such line


def _psutil_memory(pid: int | None, field: str) -> float:
    import psutil

    try:
        return float(getattr(psutil.Process(pid).memory_info(), field)) / _MIB
    except psutil.NoSuchProcess as error:
        raise ProcessLookupError(f"There is no process {pid}.") from error
