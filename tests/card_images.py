"""Makes card images for the tests: a partition table by hand, a file system by mkfs.fat, files by mtools."""

import os
import shutil
import struct
import subprocess
import uuid
import zlib
from collections.abc import Mapping
from pathlib import Path

SBIN = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
MKFS = shutil.which("mkfs.fat", path=SBIN)
FSCK = shutil.which("fsck.fat", path=SBIN)
START = 2048  # first sector of the partition

RPI_CMDLINE = (
    "console=serial0,115200 console=tty1 root=PARTUUID=4e639091-02 rootfstype=ext4 fsck.repair=yes rootwait "
    "quiet init=/usr/lib/raspberrypi-sys-mods/firstboot\n"
)
BOOKWORM = {
    "cmdline.txt": RPI_CMDLINE.encode(),
    "config.txt": b"arm_64bit=1\n",
    "issue.txt": b"Raspberry Pi reference 2025-05-13\nGenerated using pi-gen, stage2\n",
    "kernel8.img": b"kernel",
}
TRIXIE = {
    "cmdline.txt": b"console=tty1 root=PARTUUID=4e639091-02 rootfstype=ext4 rootwait resize\n",
    "config.txt": b"arm_64bit=1\n",
    "issue.txt": b"Raspberry Pi reference 2025-11-24\nGenerated using pi-gen, stage2\n",
    "kernel8.img": b"kernel",
    "user-data": b"#cloud-config\n# Raspberry Pi Imager or you write here.\n",
    "meta-data": b"dsmode: local\ninstance_id: rpi-image-1\n",
    "network-config": b"# netplan\n",
}


def make_image(
    path: Path, files: Mapping[str, bytes], *, bits: int = 32, scheme: str = "MBR", mib: int = 80
) -> Path:
    """Write an image with one FAT partition that holds ``files``."""
    partition = path.with_suffix(".part")
    with partition.open("wb") as file:
        file.truncate(mib * 2**20)
    sectors = mib * 2048
    command = [str(MKFS), "-F", str(bits), "-s", "1" if bits == 32 else "8", "-n", "bootfs", str(partition)]
    subprocess.run(command, check=True, capture_output=True)
    for name, data in files.items():
        subprocess.run(
            ["mcopy", "-D", "o", "-i", str(partition), "-", f"::{name}"],
            input=data,
            check=True,
            capture_output=True,
        )
    with path.open("wb") as file:
        file.truncate((START + sectors + 34) * 512)
        for sector, data in _table(scheme, sectors).items():
            file.seek(sector * 512)
            file.write(data)
        file.seek(START * 512)
        file.write(partition.read_bytes())
    partition.unlink()
    return path


def fsck(image: Path, *, mib: int = 80) -> str:
    """Return what fsck.fat finds wrong with the partition; empty if nothing."""
    partition = image.with_suffix(".fsck")
    with image.open("rb") as file:
        file.seek(START * 512)
        partition.write_bytes(file.read(mib * 2**20))
    done = subprocess.run(
        [str(FSCK), "-n", "-v", str(partition)], capture_output=True, text=True, check=False
    )
    partition.unlink()
    wrong = [line for line in done.stdout.splitlines() if "wrong" in line or "Orphan" in line]
    return "" if done.returncode == 0 and not wrong else done.stdout + done.stderr


def mtype(image: Path, name: str) -> bytes:
    """Return a file's bytes, read by mtools."""
    offset = f"{image}@@{START * 512}"
    return subprocess.run(["mtype", "-i", offset, f"::{name}"], check=True, capture_output=True).stdout


def _table(scheme: str, sectors: int) -> dict[int, bytes]:
    row = struct.pack("<B3sB3sII", 0, bytes(3), 0x0C, bytes(3), START, sectors)
    if scheme == "MBR":
        return {0: bytes(446) + row + bytes(48) + b"\x55\xaa"}
    protective = struct.pack("<B3sB3sII", 0, bytes(3), 0xEE, bytes(3), 1, START + sectors + 33)
    kind = uuid.UUID("ebd0a0a2-b9e5-4433-87c0-68b6b72699c7").bytes_le
    entry = kind + bytes(15) + b"\1" + struct.pack("<QQQ", START, START + sectors - 1, 0) + bytes(72)
    table = entry.ljust(128 * 128, b"\0")
    head = struct.pack("<8sIIIIQQQQ16sQIII", b"EFI PART", 0x10000, 92, 0, 0, 1, START + sectors + 33, 34,
                       START + sectors, bytes(16), 2, 128, 128, zlib.crc32(table))  # fmt: skip
    head = head[:16] + struct.pack("<I", zlib.crc32(head)) + head[20:]
    return {0: bytes(446) + protective + bytes(48) + b"\x55\xaa", 1: head, 2: table}
