"""The fixed-point grid on which a perturbation can be undone exactly.

Weights are float32, but each is a whole number of grid steps, and so is whatever is added to it.
Below 2**24 steps float32 adds whole numbers without rounding, hence w + a - 2a + a gives w back, bit
for bit, with no second copy. A *segment* is a run of the flat weight vector with one grid.

    step = 2**(exponent - 24);  limit = 2**exponent;  an update keeps |w| <= 3/4 limit

The quarter in between is room for what is added and taken away within a round: a perturbation of at
most 1/8 limit and the private moves of all local steps together of at most 1/8 limit.

Every operation is elementwise and in a fixed order: integers, then float32 + - * / and sqrt.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_agent.noise import UNIT, NoiseKey, byte_sums, hash_words

__all__ = [
    "RESERVE_STEPS",
    "Segment",
    "Term",
    "bf16_to_float",
    "chunks",
    "inverse_root",
    "move",
    "perturb",
    "plan_segments",
    "round_update",
    "snap",
    "step_scale",
    "weighted_noise",
]

RESERVE_STEPS = 1 << 21
"""Grid steps by which a perturbation, or all private moves of a round, may displace a weight."""

WEIGHT_STEPS = 3 << 22
"""Grid steps beyond which an update does not move a weight: 3/4 of 2**24."""

_SMALLEST_EXPONENT = 2
_HEADROOM_BITS = 2
_CHUNK = 1 << 15


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


def bf16_to_float(curvature: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Return bfloat16 bits (uint16) as float32, exactly."""
    return (curvature.astype(np.uint32) << np.uint32(16)).view(np.float32)


def inverse_root(curvature: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Return 1 / sqrt(h) of bfloat16 curvature bits as float32, each operation rounded once."""
    return np.float32(1) / np.sqrt(bf16_to_float(curvature))


def perturb(
    weights: NDArray[np.float32],
    segments: Sequence[Segment],
    terms: Sequence[Term],
    *,
    epsilon: float,
    curvature: NDArray[np.uint16] | None = None,
) -> None:
    """Add ``sum_t times_t * epsilon * z_t`` to the weights, in place and exactly undoable.

    z is the noise of the key, divided by sqrt(h) where there is curvature, and epsilon * z is rounded
    to whole grid steps *before* it is multiplied. Several terms make one pass: to undo
    the last perturbation and apply the next, pass both.

    Args:
        weights: Flat float32 vector on the grid.
        segments: Its grids.
        terms: What to add; the absolute ``times`` add up to at most 4.
        epsilon: Step of the finite difference, > 0.
        curvature: bfloat16 bits, shape of ``weights``; None for h = 1.
    """
    amount = np.float32(epsilon * UNIT)
    limit = np.float32(RESERVE_STEPS)
    for start, stop, exponent in chunks(segments):
        scale = step_scale(exponent)
        root = None if curvature is None else inverse_root(curvature[start:stop])
        total = np.zeros(stop - start, np.float32)
        for key, times in terms:
            steps = byte_sums(hash_words(key, start, stop - start))
            steps *= amount * scale
            if root is not None:
                steps *= root
            np.clip(steps, -limit, limit, out=steps)
            np.rint(steps, out=steps)
            steps *= np.float32(times)
            total += steps
        total /= scale
        weights[start:stop] += total


def weighted_noise(
    keys: Sequence[NoiseKey], scalars: Sequence[np.float32], start: int, size: int
) -> tuple[NDArray[np.float32], NDArray[np.uint32]]:
    """Return ``sum_p scalar_p * u_p`` (byte sums, not yet scaled) and 32 spare random bits an element.

    The sum is taken in float32 in the order of the keys. The spare bits are the exclusive or of all
    hash words, scrambled once more, so that they do not follow the byte sums.
    """
    total = np.zeros(size, np.float32)
    spare = np.zeros(size, np.uint32)
    for key, scalar in zip(keys, scalars, strict=True):
        words = hash_words(key, start, size)
        spare ^= words
        total += byte_sums(words) * np.float32(scalar)
    spare *= np.uint32(0x9E3779B1)
    spare ^= spare >> np.uint32(15)
    return total, spare


def round_update(steps: NDArray[np.float32], spare: NDArray[np.uint32], limit: int) -> NDArray[np.float32]:
    """Round an update, in grid steps, to whole steps: up or down with the odds that keep its mean.

    The 16 upper spare bits decide, so that every replica decides alike; updates far below half a step
    still move weights, in the mean by what they should.

    Args:
        steps: Update in grid steps, float32; overwritten.
        spare: Random words from :func:`weighted_noise`.
        limit: Largest displacement in grid steps; at most 2**21.
    """
    np.clip(steps, -np.float32(limit), np.float32(limit), out=steps)
    dither = (spare >> np.uint32(16)).astype(np.float32) * np.float32(2.0**-16)
    steps += dither + np.float32(2.0**-17 - 0.5)
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
    curvature: NDArray[np.uint16] | None = None,
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
        curvature: As in :func:`perturb`.
    """
    amount = np.float32(rate * UNIT / len(keys))
    for start, stop, exponent in chunks(segments):
        scale = step_scale(exponent)
        total, spare = weighted_noise(keys, scalars, start, stop - start)
        total *= amount * scale
        if curvature is not None:
            total *= inverse_root(curvature[start:stop])
        steps = round_update(total, spare, limit)
        steps /= np.float32(direction) * scale
        weights[start:stop] -= steps
