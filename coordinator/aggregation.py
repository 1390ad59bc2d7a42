"""Many agents' scalars into one: the only place where sums over agents are taken.

In float64, in the order of the agents' numbers, rounded to float32 once; what comes out is logged,
and every replica uses the logged value.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from edge_agent.wire import Reply

__all__ = ["mean_loss", "mean_scalars"]


def mean_scalars(replies: Mapping[int, Reply]) -> NDArray[np.float32]:
    """Return the mean of the agents' scalars, each weighted by its samples: float32 of shape (K * P,).

    Args:
        replies: By agent number; at least one, none failed, all with the same number of scalars.
    """
    order = sorted(replies)
    total = np.zeros(replies[order[0]].scalars.size, np.float64)
    samples = 0
    for number in order:
        total += replies[number].samples * replies[number].scalars.astype(np.float64)
        samples += replies[number].samples
    return (total / samples).astype(np.float32)


def mean_loss(replies: Mapping[int, Reply]) -> float:
    """Return the mean loss over the samples of all replies."""
    order = sorted(replies)
    samples = sum(replies[number].samples for number in order)
    return sum(replies[number].samples * replies[number].loss for number in order) / samples
