"""Messages to bytes and back: strict, little-endian, of fixed layout.

``docs/wire.md`` shows every layout byte by byte, and the tests pin golden bytes for each. A decoder
accepts exactly what an encoder makes: a wrong length, version, kind or range, or a number that is not
finite, is a :class:`~profiles.errors.WireError`. This module knows neither topics nor sockets.

Floating-point fields are float32 on the wire; the classes round them on construction, so that what a
program computes with is what a record says.
"""

import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from edge_agent.cohort import (
    BATCH_BYTES,
    Cohort,
    decode_batches,
    decode_uncounted,
    encode_batches,
    encode_uncounted,
)
from edge_agent.optimizer import METHODS, method_by_code
from edge_agent.plan import RoundPlan
from profiles.errors import WireError

__all__ = [
    "LARGEST_SCALAR",
    "MAX_MESSAGE",
    "MAX_SCALARS",
    "MAX_SHARES",
    "WIRE_VERSION",
    "Reply",
    "RoundOpen",
    "RoundRecord",
    "Slice",
    "SliceRequest",
    "Snapshot",
    "decode",
    "decode_record",
    "encode",
    "encode_record",
]

WIRE_VERSION = 1

MAX_MESSAGE = 1 << 20
"""No message is longer; whatever is, is refused before it is looked at."""

MAX_SCALARS = 0xFFFF
"""No round asks for more: a reply counts its scalars with 16 bits."""

MAX_SHARES = 255
"""No plan deals the agents into more shares."""

LARGEST_SCALAR = 1e9
"""A projected gradient or loss beyond this is no estimate of anything."""

_PLAN = struct.Struct("<IQBBBBHHff")
_RECORD = struct.Struct("<HBQ")
_OPEN = struct.Struct("<BBHHHBBIH")
_COUNT = struct.Struct("<H")
_REPLY = struct.Struct("<BBHIHHIfIQ")
_SLICE = struct.Struct("<BBHIH")
_REQUEST = struct.Struct("<BBHI")

_SNAPSHOT = struct.Struct("<BBH")

_KIND_OPEN, _KIND_REPLY, _KIND_SLICE, _KIND_REQUEST, _KIND_SNAPSHOT = 1, 2, 3, 4, 5


@dataclass(frozen=True, eq=False)
class RoundRecord:
    """What closes a round: the message, the row of the scalar log and the input of replay in one.

    Attributes:
        plan: What was asked.
        epoch: Incarnation of the coordinator that closed the round.
        skipped: No quorum came together; replay only counts the round.
        scalars: Aggregated scalars, float32 of shape (K, ``plan.scalars``); zeros when skipped. In a
            family of widths those of the narrowest come first: the mean over all agents, then over those that
            hold the next width, and so on.
        digest: Of the replica after this record; in a family, of the widest.
        narrower: In a family, the digests of the other widths, the narrowest first.
    """

    plan: RoundPlan
    epoch: int
    skipped: bool
    scalars: NDArray[np.float32]
    digest: int
    narrower: tuple[int, ...] = ()

    @property
    def digests(self) -> tuple[int, ...]:
        """The digests of all widths, the narrowest first."""
        return (*self.narrower, self.digest)

    def ending(self, digests: tuple[int, ...]) -> "RoundRecord":
        """Return the record with the digests of all widths, the narrowest first."""
        return replace(self, digest=digests[-1], narrower=digests[:-1])

    def digest_at(self, level: int) -> int:
        """Return the digest of a replica of a level, the narrowest being 0."""
        return self.digests[min(level, len(self.narrower))]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RoundRecord) and encode_record(self) == encode_record(other)

    def __hash__(self) -> int:
        return hash(encode_record(self))


