"""The protocol, over the in-memory link: faults change nothing, and disagreement is noticed."""

from dataclasses import replace

import numpy as np
import pytest
from fleet import BUNDLE, TOPICS, FleetInMemory, fresh_replica

from edge_agent.link import MemoryLink
from edge_agent.replay import apply_records
from edge_agent.wire import Reply, RoundOpen, decode, encode


@pytest.fixture(scope="module")
def faultless(tmp_path_factory) -> int:
    """Digest of twelve rounds in which nothing went wrong."""
    fleet = FleetInMemory(tmp_path_factory.mktemp("faultless"))
    fleet.run()
    (digest,) = fleet.digests()
    return digest


def at_round(fleet: FleetInMemory, number: int):
    return lambda: fleet.rounds.replica.round >= number


def test_all_replicas_end_with_one_digest(faultless):
    """Coordinator and boards agree after the last round, and did move."""
    assert faultless != fresh_replica().digest()


def test_the_same_run_again_gives_the_same_digest(tmp_path, faultless):
    """Nothing but the experiment decides the result."""
    fleet = FleetInMemory(tmp_path)
    fleet.run()
    assert fleet.digests() == {faultless}


def test_the_log_alone_rebuilds_the_result(tmp_path, faultless):
    """Bundle plus records give the digest that the run ended with."""
    fleet = FleetInMemory(tmp_path)
    fleet.run()
    replica = fresh_replica()
    apply_records(replica, fleet.log.records())
    assert replica.digest() == faultless


def test_a_killed_board_comes_back_to_the_same_digest(tmp_path, faultless):
    """A board that loses all its memory in the middle catches up from the log; no round is lost."""
    fleet = FleetInMemory(tmp_path)
    fleet.run(until=at_round(fleet, 7))
    fleet.boards[1].kill()
    for _ in range(5):
        fleet.turn()
    fleet.boards[1].boot()
    fleet.run()
    assert fleet.digests() == {faultless}
    assert fleet.log.skipped() == 0


def test_a_forgetful_broker_changes_nothing(tmp_path, faultless):
    """The broker loses all retained messages twice."""
    fleet = FleetInMemory(tmp_path)
    for number in (3, 8):
        fleet.run(until=at_round(fleet, number))
        fleet.broker.restart()
    fleet.run()
    assert fleet.digests() == {faultless}


def test_a_crashed_coordinator_goes_on_where_the_log_ends(tmp_path, faultless):
    """A new coordinator on the same log has a higher epoch and reaches the same digest."""
    fleet = FleetInMemory(tmp_path)
    fleet.run(until=at_round(fleet, 5))
    fleet.crash_coordinator()
    fleet.start_coordinator()
    fleet.run()
    assert fleet.rounds.epoch == 2
    assert fleet.digests() == {faultless}


def test_a_board_from_a_lost_future_starts_again(tmp_path, faultless):
    """A board whose replica is ahead of the log (the log was restored from a copy) returns to it."""
    fleet = FleetInMemory(tmp_path)
    fleet.run(until=at_round(fleet, 5))
    ahead = fresh_replica()
    ahead.round = 9
    fleet.boards[0].kill()
    fleet.boards[0].boot(ahead)
    fleet.run()
    assert fleet.digests() == {faultless}
    assert fleet.boards[0].agent.dropped["ahead of the log"] == 1


def test_a_board_with_one_wrong_bit_is_noticed_and_healed(tmp_path, faultless):
    """A flipped bit in a replica is seen in the same round; the board starts again from its bundle."""
    fleet = FleetInMemory(tmp_path)
    fleet.run(until=at_round(fleet, 5))
    weights = fleet.boards[2].agent.replica.weights
    weights.view(np.uint32)[17] ^= 1 << 20
    fleet.run()
    assert fleet.digests() == {faultless}
    assert fleet.boards[2].agent.dropped["digest disagreed"] >= 1


def test_duplicates_and_late_replies_change_nothing(tmp_path, faultless):
    """Every reply is repeated at once and again four rounds later."""
    fleet = FleetInMemory(tmp_path)
    echo = MemoryLink(fleet.broker)
    echo.subscribe(TOPICS.base + "u/#")
    captured = []
    while not fleet.rounds.finished:
        fleet.turn()
        while (event := echo.receive(0)) is not None:
            if not hasattr(event, "topic") or event in captured:
                continue
            captured.append(event)
            for old in (event, *captured[-13:-12]):
                fleet.coordinator_link.deliver(old.topic, old.payload)
    fleet.run()
    assert fleet.digests() == {faultless}
    assert fleet.rounds.dropped["late"] > 0


