"""The last linear layers, whose gradients a forward pass gives away.

Under cross-entropy the gradient of the last layer is [(p - y)' f / n ; mean(p - y)], with the features f
and the softmax p that every forward pass computes; one step further back is the layer before. So some of
their coordinates are sent as they are (exact scalars), and no perturbation needs to move these layers.
This module knows which of their coordinates a step takes; the graph computes the gradients, replay moves
the weights.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edge_agent.grid import Segment
from edge_agent.noise import NoiseKey, hash_words, mix64
from edge_agent.plan import RoundPlan

__all__ = ["Span", "chosen", "flat_indices", "head_size", "outside", "taking_part"]

Span = tuple[int, int]

_LONGEST_TURN = 100
_ORDER = 0x4EAD << 32  # beyond every perturbation number, so that no noise has this key


def head_size(spans: Sequence[Span]) -> int:
    """Return how many weights the spans (start, stop) of the flat vector hold."""
    size = 0
    for start, stop in spans:
        size += stop - start
    return size


def chosen(plan: RoundPlan, step: int, sizes: Sequence[int]) -> NDArray[np.int64]:
    """Return which coordinates a step's exact scalars are: int64 of shape (plan.exact,), layer by layer.

    All of a layer are gone through in a shuffled order before the first comes again; the order of each pass
    follows from the key alone. Of two layers the first, which is the last of the net, moves whole.

    Args:
        plan: With the number of exact scalars and the seed.
        step: Local step.
        sizes: Weights of each layer; coordinates are counted through all of them.

    Raises:
        ValueError: More are asked for than the layers have.
    """
    if plan.exact > sum(sizes):
        raise ValueError(f"{plan.exact} exact scalars of layers with {sum(sizes)} weights")
    first = min(plan.exact, sizes[0])
    parts = [_turn(plan, step, first, sizes[0], 0)]
    if len(sizes) > 1:
        parts.append(sizes[0] + _turn(plan, step, plan.exact - first, sizes[1], 1))
    return np.concatenate(parts)


def _turn(plan: RoundPlan, step: int, count: int, size: int, layer: int) -> NDArray[np.int64]:
    """Return the next ``count`` of a layer's ``size`` coordinates."""
    first = (plan.round * plan.steps + step) * count
    positions = np.arange(first, first + count, dtype=np.int64)
    passes, places = positions // size, positions % size
    taken = np.empty(count, np.int64)
    for number in sorted(set(passes.tolist())):
        words = hash_words(NoiseKey(mix64(plan.seed), number, layer, _ORDER), 0, size)
        taken[passes == number] = np.argsort(words, kind="stable")[places[passes == number]]
    return taken


def taking_part(exact: int, sizes: Sequence[int]) -> int:
    """Return how many of the layers, the last of the net first, send exact scalars.

    The layer before the last takes part if, with the last moving whole, what is left of the scalars brings
    each of its coordinates its turn within a hundred rounds; else it is perturbed like the rest.
    """
    if len(sizes) > 1 and (exact - sizes[0]) * _LONGEST_TURN >= sizes[1]:
        return 2
    return 1


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
