"""Tests of edge_agent.wire: golden bytes, sizes, and strictness."""

from dataclasses import replace

import numpy as np
import pytest

from edge_agent.cohort import Cohort
from edge_agent.optimizer import METHODS
from edge_agent.plan import RoundPlan
from edge_agent.wire import (
    MAX_MESSAGE,
    Reply,
    RoundOpen,
    RoundRecord,
    Slice,
    SliceRequest,
    decode,
    decode_record,
    encode,
    encode_record,
)
from profiles.errors import WireError

HISO = METHODS["hiso"]


def plan(round_: int, perturbations: int = 8, steps: int = 1) -> RoundPlan:
    return RoundPlan(round_, 7, HISO.code, steps, perturbations, 1e-3, 0.25, (0.5, 0.125, 0.0))


def record(round_: int, perturbations: int = 8) -> RoundRecord:
    scalars = np.arange(perturbations, dtype=np.float32).reshape(1, perturbations)
    return RoundRecord(plan(round_, perturbations), 3, False, scalars, 0x0123456789ABCDEF)


REPLY = Reply(3, 9, 1, 16, 0.5, 60_000, 0x0123456789ABCDEF, np.array([1.0, -2.0], np.float32))
OPEN = RoundOpen(plan(9, 2), 3, 1, 16, True, False, 60_000, Cohort(frozenset({0, 2, 9})), (record(8, 2),))
MESSAGES = [REPLY, OPEN, Slice(3, 5, (record(5), record(6))), SliceRequest(3, 5)]


def test_golden_bytes_of_a_reply():
    """A reply has the bytes that docs/wire.md shows."""
    assert encode(REPLY).hex() == (
        "0102" "0300" "09000000" "0100" "0200" "10000000" "0000003f" "60ea0000"
        "2b2dd810a3a55098" "0000803f" "000000c0"
    )  # fmt: skip


def test_golden_bytes_of_a_record():
    """A record has the bytes that docs/wire.md shows."""
    assert encode_record(record(8, 2)).hex() == (
        "08000000" "0700000000000000" "01" "02" "01" "03" "0200" "0000" "6f12833a" "0000803e"
        "0000003f" "0000003e" "00000000"
        "0300" "00" "efcdab8967452301" "00000000" "0000803f"
    )  # fmt: skip


def test_golden_bytes_of_a_round_announcement():
    """An announcement is its head, its cohort's bits, its plan and its records."""
    head = "0101030001001000010160ea000002000502"
    assert encode(OPEN) == bytes.fromhex(head) + encode_record(record(9, 2))[:40] + encode_record(
        record(8, 2)
    )


def test_golden_bytes_of_smaller_batches_and_of_acknowledgements():
    """Both follow the plan, each behind its own flag; without them the bytes are as before."""
    told = replace(OPEN, batches={1: 8, 3: 4}, uncounted=frozenset({0, 9}))
    plain, more = encode(OPEN).hex(), encode(told).hex()
    assert plain[16:18] == "01"
    assert more[16:18] == "0d"
    rest = "0200" "01000000" "0800" "03000000" "0400" "0200" "0102"  # fmt: skip
    plan_ends = 2 * (18 + 40)
    assert more[18:] == plain[18:plan_ends] + rest + plain[plan_ends:]
    assert decode(encode(told)) == told


@pytest.mark.parametrize("batches", [{1: 16}, {1: 17}, {1: 0}])
def test_a_batch_that_is_not_smaller_is_refused(batches):
    """A batch for one agent is at least one sample and less than the round's."""
    with pytest.raises(WireError, match="smaller"):
        decode(encode(replace(OPEN, batches=batches)))


def test_golden_bytes_of_a_request_and_a_slice():
    """The two messages of catching up."""
    assert encode(SliceRequest(3, 5)).hex() == "0104030005000000"
    assert encode(Slice(3, 5, (record(5),))).hex() == "01030300050000000100" + encode_record(record(5)).hex()


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_decoding_undoes_encoding(message):
    """What was encoded comes back, byte for byte."""
    assert encode(decode(encode(message))) == encode(message)


def test_a_reply_with_eight_scalars_has_64_bytes():
    """The uplink of a round is 64 payload bytes at P = 8."""
    assert len(encode(replace(REPLY, scalars=np.zeros(8, np.float32)))) == 64


def test_an_announcement_with_four_records_fits_400_bytes():
    """The downlink of a round is at most 400 payload bytes at P = 8, for a cohort of 16 too."""
    opened = replace(
        OPEN, plan=plan(9), records=tuple(map(record, range(5, 9))), cohort=Cohort(frozenset({0, 15}))
    )
    assert len(encode(opened)) <= 400


def exact_record(round_: int) -> RoundRecord:
    """A record of two projected gradients and three exact scalars in each of two steps."""
    asked = RoundPlan(round_, 7, METHODS["headstep"].code, 2, 2, 1e-3, 0.25, (0.5, 1.0), exact=3)
    return RoundRecord(asked, 3, False, np.arange(10, dtype=np.float32).reshape(2, 5), 0x0123456789ABCDEF)


