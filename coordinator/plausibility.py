"""Whether an agent's scalars can have come from samples at all, by the scalars of the classes.

A loss is a mean over samples, hence an agent's vector of scalars is u = R p + noise, where the columns
of R are the classes' (``reference``) and p, its label shares, is never negative; how uneven the labels are
does not matter. Two fits by non-negative least squares over the last fifty rounds or so, one to u and one to
-u, give the logarithm of a likelihood ratio. It is far above zero for an agent that measures, far below for
one that turns its signs, and about zero for noise.

Source: Wald, "Sequential Tests of Statistical Hypotheses", 1945, for the ratio; the mixture is our own.
"""

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

__all__ = ["Plausibility"]

_Floats = NDArray[np.float64]

_FORGETTING = 0.98
_LONGEST = 3.0  # in typical lengths: a huge vector must not count as huge evidence
_SWEEPS = 40
_RIDGE = 1e-3
_CHANCE = 1e-6  # of calling one honest agent a liar, by the ratio
_CONTRADICTION = 0.2  # samples of its own that a net has learned by heart make an agent seem a little turned
_NOTHING, _SOMETHING = 0.02, 0.3  # shares explained: of noise, and of a fleet that measures
_SCALARS_A_CLASS = 25  # noise has a share of about classes / (2 scalars)
_CLEAR = 0.3


class Plausibility:
    """The evidence on each agent of a fleet."""

    def __init__(self) -> None:
        self._squares: dict[int, _Floats] = {}  # sums of R^T R, of R^T u, of u^T u, and how many scalars
        self._products: dict[int, _Floats] = {}
        self._sizes: dict[int, tuple[float, float]] = {}
        self._ratios: dict[int, float] = {}
        self._shares: dict[int, float] = {}  # of u^T u: explained by mixtures less explained by turned ones

    def observe(self, rows: Mapping[int, _Floats], classes: _Floats) -> None:
        """Take in a round.

        Args:
            rows: By agent number, its scalars of one kind in the first step, (n,).
            classes: Those of the classes, (n, classes).
        """
        order = sorted(rows)
        matrix = np.stack([rows[number] for number in order])
        lengths = np.sqrt((matrix**2).mean(axis=1))
        typical = float(np.median(lengths))
        if not typical > 0:
            return
        shorter = np.minimum(1.0, _LONGEST * typical / np.maximum(lengths, 1e-300)) / typical
        matrix = matrix * shorter[:, None]
        scaled = classes / typical
        square = scaled.T @ scaled
        for number, row in zip(order, matrix, strict=True):
            kept = _FORGETTING if number in self._squares else 0.0
            self._squares[number] = square + (kept * self._squares[number] if kept else 0.0)
            self._products[number] = scaled.T @ row + (kept * self._products[number] if kept else 0.0)
            size, count = self._sizes.get(number, (0.0, 0.0))
            self._sizes[number] = (kept * size + float(row @ row), kept * count + len(row))
        self._judge()

    def ratio(self, number: int) -> float:
        """Return the log-likelihood ratio of measured against turned, 0.0 where nothing is known."""
        return self._ratios.get(number, 0.0)

    def verdict(self, number: int, *, suspected: bool) -> str:
        """Return what is to be said of an agent; empty for nothing.

        Args:
            number: Of the agent.
            suspected: Whether it was so far; then it takes clear evidence to be trusted again.
        """
        ratio, share = self.ratio(number), self._shares.get(number, 0.0)
        typical = float(np.median(list(self._shares.values()))) if self._shares else 0.0
        limit = -math.log(_CHANCE)
        explained = f"samples explain {share:.0%} of them, typical {typical:.0%}"
        if ratio < -limit and share < -_CONTRADICTION:
            return f"its scalars contradict what samples give: log-likelihood ratio {ratio:.0f}"
        if self._much_of(number) and typical > _SOMETHING and share < _NOTHING:
            return f"its scalars have nothing to do with samples: {explained}"
        if suspected and not (ratio > limit and share > _CLEAR * typical):
            return f"nothing speaks for its scalars yet: {explained}"
        return ""

    def _much_of(self, number: int) -> bool:
        """Return whether enough scalars were seen to tell a mixture from noise."""
        products = self._products.get(number)
        return products is not None and self._sizes[number][1] > _SCALARS_A_CLASS * len(products)

    def _judge(self) -> None:
        order = list(self._squares)
        squares = np.stack([self._squares[number] for number in order])
        products = np.stack([self._products[number] for number in order])
        sizes = np.array([self._sizes[number] for number in order])
        plus, minus = _gain(squares, products), _gain(squares, -products)
        # What no mixture explains is the noise of small batches; liars do not move its median.
        noise = max(float(np.median((sizes[:, 0] - plus) / sizes[:, 1])), 1e-12)
        self._ratios = dict(zip(order, ((plus - minus) / (2 * noise)).tolist(), strict=True))
        shares = (plus - minus) / np.maximum(sizes[:, 0], 1e-300)
        self._shares = dict(zip(order, shares.tolist(), strict=True))


def _gain(squares: _Floats, products: _Floats) -> _Floats:
    """Return by how much the best mixture p >= 0 lessens the sum of squares, for each of n agents.

    Coordinate descent on the normal equations: (n, classes, classes) and (n, classes).
    """
    classes = products.shape[1]
    diagonal = np.einsum("icc->ic", squares)
    ridge = _RIDGE * diagonal.mean(axis=1, keepdims=True) + 1e-12
    shares = np.zeros_like(products)
    for _ in range(_SWEEPS):
        for column in range(classes):
            left = products[:, column] - np.einsum("ic,ic->i", squares[:, column], shares)
            step = (left - ridge[:, 0] * shares[:, column]) / (diagonal[:, column] + ridge[:, 0])
            shares[:, column] = np.maximum(0.0, shares[:, column] + step)
    fitted = np.einsum("ic,icd,id->i", shares, squares, shares)
    return np.asarray(2 * (shares * products).sum(axis=1) - fitted)