HOSTILE = {
    "garbage": b"\xff" * 64,
    "nothing": b"",
    "not a number": encode(Reply(1, 3, 0, 16, 0.1, 1, 0, np.full(4, np.nan, np.float32))),
    "wrong digest": encode(Reply(1, 3, 0, 16, 0.1, 1, 0, np.ones(4, np.float32))),
    "wrong epoch": encode(Reply(9, 3, 0, 16, 0.1, 1, 0, np.ones(4, np.float32))),
    "future round": encode(Reply(1, 30, 0, 16, 0.1, 1, 0, np.ones(4, np.float32))),
    "too many scalars": encode(Reply(1, 3, 0, 16, 0.1, 1, 0, np.ones(400, np.float32))),
}


@pytest.mark.parametrize("payload", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_replies_are_counted_and_dropped(tmp_path, faultless, payload):
    """The same bytes on every board's reply topic, and on a stranger's, in every round."""
    fleet = FleetInMemory(tmp_path)
    stranger = MemoryLink(fleet.broker)
    while not fleet.rounds.finished:
        for name in ("board-0", "board-1", "nobody"):
            stranger.publish(TOPICS.reply(0, name), payload)
        fleet.turn()
    fleet.run()
    assert fleet.digests() == {faultless}
    assert sum(fleet.service.counts().values()) >= 12


def test_hostile_announcements_do_not_move_a_replica(tmp_path, faultless):
    """Garbage, and an announcement whose records lead elsewhere, leave boards on the log's digest."""
    fleet = FleetInMemory(tmp_path)
    fleet.run(until=at_round(fleet, 4))
    opened = decode(fleet.broker.retained[TOPICS.round(0)])
    assert isinstance(opened, RoundOpen)
    last = opened.records[-1]
    forged = replace(
        opened,
        plan=replace(opened.plan, round=opened.plan.round + 1),
        records=(replace(last, plan=opened.plan, scalars=last.scalars * 3),),
    )
    stranger = MemoryLink(fleet.broker)
    for payload in (b"\x01\x01garbage", encode(forged)):
        stranger.publish(TOPICS.round(0), payload)
    fleet.run()
    assert fleet.digests() == {faultless}


def test_a_round_without_quorum_is_skipped_on_record(tmp_path):
    """With one board gone and all needed, the round is extended once, then skipped, then goes on without."""
    fleet = FleetInMemory(tmp_path, rounds=8, deadline_s=5.0)
    fleet.run(until=at_round(fleet, 2))
    fleet.boards[0].kill()
    fleet.run()
    records = list(fleet.log.records())
    assert [record.skipped for record in records] == [False, False, True, True, True, False, False, False]
    assert len(fleet.digests()) == 1


def test_an_excluded_board_is_asked_again_when_it_speaks(tmp_path):
    """After three silent rounds a board is left out; its next status brings it back."""
    fleet = FleetInMemory(tmp_path, rounds=14, deadline_s=5.0)
    fleet.run(until=at_round(fleet, 2))
    fleet.boards[0].kill()
    fleet.run(until=at_round(fleet, 7))
    assert fleet.rounds.attendance.members[0].excluded
    fleet.boards[0].boot()
    fleet.run()
    assert not fleet.rounds.attendance.members[0].excluded
    assert fleet.rounds.attendance.members[0].counted > 2
    assert len(fleet.digests()) == 1


def test_a_quorum_closes_without_the_absent(tmp_path):
    """With two of three needed, a board that is known to be gone is not waited for."""
    fleet = FleetInMemory(tmp_path, quorum=2)
    fleet.run(until=at_round(fleet, 2))
    fleet.boards[0].kill()
    begun = fleet.now
    fleet.run()
    assert fleet.log.skipped() == 0
    assert fleet.now - begun < 60.0


def test_replies_are_acknowledged_by_the_next_round(tmp_path):
    """Every agent learns of each of its replies but the last whether it counted."""
    fleet = FleetInMemory(tmp_path, rounds=10)
    fleet.run()
    assert [(board.agent.counted, board.agent.uncounted) for board in fleet.boards] == [(10, 0)] * 3


def test_a_reply_that_did_not_count_is_not_acknowledged(tmp_path):
    """A straggler's board learns that its late reply did not count, and nobody else does."""
    fleet = FleetInMemory(tmp_path, rounds=6, quorum=2, deadline_s=1.0)
    slow = fleet.boards[0]
    fleet.run(until=lambda: fleet.rounds.replica.round == 2)
    held = []
    publish = slow.link.publish
    slow.link.publish = lambda topic, payload, **rest: (
        held.append((topic, payload)) if "/u/" in topic else publish(topic, payload, **rest)
    )
    fleet.run(until=lambda: fleet.rounds.replica.round == 3)
    slow.link.publish = publish
    fleet.run()
    assert held
    assert slow.agent.uncounted >= 1
    assert [board.agent.uncounted for board in fleet.boards[1:]] == [0, 0]


def test_a_smaller_cohort_asks_others_each_round(tmp_path):
    """With a cohort of one of three, every board is asked at some time and all replicas agree."""
    fleet = FleetInMemory(tmp_path, cohort=1)
    fleet.run()
    assert len(fleet.digests()) == 1
    counted = [member.counted for member in fleet.rounds.attendance.members]
    assert sum(counted) == 12
    assert min(counted) >= 1


def test_a_run_with_another_bundle_is_refused(tmp_path):
    """An agent says so, and estimates nothing."""
    fleet = FleetInMemory(tmp_path)
    (report,) = fleet.boards[0].agent.on_control(
        {"bundle": "c" * 64, "agents": [], "shards": 1, "epoch": 1}, 0.0
    )
    assert report.state == "refused"
    assert BUNDLE[:12] in report.text


def test_a_board_short_of_memory_takes_smaller_batches(tmp_path):
    """It halves the batch until one fits, keeps to it, counts by its samples, and no round is lost."""
    fleet = FleetInMemory(tmp_path)
    small = fleet.boards[1]
    measure, tried = small._estimate, []

    def estimate(replica, opened, number):
        tried.append(opened.batch_size)
        if opened.batch_size > 5:
            raise MemoryError
        return measure(replica, opened, number)

    small.agent._estimate = estimate
    fleet.run()
    assert tried == [16, 8, 4] + [4] * 11
    assert fleet.log.skipped() == 0
    assert len(fleet.digests()) == 1
    samples = fleet.log._db.execute("SELECT agent, samples FROM replies WHERE counted").fetchall()
    assert set(samples) == {("board-0", 16), ("board-1", 4), ("board-2", 16)}
    assert fleet.log.count_events("smaller batch", "board-1") == 12


def test_a_board_without_any_memory_says_so(tmp_path):
    """Not even one sample fits: the agent answers that it failed instead of dying."""
    fleet = FleetInMemory(tmp_path, quorum=2)

    def estimate(replica, opened, number):
        raise MemoryError

    fleet.boards[1].agent._estimate = estimate
    fleet.run()
    assert fleet.log.skipped() == 0
    assert fleet.log.count_events("estimate failed", "board-1") == 12


def test_a_board_that_sends_no_numbers_is_named_and_left_out(tmp_path):
    """NaN never gets past the decoder: the board is named, counts as silent, and is not asked any more."""
    fleet = FleetInMemory(tmp_path, rounds=10, quorum=2, deadline_s=5.0)
    liar = fleet.boards[0]
    answer = liar.agent._answer

    def lie(opened, number):
        return replace(answer(opened, number), scalars=np.full(4, np.nan, np.float32))

    liar.agent._answer = lie
    fleet.run()
    assert fleet.log.skipped() == 0
    assert fleet.rounds.attendance.members[0].counted == 0
    assert fleet.log.count_events("dropped", "board-0") >= 1
    assert fleet.log.count_events("excluded", "board-0") >= 1
    assert len(fleet.digests()) == 1


def test_who_sends_no_numbers_is_a_liar_less_among_the_others(tmp_path):
    """One of five may lie, and one is known to: the median of the other four is their mean."""
    fleet = FleetInMemory(tmp_path, boards=5, rounds=1, quorum=4, deadline_s=5.0, rule="median", liars=0.2)
    told = {}

    def answering(board, answer):
        def lie_or_tell(opened, number):
            reply = answer(opened, number)
            told[board.name] = reply.scalars
            nonsense = np.full(4, np.nan, np.float32)
            return replace(reply, scalars=nonsense) if board is fleet.boards[0] else reply

        return lie_or_tell

    for board in fleet.boards:
        board.agent._answer = answering(board, board.agent._answer)
    fleet.run()
    (record,) = fleet.log.records()
    honest = np.array([told[board.name] for board in fleet.boards[1:]])
    assert np.allclose(record.scalars, honest.mean(axis=0), rtol=1e-6)
    assert not np.allclose(record.scalars, np.median(honest, axis=0), rtol=1e-3)
