"""The fixed-point grid on which a perturbation can be undone exactly.

Weights are float32, but each is a whole number of grid steps, and so is whatever is added to it.
Below 2**24 steps float32 adds whole numbers without rounding, hence w + a - 2a + a gives w back, bit
for bit, with no second copy. A *segment* is a run of the flat weight vector with one grid.

    step = 2**(exponent - 24);  limit = 2**exponent;  an update keeps |w| <= 3/4 limit

The quarter in between is room for what is added and taken away within a round: a perturbation of at
most 1/8 limit and the private moves of all local steps together of at most 1/8 limit.

Every operation is elementwise and in a fixed order: integers, then float32 + - * and division by
powers of two. What numpy computes here defines the bits; the compiled kernel, where there is one,
gives the same.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from edge_agent.native.kernel import Bits, Displace, find_kernel
from edge_agent.noise import CHUNK, NoiseKey, chunk_words, values

__all__ = [
    "NO_LIMIT",
    "RESERVE_STEPS",
    "WEIGHT_STEPS",
    "Noise",
    "Segment",
    "Term",
    "bf16_to_float",
    "chunks",
    "displacer",
    "finite",
    "inverse_root",
    "move",
    "nudge",
    "perturb",
    "plan_segments",
    "round_update",
    "rounding_words",
    "snap",
    "step_scale",
    "weighted_noise",
    "whole_scalars",
]

RESERVE_STEPS = 1 << 21
"""Grid steps by which a perturbation, or all private moves of a round, may displace a weight."""

WEIGHT_STEPS = 3 << 22
"""Grid steps beyond which an update does not move a weight: 3/4 of 2**24."""

NO_LIMIT = 1 << 26
"""Grid steps that no weight comes near."""

_LARGEST_FACTOR = 1e30
_LARGEST_WHOLE = 127 * 128
_ROUNDING = 1 << 32
_MULTIPLIERS = np.array(
    [0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F, 0x165667B1, 0xD3A2646D, 0xFD7046C5, 0xB55A4F09],
    np.uint32,
)[:, None]
_SMALLEST_EXPONENT = 2
_HEADROOM_BITS = 2
_CHUNK = 1 << 15


Noise: TypeAlias = Callable[[NoiseKey, int, int], NDArray[np.int32]]
"""Makes a piece of a direction of its key, start and size, as :func:`edge_agent.noise.values` does."""


class Segment(NamedTuple):
    """Elements ``start`` to ``stop`` of the flat vector lie on multiples of 2**(exponent - 24)."""

    start: int
    stop: int
    exponent: int


class Term(NamedTuple):
    """``times`` times the perturbation ``key``; a small whole number, negative to undo."""

    key: NoiseKey
    times: int


def plan_segments(weights: NDArray[np.float32], spans: Sequence[tuple[int, int]]) -> list[Segment]:
    """Choose a grid for each span (start, stop) of the flat vector and join neighbours that agree.

    A weight may grow to three times the largest of its tensor, or to 3 where that is more: most nets
    then have a single segment with a step of 2**-22 = 2.4e-7.

    Args:
        weights: Flat float32 vector, finite.
        spans: Ascending (start, stop) pairs that together cover the vector.

    Raises:
        ValueError: The spans do not cover the vector in order.
    """
    segments: list[Segment] = []
    for start, stop in spans:
        if start != (segments[-1].stop if segments else 0) or stop <= start:
            raise ValueError(f"spans must cover the vector in order, got ({start}, {stop})")
        largest = float(np.abs(weights[start:stop]).max())
        exponent = max(_SMALLEST_EXPONENT, int(np.frexp(largest)[1]) + _HEADROOM_BITS)
        if segments and segments[-1].exponent == exponent:
            start = segments.pop().start
        segments.append(Segment(start, stop, exponent))
    if not segments or segments[-1].stop != weights.size:
        raise ValueError(f"spans must cover all {weights.size} weights")
    return segments


def snap(weights: NDArray[np.float32], segments: Sequence[Segment]) -> None:
    """Move every weight to the nearest point of its grid, in place; -0.0 becomes 0.0."""
    for start, stop, scale in chunks(segments):
        piece = weights[start:stop]
        steps = np.clip(np.rint(piece * step_scale(scale)), -WEIGHT_STEPS, WEIGHT_STEPS)
        piece[...] = steps / step_scale(scale) + np.float32(0)


def chunks(segments: Sequence[Segment]) -> Iterator[tuple[int, int, int]]:
    """Yield (start, stop, exponent) pieces, small enough for a cache, that cover the segments in order."""
    for segment in segments:
        for start in range(segment.start, segment.stop, _CHUNK):
            yield start, min(start + _CHUNK, segment.stop), segment.exponent


def step_scale(exponent: int) -> np.float32:
    """Return 1 / step = 2**(24 - exponent), exact in float32."""
    return np.float32(2.0 ** (24 - exponent))


def finite(factor: float) -> np.float32:
    """Return a factor >= 0 as float32, at most 1e30, so that no product with it is 0 times infinity."""
    return np.float32(min(factor, _LARGEST_FACTOR))


def bf16_to_float(curvature: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Return bfloat16 bits (uint16) as float32, exactly."""
    return (curvature.astype(np.uint32) << np.uint32(16)).view(np.float32)


