"""Hostile input: whatever is sent is counted, named and dropped, and leaves nothing behind."""

import json
import random
from dataclasses import replace

import numpy as np
import psutil
import pytest
from fleet import BUNDLE, TOPICS, FleetInMemory

from coordinator.status import read_status
from edge_agent.link import MemoryLink, Message
from edge_agent.roster import number_in, pack_names
from edge_agent.wire import RoundOpen, SliceRequest, decode, encode
from profiles.errors import WireError


@pytest.fixture(scope="module")
def captured(tmp_path_factory):
    """Digest of a run in which nobody was hostile, and all that was said in it."""
    fleet = FleetInMemory(tmp_path_factory.mktemp("captured"))
    ear = MemoryLink(fleet.broker)
    ear.subscribe(TOPICS.base + "#")
    fleet.run()
    (digest,) = fleet.digests()
    said = []
    while (event := ear.receive(0)) is not None:
        if isinstance(event, Message):
            said.append(event)
    return digest, said


def at_round(fleet: FleetInMemory, number: int):
    return lambda: fleet.rounds.replica.round >= number


def mutated(payload: bytes, chance: random.Random) -> bytes:
    """Return the payload with some bits flipped, bytes cut out, put in, doubled, or replaced altogether."""
    data = bytearray(payload)
    for _ in range(chance.randint(1, 4)):
        kind = chance.randrange(6)
        at = chance.randrange(len(data) + 1)
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del data[at : at + chance.randint(1, 8)]
        elif kind == 2:
            data[at:at] = chance.randbytes(chance.randint(1, 8))
        elif kind == 3 and data:
            data[at % len(data)] = chance.choice([0, 1, 0x7F, 0x80, 0xFF])
        elif kind == 4:
            data += data[at:]
        else:
            data = bytearray(chance.randbytes(chance.randint(0, 80)))
    return bytes(data) if bytes(data) != payload else bytes(data) + b"\0"


def test_a_hundred_thousand_mutated_messages_change_nothing(tmp_path, captured):
    """They come between the true ones of every round, on every topic; memory and log do not grow."""
    digest, said = captured
    chance = random.Random(3)
    fleet = FleetInMemory(tmp_path, rounds=12)
    own = (TOPICS.control, TOPICS.round(0))  # what agents hear; the coordinator only watches it
    process = psutil.Process()
    sizes = []
    sent = 0
    for step in range(100):
        for _ in range(1000):
            told = chance.choice(said)
            topic = chance.choice([told.topic, chance.choice(said).topic])
            if topic in own and chance.random() < 0.9:
                continue
            fleet.coordinator_link.deliver(topic, mutated(told.payload, chance))
        sent += 1000
        fleet.service.pump()
        if step % 9 == 0:
            fleet.turn()
        while fleet.coordinator_link._events.qsize():
            fleet.service.pump()
        if step >= 20:
            sizes.append(process.memory_info().rss)
    fleet.run()
    assert sent == 100_000
    assert sum(fleet.service.counts().values()) > 50_000
    assert fleet.digests() == {digest}
    assert fleet.log.skipped() == 0
    assert max(sizes) - sizes[0] < 8 << 20
    events = fleet.log._db.execute("SELECT COUNT(*), MAX(LENGTH(text)) FROM events").fetchone()
    assert events[0] < 1000
    assert events[1] < 300
    assert all(len(json.dumps(status)) < 20_000 for status in fleet.service.statuses.values())


@pytest.mark.slow
def test_a_million_mutated_messages_do_not_break_the_decoder(captured):
    """Each is decoded or refused as a WireError, and what is decoded encodes to the same bytes."""
    _, said = captured
    payloads = [message.payload for message in said if message.topic.split("/")[2] in ("r", "u", "q", "a")]
    assert payloads
    chance = random.Random(5)
    refused = 0
    for _ in range(1_000_000):
        data = mutated(chance.choice(payloads), chance)
        try:
            message = decode(data)
        except WireError:
            refused += 1
            continue
        assert encode(message) == data or getattr(message, "failed", False)  # their loss is any NaN
    assert refused > 900_000


