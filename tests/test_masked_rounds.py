"""Rounds whose replies only their sum can be read of: exact, with dropouts, and with keys that change."""

import json
import os
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from coordinator.config import load_experiment
from edge_agent.agreement import PrivateKey
from edge_agent.link import Message
from edge_agent.masked_wire import (
    MaskedReply,
    Unmask,
    Unmasked,
    decode_masked,
    encode_masked,
    is_masked,
)
from edge_agent.masking import from_fixed, to_fixed
from edge_agent.topics import shard_of
from edge_agent.veil import Veil
from edge_agent.wire import Reply, encode
from profiles.errors import ConfigError, WireError
from tests.fleet import TOPICS, BoardInMemory, FleetInMemory

pytest.importorskip("cryptography")

ROOT = Path(__file__).resolve().parent.parent


class MaskedBoard(BoardInMemory):
    """A board with a veil, as the agent process has one; remembers what it hid."""

    def boot(self, replica=None):
        super().boot(replica)
        self.veil = Veil("test", PrivateKey(), os.urandom)
        self.hidden = {}
        self.silent = False

    def pump(self, now):
        while self.link is not None and (event := self.link.receive(0)) is not None:
            if isinstance(event, Message) and is_masked(event.payload):
                request = decode_masked(event.payload)
                answer = None if self.silent else self.veil.tell(request)
                if answer is not None:
                    self.link.publish(TOPICS.reply(0, self.name), encode_masked(answer))
                continue
            if isinstance(event, Message) and event.topic == TOPICS.control:
                control = json.loads(event.payload)
                self.veil.on_control(control)
                outgoing = self.agent.on_control(control, now)
                self.link.subscribe(TOPICS.round(shard_of(self.name, 1)))
            elif isinstance(event, Message):
                outgoing = self.agent.on_message(event.payload, now)
            else:
                outgoing = self.agent.on_connected(now)
            self._send(outgoing)
        if self.link is not None:
            self._send(self.agent.on_tick(now))

    def _send(self, outgoing):
        for message in outgoing:
            if isinstance(message, Reply):
                covered = self.veil.cover(message, self.agent.opened, self.agent.number)
                if covered is not None:
                    self.hidden[message.round] = message
                    self.link.publish(TOPICS.reply(0, self.name), encode_masked(covered))
            elif hasattr(message, "state"):
                told = {"state": message.state, "round": self.agent.replica.round}
                told["key"] = self.veil.public.hex()
                self.link.publish(TOPICS.status(self.name), json.dumps(told).encode(), retain=True)
            else:
                super()._send([message])


class MaskedFleet(FleetInMemory):
    """A fleet whose coordinator reads sums alone."""

    masked = True
    board = MaskedBoard

    def terms_of(self, round_):
        return replace(self.terms, masked=True)


def sums(fleet, round_):
    """Return the mean of what the survivors of a round hid, in the fixed point of the masks."""
    rows = fleet.log._db.execute("SELECT agent, samples FROM replies WHERE round = ? AND counted", (round_,))
    survivors = dict(rows.fetchall())
    boards = {board.name: board for board in fleet.boards}
    total = np.zeros(4, np.uint64)
    for name, samples in survivors.items():
        total = total + to_fixed(boards[name].hidden[round_].scalars, samples)
    return len(survivors), from_fixed(total, sum(survivors.values()))


def check_records(fleet):
    """Check that each record holds the exact mean of its survivors, and return how many these were."""
    counts = []
    for record in fleet.log.records():
        if not record.skipped:
            survivors, mean = sums(fleet, record.plan.round)
            counts.append(survivors)
            assert np.array_equal(record.scalars[0], mean)
    assert len(fleet.digests()) == 1
    return counts


def test_a_masked_run_has_the_sums_of_an_open_one(tmp_path):
    """Every record is the mean of what all agents hid, bit for bit in the fixed point; all replicas agree."""
    fleet = MaskedFleet(tmp_path, boards=8, rounds=10)
    fleet.run()
    assert check_records(fleet) == [8] * 10
    assert fleet.log.skipped() == 0
    losses = [row[0] for row in fleet.log._db.execute("SELECT loss FROM records")]
    assert all(0 < loss < 1 for loss in losses)


