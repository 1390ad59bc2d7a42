"""A boot partition, mounted or inside an image, as files by name.

Knows how to read and write them so that what was written can be believed. Does not know what they mean.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from coordinator.flash.fat import FatVolume
from coordinator.flash.partitions import fat_partitions
from profiles.errors import FlashError

__all__ = ["BootVolume", "FolderVolume", "boot_volume_of_image"]

_MARKS = ("cmdline.txt", "user-data", "config.txt")


class BootVolume(Protocol):
    """What flashing needs of a boot partition; paths use ``/``."""

    @property
    def label(self) -> str:
        """The volume's name."""

    @property
    def free_bytes(self) -> int:
        """Bytes that still fit."""

    def exists(self, path: str) -> bool:
        """Return whether there is a file or folder of that name."""

    def is_folder(self, path: str) -> bool:
        """Return whether there is a folder of that name."""

    def names(self, path: str = "") -> list[str]:
        """Return the names in a folder."""

    def read(self, path: str) -> bytes:
        """Return a file's bytes."""

    def write(self, path: str, data: bytes) -> None:
        """Write a file and the folders on the way."""

    def remove(self, path: str) -> None:
        """Remove a file or a folder, if it is there."""

    def flush(self) -> None:
        """See to it that all of it is on the medium."""


class FolderVolume:
    """A mounted boot partition.

    Args:
        folder: Where it is mounted.

    Raises:
        FlashError: There is no such folder.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise FlashError(
                f"{folder} is no folder",
                hint="Give the place where the card's boot partition is mounted, such as /media/you/bootfs.",
            )
        self._folder = folder

    @property
    def label(self) -> str:
        """The name of the folder, which is the volume's on a desktop."""
        return self._folder.name

    @property
    def free_bytes(self) -> int:
        """Bytes that still fit."""
        return shutil.disk_usage(self._folder).free

    def exists(self, path: str) -> bool:
        """Return whether there is a file or folder of that name."""
        return (self._folder / path).exists()

    def is_folder(self, path: str) -> bool:
        """Return whether there is a folder of that name."""
        return (self._folder / path).is_dir()

    def names(self, path: str = "") -> list[str]:
        """Return the names in a folder; empty where there is no such folder."""
        folder = self._folder / path
        return sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []

    def read(self, path: str) -> bytes:
        """Return a file's bytes.

        Raises:
            FlashError: It cannot be read.
        """
        with self._told(path):
            return (self._folder / path).read_bytes()

    def write(self, path: str, data: bytes) -> None:
        """Write a file beside the old one, flush it to the card, and put it in its place.

        Raises:
            FlashError: It cannot be written.
        """
        target = self._folder / path
        beside = target.with_name(f"{target.name}.new")
        with self._told(path):
            target.parent.mkdir(parents=True, exist_ok=True)
            with beside.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(target)

    def remove(self, path: str) -> None:
        """Remove a file or a folder, if it is there.

        Raises:
            FlashError: It is there and stays.
        """
        target = self._folder / path
        with self._told(path):
            if target.is_dir():
                shutil.rmtree(target)
            else:
                target.unlink(missing_ok=True)

    def flush(self) -> None:
        """See to it that the names are on the card too."""
        with contextlib.suppress(OSError):  # a folder cannot be opened on every system
            folder = os.open(self._folder, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    @contextlib.contextmanager
    def _told(self, path: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise FlashError(
                f"{self._folder / path}: {error.strerror or error}",
                hint="Put the card in again and run the same command: it repairs what was begun. A card that "
                "is read-only has its lock set, or is worn out.",
            ) from error


@contextlib.contextmanager
def boot_volume_of_image(path: Path, *, writable: bool) -> Iterator[FatVolume]:
    """Open the partition of an image from which a board boots.

    Args:
        path: The image.
        writable: Whether it will be changed; it is on the disk when the context ends.

    Raises:
        FlashError: No FAT partition of it holds what a board boots from.
    """
    with path.open("r+b" if writable else "rb") as file:
        volumes = []
        for part in fat_partitions(file):
            with contextlib.suppress(FlashError):  # a table may call FAT what is not
                volumes.append(FatVolume(file, part.offset, part.size))
        booting = [volume for volume in volumes if any(volume.exists(mark) for mark in _MARKS)]
        if not booting:
            raise FlashError(
                f"{path.name} has no boot partition that a board's first boot looks at "
                f"({len(volumes)} FAT partitions, none with {', '.join(_MARKS)})",
                hint="Armbian and Jetson images have none: boot the board as its maker says, then use "
                "`scalarfed flash ssh USER@HOST`.",
            )
        yield booting[0]
        if writable:
            file.flush()
            os.fsync(file.fileno())
