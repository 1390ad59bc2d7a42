"""The last linear layer, whose gradient a forward pass gives away.

Under cross-entropy the gradient of the last layer is [(p - y)' f / n ; mean(p - y)], with the features f
and the softmax p that every forward pass computes. So some of its coordinates are sent as they are
(exact scalars), and no perturbation needs to move that layer. This module knows where the layer lies
and which of its coordinates a step takes; the graph computes the gradient, replay moves the weights.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edge_agent.grid import Segment
from edge_agent.noise import NoiseKey, hash_words, mix64
from edge_agent.plan import RoundPlan

__all__ = ["Span", "chosen", "flat_indices", "head_size", "outside"]

Span = tuple[int, int]

_ORDER = 0x4EAD << 32  # beyond every perturbation number, so that no noise has this key


def head_size(spans: Sequence[Span]) -> int:
    """Return how many weights the spans (start, stop) of the flat vector hold."""
    size = 0
    for start, stop in spans:
        size += stop - start
    return size


def chosen(plan: RoundPlan, step: int, size: int) -> NDArray[np.int64]:
    """Return which coordinates of the layer a step's exact scalars are: int64 of shape (plan.exact,).

    All are gone through in a shuffled order before the first comes again; the order of each pass follows
    from the key alone.

    Args:
        plan: With the number of exact scalars and the seed.
        step: Local step.
        size: Weights of the layer.

    Raises:
        ValueError: More are asked for than the layer has.
    """
    if plan.exact > size:
        raise ValueError(f"{plan.exact} exact scalars of a layer with {size} weights")
    first = (plan.round * plan.steps + step) * plan.exact
    positions = np.arange(first, first + plan.exact, dtype=np.int64)
    passes, places = positions // size, positions % size
    taken = np.empty(plan.exact, np.int64)
    for number in sorted(set(passes.tolist())):
        words = hash_words(NoiseKey(mix64(plan.seed), number, 0, _ORDER), 0, size)
        taken[passes == number] = np.argsort(words, kind="stable")[places[passes == number]]
    return taken


def flat_indices(coordinates: NDArray[np.int64], spans: Sequence[Span]) -> NDArray[np.int64]:
    """Return where coordinates of the layer, counted through its spans, lie in the flat vector."""
    indices = np.empty_like(coordinates)
    first = 0
    for start, stop in spans:
        inside = (coordinates >= first) & (coordinates < first + stop - start)
        indices[inside] = coordinates[inside] - first + start
        first += stop - start
    return indices


def outside(segments: Sequence[Segment], spans: Sequence[Span]) -> list[Segment]:
    """Return the segments without what the ascending spans cover."""
    left: list[Segment] = []
    for segment in segments:
        start = segment.start
        for first, last in spans:
            if last <= start or first >= segment.stop:
                continue
            if first > start:
                left.append(Segment(start, first, segment.exponent))
            start = min(last, segment.stop)
        if start < segment.stop:
            left.append(Segment(start, segment.stop, segment.exponent))
    return left
