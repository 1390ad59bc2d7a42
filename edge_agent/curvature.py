"""Curvature: what a method divides its noise by, one value a weight or one for a group of weights.

One value a weight is an array of bfloat16 bits. A group is a row of a matrix (the weights into one neuron or
channel) or a tensor; its value is one float32, and pieces of the array are made of it when they are asked
for, so that it never stands in memory. All of it follows from the scalars, in a fixed order. Does not know
records or whose the groups are.

Source of the elementwise rule: HiSo, arXiv 2506.02370. Over a group its square is replaced by the mean of the
group's squares: sums of whole numbers, the same on every machine.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_agent.grid import Segment, bf16_to_float, chunks, inverse_root, step_scale, weighted_noise
from edge_agent.native.kernel import Learning
from edge_agent.noise import NoiseKey, hash_words, mix64
from edge_agent.tally import add_runs

__all__ = ["ONE_BF16", "Shared", "groups_of", "learn_each", "scales", "sparse_mask"]

ONE_BF16 = np.uint16(0x3F80)
"""A curvature of 1."""

_STILL_BF16 = np.uint16(0x7F00)  # 1 / sqrt of it is 8e-20: such a weight is neither perturbed nor moved
_MASK = 0x3A5C << 32  # beyond every perturbation number, so that no noise has this key
_LARGEST_CURVATURE = np.float32(1e30)
_LARGEST_DESCENT = np.float32(1e15)


@dataclass
class Shared:
    """One curvature value for each group of neighbouring weights; reads like the array of all bits.

    Attributes:
        starts: First element of each group, ascending from 0; int64. A group ends where the next begins.
        values: Float32, one a group.
        size: Elements of all groups.
    """

    starts: NDArray[np.int64]
    values: NDArray[np.float32]
    size: int

    def __getitem__(self, piece: slice) -> NDArray[np.uint16]:
        """Return bfloat16 bits of the elements ``piece.start`` to ``piece.stop``, rounded to the nearest."""
        first, last, edges = self.within(piece.start, piece.stop)
        return np.repeat(self._bits(first, last), np.diff(edges))

    def learn(
        self,
        segments: Sequence[Segment],
        keys: Sequence[NoiseKey],
        wholes: Sequence[int],
        learning: Learning,
    ) -> None:
        """Take a step in: h <- max((1 - nu) h + nu mean of Dx^2 over the group, floor), Dx = 1/P sum G z.

        Groups of which the segments hold nothing stay as they are.

        Args:
            segments: What the step moved.
            keys: Its perturbations.
            wholes: Its P whole scalars.
            learning: As for one value a weight.
        """
        totals = np.zeros(self.starts.size, np.int64)
        counts = np.zeros(self.starts.size, np.int64)
        for start, stop, _ in chunks(segments):
            first, last, edges = self.within(start, stop)
            squares = weighted_noise(keys, wholes, start, stop - start).astype(np.int64)
            squares *= squares
            add_runs(totals[first:last], squares, edges)
            counts[first:last] += np.diff(edges)
        moved = counts > 0
        root = inverse_root(self._bits(0, self.starts.size)).astype(np.float64)[moved]
        size = float(learning.descent) * root
        seen = size * size * (totals[moved] / counts[moved])
        h = (1.0 - learning.nu) * self.values[moved].astype(np.float64) + learning.nu * seen
        self.values[moved] = np.clip(h, learning.floor, float(_LARGEST_CURVATURE)).astype(np.float32)

    def within(self, start: int, stop: int) -> tuple[int, int, NDArray[np.int64]]:
        """Return a piece's first group, the one after its last, and their edges, counted from its start."""
        first = int(np.searchsorted(self.starts, start, side="right")) - 1
        last = int(np.searchsorted(self.starts, stop, side="left"))
        edges = np.append(self.starts[first:last], stop)
        edges[0] = start
        return first, last, edges - start

    def _bits(self, first: int, last: int) -> NDArray[np.uint16]:
        words = self.values[first:last].view(np.uint32) + np.uint32(0x8000)
        return (words >> np.uint32(16)).astype(np.uint16)


def groups_of(tensors: Sequence[tuple[int, int]], widths: Sequence[int], size: int) -> Shared:
    """Return groups with a curvature of 1; the gap after a tensor belongs to its last group.

    Args:
        tensors: Where each lies, (start, stop) in order; none for a single group.
        widths: Elements of a group in each tensor, which go into the tensor without a rest.
        size: Elements of the whole vector.
    """
    starts = [np.arange(a, b, width) for (a, b), width in zip(tensors, widths, strict=True)]
    joined = np.concatenate(starts).astype(np.int64) if starts else np.zeros(1, np.int64)
    joined[0] = 0
    return Shared(joined, np.ones(joined.size, np.float32), size)


def scales(weights: NDArray[np.float32], segments: Sequence[Segment], groups: Shared, floor: float) -> None:
    """Set the values so that each group's noise is as large as its weights: h = mean w^2 / the group's mean.

    Args:
        weights: Flat float32 vector on the grid.
        segments: Its grids.
        groups: Changed in place.
        floor: Least mean square of a group, as a share of that of all weights; keeps zeros in motion.
    """
    squares = np.zeros(groups.starts.size, np.float64)
    for segment in segments:
        high = np.zeros(groups.starts.size, np.int64)
        low = np.zeros(groups.starts.size, np.int64)
        for start, stop, exponent in chunks([segment]):
            first, last, edges = groups.within(start, stop)
            steps = (weights[start:stop] * step_scale(exponent)).astype(np.int64)
            steps *= steps  # up to 2**48: two sums of whole numbers, in whatever order
            add_runs(high[first:last], steps >> 24, edges)
            add_runs(low[first:last], steps & 0xFFFFFF, edges)
        step = 1.0 / float(step_scale(segment.exponent))
        squares += (high * 2.0**24 + low) * (step * step)
    whole = 0.0
    for square in squares.tolist():
        whole += square
    if whole <= 0.0:
        groups.values[:] = 1.0
        return
    shares = squares / np.diff(np.append(groups.starts, groups.size)) / (whole / groups.size)
    groups.values[:] = 1.0 / np.maximum(shares, floor)


def learn_each(
    curvature: NDArray[np.uint16],
    descent: NDArray[np.float32],
    words: NDArray[np.uint32],
    learning: Learning,
) -> NDArray[np.uint16]:
    """Return the curvature after a round, in bfloat16 rounded up or down by the lower 16 random bits.

    Nearest rounding would never move h once nu times its change is under 0.4 %.
    """
    h = bf16_to_float(curvature) * np.float32(1.0 - learning.nu)
    np.clip(descent, -_LARGEST_DESCENT, _LARGEST_DESCENT, out=descent)
    descent *= descent
    descent *= np.float32(learning.nu)
    h += descent
    np.clip(h, np.float32(learning.floor), _LARGEST_CURVATURE, out=h)
    return ((h.view(np.uint32) + (words & np.uint32(0xFFFF))) >> np.uint32(16)).astype(np.uint16)


def sparse_mask(size: int, seed: int, kept: float) -> NDArray[np.uint16]:
    """Return a curvature that lets a share of the weights move, the same in every round of a run."""
    words = hash_words(NoiseKey(mix64(seed), 0, 0, _MASK), 0, size)
    mask = np.full(size, _STILL_BF16, np.uint16)
    mask[words < kept * 4294967296.0] = ONE_BF16
    return mask
