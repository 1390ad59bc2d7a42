"""Messages of masked rounds to bytes and back, as strict as ``wire``; their kinds follow those there.

``docs/wire.md`` shows every layout. Knows neither keys nor masks.
"""

import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_agent.cohort import Cohort
from edge_agent.masking import SHARE_BYTES
from edge_agent.wire import MAX_MESSAGE, MAX_SCALARS, WIRE_VERSION
from profiles.errors import WireError

__all__ = [
    "SEALED_BYTES",
    "MaskedReply",
    "Unmask",
    "Unmasked",
    "decode_masked",
    "encode_masked",
    "is_masked",
]

SEALED_BYTES = SHARE_BYTES + 8
"""Length of a share that is sealed for one agent."""

_KIND_REPLY, _KIND_UNMASK, _KIND_UNMASKED = 6, 7, 8
_HEAD = struct.Struct("<BBHI8sHH")
_REPLY = struct.Struct("<HIIQ")
_AGENT = struct.Struct("<I")
_CHECK = struct.Struct("<I")


@dataclass(frozen=True, eq=False)
class MaskedReply:
    """Agent to coordinator: its vector under its masks, and the sealed shares of its own mask's seed.

    Attributes:
        session: Which cohort and keys the masks are for, 8 bytes.
        samples: Behind the vector, which holds sums over them.
        values: K * S scalars and the loss, uint64.
        shares: By agent, 24 bytes each.
    """

    epoch: int
    round: int
    session: bytes
    attempt: int
    samples: int
    peak_kib: int
    digest: int
    values: NDArray[np.uint64]
    shares: Mapping[int, bytes]


@dataclass(frozen=True, eq=False)
class Unmask:
    """Coordinator to one agent: who answered, and their shares that are sealed for it."""

    epoch: int
    round: int
    session: bytes
    survivors: frozenset[int]
    shares: Mapping[int, bytes]


@dataclass(frozen=True, eq=False)
class Unmasked:
    """Agent to coordinator: the sum of its masks with those who dropped out, and the survivors' shares.

    Attributes:
        values: Empty if nobody dropped out.
        shares: By survivor, 16 bytes each, opened.
    """

    epoch: int
    round: int
    session: bytes
    values: NDArray[np.uint64]
    shares: Mapping[int, bytes]


def is_masked(payload: bytes) -> bool:
    """Return whether bytes claim to be one of these messages."""
    return len(payload) > 1 and payload[1] in (_KIND_REPLY, _KIND_UNMASK, _KIND_UNMASKED)


def encode_masked(message: MaskedReply | Unmask | Unmasked) -> bytes:
    """Return the bytes of a message: a head, its own fields, shares, values, and a CRC-32 of all that."""
    values: NDArray[np.uint64] = np.empty(0, np.uint64)
    own = b""
    if isinstance(message, MaskedReply):
        kind, values = _KIND_REPLY, message.values
        own = _REPLY.pack(message.attempt, message.samples, message.peak_kib, message.digest)
    elif isinstance(message, Unmask):
        kind, bits = _KIND_UNMASK, Cohort(message.survivors).to_bytes()
        own = len(bits).to_bytes(2, "little") + bits
    else:
        kind, values = _KIND_UNMASKED, message.values
    counts = (values.size, len(message.shares))
    head = _HEAD.pack(WIRE_VERSION, kind, message.epoch, message.round, message.session, *counts)
    shares = b"".join(_AGENT.pack(agent) + message.shares[agent] for agent in sorted(message.shares))
    body = head + own + shares + values.astype("<u8").tobytes()
    return body + _CHECK.pack(zlib.crc32(body))


def decode_masked(data: bytes) -> MaskedReply | Unmask | Unmasked:
    """Return the message that ``data`` holds, all of it and nothing else.

    Raises:
        WireError: The bytes are not exactly one such message of this version.
    """
    if not _HEAD.size + _CHECK.size <= len(data) <= MAX_MESSAGE:
        raise WireError(f"a masked message of {len(data)} bytes has no such length")
    body, (check,) = data[: -_CHECK.size], _CHECK.unpack(data[-_CHECK.size :])
    version, kind, epoch, round_, session, count, holders = _HEAD.unpack_from(body)
    if version != WIRE_VERSION or not is_masked(data):
        raise WireError(f"masked message version {version}, kind {kind}")
    if zlib.crc32(body) != check:
        raise WireError("a masked message was damaged on its way")
    at = _HEAD.size
    size = SHARE_BYTES if kind == _KIND_UNMASKED else SEALED_BYTES
    try:
        own: tuple[int, ...] = ()
        survivors: frozenset[int] = frozenset()
        if kind == _KIND_REPLY:
            own, at = _REPLY.unpack_from(body, at), at + _REPLY.size
        elif kind == _KIND_UNMASK:
            length = int.from_bytes(body[at : at + 2], "little")
            survivors = Cohort.from_bytes(body[at + 2 : at + 2 + length]).members or frozenset()
            at += 2 + length
        shares: dict[int, bytes] = {}
        for _ in range(holders):
            (agent,) = _AGENT.unpack_from(body, at)
            shares[agent] = body[at + _AGENT.size : at + _AGENT.size + size]
            at += _AGENT.size + size
    except struct.error:
        raise WireError("a masked message ends early") from None
    whole = len(shares) == holders and list(shares) == sorted(shares) and count <= MAX_SCALARS
    if not whole or at + 8 * count != len(body) or (kind == _KIND_UNMASK and (count or not survivors)):
        raise WireError("a masked message has another length than its counts say")
    values = np.frombuffer(body[at:], "<u8").astype(np.uint64)
    if kind == _KIND_REPLY:
        attempt, samples, peak_kib, digest = own
        return MaskedReply(epoch, round_, session, attempt, samples, peak_kib, digest, values, shares)
    if kind == _KIND_UNMASK:
        return Unmask(epoch, round_, session, survivors, shares)
    return Unmasked(epoch, round_, session, values, shares)
