"""Messages to bytes and back: strict, little-endian, of fixed layout.

``docs/wire.md`` shows every layout byte by byte, and the tests pin golden bytes for each. A decoder
accepts exactly what an encoder makes: a wrong length, version, kind or range, or a number that is not
finite, is a :class:`~profiles.errors.WireError`. This module knows neither topics nor sockets.

Floating-point fields are float32 on the wire; the classes round them on construction, so that what a
program computes with is what a record says.
"""

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from edge_agent.noise import NOISE_VERSION, NoiseKey
from edge_agent.optimizer import METHODS, method_by_code
from profiles.errors import WireError

__all__ = [
    "LARGEST_SCALAR",
    "MAX_MESSAGE",
    "MAX_SCALARS",
    "WIRE_VERSION",
    "Cohort",
    "Reply",
    "RoundOpen",
    "RoundPlan",
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

LARGEST_SCALAR = 1e9
"""A projected gradient or loss beyond this is no estimate of anything."""

_PLAN = struct.Struct("<IQBBBBHHff")
_RECORD = struct.Struct("<HBQ")
_OPEN = struct.Struct("<BBHHHBBIH")
_REPLY = struct.Struct("<BBHIHHIfIQ")
_SLICE = struct.Struct("<BBHIH")
_REQUEST = struct.Struct("<BBHI")

_SNAPSHOT = struct.Struct("<BBH")

_KIND_OPEN, _KIND_REPLY, _KIND_SLICE, _KIND_REQUEST, _KIND_SNAPSHOT = 1, 2, 3, 4, 5


def _single(value: float) -> float:
    """Return the float32 nearest to ``value`` as a Python float."""
    return float(np.float32(value))


@dataclass(frozen=True)
class RoundPlan:
    """What a round asks for, and all that its replay needs beside the scalars.

    Attributes:
        round: Number of the round, from 0.
        seed: Noise seed, 64 bits.
        method: Code of the method; see :data:`edge_agent.optimizer.METHODS`.
        steps: Local steps K, 1 to 255.
        perturbations: Perturbations a step P, 1 to 65535.
        epsilon: Step of the finite difference, > 0.
        learning_rate: Learning rate of this round, >= 0.
        constants: The method's constants in its order.
        exact: Exact scalars a step Q: coordinates of the last layer's gradient; 0 for none.
        noise_version: Which bits the noise has.
    """

    round: int
    seed: int
    method: int
    steps: int
    perturbations: int
    epsilon: float
    learning_rate: float
    constants: tuple[float, ...] = ()
    exact: int = 0
    noise_version: int = NOISE_VERSION

    def __post_init__(self) -> None:
        object.__setattr__(self, "epsilon", _single(self.epsilon))
        object.__setattr__(self, "learning_rate", _single(self.learning_rate))
        object.__setattr__(self, "constants", tuple(_single(value) for value in self.constants))

    @property
    def scalars(self) -> int:
        """Scalars of a local step: P projected gradients, then what else the plan asks."""
        return self.perturbations + self.exact + method_by_code(self.method).losses

    @property
    def levels(self) -> int:
        """Widths of the family that is trained; 1 where all boards hold the same net."""
        return method_by_code(self.method).levels(self.constants)

    @property
    def logged_scalars(self) -> int:
        """Scalars of a local step in the record: those of a reply for each of the levels."""
        return self.levels * self.scalars

    def keys(self, step: int) -> list[NoiseKey]:
        """Return the noise keys of a local step's P perturbations."""
        return [NoiseKey(self.seed, self.round, step, number) for number in range(self.perturbations)]


@dataclass(frozen=True, eq=False)
class RoundRecord:
    """What closes a round: the message, the row of the scalar log and the input of replay in one.

    Attributes:
        plan: What was asked.
        epoch: Incarnation of the coordinator that closed the round.
        skipped: No quorum came together; replay only counts the round.
        scalars: Aggregated scalars, float32 of shape (K, ``plan.logged_scalars``); zeros when skipped. In a
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

    def digest_at(self, level: int) -> int:
        """Return the digest of a replica of a level, the narrowest being 0."""
        return self.narrower[level] if level < len(self.narrower) else self.digest

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RoundRecord) and encode_record(self) == encode_record(other)

    def __hash__(self) -> int:
        return hash(encode_record(self))


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
        """Return the cohort that :meth:`to_bytes` wrote."""
        if not bits:
            return cls()
        return cls(frozenset(8 * i + j for i, byte in enumerate(bits) for j in range(8) if byte >> j & 1))


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


@dataclass(frozen=True, eq=False)
class Reply:
    """Agent to coordinator: what one agent measured in one round.

    Attributes:
        epoch, round, attempt: Of the message that is answered.
        samples: Samples behind each scalar.
        loss: Mean loss over the samples and forwards, or NaN if the estimate failed.
        peak_kib: Largest resident size of the agent's process so far.
        digest: Of the agent's replica before the round.
        scalars: Float32 of shape (K * ``plan.scalars``,), step by step; empty if it failed.
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
        flags = message.central | message.closing << 1
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
        return head + cohort + _encode_plan(message.plan) + b"".join(map(encode_record, message.records))
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
    levels = rule.levels(constants)
    asked = levels * steps * (perturbations + exact + rule.losses)
    if not (levels > 0 and steps and perturbations and asked <= MAX_SCALARS):
        raise WireError(
            f"a plan has 1 to {MAX_SCALARS} scalars, got {steps} times {perturbations} and {exact} exact ones"
        )
    if not (0 < epsilon < np.inf and 0 <= rate < np.inf and all(np.isfinite(constants))):
        raise WireError(f"epsilon {epsilon}, learning rate {rate} or a constant {constants} is out of range")
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
    count = plan.steps * plan.logged_scalars
    scalars = np.zeros(count, np.float32) if flags else _read_scalars(reader, count)
    shaped = scalars.reshape(plan.steps, plan.logged_scalars)
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
    if int(flags) > 3 or batch < 1:
        raise WireError(f"flags {flags} or batch size {batch} is out of range")
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
        records=records,
    )


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
