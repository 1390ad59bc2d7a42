"""Tests of collectors: sums that anybody may take, packs, and a fleet that does not notice them."""

import math
from dataclasses import replace

import numpy as np
import pytest

from coordinator.aggregation import aggregate, mean_of_packs
from coordinator.broker import find_mosquitto
from coordinator.collector import Collector
from coordinator.packing import MOST_REFUSED, Pack, Refused, most_replies, pack, unpack
from coordinator.partial import SUM_BYTES, Partial
from coordinator.swarm import Load, run_swarm
from edge_agent.link import MemoryLink
from edge_agent.topics import shard_of
from edge_agent.wire import LARGEST_SCALAR, MAX_MESSAGE, Reply, SliceRequest, encode, encode_record
from profiles.errors import WireError
from tests.fleet import TOPICS, FleetInMemory

HELLO = Pack(3)
GOLDEN = (
    "0106" "0100" "0300" "09000000" "0100" "0100" "01" "2000" "1000000000000000"
    "07000000" "0100" "10000000" "0000003f" "60ea0000" "efcdab8967452301" "0000803f"
    "0000000000000000000000000000000000000002000000000000000000000000"
    "5b5b226e6f742061207265706c79222c202270692d32222c2022222c20315d5d"
)  # fmt: skip


def any_rows(chance: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return finite float32 of every size, denormal and huge ones too, and samples."""
    agents, scalars = chance.integers(1, 40), chance.integers(1, 6)
    if chance.random() < 0.5:
        bits = chance.integers(0, 2**32, (agents, scalars), dtype=np.uint64).astype(np.uint32)
        rows = bits.view(np.float32)
        rows[~np.isfinite(rows)] = -0.0
    else:  # of like size, so that much cancels
        scale = 10.0 ** chance.integers(-44, 38)
        rows = (chance.normal(size=(agents, scalars)) * scale).astype(np.float32)
    return rows, chance.integers(1, 65_536, agents)


def reply(chance: np.random.Generator, *, scalars: int = 3, **changes) -> Reply:
    values = {
        "epoch": 1,
        "round": 5,
        "attempt": int(chance.integers(0, 9)),
        "samples": int(chance.integers(1, 65_536)),
        "loss": float(np.float32(chance.normal())),
        "peak_kib": int(chance.integers(0, 1 << 32)),
        "digest": int(chance.integers(0, 1 << 63)),
        "scalars": chance.normal(size=scalars).astype(np.float32),
    }
    return Reply(**{**values, **changes})


def as_bytes(replies) -> list[tuple[int, bytes]]:
    return [(agent, encode(one)) for agent, one in replies]


# -------------------------------------------------------------------------------------------------- sums


def test_a_mean_of_whole_numbers_has_the_bits_of_fsum():
    """Against math.fsum, on float32 from the smallest denormal to the largest number."""
    chance = np.random.default_rng(1)
    for _ in range(500):
        rows, samples = any_rows(chance)
        products = rows.astype(np.float64) * samples[:, None]
        wanted = np.array([math.fsum(column) for column in products.T.tolist()]) / math.fsum(samples)
        assert Partial.of(rows, samples).mean().tobytes() == wanted.tobytes()


def test_it_does_not_matter_who_sums_what():
    """Agents in any order, cut into any parts, joined in any order: one sum."""
    chance = np.random.default_rng(2)
    for _ in range(200):
        rows, samples = any_rows(chance)
        order = chance.permutation(len(rows))
        cuts = np.sort(chance.integers(0, len(rows) + 1, 3))
        parts = [Partial.of(rows[piece], samples[piece]) for piece in np.split(order, cuts)]
        chance.shuffle(parts)
        left = Partial.joined([Partial.joined(parts[:2]), *parts[2:]])
        assert left == Partial.joined(parts) == Partial.of(rows, samples)


def test_the_largest_sum_fits_the_wire():
    """As many agents as a pack can hold, all at the bounds, and the smallest denormal beside them."""
    largest = Partial.of(np.full((1, 1), LARGEST_SCALAR, np.float32), np.array([0xFFFF]))
    total = Partial(0xFFFF, (-0xFFFF * largest.sums[0] - 1,))
    assert Partial.from_bytes(total.to_bytes(), samples=0xFFFF) == total
    assert len(total.to_bytes()) == SUM_BYTES


def test_sums_of_packs_serve_only_if_every_reply_in_them_counts():
    """A pack with somebody who is not trusted, or who had said something else before, is added up anew."""
    chance = np.random.default_rng(3)
    replies = {agent: reply(chance) for agent in range(9)}
    again = replace(replies[4], scalars=replies[4].scalars + 1)
    listed = [
        [(0, replies[0]), (1, replies[1])],
        [(2, replies[2]), (3, replies[3])],
        [(4, again), (5, replies[5])],
        [(6, replies[6]), (6, replies[6])],
    ]
    packs = [Pack(0, tuple(one), partial=unpack(pack(0, one), fleet=9).partial) for one in listed]
    trusted = {agent: one for agent, one in replies.items() if agent != 3}
    assert mean_of_packs(trusted, packs).tobytes() == aggregate(trusted).tobytes()
    spoilt = [replace(one, partial=Partial(1, (0, 0, 0))) for one in packs]
    assert mean_of_packs(trusted, spoilt[1:]).tobytes() == aggregate(trusted).tobytes()
    assert mean_of_packs(trusted, spoilt[:1]).tobytes() != aggregate(trusted).tobytes()


# ------------------------------------------------------------------------------------------------- bytes


def test_golden_bytes_of_a_pack():
    """A pack has the bytes that docs/wire.md shows."""
    one = Reply(3, 9, 1, 16, 0.5, 60_000, 0x0123456789ABCDEF, np.array([1.0], np.float32))
    refused = [Refused("not a reply", "pi-2", "")]
    assert pack(1, [(7, one)], refused).hex() == GOLDEN


def test_unpacking_undoes_packing():
    """Replies with their agents, their sum, and what was refused; failed replies; and nothing at all."""
    chance = np.random.default_rng(4)
    whole = [(agent, reply(chance)) for agent in (7, 0, 7, 4_999)]
    failed = [(1, reply(chance, scalars=0, loss=math.nan)), (2, reply(chance, scalars=0, loss=math.nan))]
    refused = (Refused("undecodable reply", "pi-1", "too short", 3), Refused("not a reply", "ä", ""))
    for replies in (whole, failed, []):
        found = unpack(pack(3, replies, refused), fleet=5000)
        assert as_bytes(found.replies) == as_bytes(replies)
        assert (found.collector, found.refused) == (3, refused)
    assert unpack(pack(3, whole), fleet=5000).partial == Partial.of(
        np.stack([one.scalars for _, one in whole]), np.array([one.samples for _, one in whole])
    )
    assert unpack(pack(3, failed), fleet=3).partial is None
    assert unpack(pack(3, []), fleet=3) == HELLO
    assert HELLO.is_hello


def test_impossible_samples_are_in_no_sum():
    """A reply that the rounds will refuse for its samples makes no number that is too long for the wire."""
    chance = np.random.default_rng(5)
    absurd = [(0, reply(chance, samples=0xFFFFFFFF, scalars=2)), (1, reply(chance, scalars=2))]
    assert unpack(pack(0, absurd), fleet=2).partial is None


@pytest.mark.parametrize("scalars", [0, 1, 72, 65_535])
def test_a_full_pack_fits_a_message(scalars):
    """The most replies of a pack, with the longest refusals, are no longer than a message may be."""
    one = Reply(1, 1, 1, 1, 0.5, 1, 1, np.ones(scalars, np.float32))
    refused = [Refused("undecodable reply", "x" * 63, '"' * 160, 0xFFFF)] * MOST_REFUSED
    assert len(pack(0, [(0, one)] * most_replies(scalars), refused)) <= MAX_MESSAGE


def test_a_pack_is_read_strictly():
    """Cut, lengthened, about another fleet, with NaN or absurd numbers: refused."""
    chance = np.random.default_rng(6)
    good = pack(1, [(agent, reply(chance)) for agent in range(4)], [Refused("not a reply", "pi-1", "")])
    assert unpack(good, fleet=4)
    for size in range(len(good)):
        with pytest.raises(WireError):
            unpack(good[:size], fleet=4)
    with pytest.raises(WireError):
        unpack(good + b" ", fleet=4)
    with pytest.raises(WireError, match="beyond the fleet"):
        unpack(good, fleet=3)
    for value in (np.nan, np.inf, 2e9):
        absurd = replace(reply(chance), scalars=np.array([value], np.float32), samples=1 << 20)
        with pytest.raises(WireError, match="not finite"):
            unpack(pack(1, [(0, reply(chance, scalars=1)), (1, absurd)]), fleet=4)
        with pytest.raises(WireError, match="not finite"):
            unpack(pack(1, [(0, reply(chance, loss=value))]), fleet=4)


def test_mutated_packs_do_not_break_the_decoder():
    """A hundred thousand packs with changed, cut or added bytes: each is refused, or is a pack."""
    chance = np.random.default_rng(7)
    good = pack(1, [(agent, reply(chance)) for agent in range(3)], [Refused("not a reply", "pi-1", "x", 2)])
    refused = 0
    for _ in range(100_000):
        data = bytearray(good)
        for _ in range(chance.integers(1, 4)):
            data[chance.integers(len(data))] = chance.integers(256)
        try:
            unpack(bytes(data), fleet=5)
        except WireError:
            refused += 1
    assert 20_000 < refused < 100_000


# ------------------------------------------------------------------------------------------------- fleet


class CollectedFleet(FleetInMemory):
    """Five boards on three shards, whose replies two collectors read."""

    shards = 3
    collected = True

    def __init__(self, folder, **options) -> None:
        self.collectors: list[Collector] = []
        self.links: list[MemoryLink] = []
        super().__init__(folder, boards=5, **options)
        for number in range(2):
            self.start_collector(number)

    def start_collector(self, number: int) -> None:
        link = MemoryLink(self.broker)
        found = Collector(
            link=link,
            topics=TOPICS,
            number=number,
            agents=[board.name for board in self.boards],
            shards=3,
            mine=[shard for shard in range(3) if shard % 2 == number],
            clock=lambda: self.now,
        )
        found.start()
        self.collectors[number:] = [found, *self.collectors[number + 1 :]]
        self.links[number:] = [link, *self.links[number + 1 :]]

    def turn(self, seconds: float = 0.3) -> None:
        self.now += seconds
        self.service.pump()
        for board in self.boards:
            board.pump(self.now)
        for _ in range(2):  # take in, wait a little, hand up
            for collector in self.collectors:
                collector.pump()
            self.now += 0.02
        self.service.pump()


def records(fleet: FleetInMemory) -> list[bytes]:
    """Return the fleet's records; all its replicas have ended alike."""
    assert len(fleet.digests()) == 1
    return [encode_record(one) for one in fleet.log.records()]


def folders(folder):
    """Return two empty folders."""
    for name in ("plain", "collected"):
        (folder / name).mkdir()
    return folder / "plain", folder / "collected"


@pytest.mark.parametrize("rule", ["mean", "median", "trimmed", "krum"])
def test_a_fleet_with_collectors_has_the_same_records(tmp_path, rule):
    """Bit for bit, with every rule; and every reply stands in the log."""
    first, second = folders(tmp_path)
    plain = FleetInMemory(first, boards=5, rule=rule)
    fleet = CollectedFleet(second, rule=rule)
    plain.run()
    fleet.run()
    assert {shard_of(board.name, 3) for board in fleet.boards} == {0, 1, 2}
    assert len(records(fleet)) == 12
    assert records(fleet) == records(plain)
    assert fleet.log.answered_at_once(1) == plain.log.answered_at_once(1) == 5 * 11


def test_the_coordinator_hears_packs_alone(tmp_path, monkeypatch):
    """It gets no agent's replies, and adds nothing up that the collectors have added up."""
    fleet = CollectedFleet(tmp_path)
    kinds = set()
    receive = fleet.coordinator_link.receive

    def spy(timeout_s):
        event = receive(timeout_s)
        kinds.add(getattr(event, "topic", "").removeprefix(TOPICS.base).partition("/")[0])
        return event

    def refuse(*_arguments, **_options):
        raise AssertionError("the replies were added up again")

    fleet.coordinator_link.receive = spy
    monkeypatch.setattr("coordinator.aggregation.aggregate_shares", refuse)
    fleet.run()
    assert "p" in kinds
    assert "u" not in kinds


def test_what_is_hostile_is_counted_as_without_collectors(tmp_path):
    """Garbage, NaN, another epoch, a wrong digest, other messages, a stranger, a wrong shard: the same."""
    first, second = folders(tmp_path)
    ones = np.ones(4, np.float32)
    hostile = {
        "board-0": [b"", b"\xff" * 64, encode(SliceRequest(1, 0))],
        "board-1": [encode(Reply(1, 0, 0, 16, 0.1, 1, 0, np.full(4, np.nan, np.float32)))] * 3,
        "board-2": [encode(Reply(9, 0, 0, 16, 0.1, 1, 0, ones)), encode(Reply(1, 0, 0, 16, 0.1, 1, 7, ones))],
        "nobody": [b"x"],
    }
    counts = []
    for fleet in (FleetInMemory(first, boards=5, rounds=3), CollectedFleet(second, rounds=3)):
        stranger = MemoryLink(fleet.broker)
        for name, payloads in hostile.items():
            for payload in payloads:
                stranger.publish(TOPICS.reply(shard_of(name, fleet.shards), name), payload)
        wrong = shard_of("board-3", fleet.shards) + 1
        stranger.publish(TOPICS.reply(wrong % 3, "board-3"), b"x")
        fleet.run()
        assert len(fleet.digests()) == 1
        counts.append(
            {
                reason: times
                for reason, times in fleet.service.counts().items()
                if reason not in ("late", "duplicate")
            }
        )
    assert counts[0] == counts[1]
    assert sum(counts[0].values()) == 10


def test_duplicates_and_late_replies_change_nothing(tmp_path):
    """Every reply is repeated at once and again four rounds later, past the collectors."""
    first, second = folders(tmp_path)
    plain = FleetInMemory(first, boards=5)
    plain.run()
    fleet = CollectedFleet(second)
    echo = MemoryLink(fleet.broker)
    echo.subscribe(TOPICS.base + "u/#")
    captured = []
    while not fleet.rounds.finished:
        fleet.turn()
        while (event := echo.receive(0)) is not None:
            if not hasattr(event, "topic") or event in captured:
                continue
            captured.append(event)
            for old in (event, *captured[-21:-20]):
                for link in fleet.links:
                    link.deliver(old.topic, old.payload)
    fleet.run()
    assert records(fleet) == records(plain)
    assert fleet.rounds.dropped["late"] > 0


def test_a_collector_that_comes_back_has_the_round_announced_again(tmp_path):
    """What a killed collector held is asked for again at once, not only after the time to resend."""
    fleet = CollectedFleet(tmp_path, resend_s=50.0)
    fleet.run(until=lambda: fleet.rounds.replica.round == 3)
    fleet.links[0].close()
    fleet.collectors[0] = fleet.collectors[1]
    for _ in range(5):
        fleet.turn()
    assert fleet.rounds.replica.round == 3
    fleet.start_collector(0)
    fleet.run(turns=60)
    assert fleet.log.skipped() == 0
    assert len(fleet.digests()) == 1


def test_a_malformed_pack_changes_nothing(tmp_path):
    """Random bytes and packs about agents that do not exist, on the collectors' topic, in every turn."""
    first, second = folders(tmp_path)
    plain = FleetInMemory(first, boards=5)
    plain.run()
    fleet = CollectedFleet(second)
    stranger = MemoryLink(fleet.broker)
    chance = np.random.default_rng(8)
    while not fleet.rounds.finished:
        stranger.publish(TOPICS.pack(0), chance.bytes(64))
        stranger.publish(TOPICS.pack(9), pack(9, [(5, reply(chance))]))
        fleet.turn()
    fleet.run()
    assert records(fleet) == records(plain)
    assert fleet.service.counts()["malformed pack"] >= 24


@pytest.mark.skipif(find_mosquitto() is None, reason="needs mosquitto")
def test_a_swarm_with_two_collectors_loses_no_reply():
    """Sixty agents, a real broker, three real processes: every reply of every round is counted."""
    result = run_swarm(Load(60, 5, 60.0, collectors=2))
    assert result["rounds"] == 5
    assert result["replies_lost"] == 0
    assert result["collectors"] == 2
