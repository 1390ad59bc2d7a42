"""Scalars as if a round's directions had been orthogonal: the gradient's projection on their span.

The mean of G z over P directions counts what two of them share twice. With the Gram matrix Z Z' of the
directions, d (Z Z')^-1 G in the place of G makes the step the orthogonal projection of the gradient on
their span, stretched by d / P like the mean. The noise is whole numbers, hence the Gram matrix is exact in
any order and on every machine; what follows are P**3 Python floats, each rounded once. Knows nothing of
weights.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edge_agent.noise import NoiseKey, values

__all__ = ["orthogonal"]

_CHUNK = 1 << 16


def orthogonal(scalars: NDArray[np.float32], keys: Sequence[NoiseKey], size: int) -> NDArray[np.float32]:
    """Return d (Z Z')^-1 G as float32 of shape (P,); G itself where directions depend on each other.

    Args:
        scalars: G, shape (P,).
        keys: Of the P directions.
        size: Elements d of a direction, > P.
    """
    gram = np.zeros((len(keys), len(keys)), np.int64)
    for start in range(0, size, _CHUNK):
        z = np.stack([values(key, start, min(_CHUNK, size - start)) for key in keys]).astype(np.int64)
        gram += z @ z.T
    rows = [[*map(float, row), float(scalar)] for row, scalar in zip(gram.tolist(), scalars, strict=True)]
    for place, row in enumerate(rows):  # symmetric and positive definite: no pivoting is needed
        if row[place] < 1e-6 * size:
            return scalars
        for other in rows[place + 1 :]:
            factor = other[place] / row[place]
            for column in range(place, len(row)):
                other[column] -= factor * row[column]
    solved = [0.0] * len(rows)
    for place in reversed(range(len(rows))):
        known = 0.0
        for column in range(place + 1, len(rows)):
            known += rows[place][column] * solved[column]
        solved[place] = (rows[place][-1] - known) / rows[place][place]
    return np.array([size * value for value in solved], np.float64).astype(np.float32)
