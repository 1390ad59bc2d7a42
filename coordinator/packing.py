"""Many replies in one message, from a collector to the coordinator: bytes and back, strict.

A pack holds replies to one round, column by column, and their sum; and what was refused, so that the
coordinator counts it as if it had come to itself. ``docs/wire.md`` shows the layout. Knows replies and their
agents' numbers. Does not know topics, nor which replies belong to the open round.
"""

import json
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from coordinator.partial import SUM_BYTES, Partial
from edge_agent.wire import LARGEST_SCALAR, MAX_MESSAGE, WIRE_VERSION, Reply
from profiles.errors import WireError

__all__ = ["MOST_REFUSED", "Pack", "Refused", "most_replies", "pack", "unpack"]

MOST_REFUSED = 64
"""Different refusals in one pack, at most."""

_KIND = 6
_HEAD = struct.Struct("<BBHHIHHBHQ")
_SUMMED = 1
_MOST_SAMPLES = 0xFFFF  # of an agent in a round; more are refused, and are in no sum
_MOST_SUMS = 2048  # scalars; beyond, sums are long and packs hold few replies
_LONGEST_PACK = MAX_MESSAGE // 2
_COLUMNS = (
    ("agents", "<u4"),
    ("attempts", "<u2"),
    ("samples", "<u4"),
    ("losses", "<f4"),
    ("peaks", "<u4"),
    ("digests", "<u8"),
)
_ROW = sum(np.dtype(kind).itemsize for _, kind in _COLUMNS)


@dataclass(frozen=True)
class Refused:
    """Messages that were no replies.

    Attributes:
        reason: For the count.
        name: Of the agent on whose topic they came; not always one of the fleet.
        text: What was wrong with the first.
        times: How many, 1 to 65,535.
    """

    reason: str
    name: str
    text: str
    times: int = 1


@dataclass(frozen=True)
class Pack:
    """What a collector hands up.

    Attributes:
        collector: Its number.
        replies: With the agents' numbers, in the order of their arrival; all to one round of one epoch, with
            as many scalars each. None at all says only that the collector has just come.
        refused: What was dropped.
        partial: The sum of the replies' scalars; None where they have none, or very many.
    """

    collector: int
    replies: tuple[tuple[int, Reply], ...] = ()
    refused: tuple[Refused, ...] = ()
    partial: Partial | None = None

    @property
    def is_hello(self) -> bool:
        """Whether the collector says no more than that it is there."""
        return not self.replies and not self.refused


def most_replies(scalars: int) -> int:
    """Return how many replies of so many scalars fit a pack, at least one."""
    return max(1, min(0xFFFF, _LONGEST_PACK // (_ROW + 4 * scalars)))


def pack(collector: int, replies: Sequence[tuple[int, Reply]], refused: Iterable[Refused] = ()) -> bytes:
    """Return the bytes of a :class:`Pack`, its replies summed.

    Args:
        collector: Its number, below 65,536.
        replies: At most :func:`most_replies`, as :class:`Pack` wants them.
        refused: At most :data:`MOST_REFUSED`.
    """
    first = replies[0][1] if replies else Reply(0, 0, 0, 0, 0.0, 0, 0)
    told = json.dumps([[one.reason, one.name, one.text, one.times] for one in refused]).encode()
    rows = np.array([reply.scalars for _, reply in replies], np.float32)
    rows = rows.reshape(len(replies), first.scalars.size)
    samples = np.array([reply.samples for _, reply in replies], np.int64)
    summed = rows.size > 0 and rows.shape[1] <= _MOST_SUMS and int(samples.max()) <= _MOST_SAMPLES
    partial = Partial.of(rows, samples) if summed else Partial(0, ())
    columns = {
        "agents": [agent for agent, _ in replies],
        "attempts": [reply.attempt for _, reply in replies],
        "samples": samples,
        "losses": [reply.loss for _, reply in replies],
        "peaks": [reply.peak_kib for _, reply in replies],
        "digests": [reply.digest for _, reply in replies],
    }
    head = _HEAD.pack(
        WIRE_VERSION,
        _KIND,
        collector,
        first.epoch,
        first.round,
        len(replies),
        first.scalars.size,
        summed * _SUMMED,
        len(told),
        partial.samples,
    )
    body = b"".join(np.array(columns[name], kind).tobytes() for name, kind in _COLUMNS)
    return head + body + rows.astype("<f4").tobytes() + partial.to_bytes() + told


def unpack(data: bytes, *, fleet: int) -> Pack:
    """Return the pack that ``data`` holds, all of it and nothing else.

    Args:
        data: The bytes.
        fleet: How many agents there are.

    Raises:
        WireError: The bytes are not exactly one pack about this fleet.
    """
    if not _HEAD.size <= len(data) <= MAX_MESSAGE:
        raise WireError(f"a pack of {len(data)} bytes")
    version, kind, collector, epoch, round_, count, scalars, flags, told, summed = _HEAD.unpack_from(data)
    if (version, kind) != (WIRE_VERSION, _KIND) or flags not in (0, _SUMMED):
        raise WireError(f"version {version}, kind {kind}, flags {flags} are no pack")
    sums = SUM_BYTES * scalars if flags else 0
    at = _HEAD.size
    if len(data) != at + count * (_ROW + 4 * scalars) + sums + told:
        raise WireError(f"a pack of {count} replies has not {len(data)} bytes")
    columns = {}
    for name, kind in _COLUMNS:
        columns[name] = np.frombuffer(data, kind, count, at)
        at += columns[name].nbytes
    rows = np.frombuffer(data, "<f4", count * scalars, at).astype(np.float32).reshape(count, scalars)
    at += rows.nbytes
    if not np.all(np.abs(rows) <= LARGEST_SCALAR):
        raise WireError(f"a scalar in a pack is not finite or beyond {LARGEST_SCALAR:g}")
    if scalars and not np.all(np.abs(columns["losses"]) <= LARGEST_SCALAR):
        raise WireError(f"a loss in a pack is not finite or beyond {LARGEST_SCALAR:g}")
    if count and int(columns["agents"].max()) >= fleet:
        raise WireError(f"a pack has an agent beyond the fleet of {fleet}")
    listed = [columns[name].tolist() for name, _ in _COLUMNS]
    replies = tuple(
        (agent, Reply(epoch, round_, attempt, samples, loss, peak, digest, row))
        for agent, attempt, samples, loss, peak, digest, row in zip(*listed, rows, strict=True)
    )
    partial = Partial.from_bytes(data[at : at + sums], samples=summed) if flags else None
    if partial is not None and partial.samples != int(columns["samples"].sum(dtype=np.uint64)):
        raise WireError("a pack counts its samples wrong")
    return Pack(collector, replies, _read_refused(data[at + sums :]), partial)


def _read_refused(data: bytes) -> tuple[Refused, ...]:
    try:
        entries = json.loads(data)
    except ValueError:
        raise WireError("what a pack refused is no JSON") from None
    if not isinstance(entries, list) or len(entries) > MOST_REFUSED:
        raise WireError("what a pack refused is no short list")
    for entry in entries:
        if not isinstance(entry, list) or [type(part) for part in entry] != [str, str, str, int]:
            raise WireError("what a pack refused is not reason, name, text and times")
        if not 1 <= entry[3] <= 0xFFFF:
            raise WireError(f"a pack refused a message {entry[3]} times")
    return tuple(Refused(*entry) for entry in entries)
