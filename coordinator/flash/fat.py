"""Reads and writes files in a FAT16 or FAT32 partition of an image, without mounting it.

Knows the file system alone. Long names are written as VFAT does; both copies of the table, the count of
free clusters and the hint for the next one are kept, so that ``fsck.fat -n`` has nothing to say. An image
is edited as a copy: nothing here is safe against a power cut, and nothing needs to be.

Source: Microsoft, "FAT32 File System Specification" 1.03, 2000.
"""

import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from profiles.errors import FlashError

__all__ = ["FatVolume"]

_ENTRY = 32
_FOLDER, _LABEL, _LONG, _FILE = 0x10, 0x08, 0x0F, 0x20
_FREE, _END = 0xE5, 0x00
_PLAIN = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-$~!#%&{}()@'`")
_ROOT = 0


@dataclass(frozen=True)
class _Entry:
    name: str
    raw: bytes
    slots: list[int]  # byte positions of its 32-byte slots, the short entry last

    @property
    def is_folder(self) -> bool:
        return bool(self.raw[11] & _FOLDER)

    @property
    def cluster(self) -> int:
        high, low = struct.unpack_from("<H", self.raw, 20)[0], struct.unpack_from("<H", self.raw, 26)[0]
        return int(high << 16 | low)

    @property
    def size(self) -> int:
        return int(struct.unpack_from("<I", self.raw, 28)[0])


