"""Holds a process to its memory budget, by the strongest means that the system offers.

The ladder: a cgroup that a service manager has set up, or that this process may make for itself; else
RLIMIT_DATA, calibrated after the imports; and on every rung a sampler thread, which ends the process with
a clear last line. On macOS and Windows the sampler stands alone. Knows nothing of what work costs
(``budget``); measures with ``memory``.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import threading
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from profiles.errors import BudgetError
from profiles.memory import CgroupMemory, cgroup_memory, current_rss_mib, data_mib, pss_mib

__all__ = ["EXIT_OVER_BUDGET", "Enforcement", "enforce", "scope_command"]

EXIT_OVER_BUDGET = 98
"""What a process returns that its own sampler has ended."""

_MIB = 2**20
_SAMPLE_S = 0.05
_LEAF = "scalarfed-agent-"


@dataclass(frozen=True)
class Enforcement:
    """Which rung holds the process, for its first report.

    Attributes:
        rung: ``cgroup v2 delegated``, ``cgroup v2 root``, ``cgroup v1``, ``RLIMIT_DATA`` or ``sampler``.
        budget_mib: What was asked for.
        limit_mib: The number given to the kernel, in the kernel's own measure (RLIMIT_DATA counts what was
            asked for, touched or not; a cgroup joined late counts from then on); None on the last rung.
        detail: The same for a person, in one line.
    """

    rung: str
    budget_mib: float
    limit_mib: float | None
    detail: str
    _stopped: threading.Event = field(default_factory=threading.Event, repr=False, compare=False)

    def stop(self) -> None:
        """End the sampler; what the kernel was told stays."""
        self._stopped.set()


def enforce(
    budget_mib: float,
    *,
    spare_threads: int = 4,
    rungs: Collection[str] = ("cgroup", "rlimit"),
    root: Path = Path("/"),
) -> Enforcement:
    """Hold this process to ``budget_mib`` from now on. Call it once, after all imports.

    A request beyond the budget then raises MemoryError (numpy) or RuntimeError (onnxruntime) on the rung
    RLIMIT_DATA; in a cgroup the kernel kills the process. On every rung, 50 ms after the process holds more
    than the budget (PSS, where the system tells it, else RSS), the sampler writes one line to standard
    error and ends the process with :data:`EXIT_OVER_BUDGET`, without any clean-up: what must survive has
    to be on the disk already.

    Args:
        budget_mib: MiB that the process may hold, its imports included.
        spare_threads: Threads still to be started; RLIMIT_DATA counts each one's whole stack (8 MiB, of
            which it touches a few KiB), so that the limit is raised by as much.
        rungs: What the kernel may be asked for, ``cgroup`` and ``rlimit``; the sampler always runs.
        root: Where ``/proc`` and ``/sys`` lie.

    Raises:
        BudgetError: The process holds more than that already.
    """
    held = current_rss_mib()
    if held >= budget_mib:
        raise BudgetError(
            f"The agent's imports alone hold {held:.0f} MiB; its budget allows {budget_mib:.0f} MiB.",
            hint=f"Give it at least {held + 16:.0f} MiB, or leave the device out.",
        )
    stopped = threading.Event()
    threading.Thread(target=_sample, args=(budget_mib, stopped), name="memory-sampler", daemon=True).start()
    found: tuple[str, float | None, str] | None = None
    if "cgroup" in rungs:
        found = _preset_cgroup(budget_mib, root) or _own_cgroup(budget_mib, root)
    if "rlimit" in rungs:
        found = found or _data_limit(budget_mib, spare_threads)
    rung, limit_mib, detail = found or ("sampler", None, "no limit by the kernel")
    detail = f"{budget_mib:.0f} MiB by {rung} ({detail}) and a sampler every {_SAMPLE_S * 1e3:.0f} ms"
    return Enforcement(rung, budget_mib, limit_mib, detail, stopped)


def scope_command(budget_mib: float, *, root: Path = Path("/")) -> list[str]:
    """Return the words that, put before a command, start it in a limited scope of systemd.

    Empty where systemd does not run, or may not limit memory. The process keeps the pid of the command,
    and its memory is counted from its first page on, which no process can do for itself.

    Args:
        budget_mib: MiB for all processes in the scope; swap is not allowed.
        root: Where ``/run`` and ``/sys`` lie.
    """
    if sys.platform != "linux" or shutil.which("systemd-run") is None:
        return []
    user = os.geteuid()
    slices = f"user.slice/user-{user}.slice/user@{user}.service"
    manager = root / (f"run/user/{user}/systemd/private" if user else "run/systemd/private")
    try:
        delegated = (root / "sys/fs/cgroup" / (slices if user else "") / "cgroup.controllers").read_text()
    except OSError:
        return []
    if not manager.exists() or "memory" not in delegated.split():
        return []
    words = ["systemd-run", *(["--user"] if user else []), "--scope", "--quiet", "--collect"]
    return [*words, "-p", f"MemoryMax={int(budget_mib * _MIB)}", "-p", "MemorySwapMax=0", "--"]


def _preset_cgroup(budget_mib: float, root: Path) -> tuple[str, float, str] | None:
    account = cgroup_memory(root=root)
    if account is None or account.limit_mib is None or account.limit_mib > budget_mib + 1:
        return None
    detail = f"set from outside on {account.folder.name}"
    return _cgroup_rung(account, "user@" in str(account.folder)), account.limit_mib, detail


def _cgroup_rung(account: CgroupMemory, delegated: bool) -> str:
    if account.version == 1:
        return "cgroup v1"
    return "cgroup v2 delegated" if delegated else "cgroup v2 root"


def _own_cgroup(budget_mib: float, root: Path) -> tuple[str, float, str] | None:
    """Move this process into a new cgroup beside its old one, if the system allows that."""
    account = cgroup_memory(root=root)
    if account is None or account.version != 2:
        return None
    parent = account.folder.parent
    for old in parent.glob(f"{_LEAF}*"):
        with contextlib.suppress(OSError):  # only the empty ones, left by agents that ended, can be removed
            old.rmdir()
    leaf = parent / f"{_LEAF}{os.getpid()}"
    # What is charged already stays charged to the old cgroup: only the rest of the budget is new.
    limit = budget_mib - current_rss_mib()
    try:
        leaf.mkdir()
    except OSError:
        return None
    try:
        (leaf / "memory.max").write_text(str(int(limit * _MIB)))
        with contextlib.suppress(OSError):  # kernels without swap accounting
            (leaf / "memory.swap.max").write_text("0")
        (leaf / "cgroup.procs").write_text(str(os.getpid()))
    except OSError:
        with contextlib.suppress(OSError):
            leaf.rmdir()
        return None
    return _cgroup_rung(account, os.geteuid() != 0), limit, f"made by itself: {leaf.name}"


def _data_limit(budget_mib: float, spare_threads: int) -> tuple[str, float, str] | None:
    """Set RLIMIT_DATA to what is asked for now, and the rest of the budget, and the stacks to come.

    Only the soft limit: it binds this process, and what it starts may raise it again.
    """
    asked = data_mib()
    if sys.platform != "linux" or asked is None:
        return None
    import resource

    stack = resource.getrlimit(resource.RLIMIT_STACK)[0]
    stacks_mib = spare_threads * (8 if stack == resource.RLIM_INFINITY else stack / _MIB)
    limit = asked + budget_mib - current_rss_mib() + stacks_mib
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    wanted = int(limit * _MIB)
    try:
        resource.setrlimit(
            resource.RLIMIT_DATA, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard)
        )
    except (OSError, ValueError):
        return None
    return "RLIMIT_DATA", limit, f"{limit:.0f} MiB of private data, {stacks_mib:.0f} of it for stacks"


def _sample(budget_mib: float, stopped: threading.Event) -> None:
    while not stopped.wait(_SAMPLE_S):
        held, measure = current_rss_mib(), "resident"
        if held <= budget_mib:  # PSS is never more than RSS, and costs 20 times as much to ask for
            continue
        shared_out = pss_mib()
        if shared_out is not None:
            held, measure = shared_out, "proportional"
        if held > budget_mib:
            _end(held, measure, budget_mib)


def _end(held: float, measure: str, budget_mib: float) -> None:
    line = (
        f"scalarfed: ended by its own memory limit: {held:.1f} MiB {measure}, the budget allows "
        f"{budget_mib:.1f} MiB. {BudgetError.hint}\n"
    )
    # Straight to the descriptor: another thread may hold the lock of sys.stderr and never give it back.
    with contextlib.suppress(OSError):
        os.write(2, line.encode())
    os._exit(EXIT_OVER_BUDGET)