@dataclass(frozen=True)
class RoundOpen:
    """Coordinator to all, retained: the round that is open, and the records just before it.

    Attributes:
        plan: What is asked.
        epoch: Incarnation of the coordinator.
        attempt: How often the round was announced; an agent that has replied replies again.
        batch_size: Samples of a local step.
        central: Central differences, 2P forwards; else forward differences, P + 1.
        closing: The run ends here: catch up, report, do not estimate.
        deadline_ms: Time left from the first announcement.
        cohort: Who is asked.
        batches: Agents that take fewer samples than ``batch_size``, with how many.
        uncounted: Agents that were asked in the round before and whose reply did not count; everybody else's
            did. This acknowledges replies.
        records: The newest records, ending with round ``plan.round - 1``.
    """

    plan: RoundPlan
    epoch: int
    attempt: int
    batch_size: int
    central: bool
    closing: bool
    deadline_ms: int
    cohort: Cohort
    records: tuple[RoundRecord, ...] = ()
    batches: Mapping[int, int] = field(default_factory=dict)
    uncounted: frozenset[int] = frozenset()

    def batch_of(self, agent: int) -> int:
        """Return the samples of a local step for an agent."""
        return self.batches.get(agent, self.batch_size)


@dataclass(frozen=True, eq=False)
class Reply:
    """Agent to coordinator: what one agent measured in one round.

    Attributes:
        epoch, round, attempt: Of the message that is answered.
        samples: Samples behind each scalar.
        loss: Mean loss over the samples and forwards, or NaN if the estimate failed.
        peak_kib: Largest resident size of the agent's process so far.
        digest: Of the agent's replica before the round.
        scalars: Float32 of shape (K * ``plan.reply_scalars``,), step by step; empty if it failed.
    """

    epoch: int
    round: int
    attempt: int
    samples: int
    loss: float
    peak_kib: int
    digest: int
    scalars: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))

    @property
    def failed(self) -> bool:
        """Whether the agent could not make an estimate."""
        return self.scalars.size == 0


@dataclass(frozen=True)
class Slice:
    """Coordinator to one agent: records in order, from the round that it asked for."""

    epoch: int
    first: int
    records: tuple[RoundRecord, ...]


@dataclass(frozen=True)
class SliceRequest:
    """Agent to coordinator: send me the records from this round on."""

    epoch: int
    first: int


@dataclass(frozen=True)
class Snapshot:
    """Coordinator to one agent: a replica as a state file has it, where that is less than the records."""

    epoch: int
    state: bytes


def encode(message: RoundOpen | Reply | Slice | SliceRequest | Snapshot) -> bytes:
    """Return the bytes of a message."""
    if isinstance(message, RoundOpen):
        cohort = message.cohort.to_bytes()
        flags = message.central | message.closing << 1 | bool(message.batches) << 2
        flags |= bool(message.uncounted) << 3
        head = _OPEN.pack(
            WIRE_VERSION,
            _KIND_OPEN,
            message.epoch,
            message.attempt,
            message.batch_size,
            flags,
            len(message.records),
            message.deadline_ms,
            len(cohort),
        )
        more = encode_batches(message.batches) + encode_uncounted(message.uncounted)
        return (
            head + cohort + _encode_plan(message.plan) + more + b"".join(map(encode_record, message.records))
        )
    if isinstance(message, Reply):
        scalars = message.scalars.astype("<f4").tobytes()
        head = _REPLY.pack(
            WIRE_VERSION,
            _KIND_REPLY,
            message.epoch,
            message.round,
            message.attempt,
            message.scalars.size,
            message.samples,
            message.loss,
            message.peak_kib,
            message.digest,
        )
        check = _check(head[:-8], scalars)
        return head[:-8] + struct.pack("<Q", message.digest ^ check) + scalars
    if isinstance(message, Slice):
        head = _SLICE.pack(WIRE_VERSION, _KIND_SLICE, message.epoch, message.first, len(message.records))
        return head + b"".join(map(encode_record, message.records))
    if isinstance(message, Snapshot):
        return _SNAPSHOT.pack(WIRE_VERSION, _KIND_SNAPSHOT, message.epoch) + message.state
    return _REQUEST.pack(WIRE_VERSION, _KIND_REQUEST, message.epoch, message.first)