def test_a_replayed_capture_of_the_whole_run_changes_nothing(tmp_path, captured):
    """All that was said in an earlier run of the same name is said again in the middle of this one."""
    digest, said = captured
    fleet = FleetInMemory(tmp_path)
    fleet.run(until=at_round(fleet, 5))
    stranger = MemoryLink(fleet.broker)
    for message in said:
        stranger.publish(message.topic, message.payload, retain=True)
        fleet.turn(0.01)
    fleet.run()
    assert fleet.digests() == {digest}
    assert fleet.log.skipped() == 0


@pytest.mark.parametrize("epoch", [1, 9])
def test_retained_leftovers_of_another_run_change_nothing(tmp_path, captured, epoch):
    """A broker still holds what a run of that name with another bundle said, of a lower or a higher epoch."""
    digest, said = captured
    fleet = FleetInMemory(tmp_path)
    fleet.crash_coordinator()
    for board in fleet.boards:
        board.kill()
    stranger = MemoryLink(fleet.broker)
    for message in said:
        payload = message.payload
        if message.topic == TOPICS.round(0):
            payload = encode(replace(decode(payload), epoch=epoch))
        elif message.topic == TOPICS.control:
            payload = json.dumps({**json.loads(payload), "epoch": epoch, "bundle": "c" * 64}).encode()
        stranger.publish(message.topic, payload, retain=True)
    stranger.close()
    for board in fleet.boards:
        board.boot()
        board.pump(fleet.now)
    fleet.start_coordinator()
    fleet.run()
    assert fleet.digests() == {digest}
    assert fleet.log.skipped() == 0


@pytest.mark.parametrize("epoch", [2, 0xFFFF])
def test_a_forged_announcement_of_a_higher_epoch_locks_nobody_out(tmp_path, captured, epoch):
    """The coordinator hears it on its own topic and speaks again; its control message names the epoch."""
    digest, _ = captured
    fleet = FleetInMemory(tmp_path)
    fleet.run(until=at_round(fleet, 4))
    opened = decode(fleet.broker.retained[TOPICS.round(0)])
    assert isinstance(opened, RoundOpen)
    stranger = MemoryLink(fleet.broker)
    forged = replace(opened, epoch=epoch, plan=replace(opened.plan, round=90), records=())
    stranger.publish(TOPICS.round(0), encode(forged), retain=True)
    fleet.run(turns=100)
    assert fleet.digests() == {digest}
    assert fleet.service.dropped["foreign announcement"] == 1


@pytest.mark.parametrize(
    "forged",
    [
        {"bundle": "c" * 64, "agents": ["board-0"], "shards": 1, "epoch": 9},
        {"bundle": BUNDLE, "agents": ["x", "y", "board-0"], "shards": 1, "epoch": 9},
        {"bundle": BUNDLE, "agents": [["board-", 0, 3]], "shards": 7, "epoch": 9},
        {"bundle": BUNDLE, "agents": 3, "shards": float("inf"), "epoch": []},
    ],
    ids=["bundle", "fleet", "shards", "types"],
)
def test_a_forged_control_message_is_answered_with_the_true_one(tmp_path, captured, forged):
    """Agents that were misled, or told to leave, are back in the same run."""
    digest, _ = captured
    fleet = FleetInMemory(tmp_path)
    fleet.run(until=at_round(fleet, 4))
    stranger = MemoryLink(fleet.broker)
    stranger.publish(TOPICS.control, json.dumps(forged).encode(), retain=True)
    fleet.run(turns=100)
    assert fleet.digests() == {digest}
    assert json.loads(fleet.broker.retained[TOPICS.control])["bundle"] == BUNDLE


