"""A board of one's own: qemu runs a flashed card image; a root shell on its serial line answers questions."""

import contextlib
import re
import shutil
import socket
import subprocess
import time
from pathlib import Path

from coordinator.flash.volume import boot_volume_of_image

__all__ = ["EmulatedBoard"]

# An emulated processor on a busy machine is slow: nothing here may fail for taking its time.
_KERNEL = (
    "console=ttyAMA0 loglevel=4 systemd.debug_shell=ttyAMA0 "
    "systemd.default_device_timeout_sec=900 systemd.default_timeout_start_sec=900"
)


class EmulatedBoard:
    """A 64-bit Arm board with 512 MB; its firmware is played here: read cmdline.txt, load the kernel.

    Args:
        folder: With ``vmlinuz`` and ``initrd.img`` from build.sh.
        card: The flashed image; the board writes to it.
        work: For the serial line and its log.
    """

    def __init__(self, folder: Path, card: Path, work: Path, *, ram_mib: int = 512) -> None:
        self._folder, self._card, self._work, self._ram_mib = folder, card, work, ram_mib
        self._child: subprocess.Popen[bytes] | None = None
        self._shell: socket.socket | None = None
        self._asked = 0
        self.log = work / "serial.log"

    def power_on(self) -> None:
        """Boot with what the card's cmdline.txt says now."""
        with boot_volume_of_image(self._card, writable=False) as volume:
            line = volume.read("cmdline.txt").decode().strip()
        program = shutil.which("qemu-system-aarch64")
        assert program, "apt-get install qemu-system-arm"
        line_path = self._work / "serial.sock"
        line_path.unlink(missing_ok=True)
        words = f"-M virt -cpu cortex-a72 -smp 2 -m {self._ram_mib} -accel tcg,thread=multi,tb-size=256"
        words += " -netdev user,id=n0 -device virtio-net-pci,netdev=n0,romfile= -device virtio-rng-pci"
        words += " -device virtio-blk-pci,drive=d0 -display none -monitor none -serial chardev:s0"
        self._child = subprocess.Popen(
            [
                *(program, *words.split()),
                *("-drive", f"file={self._card},if=none,id=d0,format=raw,cache=unsafe"),
                *(
                    "-chardev",
                    f"socket,id=s0,path={line_path},server=on,wait=off,logfile={self.log},logappend=on",
                ),
                *("-kernel", str(self._folder / "vmlinuz"), "-initrd", str(self._folder / "initrd.img")),
                *("-append", f"{line} {_KERNEL}"),
            ],
            stdin=subprocess.DEVNULL,
        )

    def ask(self, command: str, *, within_s: float = 60.0) -> str:
        """Return what a command prints in the board's root shell."""
        self._asked += 1
        begin, end = f"<<{self._asked}", f"{self._asked}>>"
        shell = self._awake()
        # The marks are put together by the shell, so that the echo of the line holds none of them.
        shell.sendall(f"echo '<<''{self._asked}'; {command}; echo '{self._asked}''>>'\n".encode())
        said, deadline = "", time.monotonic() + within_s
        while end not in said:
            assert time.monotonic() < deadline, f"{command!r} did not end: {said[-500:]}"
            with contextlib.suppress(TimeoutError):
                said += shell.recv(65536).decode(errors="replace")
        inner = said.split(begin, 1)[-1].split(end, 1)[0]
        inner = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b\][^\x07\x1b]*(\x07|\x1b\\)", "", inner)
        return inner.replace("\r", "").strip()

    def _awake(self, *, within_s: float = 120.0) -> socket.socket:
        """Return the shell once it answers: what is typed while it starts, or asks its terminal, is lost."""
        shell = self._connected()
        mark, said, deadline = f"~{self._asked}~", "", time.monotonic() + within_s
        while mark not in said:
            assert time.monotonic() < deadline, f"the shell did not answer: {said[-500:]}"
            shell.sendall(f"echo '~''{self._asked}~'\n".encode())
            again = time.monotonic() + 5.0
            while mark not in said and time.monotonic() < again:
                with contextlib.suppress(TimeoutError):
                    said += shell.recv(65536).decode(errors="replace")
        return shell

    def power_off(self) -> None:
        """Shut down in order, so that the card can be read."""
        if self._child is None:
            return
        with contextlib.suppress(OSError):
            shell = self._connected()
            shell.sendall(b"systemctl poweroff\n")
            deadline = time.monotonic() + 180
            while self.alive() and time.monotonic() < deadline:
                with contextlib.suppress(TimeoutError):
                    shell.recv(65536)  # whoever does not listen keeps the console, and so the board, waiting
        self.cut_power()

    def cut_power(self) -> None:
        """End without a word."""
        if self._shell is not None:
            self._shell.close()
            self._shell = None
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            self._child = None

    def alive(self) -> bool:
        """Return whether the board has power."""
        return self._child is not None and self._child.poll() is None

    def _connected(self) -> socket.socket:
        if self._shell is None:
            self._shell = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._shell.settimeout(1.0)
            self._shell.connect(str(self._work / "serial.sock"))
        return self._shell
