"""Installs the agent on a running machine over SSH: looks, refuses or copies, installs, shows the log.

Uses the system's OpenSSH, with its keys, agents, configuration and questions; one connection serves all
steps. The machine gets the same payload and the same installer as a card.
"""

import io
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from coordinator.flash.payload import Payload, Target
from profiles.errors import FlashError

__all__ = ["Host", "Machine"]

_LOOK = """\
PATH="$PATH:/usr/sbin:/sbin"
say() { echo "scalarfed-$1=$2"; }
say arch "$(uname -m)"
say hostname "$(uname -n)"
say uid "$(id -u)"
python='import sys, struct; print("%d.%d/%d" % (*sys.version_info[:2], 8 * struct.calcsize("P")))'
say python "$(python3 -c "$python" 2>/dev/null)"
say systemd "$([ -d "$1/run/systemd/system" ] && echo yes)"
say ram_kib "$(awk '/^MemTotal/ {print $2}' /proc/meminfo)"
say free_kib "$(df -Pk "$([ -d "$1/opt" ] && echo "$1/opt" || echo "$1/")" | awk 'NR == 2 {print $4}')"
say sudo "$(sudo -n true 2>/dev/null && echo yes)"
say memory_cgroup "$(grep -qw memory /sys/fs/cgroup/cgroup.controllers 2>/dev/null && echo yes)"
say current "$(readlink "$1/opt/scalarfed/current" 2>/dev/null)"
"""
_SYSTEM_MIB = 128


@dataclass(frozen=True)
class Machine:
    """What a look at a machine told.

    Attributes:
        arch: As ``uname -m`` says.
        hostname: Its own name for itself.
        python: Such as ``3.10``; empty without one.
        bits: Of that Python.
        systemd: Whether it manages the services.
        ram_mib: RAM that Linux sees.
        free_mib: Free on the disk of ``/opt``.
        root: Whether we log in as root.
        sudo: Whether sudo works without a password.
        memory_cgroup: Whether the kernel can limit memory now.
        release: Installed already; empty for none.
    """

    arch: str
    hostname: str
    python: str
    bits: int
    systemd: bool
    ram_mib: float
    free_mib: float
    root: bool
    sudo: bool
    memory_cgroup: bool
    release: str

    def target(self, *, memory_mib: float) -> Target:
        """Return what wheels it takes.

        Args:
            memory_mib: The agent's budget.

        Raises:
            FlashError: The agent cannot run there: too little RAM, no systemd, 32 bits, an old Python.
        """
        if not self.systemd:
            raise FlashError(
                f"{self.hostname} has no systemd, which keeps the agent running and within its budget",
                hint="Use a system with systemd (Raspberry Pi OS, Ubuntu, Debian, JetPack), or start "
                "`scalarfed-agent` there by your own means.",
            )
        if self.ram_mib < memory_mib + _SYSTEM_MIB:
            raise FlashError(
                f"{self.hostname} has {self.ram_mib:.0f} MiB of RAM; a budget of {memory_mib:.0f} MiB "
                f"leaves the system less than {_SYSTEM_MIB}",
                hint=f"Set --memory-mib {max(32, int(self.ram_mib) - _SYSTEM_MIB)} or less, and look with "
                "`scalarfed profile show` what is usual for this board.",
            )
        if not self.python:
            raise FlashError(f"{self.hostname} has no python3", hint="Install it there: apt install python3.")
        if self.bits != 64 or self.arch not in ("aarch64", "x86_64"):
            raise FlashError(
                f"{self.hostname} is {self.arch} with a {self.bits}-bit Python: there are no wheels for it",
                hint="Write a 64-bit system onto it.",
            )
        return Target(self.python, self.arch)


