"""Weighted sums of scalars as whole numbers: whoever adds them up, in whatever order, gets the same.

A float32 is a multiple of 2^-149, and so is its product with a number of samples; a sum of such products is
a whole number of these units, and adding whole numbers is associative. It is divided and rounded only at the
end, hence parts that several processes have summed make the very bits of a sum over all. Knows scalars and
samples. Does not know agents, nor which of them count.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["SUM_BYTES", "Partial"]

SUM_BYTES = 32
"""Bytes of a sum on the wire: 149 bits below one; 30, 32 and 16 for largest scalar, samples and count."""

_UNIT = -149  # exponent of the smallest float32 above zero
_LIMB = 32


@dataclass(frozen=True)
class Partial:
    """The sum of some agents' scalars, each times its samples.

    Attributes:
        samples: Of all of them.
        sums: For every scalar, in units of 2^-149.
    """

    samples: int
    sums: tuple[int, ...]

    @classmethod
    def of(cls, rows: NDArray[np.float32], samples: NDArray[np.integer]) -> "Partial":
        """Sum agents' scalars.

        Args:
            rows: Float32 of shape (n, scalars), finite.
            samples: Of each agent, (n,), each below 2^29, so that a product is exact in a float64.
        """
        products = rows.astype(np.float64) * samples[:, None]
        totals = [0] * rows.shape[1]
        if not products.size:
            return cls(int(samples.sum()), tuple(totals))
        highest = int(np.frexp(np.abs(products).max())[1]) - _UNIT
        for limb in range(max(0, highest) // _LIMB, -1, -1):
            if not products.any():
                break
            unit = 2.0 ** (_LIMB * limb + _UNIT)
            whole = np.trunc(products / unit)  # below 2^32: two thousand million of them fit 63 bits
            products -= whole * unit  # exact: the lower bits of a float
            column = whole.astype(np.int64).sum(axis=0).tolist()
            totals = [total + (part << (_LIMB * limb)) for total, part in zip(totals, column, strict=True)]
        return cls(int(samples.sum()), tuple(totals))

    @classmethod
    def joined(cls, parts: Iterable["Partial"]) -> "Partial":
        """Return the sum over the agents of all parts; there is at least one, all of as many scalars."""
        listed = list(parts)
        columns = zip(*(part.sums for part in listed), strict=True)
        return cls(sum(part.samples for part in listed), tuple(map(sum, columns)))

    def mean(self) -> NDArray[np.float64]:
        """Return the mean over the samples: the sum rounded to a float64, over their number.

        These are the bits of ``math.fsum`` of the products, divided by the samples.
        """
        return np.array([total / (1 << -_UNIT) for total in self.sums]) / self.samples

    def to_bytes(self) -> bytes:
        """Return the sums as signed little-endian numbers of :data:`SUM_BYTES`, one after the other."""
        return b"".join(total.to_bytes(SUM_BYTES, "little", signed=True) for total in self.sums)

    @classmethod
    def from_bytes(cls, data: bytes, *, samples: int) -> "Partial":
        """Return the part that :meth:`to_bytes` wrote."""
        pieces = (data[at : at + SUM_BYTES] for at in range(0, len(data), SUM_BYTES))
        return cls(samples, tuple(int.from_bytes(piece, "little", signed=True) for piece in pieces))
