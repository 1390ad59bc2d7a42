"""Keeps processes running, as systemd does on a board: a test-bed's agents, and collectors.

Knows commands and exit codes, not what a process does.
"""

import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from coordinator.child import Child, end_orphan
from profiles.errors import StateError

__all__ = ["Supervisor", "agent_command"]

_HEALTHY_S = 10.0
_FAILURES = 5
_SLOWEST_RESTART_S = 5.0


def agent_command() -> list[str]:
    """Return what starts an agent: the installed command beside this Python, else the module."""
    beside = shutil.which("scalarfed-agent", path=str(Path(sys.executable).parent))
    return [sys.executable, beside] if beside and os.name == "posix" else [sys.executable, "-m", "edge_agent"]


@dataclass
class _Slot:
    command: Sequence[str]
    child: Child | None = None
    started_at: float = 0.0
    failures: int = 0
    restart_at: float = 0.0


class Supervisor:
    """Starts processes, and again whenever one ends.

    Args:
        commands: Command line by name.
        folder: Gets ``NAME.log`` and ``NAME.pid``.
        on_event: Told of every restart: kind, name, text.
        what: They are, in what people read.
    """

    def __init__(
        self,
        commands: Mapping[str, Sequence[str]],
        *,
        folder: Path,
        on_event: Callable[[str, str, str], None],
        what: str = "agent",
    ) -> None:
        self._what = what
        self._folder = folder
        self._on_event = on_event
        self._slots = {name: _Slot(command) for name, command in commands.items()}
        # Many small processes on one machine: one thread and few heaps each, as a small board has.
        one = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
        self._env = {**os.environ, **one}

    def start(self) -> None:
        """End what an interrupted run left behind, then start every process."""
        for name, slot in self._slots.items():
            end_orphan(self._folder / f"{name}.pid")
            self._spawn(name, slot)

    def watch(self) -> None:
        """Start again what ended; called from the main loop.

        Raises:
            StateError: One ends again and again right after its start.
        """
        now = time.monotonic()
        for name, slot in self._slots.items():
            if slot.child is not None and not slot.child.alive():
                code = slot.child.wait(0)
                slot.failures = slot.failures + 1 if now - slot.started_at < _HEALTHY_S else 1
                if slot.failures >= _FAILURES:
                    raise StateError(
                        f"{self._what} {name} ended {_FAILURES} times right after its start, "
                        f"last with exit code {code}: {self._last_line(name)}",
                        hint=f"Read {self._folder / name}.log, correct the cause, then go on with --resume.",
                    )
                slot.child = None
                slot.restart_at = now + min(_SLOWEST_RESTART_S, 0.2 * 2.0**slot.failures)
                self._on_event(f"{self._what} ended", name, f"exit code {code}; starting it again")
            if slot.child is None and now >= slot.restart_at:
                self._spawn(name, slot)

    def alive(self) -> int:
        """Return how many run."""
        return sum(slot.child is not None and slot.child.alive() for slot in self._slots.values())

    def stop(self) -> None:
        """Ask all to end, and end those that do not."""
        children = [slot.child for slot in self._slots.values() if slot.child is not None]
        for child in children:
            child.ask_to_end()
        for child in children:
            child.stop()

    def _spawn(self, name: str, slot: _Slot) -> None:
        slot.child = Child(
            slot.command,
            log=self._folder / f"{name}.log",
            pid_file=self._folder / f"{name}.pid",
            env=self._env,
        )
        slot.started_at = time.monotonic()

    def _last_line(self, name: str) -> str:
        lines = (self._folder / f"{name}.log").read_text(errors="replace").splitlines()
        told = [line for line in lines if "hint:" not in line]
        return told[-1] if told else "it printed nothing"