def decode(data: bytes) -> RoundOpen | Reply | Slice | SliceRequest | Snapshot:
    """Return the message that ``data`` holds, all of it and nothing else.

    Raises:
        WireError: The bytes are not exactly one message of this version.
    """
    if len(data) > MAX_MESSAGE:
        raise WireError(f"a message of {len(data)} bytes is longer than {MAX_MESSAGE}")
    if len(data) < 2:
        raise WireError(f"a message of {len(data)} bytes is too short")
    if data[0] != WIRE_VERSION:
        raise WireError(f"message version {data[0]} is not {WIRE_VERSION}")
    decoders: dict[int, Callable[[_Reader], RoundOpen | Reply | Slice | SliceRequest | Snapshot]] = {
        _KIND_OPEN: _decode_open,
        _KIND_REPLY: _decode_reply,
        _KIND_SLICE: _decode_slice,
        _KIND_REQUEST: _decode_request,
        _KIND_SNAPSHOT: _decode_snapshot,
    }
    decoder = decoders.get(data[1])
    if decoder is None:
        raise WireError(f"message kind {data[1]} is unknown")
    reader = _Reader(data)
    message = decoder(reader)
    if reader.position != len(data):
        raise WireError(f"{len(data) - reader.position} bytes follow the message")
    return message


def encode_record(record: RoundRecord) -> bytes:
    """Return the bytes of a record: its plan, then epoch, flags, digest or digests, the float32 scalars."""
    if len(record.narrower) != record.plan.levels - 1:
        raise ValueError(f"{record.plan.levels} levels and {len(record.narrower)} digests of narrower ones")
    head = _RECORD.pack(record.epoch, int(record.skipped), record.digest)
    head += struct.pack(f"<{len(record.narrower)}Q", *record.narrower)
    scalars = b"" if record.skipped else record.scalars.astype("<f4").tobytes()
    return _encode_plan(record.plan) + head + scalars


def decode_record(data: bytes) -> RoundRecord:
    """Return the record that :func:`encode_record` wrote.

    Raises:
        WireError: The bytes are not exactly one record.
    """
    reader = _Reader(data)
    record = _read_record(reader)
    if reader.position != len(data):
        raise WireError(f"{len(data) - reader.position} bytes follow the record")
    return record


