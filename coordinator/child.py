"""A process of ours that ends with us, or is found and ended by the next run.

Knows processes, their log and their pid file. Does not know what they do.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import psutil

from profiles.errors import StateError

__all__ = ["Child", "end_orphan"]

# Asks the kernel for SIGTERM when the parent dies (prctl PR_SET_PDEATHSIG, kept across exec), looks whether
# it died meanwhile, and becomes the program. A preexec_fn would run Python between fork and exec, where
# threads can deadlock.
_LAUNCHER = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 15, 0, 0, 0)
if os.getppid() != int(sys.argv[1]):
    sys.exit(0)
os.execvp(sys.argv[2], sys.argv[2:])
"""

_SAME_START_S = 2.0
"""Start times of one process differ by less, since the kernel's clock may be set meanwhile."""


class Child:
    """A running process with its output in a file.

    It does not get the terminal's Ctrl-C: whoever started it stops it. On Linux it also ends when this
    process dies, if started from the main thread (else the kernel would end it together with the thread).

    Args:
        command: Program and arguments.
        log: Gets what the process prints, appended.
        pid_file: Names the process as long as it may run, for :func:`end_orphan`.
        env: The whole environment; ours where left out.

    Attributes:
        log: As given.

    Raises:
        StateError: The program cannot be started, or a file cannot be written.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        log: Path,
        pid_file: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.log = log
        self._pid_file = pid_file
        options: dict[str, Any] = {"start_new_session": True}
        if sys.platform == "win32":
            options = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
        elif sys.platform == "linux" and threading.current_thread() is threading.main_thread():
            command = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), *command]
        try:
            with log.open("ab") as output:
                self._process = _start(command, output, env, options)
            if pid_file is not None:
                _write_pid_file(pid_file, self._process.pid)
        except OSError as error:
            raise StateError(f"`{command[0]}` cannot be started with its log {log}: {error}.") from error

    @property
    def pid(self) -> int:
        """The number of the process."""
        return self._process.pid

    def alive(self) -> bool:
        """Say whether the process still runs."""
        return self._process.poll() is None

    def wait(self, timeout_s: float) -> int | None:
        """Return the exit code as soon as the process has ended, or None after the time."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def kill(self) -> None:
        """End the process at once and wait until it is gone."""
        self._process.kill()
        self._forget()

    def ask_to_end(self) -> None:
        """Ask the process to end and do not wait, so that several can be asked before one is waited for."""
        self._process.terminate()

    def stop(self, *, grace_s: float = 5.0) -> None:
        """Ask the process to end, wait, and kill it after the grace; nothing if it has ended."""
        self.ask_to_end()
        if self.wait(grace_s) is None:
            self._process.kill()
        self._forget()

    def _forget(self) -> None:
        self._process.wait()
        if self._pid_file is not None:
            self._pid_file.unlink(missing_ok=True)


def end_orphan(pid_file: Path) -> bool:
    """End the process that a dead parent left behind, and remove its pid file.

    Returns:
        Whether there was such a process.

    Raises:
        StateError: The parent lives: its run is not ours to disturb.
    """
    try:
        noted = json.loads(pid_file.read_text(encoding="utf-8"))
        child = _find(noted["pid"], noted["started"])
        parent = _find(noted["parent"], noted["parent_started"])
    except (OSError, ValueError, KeyError, TypeError):
        child = parent = None
    if child is not None and parent is not None and parent.pid != os.getpid():
        raise StateError(
            f"{pid_file.parent} is in use by process {parent.pid}.",
            hint="Wait until that run ends, stop it with Ctrl-C, or choose another folder with --out.",
        )
    if child is not None:
        child.terminate()
        if psutil.wait_procs([child], timeout=5)[1]:
            child.kill()
            psutil.wait_procs([child], timeout=5)
    pid_file.unlink(missing_ok=True)
    return child is not None


def _start(
    command: Sequence[str], output: IO[bytes], env: Mapping[str, str] | None, options: Mapping[str, Any]
) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=env, **options
    )


def _write_pid_file(path: Path, pid: int) -> None:
    try:
        started = psutil.Process(pid).create_time()
    except psutil.NoSuchProcess:
        return
    note = {
        "pid": pid,
        "started": started,
        "parent": os.getpid(),
        "parent_started": psutil.Process().create_time(),
    }
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(note), encoding="utf-8")
    part.replace(path)


def _find(pid: int, started: float) -> psutil.Process | None:
    try:
        process = psutil.Process(pid)
        same = (
            abs(process.create_time() - started) < _SAME_START_S and process.status() != psutil.STATUS_ZOMBIE
        )
        return process if same else None
    except psutil.Error:
        return None
