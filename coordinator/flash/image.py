"""Copies a card image, unpacked on the way if need be, with holes where it is empty.

Knows files, not what is in them.
"""

import lzma
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from profiles.errors import FlashError

__all__ = ["copy_image"]

_PIECE = 1 << 20


def copy_image(source: Path, out: Path) -> None:
    """Write a copy of an image, whole or not at all.

    Args:
        source: ``.img``, or ``.img.xz``, which is unpacked.
        out: The copy; must not exist.

    Raises:
        FlashError: ``source`` cannot be read or is no image, ``out`` exists, or the disk is full.
    """
    if out.exists():
        raise FlashError(f"{out} exists already", hint="Choose another -o, or remove it first.")
    if source.suffix in (".zip", ".gz", ".iso", ".7z"):
        raise FlashError(
            f"{source.name} is packed in a way that is not read here", hint="Unpack it first, to a .img file."
        )
    beside = out.with_name(f"{out.name}.part")
    try:
        with _unpacked(source) as reading, beside.open("wb") as writing:
            size = 0
            while piece := reading.read(_PIECE):
                if piece.count(0) == len(piece):
                    writing.seek(len(piece), os.SEEK_CUR)  # a hole: images are mostly empty
                else:
                    writing.write(piece)
                size += len(piece)
            writing.truncate(size)
        beside.replace(out)
    except (OSError, lzma.LZMAError, EOFError) as error:
        beside.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or str(error)
        raise FlashError(
            f"{source} cannot be copied to {out}: {reason}",
            hint="Is the image whole, and is there space for the copy?",
        ) from error


@contextmanager
def _unpacked(source: Path) -> Iterator[BinaryIO]:
    if source.suffix == ".xz":
        with lzma.open(source, "rb") as file:
            yield file  # type: ignore[misc]  # it reads bytes, which is all that is asked of it
    else:
        with source.open("rb") as file:
            yield file
