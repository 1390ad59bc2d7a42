"""Perturbations: random directions that every replica rebuilds from a key.

A perturbation is never stored and never sent. Whoever knows its key can ask for any piece of it, by
position, and gets the same integers bit for bit on any machine, because 32- and 64-bit integer
arithmetic alone decides them. This module does not know what the noise is used for.

A value is the sum of the four bytes of a 32-bit hash, less 510: an integer in [-510, 510] with mean
0, variance 21845 and kurtosis 2.70; times :data:`UNIT` it has variance 1.

Source: the finaliser of SplitMix64 (Steele, Lea, Flood, "Fast Splittable Pseudorandom Number
Generators", OOPSLA 2014) mixes the key; the multipliers of the hash inside a block are those that
Ellis found by search ("Prospecting for Hash Functions", 2018), with a second key word between them.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "BLOCK",
    "NOISE_VERSION",
    "UNIT",
    "NoiseKey",
    "block_keys",
    "byte_sums",
    "hash_words",
    "mix64",
    "mix64_array",
]

NOISE_VERSION = 1
"""Named in every record: other bits are another version."""

BLOCK = 1024
"""Values that share one mixed key; a power of two."""

UNIT = 1.0 / 147.80054127099804
"""Scale that gives a byte sum unit variance: 1 / sqrt(4 * (256**2 - 1) / 12)."""

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
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
    """Return the raw words of elements ``start`` to ``start + size``: shape (size,), uniform on 32 bits.

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


def byte_sums(words: NDArray[np.uint32]) -> NDArray[np.float32]:
    """Return the noise that raw words stand for: integers in [-510, 510] as float32, same shape."""
    pairs = (words & np.uint32(0x00FF00FF)) + ((words >> np.uint32(8)) & np.uint32(0x00FF00FF))
    pairs += pairs >> np.uint32(16)
    pairs &= np.uint32(0x7FF)
    return pairs.view(np.int32).astype(np.float32) - np.float32(510)