class _Reader:
    """A position in bytes that never runs past the end."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.position = 0

    def take(self, size: int) -> bytes:
        end = self.position + size
        if end > len(self.data):
            raise WireError(f"the message ends {end - len(self.data)} bytes early")
        piece = self.data[self.position : end]
        self.position = end
        return piece

    def unpack(self, layout: struct.Struct) -> tuple[int | float, ...]:
        return layout.unpack(self.take(layout.size))


def _encode_plan(plan: RoundPlan) -> bytes:
    head = _PLAN.pack(
        plan.round,
        plan.seed,
        plan.noise_version,
        plan.method,
        plan.steps,
        len(plan.constants),
        plan.perturbations,
        plan.exact,
        plan.epsilon,
        plan.learning_rate,
    )
    return head + struct.pack(f"<{len(plan.constants)}f", *plan.constants)


def _read_plan(reader: _Reader) -> RoundPlan:
    round_, seed, noise, method, steps, count, perturbations, exact, epsilon, rate = reader.unpack(_PLAN)
    constants = struct.unpack(f"<{count}f", reader.take(4 * int(count)))
    try:
        rule = method_by_code(int(method))
    except KeyError:
        known = ", ".join(f"{m.code} {m.name}" for m in METHODS.values())
        raise WireError(f"method {method} is unknown; this release knows {known}") from None
    if count != len(rule.constants):
        raise WireError(f"method {method} has {len(rule.constants)} constants, the plan {count}")
    if exact and not rule.head:
        raise WireError(f"method {method} has no exact scalars, the plan {exact}")
    if not (0 < epsilon < np.inf and 0 <= rate < np.inf and all(np.isfinite(constants))):
        raise WireError(f"epsilon {epsilon}, learning rate {rate} or a constant {constants} is out of range")
    shares, levels = rule.named(tuple(constants)).get("shares", 1.0), rule.levels(tuple(constants))
    if not (1 <= shares <= MAX_SHARES and levels):
        raise WireError(f"{shares} shares or {levels} levels are out of range")
    projected = int(shares) * int(perturbations) * levels
    if not (steps and perturbations and steps * (projected + exact + rule.losses) <= MAX_SCALARS):
        raise WireError(
            f"a plan has 1 to {MAX_SCALARS} scalars, got {steps} times {projected} and {exact} exact ones"
        )
    return RoundPlan(
        round=int(round_),
        seed=int(seed),
        method=int(method),
        steps=int(steps),
        perturbations=int(perturbations),
        epsilon=epsilon,
        learning_rate=rate,
        constants=constants,
        exact=int(exact),
        noise_version=int(noise),
    )


def _read_scalars(reader: _Reader, count: int) -> NDArray[np.float32]:
    scalars = np.frombuffer(reader.take(4 * count), "<f4").astype(np.float32)
    if not np.all(np.abs(scalars) <= LARGEST_SCALAR):
        raise WireError(f"a scalar is not finite or beyond {LARGEST_SCALAR:g}")
    return scalars


def _read_record(reader: _Reader) -> RoundRecord:
    plan = _read_plan(reader)
    epoch, flags, digest = reader.unpack(_RECORD)
    if flags not in (0, 1):
        raise WireError(f"record flags {flags} are unknown")
    narrower = struct.unpack(f"<{plan.levels - 1}Q", reader.take(8 * (plan.levels - 1)))
    count = plan.steps * plan.scalars
    scalars = np.zeros(count, np.float32) if flags else _read_scalars(reader, count)
    shaped = scalars.reshape(plan.steps, plan.scalars)
    return RoundRecord(plan, int(epoch), bool(flags), shaped, int(digest), narrower)


def _read_records(reader: _Reader, count: int, first: int) -> tuple[RoundRecord, ...]:
    records = tuple(_read_record(reader) for _ in range(count))
    if [record.plan.round for record in records] != list(range(first, first + count)):
        raise WireError("the records of a message must be consecutive")
    return records


def _decode_open(reader: _Reader) -> RoundOpen:
    _, _, epoch, attempt, batch, flags, count, deadline, size = reader.unpack(_OPEN)
    cohort = Cohort.from_bytes(reader.take(int(size)))
    plan = _read_plan(reader)
    if int(flags) > 15 or batch < 1:
        raise WireError(f"flags {flags} or batch size {batch} is out of range")
    batches: dict[int, int] = {}
    uncounted: frozenset[int] = frozenset()
    if int(flags) & 4:
        batches = decode_batches(_take_counted(reader, BATCH_BYTES), int(batch))
    if int(flags) & 8:
        uncounted = decode_uncounted(_take_counted(reader, 1))
    records = _read_records(reader, int(count), plan.round - int(count))
    return RoundOpen(
        plan=plan,
        epoch=int(epoch),
        attempt=int(attempt),
        batch_size=int(batch),
        central=bool(int(flags) & 1),
        closing=bool(int(flags) & 2),
        deadline_ms=int(deadline),
        cohort=cohort,
        batches=batches,
        uncounted=uncounted,
        records=records,
    )


def _take_counted(reader: _Reader, size: int) -> bytes:
    """Return as many times ``size`` bytes as the next 16 bits count."""
    (count,) = reader.unpack(_COUNT)
    return reader.take(int(count) * size)


def _decode_reply(reader: _Reader) -> Reply:
    _, _, epoch, round_, attempt, count, samples, loss, peak, digest = reader.unpack(_REPLY)
    digest = int(digest) ^ _check(reader.data[: _REPLY.size - 8], reader.data[_REPLY.size :])
    scalars = _read_scalars(reader, int(count))
    if scalars.size and not abs(loss) <= LARGEST_SCALAR:
        raise WireError(f"a loss of {loss} is not finite or beyond {LARGEST_SCALAR:g}")
    return Reply(int(epoch), int(round_), int(attempt), int(samples), loss, int(peak), digest, scalars)


def _check(head: bytes, scalars: bytes) -> int:
    """Return what a reply's digest is XORed with: the CRC-32 of all its other bytes, twice.

    A reply with a changed byte has a digest that nobody expects, and costs no byte more.
    """
    return zlib.crc32(scalars, zlib.crc32(head)) * 0x1_0000_0001


def _decode_slice(reader: _Reader) -> Slice:
    _, _, epoch, first, count = reader.unpack(_SLICE)
    return Slice(int(epoch), int(first), _read_records(reader, int(count), int(first)))


def _decode_request(reader: _Reader) -> SliceRequest:
    _, _, epoch, first = reader.unpack(_REQUEST)
    return SliceRequest(int(epoch), int(first))


def _decode_snapshot(reader: _Reader) -> Snapshot:
    _, _, epoch = reader.unpack(_SNAPSHOT)
    return Snapshot(int(epoch), reader.take(len(reader.data) - reader.position))
