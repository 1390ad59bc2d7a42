"""Directions other than plain noise: of low rank, or with one of them along where the weights went.

Like plain noise they are whole numbers, of mean 0 and variance 1, which every replica makes from a key by
integer arithmetic alone, piece by piece. The compiled kernel knows plain noise only; these are made by numpy,
to the same bits on every machine. Does not know what a direction is used for.

Source: a low rank after Chen et al., "Enhancing Zeroth-order Fine-tuning for Language Models with Low-rank
Structures", arXiv 2410.07698; a guided direction after Maheswaranathan et al., "Guided evolutionary
strategies", arXiv 1806.10230, with one direction of the past in place of a subspace.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_agent.noise import NoiseKey, values

__all__ = ["Guided", "LowRank"]

_LEFT, _RIGHT = 0x1EF7 << 40, 0x2187 << 40  # beyond every perturbation number: no noise has these keys


@dataclass(frozen=True)
class LowRank:
    """Noise whose part in each matrix is sum_r u_r v_r', r = 1..rank; elsewhere the sum of as many noises.

    Its variance is ``rank``: whoever uses it divides by the root.

    Attributes:
        rank: Products that are summed, 1 to 16.
        tensors: Where each tensor lies, (start, stop), in order.
        widths: Elements of a row of each; a tensor of one row is no matrix.
    """

    rank: int
    tensors: Sequence[tuple[int, int]]
    widths: Sequence[int]

    def __call__(self, key: NoiseKey, start: int, size: int) -> NDArray[np.int32]:
        """Return elements ``start`` to ``start + size`` of the direction ``key``."""
        found = np.empty(size, np.int32)
        covered = start
        for (first, last), width in zip(self.tensors, self.widths, strict=True):
            a, b = max(first, start), min(last, start + size)
            if a >= b or width == last - first:
                continue
            found[covered - start : a - start] = self._sum(key, covered, a - covered)
            top, bottom = (a - first) // width, -(-(b - first) // width)
            products = np.zeros((bottom - top, width), np.int8)  # at most 4 * 16
            for number in range(self.rank):
                left = values(_factor(key, _LEFT, number), first + top, bottom - top).astype(np.int8)
                right = values(_factor(key, _RIGHT, number), first, width).astype(np.int8)
                products += left[:, None] * right
            skipped = a - first - top * width
            found[a - start : b - start] = products.reshape(-1)[skipped : skipped + b - a]
            covered = b
        found[covered - start :] = self._sum(key, covered, start + size - covered)
        return found

    def _sum(self, key: NoiseKey, start: int, size: int) -> NDArray[np.int32]:
        total = np.zeros(size, np.int32)
        for number in range(self.rank if size else 0):
            total += values(_factor(key, _LEFT, number), start, size)
        return total


def _factor(key: NoiseKey, side: int, number: int) -> NoiseKey:
    return key._replace(perturbation=key.perturbation + side + (number << 32))


@dataclass(frozen=True)
class Guided:
    """Noise, but the first perturbation of a step is the sign of what is remembered; noise where that is 0.

    Attributes:
        memory: Float32, one a weight: a running sum of past updates; only read.
    """

    memory: NDArray[np.float32]

    def __call__(self, key: NoiseKey, start: int, size: int) -> NDArray[np.int32]:
        """Return elements ``start`` to ``start + size`` of the direction ``key``."""
        noise = values(key, start, size)
        if key.perturbation:
            return noise
        signs = np.sign(self.memory[start : start + size]).astype(np.int32)
        return np.where(signs == 0, noise, signs)