def test_the_log_of_a_masked_run_holds_no_scalar_of_an_agent(tmp_path):
    """Neither scalars nor a loss of one agent were ever known."""
    fleet = MaskedFleet(tmp_path, boards=4, rounds=5)
    fleet.run()
    rows = fleet.log._db.execute("SELECT DISTINCT loss, scalars FROM replies").fetchall()
    assert rows == [(None, b"")]


def test_two_of_eight_drop_out_of_a_masked_run(tmp_path):
    """They never answer again: each round's sum is that of the six, from the first deadline on."""
    fleet = MaskedFleet(tmp_path, boards=8, rounds=8, quorum=5, deadline_s=2.0)
    fleet.run(until=lambda: fleet.rounds.replica.round == 2)
    for board in fleet.boards[2:4]:
        board.kill()
    fleet.run()
    counts = check_records(fleet)
    assert counts[-1] == 6
    assert fleet.log.skipped() == 0


def test_who_dies_after_its_masked_reply_is_in_the_sum(tmp_path):
    """Three of eight reply and then fall silent for ever: a majority's shares undo their masks."""
    fleet = MaskedFleet(tmp_path, boards=8, rounds=3, deadline_s=5.0)
    for board in fleet.boards[:3]:
        board.silent = True
    fleet.run()
    assert check_records(fleet) == [8] * 3


def test_a_round_whose_masks_stay_on_is_skipped_on_record(tmp_path):
    """With too few shares nothing is guessed: the round is closed without scalars, and the run goes on."""
    fleet = MaskedFleet(tmp_path, boards=4, rounds=4, deadline_s=2.0)
    fleet.run(until=lambda: fleet.rounds.replica.round == 1)
    for board in fleet.boards[:2]:
        board.silent = True
    fleet.run(until=lambda: fleet.log.skipped() == 1)
    for board in fleet.boards[:2]:
        board.silent = False
    fleet.run()
    check_records(fleet)
    assert 1 <= fleet.log.skipped() <= 2


def test_a_rebooted_board_brings_a_new_key_and_takes_part(tmp_path):
    """Its old masks are worth nothing; the open round is asked anew and nothing is lost."""
    fleet = MaskedFleet(tmp_path, boards=4, rounds=10, deadline_s=30.0)
    fleet.run(until=lambda: fleet.rounds.replica.round == 3)
    fleet.boards[1].kill()
    fleet.turn()
    fleet.boards[1].boot()
    fleet.run(until=lambda: fleet.rounds.finished)
    fleet.run()
    assert len(fleet.digests()) == 1
    assert len(fleet.log) == 10


def test_a_coordinator_that_starts_again_goes_on_masked(tmp_path):
    """The keys come back with the statuses; the result has one digest."""
    fleet = MaskedFleet(tmp_path, boards=4, rounds=10, deadline_s=5.0)
    fleet.run(until=lambda: fleet.rounds.replica.round == 3)
    fleet.crash_coordinator()
    fleet.start_coordinator()
    fleet.run()
    assert len(fleet.digests()) == 1
    assert len(fleet.log) == 10


def test_an_open_reply_is_refused_in_a_masked_run(tmp_path):
    """What is not masked does not count, whoever sends it."""
    fleet = MaskedFleet(tmp_path, boards=4, rounds=4)
    fleet.run(until=lambda: fleet.rounds.replica.round == 1)
    fleet.service._on_reply(0, plain_reply(fleet), fleet.now)
    assert fleet.service.dropped["not masked"] == 1
    fleet.run()
    assert check_records(fleet) == [4] * 4


def plain_reply(fleet) -> bytes:
    opened = fleet.rounds._open
    return encode(Reply(fleet.rounds.epoch, 1, 0, 16, 1.0, 1, opened.digests[-1], np.ones(4, np.float32)))


class Cohort:
    """Four veils that know each other, with a reply each."""

    def __init__(self):
        self.veils = [Veil("run", PrivateKey(), os.urandom) for _ in range(4)]
        control = {"keys": [veil.public.hex() for veil in self.veils]}
        for veil in self.veils:
            veil.on_control(control)

    def sent(self, opened, round_=0):
        reply = Reply(1, round_, 0, 16, 0.5, 1, 1, np.ones(4, np.float32))
        return [veil.cover(reply, opened, n) for n, veil in enumerate(self.veils)]