def test_golden_bytes_of_a_record_with_exact_scalars():
    """The exact scalars of a step follow its projected gradients."""
    assert encode_record(exact_record(8)).hex() == (
        "08000000" "0700000000000000" "01" "03" "02" "02" "0200" "0300" "6f12833a" "0000803e"
        "0000003f" "0000803f"
        "0300" "00" "efcdab8967452301"
        "00000000" "0000803f" "00000040" "00004040" "00008040"
        "0000a040" "0000c040" "0000e040" "00000041" "00001041"
    )  # fmt: skip
    assert decode_record(encode_record(exact_record(8))) == exact_record(8)


def test_exact_scalars_are_refused_where_the_method_has_none():
    """A plan of HiSo that asks for exact scalars is no plan."""
    data = bytearray(encode_record(record(1)))
    data[18] = 1
    with pytest.raises(WireError, match="no exact scalars"):
        decode_record(bytes(data))


def test_a_skipped_record_carries_no_scalars():
    """A round without a quorum costs its head only, and comes back as zeros."""
    skipped = replace(record(4), skipped=True, scalars=np.zeros((1, 8), np.float32))
    assert len(encode_record(skipped)) == len(encode_record(record(4))) - 32
    assert decode_record(encode_record(skipped)) == skipped


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_every_shorter_message_is_refused(message):
    """No prefix of a message is a message."""
    data = encode(message)
    for size in range(len(data)):
        with pytest.raises(WireError):
            decode(data[:size])


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_a_longer_message_is_refused(message):
    """A message with a byte too many is refused."""
    with pytest.raises(WireError, match=r"follow|early"):
        decode(encode(message) + b"\0")


def test_a_changed_bit_of_a_reply_shows_in_its_digest():
    """Whatever single bit is flipped, the reply is refused or has another digest."""
    data = encode(REPLY)
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        try:
            found = decode(bytes(changed))
        except WireError:
            continue
        assert isinstance(found, Reply)
        assert found.digest != REPLY.digest


def test_a_plan_for_more_scalars_than_a_reply_holds_is_refused():
    """255 steps of 65,535 perturbations would keep a board busy for days."""
    with pytest.raises(WireError, match="65535 scalars"):
        decode(encode(replace(OPEN, plan=replace(OPEN.plan, steps=255, perturbations=65535))))


def test_an_oversized_message_is_refused_unread():
    """Length is looked at before anything else."""
    with pytest.raises(WireError, match="longer"):
        decode(bytes(MAX_MESSAGE + 1))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e10])
def test_absurd_scalars_are_refused(value):
    """Not a number, infinite or beyond 1e9: no such scalar enters."""
    with pytest.raises(WireError, match="scalar"):
        decode(encode(replace(REPLY, scalars=np.array([0, value], np.float32))))


def test_a_failed_reply_may_have_no_loss():
    """An agent that could not measure says so with no scalars and a NaN."""
    failed = decode(encode(replace(REPLY, loss=float("nan"), scalars=np.zeros(0, np.float32))))
    assert isinstance(failed, Reply)
    assert failed.failed


@pytest.mark.parametrize(
    ("offset", "value", "text"), [(0, 2, "version 2"), (1, 9, "kind 9")], ids=["version", "kind"]
)
def test_other_versions_and_kinds_are_refused(offset, value, text):
    """The message names the number it met."""
    data = bytearray(encode(REPLY))
    data[offset] = value
    with pytest.raises(WireError, match=text):
        decode(bytes(data))


def test_an_unknown_method_is_refused():
    """A record of a method of another release is not guessed at."""
    data = bytearray(encode_record(record(1)))
    data[13] = 250
    with pytest.raises(WireError, match="method 250"):
        decode_record(bytes(data))


def test_records_with_a_gap_are_refused():
    """A slice whose records are not consecutive is no slice."""
    with pytest.raises(WireError, match="consecutive"):
        decode(encode(Slice(3, 5, (record(5), record(7)))))


def test_random_bytes_never_get_past_the_decoder():
    """100,000 mutations of real messages either decode to a message or raise WireError."""
    rng = np.random.default_rng(0)
    seeds = [bytearray(encode(message)) for message in MESSAGES]
    for number in range(100_000):
        data = bytearray(seeds[number % len(seeds)])
        for _ in range(rng.integers(1, 4)):
            data[rng.integers(len(data))] = rng.integers(256)
        try:
            message = decode(bytes(data[: rng.integers(1, len(data) + 1)] if number % 3 else data))
        except WireError:
            continue
        assert decode(encode(message)) is not None


def test_a_cohort_holds_exactly_its_members():
    """The bits of a cohort name its agents and nobody else."""
    cohort = Cohort.from_bytes(Cohort(frozenset({0, 7, 8, 4999})).to_bytes())
    assert [agent for agent in range(6000) if agent in cohort] == [0, 7, 8, 4999]
    assert all(agent in Cohort.from_bytes(b"") for agent in (0, 12_345))


def test_a_set_of_agents_in_more_bytes_than_needed_is_refused():
    """One message has one form: a cohort with an empty last byte is none, unless it is the only one."""
    assert Cohort.from_bytes(b"\x05").members == {0, 2}
    assert Cohort.from_bytes(b"\x00").members == frozenset()
    with pytest.raises(WireError, match="needs fewer"):
        Cohort.from_bytes(b"\x05\x00")
