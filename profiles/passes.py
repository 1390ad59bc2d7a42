"""What a forward pass asks of the allocator, in order, and what becomes resident of it at any batch size.

A pass is a list of buffers taken and given back, each so many bytes a sample, a pass and a thread. Found in
a graph once (``liveness``), it is small enough for a bundle's manifest, and says exactly what a line over
the batch size can only approach: how the arena (``arena``) grows. Knows no graphs and measures nothing.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from profiles.arena import Arena
from profiles.errors import ModelError

__all__ = ["Pass", "read_pass", "runnable_passes"]

_UNBLOCKED = ("aarch64", "armv7l")
_TRIED = 2  # samples on which an agent compares a variant with the plain graph
_PASSES = 2  # of a batch, after which the arena is as it will stay
_PIECES = 8  # of a batch, which show all sizes of pieces in turn


@dataclass(frozen=True)
class Pass:
    """The requests of one forward pass.

    Attributes:
        requests: In order. One number gives back the buffer of that number, counted as they were taken. Two
            take a buffer: bytes a sample, and beside that. Three take scratch: bytes beside what threads
            take, bytes a thread, and how many threads each sample keeps busy.
        tried: Samples of a pass that comes before all others, as an agent tries a variant; 0 for none.
    """

    requests: tuple[tuple[int, ...], ...]
    tried: int = 0

    def resident_bytes(self, batch_size: int, *, at_once: int | None = None, threads: int = 1) -> int:
        """Return the bytes that the arena makes resident once passes have run.

        Args:
            batch_size: Samples of a batch, >= 1.
            at_once: The most of them that run together; a larger batch runs in pieces of nearly the same
                size. All of them if None.
            threads: Of a pass, >= 1.
        """
        pieces = 1 if at_once is None else -(-batch_size // at_once)
        borders = [piece * batch_size // pieces for piece in range(pieces + 1)]
        sizes = [stop - start for start, stop in itertools.pairwise(borders)]
        return _resident_bytes(self, tuple(sizes[:_PIECES]), threads)

    def live_bytes(self, batch_size: int, *, threads: int = 1) -> int:
        """Return the most bytes that live at once, as an allocator without holes could hold them."""
        sizes: list[int] = []
        live = peak = 0
        for request in self.requests:
            if len(request) == 1:
                live -= sizes[request[0]]
            else:
                sizes.append(_size(request, batch_size, threads))
                live += sizes[-1]
                peak = max(peak, live)
        return peak

    def as_list(self) -> list[list[int]]:
        """Return the requests as a bundle's manifest keeps them."""
        return [list(request) for request in self.requests]


def read_pass(requests: Iterable[Sequence[Any]], *, tried: int = 0) -> Pass:
    """Read back what a manifest keeps.

    Args:
        requests: Of :meth:`Pass.as_list`.
        tried: As in :class:`Pass`.

    Raises:
        ModelError: It is not what :meth:`Pass.as_list` returns.
    """
    held: set[int] = set()
    taken = 0
    try:
        found = tuple(tuple(int(number) for number in request) for request in requests)
        for request in found:
            if min(request) < 0 or len(request) > 3:
                raise ValueError
            if len(request) == 1:
                held.remove(request[0])
            else:
                held.add(taken)
                taken += 1
    except (TypeError, ValueError, KeyError):
        raise ModelError("The manifest's requests of a forward pass are not sound.") from None
    return Pass(found, tried)


def runnable_passes(
    kept: Mapping[str, Iterable[Sequence[Any]]],
    *,
    arch: str = "",
    kernel: bool | None = None,
    image_block: int | None = None,
) -> tuple[Pass, ...]:
    """Return the passes of which a board may run one.

    Args:
        kept: The manifest's: a graph's variant, empty for the plain graph, and where its pass is another on
            processors that lay images out in blocks, ``@`` and the block.
        arch: Of the board, as :class:`profiles.device.Profile` has it; any if empty.
        kernel: Whether the board has the compiled kernel; None if nobody knows.
        image_block: Channels of a block on the board's processor, 0 for none; None if nobody knows.

    Raises:
        ModelError: See :func:`read_pass`.
    """
    blocks = (image_block,) if image_block is not None else (0,) if arch in _UNBLOCKED else (0, 8, 16)
    names = set()
    for block in blocks:
        variants = [] if kernel is False else [f"blocked{block}", "fused"]
        found = [_of_block(kept, variant, block) for variant in variants]
        plain = _of_block(kept, "", block)
        first = next(filter(None, found), None)
        names |= {first or plain} if kernel else {first, plain}
    return tuple(
        read_pass(kept[name], tried=_TRIED if name.partition("@")[0] else 0)
        for name in sorted(name for name in names if name is not None)
    )


def _of_block(kept: Mapping[str, Any], variant: str, block: int) -> str | None:
    """Return the name of a variant's pass on processors with a block, or None if there is no such variant."""
    return next((name for name in (f"{variant}@{block}", variant) if name in kept), None)


def _size(request: tuple[int, ...], batch_size: int, threads: int) -> int:
    if len(request) == 2:
        return request[0] * batch_size + request[1]
    return request[0] + request[1] * min(threads, request[2] * batch_size)


@functools.lru_cache(maxsize=1024)
def _resident_bytes(which: Pass, sizes: tuple[int, ...], threads: int) -> int:
    arena = Arena()
    for size in (which.tried, *sizes * _PASSES):
        if not size:
            continue
        held: dict[int, Any] = {}
        numbers = itertools.count()
        for request in which.requests:
            if len(request) == 1:
                arena.give_back(held.pop(request[0]))
            else:
                held[next(numbers)] = arena.take(_size(request, size, threads))
        for chunk in held.values():
            arena.give_back(chunk)
    return arena.resident_bytes
