"""How much memory onnxruntime's arena makes resident for a given order of requests.

A best-fit allocator with coalescing, over regions that double in size: a request takes the smallest free
chunk that holds it, the rest is split off only from a chunk of twice the size, and what is given back
joins its free neighbours. A table of the region's grains is written whole beside it. So a process holds
more than what lives at once: 1.1 to 1.5 times on convolutional nets, 1.3 to 1.6 times on transformers.
Knows nothing of graphs (``cost``) or of processes (``memory``).

Source: the behaviour of onnxruntime's BFCArena with its default settings, release 1.31 (first region 1 MiB,
extension by powers of two, chunks of 256 bytes); the allocator is Doug Lea's best fit, as TensorFlow has it.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Arena"]

_GRAIN = 256
_POINTER = 8
_MOST_LEFT_IN_A_CHUNK = 128 * 2**20


@dataclass(eq=False)
class _Chunk:
    region: int
    start: int
    size: int
    free: bool


class Arena:
    """One arena, from its creation on.

    Args:
        first_region_bytes: What is asked of the system first; each further region doubles it.
    """

    def __init__(self, first_region_bytes: int = 2**20) -> None:
        self._next_region = first_region_bytes
        self._regions: list[list[_Chunk]] = []
        self._touched: list[list[tuple[int, int]]] = []

    def take(self, size: int) -> _Chunk:
        """Return a chunk of at least ``size`` bytes, all of which will be written."""
        wanted = max(_GRAIN, -(-size // _GRAIN) * _GRAIN)
        fitting = (c for region in self._regions for c in region if c.free and c.size >= wanted)
        # Of equal ones the lowest: Linux puts a new region below the one before.
        chunk = min(fitting, key=lambda c: (c.size, -c.region, c.start), default=None)
        if chunk is None:
            chunk = self._extend(wanted)
        rest = chunk.size - wanted
        if rest >= wanted or rest >= _MOST_LEFT_IN_A_CHUNK:
            region = self._regions[chunk.region]
            after = _Chunk(chunk.region, chunk.start + wanted, rest, free=True)
            region.insert(region.index(chunk) + 1, after)
            chunk.size = wanted
        chunk.free = False
        self._touched[chunk.region].append((chunk.start, chunk.start + size))
        return chunk

    def give_back(self, chunk: _Chunk) -> None:
        """Free a chunk, and join it with the free ones beside it."""
        region = self._regions[chunk.region]
        place = region.index(chunk)
        chunk.free = True
        if place + 1 < len(region) and region[place + 1].free:
            chunk.size += region.pop(place + 1).size
        if place > 0 and region[place - 1].free:
            region[place - 1].size += chunk.size
            region.pop(place)

    @property
    def resident_bytes(self) -> int:
        """Bytes that take up memory: what was written, and a table of each region's grains beside it."""
        return self.written_bytes + self.reserved_bytes * _POINTER // _GRAIN

    @property
    def written_bytes(self) -> int:
        """Bytes of the regions that were ever written: none of them goes back to the system."""
        total = 0
        for spans in self._touched:
            end = 0
            for start, stop in sorted(spans):
                total += max(0, stop - max(start, end))
                end = max(end, stop)
        return total

    @property
    def reserved_bytes(self) -> int:
        """Bytes that were asked of the system, written or not."""
        return sum(chunk.size for region in self._regions for chunk in region)

    def _extend(self, wanted: int) -> _Chunk:
        grown = False
        while self._next_region < wanted:
            self._next_region *= 2
            grown = True
        chunk = _Chunk(len(self._regions), 0, self._next_region, free=True)
        self._regions.append([chunk])
        self._touched.append([])
        if not grown:
            self._next_region *= 2
        return chunk
