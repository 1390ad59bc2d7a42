"""Catching up: a late agent gets snapshot or records, whichever is less, and ends at the same digest."""

import io
import time

import numpy as np
import pytest
from fleet import BUNDLE, TOPICS, FleetInMemory, fresh_replica

from coordinator.actions import Terms
from coordinator.rounds import Rounds
from coordinator.scalar_log import ScalarLog
from coordinator.service import Service
from edge_agent.agent import Agent
from edge_agent.estimator import Estimate
from edge_agent.grid import plan_segments, snap
from edge_agent.link import MemoryBroker, MemoryLink, Message
from edge_agent.optimizer import METHODS
from edge_agent.plan import RoundPlan
from edge_agent.replay import Replica, apply_record
from edge_agent.state import read_replica, replica_bytes
from edge_agent.topics import Topics
from edge_agent.wire import RoundRecord, Snapshot, decode, encode, encode_record


def restore(state: bytes) -> Replica | None:
    return read_replica(io.BytesIO(state), fresh_replica(), bundle_identity=BUNDLE, run="test", name="x")


def at_round(fleet: FleetInMemory, number: int):
    return lambda: fleet.rounds.replica.round >= number


@pytest.fixture
def answers():
    """Collects what a board is answered."""

    def kinds(ear: MemoryLink) -> list[str]:
        found = []
        while (event := ear.receive(0)) is not None:
            if isinstance(event, Message):
                found.append(type(decode(event.payload)).__name__)
        return found

    return kinds


def late_board(tmp_path, answers, *, every: int) -> tuple[FleetInMemory, list[str], set[int]]:
    """Return a fleet of which board 1 was away from the start until round 90."""
    fleet = FleetInMemory(tmp_path, rounds=100, quorum=2)
    fleet.service._checkpoint_every = every
    fleet.boards[1].kill()
    fleet.run(until=at_round(fleet, 90))
    ear = MemoryLink(fleet.broker)
    ear.subscribe(TOPICS.answer("board-1"))
    fleet.boards[1].boot()
    fleet.boards[1].agent._restore = restore
    fleet.run()
    return fleet, answers(ear), fleet.digests()


def test_a_late_board_gets_the_snapshot_when_that_is_less(tmp_path, answers):
    """1.5 kB of replica instead of 80 records, then the records since; everybody has one digest."""
    _, kinds, digests = late_board(tmp_path, answers, every=80)
    assert kinds[0] == "Snapshot"
    assert len(digests) == 1


def test_a_late_board_gets_records_when_those_are_less(tmp_path, answers):
    """A snapshot of round 5 saves nothing that is worth its bytes."""
    fleet, kinds, digests = late_board(tmp_path, answers, every=5000)
    fleet.service._take_snapshot()
    assert set(kinds) == {"Slice"}
    assert len(digests) == 1


def test_a_snapshot_that_nobody_asked_for_is_dropped(tmp_path):
    """A forged replica with a right digest of its own does not get in."""
    fleet = FleetInMemory(tmp_path)
    fleet.run(until=at_round(fleet, 4))
    forged = fresh_replica()
    forged.round = 50
    state = replica_bytes(forged, bundle_identity=BUNDLE, run="test")
    fleet.boards[0].agent._restore = restore
    MemoryLink(fleet.broker).publish(TOPICS.answer("board-0"), encode(Snapshot(1, state)))
    fleet.run()
    assert fleet.boards[0].agent.dropped["snapshot that was not asked for"] == 1
    assert len(fleet.digests()) == 1


@pytest.mark.parametrize("damage", [slice(0, 8), slice(110, 112), slice(-3, None)])
def test_a_damaged_snapshot_is_refused(tmp_path, damage):
    """Another magic, a changed byte, a short end: the replica stays, and the agent asks again."""
    state = bytearray(replica_bytes(fresh_replica(), bundle_identity=BUNDLE, run="test"))
    del state[damage]
    fleet = FleetInMemory(tmp_path)
    agent = fleet.boards[0].agent
    agent._restore = restore
    agent._asked_at = 0.0
    agent.on_message(encode(Snapshot(1, bytes(state))), 0.0)
    assert agent.dropped["snapshot refused"] == 1
    assert agent.replica.round == 0


SIZE = 27_008
ROUNDS = 5000
BIG = Topics("scalarfed", "big")


def big_replica() -> Replica:
    weights = np.random.default_rng(1).normal(0, 0.1, SIZE).astype(np.float32)
    segments = plan_segments(weights, [(0, SIZE)])
    snap(weights, segments)
    return Replica(weights, segments)


def big_plan(round_: int) -> RoundPlan:
    method = METHODS["hiso"]
    return RoundPlan(round_, 7, method.code, 1, 8, 1e-3, 0.001, method.values({}))


@pytest.mark.slow
@pytest.mark.parametrize("checkpoints", [True, False], ids=["snapshot", "records"])
def test_a_late_joiner_after_five_thousand_rounds_is_there_within_ten_seconds(tmp_path, checkpoints):
    """27,000 parameters with curvature: by a snapshot and its records, and by all 5,000 records alone."""
    replica = big_replica()
    chance = np.random.default_rng(3)
    broker = MemoryBroker()
    records = []
    with ScalarLog.create(tmp_path / "log.sqlite", {"bundle": BUNDLE}) as log:
        for round_ in range(ROUNDS):
            scalars = chance.normal(0, 1, (1, 8)).astype(np.float32)
            record = RoundRecord(big_plan(round_), 1, False, scalars, 0)
            apply_record(replica, record, check=False)
            records.append(RoundRecord(record.plan, 1, False, scalars, replica.digest()))
        with log._db:
            log._db.executemany(
                "INSERT INTO records VALUES (?, ?, x'00', 0, 0, 0, 'applied')",
                [(record.plan.round, encode_record(record)) for record in records],
            )
        rounds = Rounds(
            fleet=1,
            terms_of=lambda _: Terms(big_plan, ROUNDS + 1, 16, True, None, None, 600.0, 600.0),
            epoch=1,
            replica=replica,
            recent=records[-4:],
            seed=1,
        )
        service = Service(
            link=MemoryLink(broker),
            topics=BIG,
            log=log,
            rounds=rounds,
            agents=["late"],
            bundle_identity=BUNDLE,
        )
        service.start()
        if not checkpoints:
            service.late._snapshots.clear()
        link = MemoryLink(broker)
        agent = Agent(
            name="late",
            bundle_identity=BUNDLE,
            replica=big_replica(),
            fresh_replica=big_replica,
            estimate=lambda replica, opened, number: Estimate(np.ones((1, 8), np.float32), 0.5, 16),
            peak_kib=lambda: 1,
            restore=lambda state: read_replica(
                io.BytesIO(state), big_replica(), bundle_identity=BUNDLE, run="big", name="x"
            ),
        )
        begun = time.monotonic()
        agent.on_control({"bundle": BUNDLE, "agents": ["late"], "shards": 1, "epoch": 1}, 0.0)
        link.subscribe(BIG.round(0))
        link.subscribe(BIG.answer("late"))
        while agent.replica.round < ROUNDS:
            event = link.receive(0)
            assert event is not None, "nothing more came"
            if isinstance(event, Message):
                for message in agent.on_message(event.payload, 0.0):
                    if not hasattr(message, "state"):
                        link.publish(BIG.request("late"), encode(message))
                service.pump()
        took_s = time.monotonic() - begun
    assert agent.replica.digest() == records[-1].digest
    assert took_s < 10.0
