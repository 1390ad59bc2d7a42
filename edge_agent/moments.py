"""Update rules that remember: momentum, Adam, and the running mean of the weights.

What they remember is rebuilt by replay from the scalars alone, elementwise in float32 and in a fixed
order, so that every replica has the same bits. Knows one piece of the flat vector at a time; what the
scalars are and where the piece lies is the caller's business.

Source: Kingma and Ba, "Adam", arXiv 1412.6980, algorithm 1, the decay added to the gradient; Zhang et al.,
"Revisiting Zeroth-Order Optimization", arXiv 2402.11592, for both with the mean of G z.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Clock", "descend", "follow"]

_LARGEST = np.float32(1e15)


@dataclass
class Clock:
    """Powers of Adam's two constants: how much of a moment is still missing.

    Attributes:
        first: beta1 to the number of rounds so far.
        second: The same of beta2.
    """

    first: float = 1.0
    second: float = 1.0

    def tick(self, constants: Mapping[str, float]) -> None:
        """Count a round."""
        self.first *= constants.get("beta1", 1.0)
        self.second *= constants.get("beta2", 1.0)


def descend(
    gradient: NDArray[np.float32],
    weights: NDArray[np.float32],
    moments: NDArray[np.float32],
    clock: Clock,
    constants: Mapping[str, float],
) -> NDArray[np.float32]:
    """Take a gradient in and return the direction of descent, before the learning rate.

    Args:
        gradient: Estimate for a piece of the vector, shape (n,); may be overwritten.
        weights: The piece itself, only read.
        moments: One row for momentum or for past updates that are only remembered, two for Adam: shape
            (rows, n), changed in place.
        clock: After this round's tick.
        constants: The method's, by name.
    """
    np.clip(gradient, -_LARGEST, _LARGEST, out=gradient)
    if "memory" in constants:
        moments[0] *= np.float32(constants["memory"])
        moments[0] += gradient
        return gradient
    if "beta1" not in constants and "momentum" not in constants:
        return gradient
    if "momentum" in constants:
        moments[0] *= np.float32(constants["momentum"])
        moments[0] += gradient
        return moments[0].copy()
    clip = constants.get("clip", 0.0)
    if clip > 0:
        np.clip(gradient, -np.float32(clip), np.float32(clip), out=gradient)
    if constants.get("decay", 0.0) > 0:
        gradient += np.float32(constants["decay"]) * weights
    first, second = moments[0], moments[1]
    first *= np.float32(constants["beta1"])
    first += np.float32(1.0 - constants["beta1"]) * gradient
    gradient *= gradient
    second *= np.float32(constants["beta2"])
    second += np.float32(1.0 - constants["beta2"]) * gradient
    root = np.sqrt(second / np.float32(1.0 - clock.second))
    root += np.float32(constants["stabiliser"])
    return first / np.float32(1.0 - clock.first) / root


def follow(average: NDArray[np.float32], weights: NDArray[np.float32], share: float) -> None:
    """Move a running mean of the weights: average <- share * average + (1 - share) * weights, in place."""
    average *= np.float32(share)
    average += np.float32(1.0 - share) * weights
