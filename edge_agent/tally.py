"""Sums of whole numbers over runs of neighbours: integers, so the same in any order and on every machine.

Where replicas must agree bit for bit nothing else is summed by numpy, whose floats depend on the order.
"""

import numpy as np
from numpy.typing import NDArray

__all__ = ["add_runs"]


def add_runs(totals: NDArray[np.int64], numbers: NDArray[np.int64], edges: NDArray[np.int64]) -> None:
    """Add to each total the sum of its run of numbers, in place.

    Args:
        totals: Shape (runs,).
        numbers: Shape (n,); no sum of them may leave 64 bits.
        edges: Where the runs begin, ascending from 0, and at the end n: shape (runs + 1,). None is empty.

    Raises:
        ValueError: Something is no array of int64.
    """
    if any(array.dtype != np.int64 for array in (totals, numbers, edges)):
        raise ValueError(f"only whole numbers are summed, got {numbers.dtype} into {totals.dtype}")
    totals += np.add.reduceat(numbers, edges[:-1])
