"""The digest of a replica: 64 bits that two replicas share if all their bits are equal.

Made to notice a disagreement in the round in which it happens, at the speed of memory: the words of
a block are hashed as pairs (the NH function of UMAC: sums of products), the blocks are scrambled
with their number and added up, so that any number of threads may take any share. It protects
against faults, not against forgers; files carry SHA-256.

Source: Black, Halevi, Krawczyk, Krovetz, Rogaway, "UMAC: Fast and Secure Message Authentication",
CRYPTO 1999, section 3 (NH).
"""

import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_agent.native.kernel import find_kernel
from edge_agent.noise import BLOCK, NoiseKey, hash_words, mix64, mix64_array

__all__ = ["fold", "join", "of_floats"]

_MASK = (1 << 64) - 1
_KEYS = hash_words(NoiseKey(0x6E68, 0, 0, 0), 0, BLOCK)
_CHUNK_BLOCKS = 64


def fold(memory: NDArray[Any], *, threads: int = 1) -> int:
    """Return the 64-bit sum of the scrambled block hashes of an array's bits.

    Args:
        memory: Contiguous, any number of 32-bit words; a last, short block counts as if filled up with zeros.
        threads: Threads of the compiled kernel.
    """
    if (kernel := find_kernel()) is not None:
        return kernel.fold(memory, threads=threads)
    words = memory.reshape(-1).view(np.uint32)
    total = 0
    chunk = BLOCK * _CHUNK_BLOCKS
    for start in range(0, words.size, chunk):
        piece = words[start : start + chunk]
        if piece.size % BLOCK:
            piece = np.concatenate([piece, np.zeros(-piece.size % BLOCK, np.uint32)])
        keyed = (piece.reshape(-1, BLOCK) + _KEYS).astype(np.uint64)
        sums = (keyed[:, 0::2] * keyed[:, 1::2]).sum(axis=1, dtype=np.uint64)
        first = start // BLOCK
        numbers = np.arange(first + 1, first + 1 + sums.size, dtype=np.uint64)
        total += int(mix64_array(sums ^ mix64_array(numbers)).sum(dtype=np.uint64))
    return total & _MASK


def join(*parts: int) -> int:
    """Return one 64-bit digest of several, order included."""
    state = len(parts)
    for part in parts:
        state = mix64((state ^ part) + 0x9E3779B97F4A7C15 & _MASK)
    return state


def of_floats(*values: float) -> int:
    """Return the digest of a few float64 values, by their bits."""
    return join(*struct.unpack(f"<{len(values)}Q", struct.pack(f"<{len(values)}d", *values)))