def test_wiped_retained_messages_are_said_again(tmp_path):
    """Somebody clears the round topic; an agent that comes later still finds the round."""
    fleet = FleetInMemory(tmp_path)
    fleet.run(until=at_round(fleet, 4))
    MemoryLink(fleet.broker).publish(TOPICS.round(0), b"", retain=True)
    for _ in range(8):
        fleet.turn()
    assert TOPICS.round(0) in fleet.broker.retained


def test_a_flood_of_requests_gets_few_answers(tmp_path):
    """A request is 8 bytes and its answer thousands: an agent gets a burst, then a few a second."""
    fleet = FleetInMemory(tmp_path)
    fleet.run(until=at_round(fleet, 6))
    before = fleet.coordinator_link.traffic.messages_up
    for _ in range(5000):
        fleet.coordinator_link.deliver(TOPICS.request("board-1"), encode(SliceRequest(1, 0)))
    fleet.service.pump()
    while fleet.coordinator_link._events.qsize():
        fleet.service.pump()
    assert fleet.coordinator_link.traffic.messages_up - before < 100
    assert fleet.service.dropped["requests too often"] > 4800


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"null",
        b"[" * 5000,
        b'{"state": "dancing"}',
        b'{"state": []}',
        b'{"state": "ready", "pid": 1e999}',
        b'{"state": "ready", "rss_mib": NaN}',
        b'{"state": "ready", "rss_mib": 1' + b"0" * 400 + b"}",
        b'{"state": "ready", "round": -1}',
        b'{"state": "ready", "version": "\\ud800"}',
        b'{"state": "ready", "traffic": {"packet_up": "much"}}',
        b'{"state": "ready", "dropped": []}',
        b'{"state": "ready", "text": "' + b"x" * 20_000 + b'"}',
        b"\xff\xfe",
    ],
)
def test_a_malformed_status_is_refused(payload):
    """Not JSON, nested without end, or a field of another type or size: always a WireError."""
    with pytest.raises(WireError, match="status"):
        read_status(payload)


def test_a_status_keeps_known_fields_only():
    """What nobody asked for does not fill the coordinator's memory."""
    assert read_status(b'{"state": "ready", "round": 3, "junk": [1, 2]}') == {"state": "ready", "round": 3}


def test_a_packed_roster_gives_every_name_its_number():
    """Names that count up are one entry; each has the number it has in the list, and strangers have none."""
    names = ["b-1", "b-2", "b-3", "solo", "b-7", "c-09", "c-9", "c-10", "7", "8", "b-4"]
    packed = json.loads(json.dumps(pack_names(names)))
    assert packed[0] == ["b-", 1, 3]
    assert [number_in(packed, name) for name in names] == list(range(len(names)))
    assert [number_in(packed, name) for name in ("b-0", "b-03", "b-5", "c-11", "")] == [None] * 5
    assert len(json.dumps(pack_names([f"pi-{n}" for n in range(5000)]))) < 30


@pytest.mark.parametrize("entries", ["abc", None, [3], [["b-", 1]], [["b-", -1, 5]], [["b-", 1, True]], {}])
def test_a_malformed_roster_is_refused(entries):
    """Nothing but names and counted names."""
    with pytest.raises(ValueError, match="fleet"):
        number_in(entries, "b-1")


def test_records_of_another_bundle_are_given_up_slowly(tmp_path):
    """A log that does not follow from the bundle is asked for ever more rarely, and said to be so."""
    fleet = FleetInMemory(tmp_path)
    fleet.run(until=at_round(fleet, 6))
    board = fleet.boards[0]
    board.kill()
    broken = board.agent._fresh_replica

    def other_bundle():
        replica = broken()
        replica.weights.view(np.uint32)[0] ^= 1 << 22
        return replica

    board.boot(other_bundle())
    board.agent._fresh_replica = other_bundle
    for _ in range(200):
        fleet.turn(1.0)
    assert 3 < board.agent.dropped["digest disagreed"] < 30
    assert fleet.service.statuses["board-0"]["state"] == "refused"
