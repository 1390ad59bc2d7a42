"""Gives memory back that only the start of the agent needed.

Importing numpy and ONNX Runtime and opening a session touch about 25 MiB of their code, nearly all of it
once. Linux counts these pages as resident until something else wants the memory; a board's budget counts
them too. Knows mappings and the allocator, not what runs in them.

Sources: madvise(2), proc_pid_smaps(5), malloc_trim(3).
"""

import ctypes
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

__all__ = ["give_back"]

_DONTNEED = 4
_SMAPS = Path("/proc/self/smaps")


def give_back() -> None:
    """Drop the pages of code that hold only what their files hold, and what the allocator keeps unused.

    A page that is needed again is mapped again from the page cache, at under a microsecond. Does nothing off
    Linux, and where the system refuses.
    """
    if sys.platform != "linux":
        return
    library = ctypes.CDLL(None)
    if trim := getattr(library, "malloc_trim", None):  # glibc has it, musl has not
        trim(ctypes.c_size_t(0))
    try:
        with _SMAPS.open() as smaps:
            found = list(_clean_code(smaps))
    except OSError:
        return
    for start, stop in found:
        library.madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), _DONTNEED)


def _clean_code(smaps: Iterable[str]) -> Iterator[tuple[int, int]]:
    """Yield the resident private mappings of files that nobody may write and nobody has written.

    A page that the loader relocated is anonymous, or swapped: no file has it, and its mapping stays. These
    two come after the resident size, the flags last.
    """
    span, fit = "", False
    for line in smaps:
        if line.startswith("VmFlags:"):
            if fit:
                start, stop = (int(border, 16) for border in span.split("-"))
                yield start, stop
            span, fit = "", False
        elif not span:
            span, rights, _, _, _, *name = line.split(None, 5)
            fit = rights[1] == "-" and rights[3] == "p" and bool(name) and name[0].startswith("/")
        elif fit and line.startswith("Rss:"):
            fit = line.split()[1] != "0"
        elif fit and line.startswith(("Anonymous:", "Swap:")):
            fit = line.split()[1] == "0"
