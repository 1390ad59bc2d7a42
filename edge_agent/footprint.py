"""Gives memory back that only the start of the agent needed.

Importing numpy and ONNX Runtime and opening a session touch about 25 MiB of their code, nearly all of it
once. Linux counts these pages as resident until something else wants the memory; a board's budget counts
them too. Knows mappings and the allocator, not what runs in them.

Sources: madvise(2), proc_pid_smaps(5), malloc_trim(3).
"""

import contextlib
import ctypes
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

__all__ = ["give_back", "giving_back"]

_DONTNEED = 4
_SMAPS = Path("/proc/self/smaps")
_EVERY_S = 0.001
_STACK_BYTES = 256 * 1024


def give_back() -> None:
    """Drop the pages of code that hold only what their files hold, and what the allocator keeps unused.

    A page that is needed again is mapped again from the page cache, at under a microsecond. Does nothing off
    Linux, and where the system refuses.
    """
    if sys.platform != "linux":
        return
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc has it, musl has not
        trim(ctypes.c_size_t(0))
    _drop(_code(resident=True))


@contextlib.contextmanager
def giving_back() -> Iterator[Callable[[], None]]:
    """Give back before, after, and every millisecond while the body runs.

    For a body that touches much code once, each page of it for a moment: what it has behind it does not
    add up to a peak. Another thread drops the pages, whenever the body leaves Python or Python takes turns;
    on a busy machine that can be late, so a body of several parts calls what it is given between them.
    """
    give_back()
    spans = _code(resident=False)
    ended = threading.Event()

    def keep_giving_back() -> None:
        while not ended.wait(_EVERY_S):
            _drop(spans)

    before = threading.stack_size(_STACK_BYTES)
    sweeper = threading.Thread(target=keep_giving_back, name="footprint", daemon=True)
    try:
        sweeper.start()
    finally:
        threading.stack_size(before)
    try:
        yield lambda: _drop(spans)
    finally:
        ended.set()
        sweeper.join()
        give_back()


def _drop(spans: Sequence[tuple[int, int]]) -> None:
    """Drop the pages of address ranges that no program has written."""
    library = ctypes.CDLL(None)
    for start, stop in spans:
        library.madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), _DONTNEED)


def _code(*, resident: bool) -> list[tuple[int, int]]:
    """Return where code lies that only its files hold; all of it, or what is resident.

    Empty off Linux, and where nothing at all is resident: an emulator's smaps say 0 of everything, of what
    was written too.
    """
    try:
        with _SMAPS.open() as smaps:
            found = list(_clean_code(smaps))
    except OSError:
        return []
    there = [(start, stop) for start, stop, kib in found if kib]
    return there if resident or not there else [(start, stop) for start, stop, _ in found]


def _clean_code(smaps: Iterable[str]) -> Iterator[tuple[int, int, int]]:
    """Yield the private mappings of files that nobody may write and nobody has written: start, stop, KiB.

    A page that the loader relocated is anonymous, or swapped: no file has it, and its mapping stays. These
    two come after the resident size, the flags last.
    """
    span, fit, kib = "", False, 0
    for line in smaps:
        if line.startswith("VmFlags:"):
            if fit:
                start, stop = (int(border, 16) for border in span.split("-"))
                yield start, stop, kib
            span, fit, kib = "", False, 0
        elif not span:
            span, rights, _, _, _, *name = line.split(None, 5)
            fit = rights[1] == "-" and rights[3] == "p" and bool(name) and name[0].startswith("/")
        elif fit and line.startswith("Rss:"):
            kib = int(line.split()[1])
        elif fit and line.startswith(("Anonymous:", "Swap:")):
            fit = line.split()[1] == "0"
