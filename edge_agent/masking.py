"""Sums that nobody can take apart: scalars in fixed point under masks that cancel, and shares for dropouts.

Each agent adds to its vector a mask of its own and one for each other agent of the cohort, which that agent
subtracts, all modulo 2^64. Of the own mask's seed every agent holds a share: any majority can tell it,
fewer know nothing. For each other agent a survivor tells either the mask that it has with it (it dropped
out) or the share of its own mask (it did not), never both, so that the sum of those who answered comes to
light and nothing else. Knows vectors, keys and random bytes that the caller brings; no messages, no clock.

Source: Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning", 2017, figure
4, with pairwise masks told instead of keys; Shamir, "How to Share a Secret", 1979.
"""

import hashlib
import hmac
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "FRACTION_BITS",
    "LARGEST",
    "SHARE_BYTES",
    "Masked",
    "combine",
    "from_fixed",
    "majority",
    "mask",
    "open_share",
    "seal_share",
    "session_of",
    "split_secret",
    "stream",
    "tell_masks",
    "to_fixed",
]

FRACTION_BITS = 20
"""A step of the fixed point is 2^-20."""

LARGEST = float(1 << 20)
"""A scalar beyond this is cut to it: then 100 agents with 65,535 samples each cannot overflow 63 bits."""

SHARE_BYTES = 16
"""Length of a share, and of the seed that it is one of."""

_PRIME = (1 << 127) - 1
_TAG = 8
_Vector = NDArray[np.uint64]


@dataclass(frozen=True)
class Masked:
    """What an agent sends.

    Attributes:
        values: The vector under its masks, uint64.
        shares: For each other agent of the cohort its share of the own mask's seed, sealed for it.
        own_share: The agent's own, which it keeps.
    """

    values: _Vector
    shares: Mapping[int, bytes]
    own_share: bytes


def majority(cohort: int) -> int:
    """Return how many shares tell a seed: more than half of the cohort."""
    return cohort // 2 + 1


def session_of(run: str, round_: int, keys: Mapping[int, bytes]) -> bytes:
    """Return what names one cohort in one round with its public keys: 8 bytes."""
    told = hashlib.blake2b(f"{run}\0{round_}".encode(), digest_size=8)
    for agent in sorted(keys):
        told.update(agent.to_bytes(4, "little") + keys[agent])
    return told.digest()


def to_fixed(values: NDArray[np.float32], samples: int) -> _Vector:
    """Return the values times ``samples`` as whole steps, modulo 2^64."""
    cut = np.clip(values.astype(np.float64), -LARGEST, LARGEST)
    return np.asarray(np.rint(cut * (1 << FRACTION_BITS)).astype(np.int64) * samples).astype(np.uint64)


def from_fixed(total: _Vector, samples: int) -> NDArray[np.float32]:
    """Return the mean whose sum over all samples is ``total``."""
    return (total.astype(np.int64).astype(np.float64) / (samples * float(1 << FRACTION_BITS))).astype(
        np.float32
    )


def stream(key: bytes, session: bytes, count: int) -> _Vector:
    """Return ``count`` words that only those who have the key can tell from chance."""
    words = hashlib.shake_256(b"mask" + key + session).digest(8 * count)
    return np.frombuffer(words, "<u8").astype(np.uint64)


def mask(
    vector: _Vector,
    *,
    agent: int,
    session: bytes,
    keys: Mapping[int, bytes],
    secret: Callable[[int], bytes],
) -> Masked:
    """Put a vector under its masks.

    Args:
        vector: Fixed-point values.
        agent: Whose they are.
        session: Of the cohort in this round; a pair's masks are used once.
        keys: What the agent shares with each other agent of the cohort, 32 bytes.
        secret: Returns so many random bytes that nobody can guess.
    """
    seed = int.from_bytes(secret(SHARE_BYTES - 1), "little")
    holders = sorted({agent, *keys})
    shares = split_secret(seed, holders, majority(len(holders)), secret)
    values = vector + stream(_seed_bytes(seed), session, vector.size)
    for other in sorted(keys):
        values = values + _pair(agent, other, keys[other], session, vector.size)
    sealed = {
        other: seal_share(shares[other], keys[other], session, sender=agent, receiver=other) for other in keys
    }
    return Masked(values, sealed, shares[agent])


