"""Sets of agents in an announcement, as bits: who is asked, who takes fewer samples, who was not counted.

Knows agent numbers and bytes. Knows no message (``wire``).
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass

from profiles.errors import WireError

__all__ = [
    "BATCH_BYTES",
    "Cohort",
    "decode_batches",
    "decode_uncounted",
    "encode_batches",
    "encode_uncounted",
]

_COUNT = struct.Struct("<H")
_BATCH = struct.Struct("<IH")

BATCH_BYTES = _BATCH.size
"""Bytes that name one agent's smaller batch."""


@dataclass(frozen=True)
class Cohort:
    """The agents that a round asks, as a set of agent numbers; None means every agent."""

    members: frozenset[int] | None = None

    def __contains__(self, agent: int) -> bool:
        return self.members is None or agent in self.members

    def to_bytes(self) -> bytes:
        """Return one bit an agent, lowest number first; nothing at all for everybody."""
        if self.members is None:
            return b""
        bits = bytearray(max(self.members, default=0) // 8 + 1)
        for member in self.members:
            bits[member // 8] |= 1 << member % 8
        return bytes(bits)

    @classmethod
    def from_bytes(cls, bits: bytes) -> "Cohort":
        """Return the cohort that :meth:`to_bytes` wrote.

        Raises:
            WireError: The last byte of several has no bits.
        """
        if not bits:
            return cls()
        if len(bits) > 1 and not bits[-1]:
            raise WireError(f"a set of agents in {len(bits)} bytes needs fewer")
        return cls(frozenset(8 * i + j for i, byte in enumerate(bits) for j in range(8) if byte >> j & 1))


def encode_batches(batches: Mapping[int, int]) -> bytes:
    """Return how many, then each agent's number and samples; nothing at all for none."""
    rows = b"".join(_BATCH.pack(agent, batches[agent]) for agent in sorted(batches))
    return _COUNT.pack(len(batches)) + rows if batches else b""


def decode_batches(data: bytes, most: int) -> dict[int, int]:
    """Return what :func:`encode_batches` wrote after the count.

    Raises:
        WireError: There is none, the agents do not ascend, or a batch is not 1 to less than ``most``.
    """
    rows = list(_BATCH.iter_unpack(data))
    agents = [agent for agent, _ in rows]
    if not rows or agents != sorted(set(agents)) or not all(1 <= batch < most for _, batch in rows):
        raise WireError("smaller batches must be of ascending agents and smaller than the round's")
    return dict(rows)


def encode_uncounted(agents: frozenset[int]) -> bytes:
    """Return how many bytes, then one bit an agent; nothing at all for none."""
    bits = Cohort(agents).to_bytes() if agents else b""
    return _COUNT.pack(len(bits)) + bits if bits else b""


def decode_uncounted(data: bytes) -> frozenset[int]:
    """Return what :func:`encode_uncounted` wrote after the count.

    Raises:
        WireError: The set is empty.
    """
    members = Cohort.from_bytes(data).members
    if not members:
        raise WireError("a set of replies that did not count must not be empty")
    return members
