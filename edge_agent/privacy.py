"""Scalars that say little of any one sample: clipped, with Gaussian noise that nobody can subtract.

Knows vectors, and random bytes that the caller brings: the noise of perturbations is public (``noise``),
this one is secret. Does not know what privacy it buys (the coordinator's ``privacy`` counts that).

Source: Dwork & Roth, "The Algorithmic Foundations of Differential Privacy", 2014, appendix A, the Gaussian
mechanism; Box & Muller, 1958, for normal values.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Privacy", "normal", "privatise", "read_privacy"]


@dataclass(frozen=True)
class Privacy:
    """What is done to a reply.

    Attributes:
        clip: Largest Euclidean length of an agent's vector of scalars, > 0.
        noise: Standard deviation of the noise on each scalar, in clips, >= 0.
    """

    clip: float
    noise: float


def read_privacy(control: Mapping[str, Any]) -> Privacy | None:
    """Return what a control message asks, None where it asks nothing.

    Raises:
        ValueError: It asks something that is none.
    """
    told = control.get("privacy")
    if told is None:
        return None
    clip, noise = float(told["clip"]), float(told["noise"])
    if not (0 < clip < math.inf and 0 <= noise < math.inf):
        raise ValueError("privacy")
    return Privacy(clip, noise)


def privatise(
    scalars: NDArray[np.float32], privacy: Privacy, secret: Callable[[int], bytes]
) -> NDArray[np.float32]:
    """Return the scalars, shortened to at most ``clip`` and with noise of ``noise * clip``.

    Args:
        scalars: Of shape (n,).
        privacy: What to do.
        secret: Returns so many random bytes, unpredictable to everybody else.
    """
    exact = scalars.astype(np.float64)
    length = math.sqrt(float(exact @ exact))
    shortened = exact * min(1.0, privacy.clip / length) if length > 0 else exact
    noise = privacy.noise * privacy.clip * normal(exact.size, secret)
    return (shortened + noise).astype(np.float32)


def normal(count: int, secret: Callable[[int], bytes]) -> NDArray[np.float64]:
    """Return independent standard normal values, float64 of shape (count,)."""
    words = np.frombuffer(secret(16 * count), "<u8").reshape(2, count)
    # 53 bits each; the first is never zero, whose logarithm there is not.
    first, second = ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return np.asarray(np.sqrt(-2.0 * np.log(first)) * np.cos(2.0 * np.pi * second))
