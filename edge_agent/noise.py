"""Perturbations: random directions that every replica rebuilds from a key.

A perturbation is never stored and never sent. Whoever knows its key can ask for any piece of it, by
position, and gets the same integers bit for bit on any machine, because 32- and 64-bit integer
arithmetic alone decides them. This module does not know what the noise is used for.

A value is the number of ones among four bits of a 32-bit hash, less 2: an integer in [-2, 2] with
mean 0, variance exactly 1 and kurtosis 2.5. One hash word serves eight values, which is what brings
a perturbation near the speed of memory; zeroth-order steps ask for no finer distribution.

The layout, so that any SIMD width writes in order: 16 consecutive words serve 128 consecutive
elements; element 128 c + 16 k + l takes bits 4 k to 4 k + 3 of word 16 c + l.

Source: the finaliser of SplitMix64 (Steele, Lea, Flood, "Fast Splittable Pseudorandom Number
Generators", OOPSLA 2014) mixes the key; the multipliers of the hash inside a block are those that
Ellis found by search ("Prospecting for Hash Functions", 2018), with a second key word between them.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "BLOCK",
    "CHUNK",
    "NOISE_VERSION",
    "SHARE",
    "NoiseKey",
    "block_keys",
    "chunk_words",
    "hash_words",
    "mix64",
    "mix64_array",
    "values",
]

NOISE_VERSION = 1
"""Named in every record: other bits are another version."""

BLOCK = 1024
"""Hash words that share one mixed key; a power of two."""

SHARE = 8
"""Elements that one hash word serves."""

CHUNK = 128
"""Elements that 16 consecutive words serve; a piece costs least if it begins on a multiple."""

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_PLANES = np.arange(28, -1, -4, dtype=np.uint32)[:, None]
_LANES = np.arange(BLOCK, dtype=np.uint32) * np.uint32(0x9E3779B1)


class NoiseKey(NamedTuple):
    """Names one perturbation; equal keys mean equal perturbations. Every field lies in [0, 2**64)."""

    seed: int
    round: int
    step: int
    perturbation: int


def mix64(word: int) -> int:
    """Scramble a 64-bit word one to one (the finaliser of SplitMix64)."""
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _MASK
    return word ^ (word >> 31)


def mix64_array(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scramble each word of an array as :func:`mix64` does."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def block_keys(key: NoiseKey, first: int, count: int) -> NDArray[np.uint64]:
    """Return the 64-bit keys of blocks ``first`` to ``first + count`` of the perturbation ``key``.

    The fields are hashed one after the other: a sum such as seed * 17 + round would let different
    keys meet.

    Raises:
        ValueError: A field of the key does not fit 64 bits.
    """
    state = 0
    for field in key:
        if not 0 <= field <= _MASK:
            raise ValueError(f"a noise key holds integers in [0, 2**64), got {key}")
        state = mix64(((state ^ field) + _GAMMA) & _MASK)
    blocks = np.arange(first, first + count, dtype=np.uint64)
    return mix64_array((blocks ^ np.uint64(state)) + np.uint64(_GAMMA))


def hash_words(key: NoiseKey, start: int, size: int) -> NDArray[np.uint32]:
    """Return the words ``start`` to ``start + size`` of a key: shape (size,), uniform on 32 bits.

    The pieces equal the whole, so that nobody needs to hold more than a piece.

    Raises:
        ValueError: ``size`` or ``start`` is negative, or the key is out of range.
    """
    if size < 0 or start < 0:
        raise ValueError(f"size and start must be >= 0, got {size=} and {start=}")
    first = start // BLOCK
    keys = block_keys(key, first, -(-(start + size) // BLOCK) - first)
    x = _LANES + keys.astype(np.uint32)[:, None]
    t = x >> np.uint32(16)
    x ^= t
    x *= np.uint32(0x7FEB352D)
    np.right_shift(x, np.uint32(15), out=t)
    x ^= t
    x += (keys >> np.uint64(32)).astype(np.uint32)[:, None]
    x *= np.uint32(0x846CA68B)
    np.right_shift(x, np.uint32(16), out=t)
    x ^= t
    return x.reshape(-1)[start - first * BLOCK :][:size]


def chunk_words(key: NoiseKey, start: int, size: int) -> NDArray[np.uint32]:
    """Return the words that serve the elements ``start`` to ``start + size``: shape (chunks, 1, 16).

    The first chunk holds element ``start``, the last one element ``start + size - 1``.
    """
    first, last = start // CHUNK, -(-(start + size) // CHUNK)
    return hash_words(key, first * 16, (last - first) * 16).reshape(-1, 1, 16)


def values(key: NoiseKey, start: int, size: int) -> NDArray[np.int32]:
    """Return the perturbation ``key`` at elements ``start`` to ``start + size``: integers in [-2, 2].

    The pieces equal the whole, so that nobody needs to hold more than a piece.

    Raises:
        ValueError: ``size`` or ``start`` is negative, or the key is out of range.
    """
    x = chunk_words(key, start, size)
    x -= (x >> np.uint32(1)) & np.uint32(0x55555555)
    x = (x & np.uint32(0x33333333)) + ((x >> np.uint32(2)) & np.uint32(0x33333333))  # ones of each four bits
    x = (x + np.uint32(0x66666666)) ^ np.uint32(0x88888888)  # less 2, as signed numbers of four bits
    signed = (x << _PLANES).view(np.int32)
    signed >>= 28
    return signed.reshape(-1)[start % CHUNK :][:size]