class Host:
    """A machine reached by ``ssh``.

    Args:
        destination: ``USER@HOST`` or a name from the SSH configuration.
        options: More words for ssh, such as ``-p 2222``.
        root: Another root than ``/`` there, for tests.

    Raises:
        FlashError: There is no ssh on this machine.
    """

    def __init__(self, destination: str, *, options: Sequence[str] = (), root: str = "") -> None:
        if destination.startswith("-") or not destination:
            raise FlashError(f"{destination!r} is no host", hint="Write USER@HOST.")
        program = shutil.which("ssh")
        if program is None:
            raise FlashError(
                "there is no ssh on this machine",
                hint="Install OpenSSH's client: apt install openssh-client.",
            )
        self.destination = destination
        self._root = root
        self._sockets: tempfile.TemporaryDirectory[str] | None = None
        shared: list[str] = []
        if sys.platform != "win32":  # OpenSSH for Windows has no connection sharing
            self._sockets = tempfile.TemporaryDirectory(prefix="sf-")
            path = f"{self._sockets.name}/%C"
            shared = ["-o", "ControlMaster=auto", "-o", f"ControlPath={path}", "-o", "ControlPersist=30"]
        asks = [] if sys.stdin is not None and sys.stdin.isatty() else ["-o", "BatchMode=yes"]
        self._command = [program, "-o", "ConnectTimeout=10", *asks, *shared, *options]

    def close(self) -> None:
        """End the shared connection."""
        if self._sockets is not None:
            command = [*self._command, "-O", "exit", self.destination]
            subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, check=False)
            self._sockets.cleanup()
            self._sockets = None

    def __enter__(self) -> "Host":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def look(self) -> Machine:
        """Return what the machine is; nothing is changed.

        Raises:
            FlashError: It cannot be reached, or does not let us in.
        """
        done = self._run(f"sh -s -- {shlex.quote(self._root)}", send=_LOOK.encode())
        rows = [line.removeprefix("scalarfed-").partition("=") for line in done.splitlines()]
        told = {key: value.strip() for key, _, value in rows}
        python, _, bits = told.get("python", "").partition("/")
        return Machine(
            arch=told.get("arch", ""),
            hostname=told.get("hostname", self.destination),
            python=python,
            bits=int(bits or 0),
            systemd=told.get("systemd") == "yes",
            ram_mib=int(told.get("ram_kib") or 0) / 1024,
            free_mib=int(told.get("free_kib") or 0) / 1024,
            root=told.get("uid") == "0",
            sudo=told.get("sudo") == "yes",
            memory_cgroup=told.get("memory_cgroup") == "yes",
            release=told.get("current", "").removeprefix("releases/"),
        )

    def install(
        self, payload: Payload, machine: Machine, *, tick: Callable[[str], None] = lambda _: None
    ) -> None:
        """Copy the payload and run its installer.

        Args:
            payload: For this machine.
            machine: From :meth:`look`.
            tick: Told of each step.

        Raises:
            FlashError: It does not fit, we may not become root, or the installer fails; it says why.
        """
        need = payload.size / 2**20 * 4 + 16  # packed, and unpacked to about three times that
        if machine.free_mib < need:
            raise FlashError(
                f"{machine.hostname} has {machine.free_mib:.0f} MiB free, {need:.0f} MiB are needed",
                hint="Remove something there, old logs or packages, and try again.",
            )
        elevate = "" if machine.root or self._root else "sudo -n "
        if elevate and not machine.sudo:
            if not (sys.stdin is not None and sys.stdin.isatty()):
                raise FlashError(
                    f"sudo on {machine.hostname} asks for a password, and there is no terminal to ask you",
                    hint="Run this in a terminal, log in as root, or let that user sudo without one.",
                )
            elevate = "sudo "
        folder = self._run("mktemp -d /var/tmp/scalarfed.XXXXXXXX").strip()
        quoted = shlex.quote(folder)
        try:
            self._run(f"tar -x -C {quoted}", send=_tar(payload))
            tick(f"{len(payload.files)} files, {payload.size / 2**20:.1f} MiB: copied")
            where = f" --root {shlex.quote(self._root)} --no-start" if self._root else ""
            self._stream(f"{elevate}sh {quoted}/install.sh{where}", tick, terminal=elevate == "sudo ")
        finally:
            self._run(f"{elevate}rm -rf {quoted}", check=False)

    def log(self, lines: int = 20) -> str:
        """Return the last lines of the agent's log there; empty where it cannot be read."""
        words = f"journalctl -u scalarfed-agent -n {lines} --no-pager -o cat"
        return self._run(f"sudo -n {words} 2>/dev/null || {words} 2>/dev/null", check=False)

    def _run(self, remote: str, *, send: bytes | None = None, check: bool = True) -> str:
        done = subprocess.run(
            [*self._command, self.destination, remote],
            input=send if send is not None else b"",
            capture_output=True,
            check=False,
        )
        if check and done.returncode != 0:
            raise self._failure(done.returncode, done.stderr.decode(errors="replace"))
        return done.stdout.decode(errors="replace")

    def _stream(self, remote: str, tick: Callable[[str], None], *, terminal: bool) -> None:
        last = ""
        command = [*self._command, *(["-tt"] if terminal else []), self.destination, remote]
        stdin = None if terminal else subprocess.DEVNULL
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=stdin
        ) as child:
            for raw in child.stdout or ():
                line = raw.decode(errors="replace").strip()
                if line.startswith("scalarfed: "):
                    tick(line.removeprefix("scalarfed: "))
                last = line or last
        if child.returncode == 75:
            raise FlashError(last.removeprefix("scalarfed: "), hint="Wait for it to end, and try again.")
        if child.returncode != 0:
            raise self._failure(child.returncode, last)

    def _failure(self, status: int, said: str) -> FlashError:
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        last = lines[-1] if lines else f"status {status}"
        hint = f"Try `ssh {self.destination}` by hand first: whatever it asks or says must be settled there."
        if status != 255:
            hint = "Nothing but the named step failed: mend it there, and run the same command again."
        return FlashError(f"{self.destination}: {last}", hint=hint)


def _tar(payload: Payload) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in payload.files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode, entry.mtime = len(data), 0o600, int(time.time())
            archive.addfile(entry, io.BytesIO(data))
    return out.getvalue()
