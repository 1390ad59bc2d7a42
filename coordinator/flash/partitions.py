"""Finds the FAT partitions of an image: reads MBR and GPT tables, writes nothing.

Knows the tables, not what lies in a partition (``fat``) nor which one a board boots from (``formats``).

Source: UEFI Specification 2.10, sections 5.2 (MBR) and 5.3 (GPT).
"""

import struct
import uuid
import zlib
from dataclasses import dataclass
from typing import BinaryIO

from profiles.errors import FlashError

__all__ = ["Partition", "fat_partitions"]

_SECTOR = 512
_FAT_TYPES = {0x04, 0x06, 0x0B, 0x0C, 0x0E, 0xEF}  # FAT16, FAT32 by CHS or LBA, EFI system partition
_PROTECTIVE = 0xEE
_FAT_GUIDS = {
    uuid.UUID("ebd0a0a2-b9e5-4433-87c0-68b6b72699c7"),  # basic data
    uuid.UUID("c12a7328-f81f-11d2-ba4b-00a0c93ec93b"),  # EFI system partition
}
_MOST_ENTRIES = 1024


@dataclass(frozen=True)
class Partition:
    """Where a partition lies.

    Attributes:
        number: From 1, as in the table.
        offset: First byte in the image.
        size: Bytes.
        scheme: ``MBR`` or ``GPT``.
    """

    number: int
    offset: int
    size: int
    scheme: str


def fat_partitions(file: BinaryIO) -> list[Partition]:
    """Return the partitions that their table calls FAT, in the order of the table.

    Args:
        file: The image, open for reading.

    Raises:
        FlashError: There is no partition table, it is damaged, or it names bytes beyond the end.
    """
    end = file.seek(0, 2)
    sector = _read(file, 0, _SECTOR)
    if len(sector) < _SECTOR or sector[510:] != b"\x55\xaa":
        raise FlashError(
            "the image has no partition table",
            hint="Give a whole card image (.img, .img.xz), not one partition, an archive or an installer.",
        )
    if sector[3:11] in (b"mkfs.fat", b"MSDOS5.0") or sector[54:57] == b"FAT" or sector[82:85] == b"FAT":
        raise FlashError(
            "the image is a single FAT partition without a partition table",
            hint="Give the image of the whole card, or mount this partition and use `scalarfed flash card`.",
        )
    rows = [sector[446 + 16 * index : 462 + 16 * index] for index in range(4)]
    if any(row[4] == _PROTECTIVE for row in rows):
        found = _gpt(file)
    else:
        found = [
            Partition(number, start * _SECTOR, count * _SECTOR, "MBR")
            for number, row in enumerate(rows, 1)
            for start, count in [struct.unpack("<II", row[8:])]
            if row[4] in _FAT_TYPES and count
        ]
    for part in found:
        if part.offset + part.size > end:
            raise FlashError(
                f"partition {part.number} ends at byte {part.offset + part.size}, the image at byte {end}",
                hint="The image is cut short: download or unpack it again, and compare its checksum.",
            )
    return found


def _gpt(file: BinaryIO) -> list[Partition]:
    header = _read(file, _SECTOR, _SECTOR)
    size = struct.unpack_from("<I", header, 12)[0] if len(header) == _SECTOR else 0
    if header[:8] != b"EFI PART" or not 92 <= size <= _SECTOR:
        raise _damaged("its header is missing")
    if zlib.crc32(header[:16] + bytes(4) + header[20:size]) != struct.unpack_from("<I", header, 16)[0]:
        raise _damaged("the checksum of its header is wrong")
    first, count, width, checksum = struct.unpack_from("<QIII", header, 72)
    if not (count <= _MOST_ENTRIES and 128 <= width <= 4096):
        raise _damaged(f"it claims {count} entries of {width} bytes")
    table = _read(file, first * _SECTOR, count * width)
    if zlib.crc32(table) != checksum:
        raise _damaged("the checksum of its entries is wrong")
    found = []
    for index in range(count):
        entry = table[index * width : (index + 1) * width]
        start, last = struct.unpack_from("<QQ", entry, 32)
        if uuid.UUID(bytes_le=entry[:16]) in _FAT_GUIDS and last >= start:
            found.append(Partition(index + 1, start * _SECTOR, (last - start + 1) * _SECTOR, "GPT"))
    return found


def _damaged(why: str) -> FlashError:
    return FlashError(
        f"the image's GPT partition table is damaged: {why}",
        hint="Download or unpack the image again, and compare its checksum.",
    )


def _read(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)