@pytest.fixture
def opened(tmp_path):
    fleet = FleetInMemory(tmp_path, boards=4)
    return fleet.rounds._open.message


def request(sent, survivors, to=0):
    shares = {n: sent[n].shares[to] for n in survivors if n != to}
    return Unmask(1, sent[to].round, sent[to].session, frozenset(survivors), shares)


def test_an_agent_tells_one_sum_a_round(opened):
    """Asked again for the same it says the same; asked for other survivors it keeps silent."""
    cohort = Cohort()
    sent = cohort.sent(opened)
    first = cohort.veils[0].tell(request(sent, [0, 1, 2, 3]))
    again = cohort.veils[0].tell(request(sent, [0, 1, 2, 3]))
    assert encode_masked(again) == encode_masked(first)
    assert cohort.veils[0].tell(request(sent, [0, 1, 2])) is None


@pytest.mark.parametrize("survivors", [[0], [0, 1], [1, 2, 3], [0, 1, 2, 9]])
def test_an_agent_does_not_unmask_for_too_few_or_for_strangers(opened, survivors):
    """It hides among at least three of its cohort, itself among them."""
    cohort = Cohort()
    sent = cohort.sent(opened)
    told = Unmask(1, 0, sent[0].session, frozenset(survivors), {})
    assert cohort.veils[0].tell(told) is None


def test_the_same_round_is_masked_alike_and_another_one_is_not(opened):
    """A repeated reply has the same bits; masks are never used for two rounds."""
    cohort = Cohort()
    first, again = cohort.sent(opened), cohort.sent(opened)
    assert np.array_equal(first[0].values, again[0].values)
    other = cohort.sent(replace(opened, plan=replace(opened.plan, round=1)), 1)
    assert not np.array_equal(first[0].values, other[0].values)


MESSAGES = [
    MaskedReply(
        3, 9, b"sessions", 1, 16, 60000, 5, np.arange(3, dtype=np.uint64), {1: b"a" * 24, 2: b"b" * 24}
    ),
    Unmask(3, 9, b"sessions", frozenset({0, 9}), {9: b"c" * 24}),
    Unmasked(3, 9, b"sessions", np.arange(2, dtype=np.uint64), {0: b"d" * 16, 9: b"e" * 16}),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_decoding_undoes_encoding_and_nothing_else_decodes(message):
    """What was encoded comes back; a byte less, more or changed does not."""
    data = encode_masked(message)
    assert encode_masked(decode_masked(data)) == data
    for wrong in (data[:-1], data + b"\0", data[1:], b""):
        with pytest.raises(WireError):
            decode_masked(wrong)
    for at in range(len(data)):
        changed = bytearray(data)
        changed[at] ^= 0x41
        with pytest.raises(WireError):
            decode_masked(bytes(changed))


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("fleet.aggregation=median", "compares replies"),
        ("fleet.cohort=2", "3 to 100"),
        ("devices=[{profile='pi-4-2gb', count=101}]", "3 to 100"),
    ],
)
def test_masks_with_what_needs_single_replies_are_refused(setting, words):
    """Before anything starts, with what to change."""
    settings = ["privacy.masks=pairwise", setting]
    with pytest.raises(ConfigError, match=words):
        load_experiment(ROOT / "examples" / "digits.toml", settings)


@pytest.mark.timeout(300)
def test_real_boards_train_behind_masks(tmp_path):
    """Four processes over a broker: all replicas agree, and the log knows no agent's scalars."""
    command = [sys.executable, "-m", "coordinator.cli", "testbed", "run"]
    settings = [
        *("rounds=12", "pruning.method=none", "privacy.masks=pairwise"),
        "devices=[{profile='pi-4-2gb', count=4}]",
    ]
    sets = [word for setting in settings for word in ("--set", setting)]
    run = tmp_path / "run"
    start = [*command, str(ROOT / "examples" / "digits.toml"), "--out", str(run), "--json", *sets]
    done = subprocess.run(start, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["digests_agree"]
    assert summary["rounds_skipped"] == 0
    with sqlite3.connect(run / "log.sqlite") as db:
        assert db.execute("SELECT DISTINCT scalars FROM replies").fetchall() == [(b"",)]
        assert db.execute("SELECT COUNT(*) FROM replies WHERE counted").fetchone() == (48,)