class FatVolume:
    """A FAT16 or FAT32 file system inside a file. Paths use ``/`` and are not case-sensitive.

    Args:
        file: Open for reading, and for writing where that is wanted.
        offset: First byte of the partition.
        size: Bytes of the partition.

    Attributes:
        kind: ``FAT16`` or ``FAT32``.
        label: The volume's name, without trailing blanks.

    Raises:
        FlashError: It is no FAT16 or FAT32, or it is damaged.
    """

    def __init__(self, file: BinaryIO, offset: int, size: int) -> None:
        self._file, self._offset = file, offset
        boot = self._get(0, 512)
        if len(boot) < 512 or boot[510:] != b"\x55\xaa":
            raise _damaged("it has no boot sector")
        self._sector, per_cluster, self._reserved, self._copies, self._root_entries, total16 = (
            struct.unpack_from("<HBHBHH", boot, 11)
        )
        fat16, (total32, fat32) = struct.unpack_from("<H", boot, 22)[0], struct.unpack_from("<II", boot, 32)
        self._fat_sectors, total = fat16 or fat32, total16 or total32
        if (
            self._sector not in (512, 1024, 2048, 4096)
            or per_cluster not in (1, 2, 4, 8, 16, 32, 64, 128)
            or not self._reserved
            or not 1 <= self._copies <= 4
            or not self._fat_sectors
        ):
            raise _damaged("its boot sector makes no sense")
        root_sectors = -(-self._root_entries * _ENTRY // self._sector)
        self._data = self._reserved + self._copies * self._fat_sectors + root_sectors
        self._clusters = (total - self._data) // per_cluster
        if total * self._sector > size:
            raise _damaged(f"it claims {total * self._sector} bytes, its partition has {size}")
        if self._clusters < 4085:
            raise FlashError(
                "the partition is FAT12, which no board boots from",
                hint="Give the image of a Raspberry Pi OS, Ubuntu or Debian card.",
            )
        self._is32 = self._clusters >= 65525
        self.kind = "FAT32" if self._is32 else "FAT16"
        self._cluster_size = per_cluster * self._sector
        self._root_cluster, self._info = struct.unpack_from("<IH", boot, 44) if self._is32 else (0, 0)
        self._mask = 0x0FFFFFFF if self._is32 else 0xFFFF
        raw = self._get(self._reserved * self._sector, self._fat_sectors * self._sector)
        self._fat: NDArray[np.uint32] | NDArray[np.uint16] = np.frombuffer(
            raw, "<u4" if self._is32 else "<u2"
        ).copy()
        if self._fat.size < self._clusters + 2:
            raise _damaged("its table is shorter than its clusters")
        self._dirty: set[int] = set()
        self._next = 2
        self.label = self._read_label(boot)

    # ------------------------------------------------------------------------------------ what it offers

    @property
    def free_bytes(self) -> int:
        """Bytes in free clusters."""
        return int(self._free().size) * self._cluster_size

    def exists(self, path: str) -> bool:
        """Return whether there is a file or folder of that name."""
        return self._find(path) is not None

    def names(self, path: str = "") -> list[str]:
        """Return the names in a folder, in the order of its entries; empty where there is no such folder."""
        folder = self._folder(path)
        found = [] if folder is None else self._entries(folder)
        return [entry.name for entry in found if entry.name not in (".", "..")]

    def is_folder(self, path: str) -> bool:
        """Return whether there is a folder of that name."""
        return self._folder(path) is not None

    def read(self, path: str) -> bytes:
        """Return a file's bytes.

        Raises:
            FlashError: There is no such file.
        """
        entry = self._find(path)
        if entry is None or entry.is_folder:
            raise FlashError(f"{path} is not on the partition", hint="`scalarfed flash check` shows what is.")
        chain = self._chain(entry.cluster)
        pieces = [self._get(self._place(a), (b - a) * self._cluster_size) for a, b in _runs(chain)]
        return b"".join(pieces)[: entry.size]

    def write(self, path: str, data: bytes) -> None:
        """Write a file, and the folders on the way; one of that name is replaced.

        Raises:
            FlashError: The partition is full, and everything on it is as before but for empty folders.
        """
        folder_path, _, name = path.strip("/").rpartition("/")
        folder = self._make_folders(folder_path)
        chain = self._allocate(-(-len(data) // self._cluster_size))
        position = 0
        for first, after in _runs(chain):
            size = (after - first) * self._cluster_size
            self._put(self._place(first), data[position : position + size].ljust(size, b"\0"))
            position += size
        first_cluster = chain[0] if chain else 0
        entry = next((e for e in self._entries(folder) if e.name.lower() == name.lower()), None)
        if entry is None:
            self._add(folder, name, _FILE, first_cluster, len(data))
            return
        if entry.is_folder:
            raise FlashError(f"{path} is a folder", hint="Remove it from the boot partition first.")
        self._put(entry.slots[-1], entry.raw[:13] + _tail(first_cluster, len(data)))
        self._release(entry.cluster)

    def remove(self, path: str) -> None:
        """Remove a file, or a folder with all that is in it; what is not there is no trouble."""
        entry = self._find(path)
        if entry is None:
            return
        if entry.is_folder:
            for name in self.names(path):
                self.remove(f"{path}/{name}")
        for slot in entry.slots:
            self._put(slot, bytes([_FREE]))
        self._release(entry.cluster)

    def flush(self) -> None:
        """Write the tables out. Without it the partition is damaged after a change."""
        raw = self._fat.tobytes()
        for copy in range(self._copies):
            start = (self._reserved + copy * self._fat_sectors) * self._sector
            for sector in sorted(self._dirty):
                at = sector * self._sector
                self._put(start + at, raw[at : at + self._sector])
        self._dirty.clear()
        if self._is32 and self._info not in (0, 0xFFFF):
            info = self._info * self._sector
            if self._get(info, 4) == b"RRaA":
                self._put(info + 488, struct.pack("<II", self._free().size, self._next))
        self._file.flush()

    # --------------------------------------------------------------------------------- bytes and clusters

    def _get(self, offset: int, size: int) -> bytes:
        self._file.seek(self._offset + offset)
        return self._file.read(size)

    def _put(self, offset: int, data: bytes) -> None:
        self._file.seek(self._offset + offset)
        self._file.write(data)

    def _place(self, cluster: int) -> int:
        return self._data * self._sector + (cluster - 2) * self._cluster_size

    def _link(self, cluster: int, value: int) -> None:
        kept = int(self._fat[cluster]) & ~self._mask & 0xFFFFFFFF
        self._fat[cluster] = kept | value
        self._dirty.add(cluster * self._fat.itemsize // self._sector)

    def _chain(self, cluster: int) -> list[int]:
        found: list[int] = []
        while 2 <= cluster < self._clusters + 2:
            found.append(cluster)
            if len(found) > self._clusters:
                raise _damaged("a chain of clusters never ends")
            cluster = int(self._fat[cluster]) & self._mask
        return found

    def _free(self) -> NDArray[np.intp]:
        return np.flatnonzero((self._fat[2 : self._clusters + 2] & self._mask) == 0) + 2

    def _allocate(self, count: int) -> list[int]:
        if count == 0:
            return []
        free = self._free()
        if free.size < count:
            raise FlashError(
                f"the boot partition has {free.size * self._cluster_size / 2**20:.1f} MiB left, "
                f"{count * self._cluster_size / 2**20:.1f} MiB are needed",
                hint="Remove what is not needed from it, or use an image with a larger boot partition.",
            )
        ahead = free[free >= self._next]
        chain = [int(cluster) for cluster in (ahead if ahead.size >= count else free)[:count]]
        for cluster, following in zip(chain, [*chain[1:], self._mask], strict=True):
            self._link(cluster, following)
        self._next = chain[-1]
        return chain

    def _release(self, cluster: int) -> None:
        for one in self._chain(cluster):
            self._link(one, 0)

    # ----------------------------------------------------------------------------------------- folders

    def _slots(self, folder: int) -> list[int]:
        if folder == _ROOT and not self._is32:
            start = (self._reserved + self._copies * self._fat_sectors) * self._sector
            return [start + _ENTRY * index for index in range(self._root_entries)]
        per_cluster = self._cluster_size // _ENTRY
        return [
            self._place(cluster) + _ENTRY * index
            for cluster in self._chain(folder or self._root_cluster)
            for index in range(per_cluster)
        ]

    def _entries(self, folder: int) -> Iterator[_Entry]:
        pieces: dict[int, bytes] = {}
        slots: list[int] = []
        for slot in self._slots(folder):
            raw = self._get(slot, _ENTRY)
            if raw[0] == _END:
                return
            if raw[0] == _FREE:
                pieces, slots = {}, []
            elif raw[11] == _LONG:
                if raw[0] & 0x40:
                    pieces, slots = {}, []
                pieces[raw[0] & 0x3F] = raw[1:11] + raw[14:26] + raw[28:32]
                slots.append(slot)
            elif raw[11] & _LABEL:
                pieces, slots = {}, []
            else:
                yield _Entry(_long_name(pieces) or _short_name(raw), raw, [*slots, slot])
                pieces, slots = {}, []

    def _find(self, path: str) -> _Entry | None:
        folder_path, _, name = path.strip("/").rpartition("/")
        folder = self._folder(folder_path)
        if folder is None:
            return None
        return next((entry for entry in self._entries(folder) if entry.name.lower() == name.lower()), None)

    def _folder(self, path: str) -> int | None:
        if not path.strip("/"):
            return _ROOT
        entry = self._find(path)
        return entry.cluster if entry is not None and entry.is_folder else None

    def _make_folders(self, path: str) -> int:
        folder = _ROOT
        for name in filter(None, path.split("/")):
            entry = next((e for e in self._entries(folder) if e.name.lower() == name.lower()), None)
            if entry is not None and not entry.is_folder:
                raise FlashError(f"{name} is a file, not a folder", hint="Remove it from the boot partition.")
            if entry is not None:
                folder = entry.cluster
                continue
            cluster = self._allocate(1)[0]
            dots = b".".ljust(11) + bytes([_FOLDER, 0]) + _tail(cluster, 0)
            dots += b"..".ljust(11) + bytes([_FOLDER, 0]) + _tail(folder, 0)
            self._put(self._place(cluster), dots.ljust(self._cluster_size, b"\0"))
            self._add(folder, name, _FOLDER, cluster, 0)
            folder = cluster
        return folder

    def _add(self, folder: int, name: str, attribute: int, cluster: int, size: int) -> None:
        short = _unused_short_name(name, {entry.raw[:11] for entry in self._entries(folder)})
        rows = [*_long_entries(name, short), short + bytes([attribute, 0]) + _tail(cluster, size)]
        for slot, row in zip(self._room(folder, len(rows)), rows, strict=True):
            self._put(slot, row)

    def _room(self, folder: int, count: int) -> list[int]:
        """Return the positions of ``count`` free slots in a row; a full folder grows."""
        while True:
            run: list[int] = []
            for slot in self._slots(folder):
                run = [*run, slot] if self._get(slot, 1)[0] in (_FREE, _END) else []
                if len(run) == count:
                    return run
            if folder == _ROOT and not self._is32:
                raise FlashError(
                    f"the root folder of the partition is full, at {self._root_entries} entries",
                    hint="Remove files that are not needed from the top of the boot partition.",
                )
            last = self._chain(folder or self._root_cluster)[-1]
            grown = self._allocate(1)[0]
            self._link(last, grown)
            self._put(self._place(grown), bytes(self._cluster_size))

    def _read_label(self, boot: bytes) -> str:
        for slot in self._slots(_ROOT):
            raw = self._get(slot, _ENTRY)
            if raw[0] == _END:
                break
            if raw[0] != _FREE and raw[11] & _LABEL and raw[11] != _LONG:
                return raw[:11].decode("cp437").rstrip()
        start = 71 if self._is32 else 43
        return boot[start : start + 11].decode("cp437").rstrip()


def _runs(chain: list[int]) -> Iterator[tuple[int, int]]:
    """Yield the stretches of consecutive clusters: first, and one past the last."""
    start = 0
    for index in range(1, len(chain) + 1):
        if index == len(chain) or chain[index] != chain[index - 1] + 1:
            yield chain[start], chain[index - 1] + 1
            start = index


def _tail(cluster: int, size: int) -> bytes:
    """Return bytes 13 to 31 of an entry: tenths of a second, times, cluster and size."""
    now = time.localtime()
    clock = now.tm_hour << 11 | now.tm_min << 5 | now.tm_sec // 2
    day = (max(now.tm_year, 1980) - 1980) << 9 | now.tm_mon << 5 | now.tm_mday
    return struct.pack("<BHHHHHHHI", 0, clock, day, day, cluster >> 16, clock, day, cluster & 0xFFFF, size)


def _long_name(pieces: dict[int, bytes]) -> str:
    joined = b"".join(pieces[number] for number in sorted(pieces))
    return joined.decode("utf-16-le", "replace").partition("\0")[0]


def _short_name(raw: bytes) -> str:
    first = b"\xe5" if raw[0] == 0x05 else raw[:1]
    stem, extension = (first + raw[1:8]).decode("cp437").rstrip(), raw[8:11].decode("cp437").rstrip()
    stem = stem.lower() if raw[12] & 0x08 else stem
    extension = extension.lower() if raw[12] & 0x10 else extension
    return f"{stem}.{extension}" if extension else stem


def _unused_short_name(name: str, used: set[bytes]) -> bytes:
    stem, dot, extension = name.upper().rpartition(".")
    stem, extension = (stem, extension) if dot else (extension, "")
    plain_stem, plain_extension = (
        "".join(char if char in _PLAIN else "_" for char in part if char not in " .")
        for part in (stem, extension)
    )
    number = 1
    while True:
        tail = f"~{number}"
        short = (plain_stem[: 8 - len(tail)] + tail).ljust(8) + plain_extension[:3].ljust(3)
        if short.encode() not in used:
            return short.encode()
        number += 1


def _long_entries(name: str, short: bytes) -> list[bytes]:
    """Return the entries that carry a long name, in the order in which they are stored: last piece first."""
    checksum = 0
    for byte in short:
        checksum = ((checksum & 1) << 7) + (checksum >> 1) + byte & 0xFF
    units = name.encode("utf-16-le")
    if len(units) % 26:
        units += b"\0\0"
        units += b"\xff" * (-len(units) % 26)
    pieces = [units[at : at + 26] for at in range(0, len(units), 26)]
    rows = []
    for number, piece in enumerate(pieces, 1):
        order = number | (0x40 if number == len(pieces) else 0)
        head = bytes([order]) + piece[:10] + bytes([_LONG, 0, checksum])
        rows.append(head + piece[10:22] + bytes(2) + piece[22:])
    return rows[::-1]


def _damaged(why: str) -> FlashError:
    return FlashError(
        f"the FAT file system is damaged: {why}",
        hint="Write the card or unpack the image again; `fsck.fat -n` tells more.",
    )