def inverse_root(curvature: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Return 1 / sqrt(h) of bfloat16 curvature bits as float32, to 0.066 %.

    bfloat16 itself resolves no more than 0.4 %. A start from the exponent bits and one Newton step, each
    operation rounded once: two divisions' worth faster than a root and a division on small cores.

    Source: the constants are Kadlec's ("Improving the fast inverse square root", 2010).
    """
    h = bf16_to_float(curvature)
    y = (np.uint32(0x5F1FFFF9) - (h.view(np.uint32) >> np.uint32(1))).view(np.float32)
    h *= y
    h *= y
    np.subtract(np.float32(2.38924456), h, out=h)
    h *= np.float32(0.703952253)
    h *= y
    return h


def displacer(
    weights: NDArray[np.float32],
    segments: Sequence[Segment],
    keys: Sequence[NoiseKey],
    *,
    epsilon: float,
    curvature: Bits | None = None,
    threads: int = 1,
    noise: Noise = values,
) -> Displace:
    """Return a function (number, times, following) that displaces weights, in place and exactly undoable.

    It adds ``times * epsilon * z`` of the key of that number, and ``following * epsilon * z`` of the next
    key in the same pass: to undo one perturbation and apply the next. z is the ``noise`` of the key, divided
    by sqrt(h) where there is curvature, and epsilon * z is rounded to whole grid steps *before* it is
    multiplied. The absolute ``times`` and ``following`` add up to at most 4.

    Args:
        weights: Flat float32 vector on the grid.
        segments: Its grids.
        keys: Of the perturbations.
        epsilon: Step of the finite difference, > 0.
        curvature: bfloat16 bits, shape of ``weights``; None for h = 1.
        threads: Threads of the compiled kernel.
        noise: What makes a direction; the compiled kernel knows plain noise alone.
    """
    if noise is values and (kernel := find_kernel()) is not None:
        epsilon = min(epsilon, _LARGEST_FACTOR)
        return kernel.displacer(
            weights, segments, keys, epsilon=epsilon, curvature=curvature, threads=threads
        )
    amount = finite(epsilon)
    limit = np.float32(RESERVE_STEPS)

    def displace(number: int, times: int, following: int = 0, /) -> None:
        terms = [Term(keys[number], times), *([Term(keys[number + 1], following)] if following else [])]
        for start, stop, exponent in chunks(segments):
            scale = step_scale(exponent)
            root = None if curvature is None else inverse_root(curvature[start:stop])
            total = np.zeros(stop - start, np.float32)
            for key, count in terms:
                steps = noise(key, start, stop - start).astype(np.float32)
                steps *= amount * scale
                if root is not None:
                    steps *= root
                np.clip(steps, -limit, limit, out=steps)
                np.rint(steps, out=steps)
                steps *= np.float32(count)
                total += steps
            total /= scale
            weights[start:stop] += total

    return displace


def perturb(
    weights: NDArray[np.float32],
    segments: Sequence[Segment],
    terms: Sequence[Term],
    *,
    epsilon: float,
    curvature: Bits | None = None,
    threads: int = 1,
) -> None:
    """Add one or two terms once; see :func:`displacer`."""
    keys = [term.key for term in terms]
    displace = displacer(weights, segments, keys, epsilon=epsilon, curvature=curvature, threads=threads)
    displace(0, *(term.times for term in terms))


def whole_scalars(scalars: Sequence[np.float32] | NDArray[np.float32]) -> tuple[list[int], float]:
    """Return scalars as whole numbers in [-16256, 16256] and the unit that they count.

    Whole numbers make the sum over perturbations exact in any order, and cheap on every processor; they
    are off by at most 3.1e-5 of the largest scalar.
    """
    exact = np.asarray(scalars).tolist()
    unit = max(map(abs, exact)) / _LARGEST_WHOLE
    if unit == 0.0:
        return [0] * len(exact), 0.0
    return [round(scalar / unit) for scalar in exact], unit


def weighted_noise(
    keys: Sequence[NoiseKey], wholes: Sequence[int], start: int, size: int, noise: Noise = values
) -> NDArray[np.float32]:
    """Return ``sum_p wholes_p * z_p``, exact in int32 for up to 65535 perturbations, as float32."""
    total = np.zeros(size, np.int32)
    for key, whole in zip(keys, wholes, strict=True):
        total += noise(key, start, size) * whole
    return total.astype(np.float32)


def rounding_words(step_key: NoiseKey, start: int, size: int) -> NDArray[np.uint32]:
    """Return random words by which the update of a local step is rounded: shape (size,).

    Args:
        step_key: Any key of the step; its perturbation number is not looked at.
        start: First element.
        size: Number of elements.
    """
    words = chunk_words(step_key._replace(perturbation=_ROUNDING), start, size) * _MULTIPLIERS
    return words.reshape(-1)[start % CHUNK :][:size]


def round_update(steps: NDArray[np.float32], words: NDArray[np.uint32], limit: int) -> NDArray[np.float32]:
    """Round an update, in grid steps, to whole steps: up or down with the odds that keep its mean.

    The upper 23 random bits decide, so that every replica decides alike; updates far below half a step
    still move weights, in the mean by what they should.

    Args:
        steps: Update in grid steps, float32; overwritten.
        words: From :func:`rounding_words`.
        limit: Largest displacement in grid steps; at most 2**21.
    """
    np.clip(steps, -np.float32(limit), np.float32(limit), out=steps)
    one_to_two = ((words >> np.uint32(9)) | np.uint32(0x3F800000)).view(np.float32)
    steps += one_to_two - np.float32(1.5)
    return np.rint(steps, out=steps)


def move(
    weights: NDArray[np.float32],
    segments: Sequence[Segment],
    keys: Sequence[NoiseKey],
    scalars: Sequence[np.float32],
    *,
    rate: float,
    limit: int,
    direction: int,
    curvature: Bits | None = None,
    threads: int = 1,
    noise: Noise = values,
) -> None:
    """Make a private step ``w -= rate / P * sum_p g_p z_p`` that the same call takes back exactly.

    Args:
        weights: Flat float32 vector on the grid, changed in place.
        segments: Its grids.
        keys: The step's P perturbations.
        scalars: Their projected gradients.
        rate: Learning rate.
        limit: Grid steps that one move may displace a weight; ``RESERVE_STEPS // K`` for K local steps.
        direction: +1 makes the move, -1 takes it back.
        curvature: As in :func:`displacer`.
        threads: Threads of the compiled kernel.
        noise: As in :func:`displacer`.
    """
    wholes, unit = whole_scalars(scalars)
    amount = finite(rate * unit / len(keys))
    if noise is values and (kernel := find_kernel()) is not None:
        kernel.update(
            weights,
            segments,
            [keys],
            [wholes],
            [amount],
            largest_move=limit,
            largest_weight=NO_LIMIT,
            direction=direction,
            curvature=curvature,
            threads=threads,
        )
        return
    for start, stop, exponent in chunks(segments):
        scale = step_scale(exponent)
        steps = weighted_noise(keys, wholes, start, stop - start, noise)
        steps *= amount * scale
        if curvature is not None:
            steps *= inverse_root(curvature[start:stop])
        round_update(steps, rounding_words(keys[0], start, stop - start), limit)
        steps /= np.float32(direction) * scale
        weights[start:stop] -= steps


def nudge(
    weights: NDArray[np.float32],
    segments: Sequence[Segment],
    indices: NDArray[np.int64],
    changes: NDArray[np.float32],
    words: NDArray[np.uint32],
    *,
    limit: int,
    direction: int = 1,
    largest: int = NO_LIMIT,
) -> None:
    """Subtract changes, rounded to the grid, from single weights; the same call takes it back exactly.

    Args:
        weights: Flat float32 vector on the grid, changed in place.
        segments: Grids of the whole vector.
        indices: Which weights, none twice.
        changes: What to subtract from each, float32.
        words: Random words by which it is rounded, one for each.
        limit: Grid steps that a weight may be displaced by.
        direction: +1, or -1 to take it back.
        largest: Grid steps beyond which no weight moves; a call that is to be taken back has no limit.
    """
    table = np.array([step_scale(segment.exponent) for segment in segments], np.float32)
    starts = np.array([segment.start for segment in segments], np.int64)
    scale = table[np.searchsorted(starts, indices, side="right") - 1]
    steps = round_update(changes * scale, words, limit)
    steps /= np.float32(direction) * scale
    bound = np.float32(largest) / scale
    weights[indices] = np.clip(weights[indices] - steps, -bound, bound)