def tell_masks(
    agent: int, dropped: Iterable[int], keys: Mapping[int, bytes], session: bytes, count: int
) -> _Vector:
    """Return the sum of the masks that an agent put on for those who dropped out."""
    total = np.zeros(count, np.uint64)
    for other in sorted(dropped):
        total = total + _pair(agent, other, keys[other], session, count)
    return total


def combine(
    masked: Mapping[int, _Vector],
    told: Mapping[int, _Vector],
    shares: Mapping[int, Mapping[int, bytes]],
    session: bytes,
    needed: int,
) -> _Vector:
    """Return the sum of the survivors' vectors.

    Args:
        masked: By survivor, what it sent.
        told: By survivor, the sum of its masks with those who dropped out; empty if nobody did.
        shares: By survivor, the shares of its seed, by who told them.
        session: As the masks were made for.
        needed: Shares that tell a seed.

    Raises:
        ValueError: A survivor has too few shares, or not all masks with the dropped were told.
    """
    if told and told.keys() != masked.keys():
        raise ValueError("every survivor must tell its masks with those who dropped out")
    count = next(iter(masked.values())).size
    total = np.zeros(count, np.uint64)
    for agent, values in masked.items():
        seed = _join(dict(sorted(shares[agent].items())[:needed]), needed)
        total = total + values - stream(_seed_bytes(seed), session, count)
        if told:
            total = total - told[agent]
    return total


def split_secret(
    seed: int, holders: Sequence[int], needed: int, secret: Callable[[int], bytes]
) -> dict[int, bytes]:
    """Return a share of ``seed`` for each holder, any ``needed`` of which tell it and fewer nothing."""
    factors = [seed, *(int.from_bytes(secret(32), "little") % _PRIME for _ in range(needed - 1))]
    shares = {}
    for holder in holders:
        value = 0
        for factor in reversed(factors):
            value = (value * (holder + 1) + factor) % _PRIME
        shares[holder] = value.to_bytes(SHARE_BYTES, "little")
    return shares


def seal_share(share: bytes, key: bytes, session: bytes, *, sender: int, receiver: int) -> bytes:
    """Return a share that only the receiver can read, and nobody change: 24 bytes."""
    pad, proof = _sealing(key, session, sender, receiver)
    hidden = bytes(a ^ b for a, b in zip(share, pad, strict=True))
    return hidden + hmac.new(proof, hidden, hashlib.sha256).digest()[:_TAG]


def open_share(sealed: bytes, key: bytes, session: bytes, *, sender: int, receiver: int) -> bytes | None:
    """Return the share, or None if it was not sealed with this key for this session and pair."""
    pad, proof = _sealing(key, session, sender, receiver)
    hidden, tag = sealed[:SHARE_BYTES], sealed[SHARE_BYTES:]
    if not hmac.compare_digest(hmac.new(proof, hidden, hashlib.sha256).digest()[:_TAG], tag):
        return None
    return bytes(a ^ b for a, b in zip(hidden, pad, strict=True))


def _sealing(key: bytes, session: bytes, sender: int, receiver: int) -> tuple[bytes, bytes]:
    who = sender.to_bytes(4, "little") + receiver.to_bytes(4, "little")
    words = hashlib.shake_256(b"share" + key + session + who).digest(SHARE_BYTES + 32)
    return words[:SHARE_BYTES], words[SHARE_BYTES:]


def _pair(agent: int, other: int, key: bytes, session: bytes, count: int) -> _Vector:
    """Return an agent's mask with another one: what the other's is taken from zero."""
    words = stream(key, session, count)
    return words if agent < other else np.uint64(0) - words


def _seed_bytes(seed: int) -> bytes:
    return seed.to_bytes(SHARE_BYTES, "little")


def _join(shares: Mapping[int, bytes], needed: int) -> int:
    """Return the secret of ``needed`` shares: the polynomial through them at 0."""
    if len(shares) < needed:
        raise ValueError(f"{len(shares)} shares of {needed} needed")
    points = [(holder + 1, int.from_bytes(share, "little")) for holder, share in shares.items()]
    total = 0
    for x, y in points:
        top = bottom = 1
        for other, _ in points:
            if other != x:
                top = top * other % _PRIME
                bottom = bottom * (other - x) % _PRIME
        total = (total + y * top * pow(bottom, -1, _PRIME)) % _PRIME
    return total
