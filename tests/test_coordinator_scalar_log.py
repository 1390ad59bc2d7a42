"""Tests of coordinator.scalar_log: durable, ordered, chained."""

import sqlite3

import numpy as np
import pytest

from coordinator.scalar_log import ScalarLog
from edge_agent.optimizer import METHODS
from edge_agent.plan import RoundPlan
from edge_agent.wire import Reply, RoundRecord
from profiles.errors import DigestError, LogError


def record(round_: int) -> RoundRecord:
    plan = RoundPlan(round_, 7, METHODS["decomfl"].code, 1, 2, 1e-3, 0.1, (0.0,))
    return RoundRecord(plan, 1, False, np.array([[round_, 0.5]], np.float32), round_ * 1000)


def append(log: ScalarLog, round_: int) -> None:
    reply = Reply(1, round_, 0, 16, 0.5, 1, 0, np.ones(2, np.float32))
    log.append(record(round_), loss=0.5, opened_at=1.0, closed_at=2.0, replies={"pi": (reply, True, 2.0)})


@pytest.fixture
def log(tmp_path):
    with ScalarLog.create(tmp_path / "log.sqlite", {"bundle": "b" * 64}) as made:
        for round_ in range(5):
            append(made, round_)
        yield made


def tamper(log: ScalarLog, statement: str, *values: object) -> None:
    with sqlite3.connect(log.path) as db:
        db.execute(statement, values)


def test_records_come_back_as_they_were(log):
    """What was appended is read back equal and in order, also from a new connection."""
    with ScalarLog.open(log.path) as again:
        assert list(again.records()) == [record(round_) for round_ in range(5)]
        assert list(again.records(2, 4)) == [record(2), record(3)]


def test_an_untouched_log_verifies(log):
    """The chain of five records holds."""
    assert log.verify() == 5


def test_an_altered_scalar_breaks_the_chain(log):
    """One flipped bit in one record is found, and its round named."""
    (data,) = sqlite3.connect(log.path).execute("SELECT record FROM records WHERE round = 3").fetchone()
    altered = bytearray(data)
    altered[-1] ^= 1
    tamper(log, "UPDATE records SET record = ? WHERE round = 3", bytes(altered))
    with pytest.raises(DigestError, match="round 3"):
        log.verify()


def test_a_removed_record_is_missed(log):
    """A row that is gone is named."""
    tamper(log, "DELETE FROM records WHERE round = 2")
    with pytest.raises(DigestError, match="round 2 is missing"):
        log.verify()


def test_the_chain_begins_with_the_bundle(log):
    """The same records under another bundle do not verify."""
    tamper(log, "UPDATE meta SET value = 'another' WHERE key = 'bundle'")
    with pytest.raises(DigestError, match="round 0"):
        log.verify()


def test_a_record_out_of_order_is_refused(log):
    """Round 7 cannot follow round 4, and nothing of it is written."""
    with pytest.raises(LogError, match="record 7 cannot follow 4"):
        append(log, 7)
    assert len(log) == 5


def test_a_failed_append_leaves_nothing_behind(log):
    """When the replies cannot be written, neither is the record."""
    bad = Reply(1, 5, 0, 16, 0.5, 1 << 70, 0, np.ones(2, np.float32))
    with pytest.raises(OverflowError):
        log.append(record(5), loss=0.5, opened_at=1.0, closed_at=2.0, replies={"pi": (bad, True, 2.0)})
    assert len(log) == 5
    append(log, 5)


def test_epochs_only_rise(log):
    """Every start of a coordinator gets a number above all before, across connections."""
    assert log.next_epoch() == 1
    with ScalarLog.open(log.path) as again:
        assert again.next_epoch() == 2


def test_a_missing_log_is_named(tmp_path):
    """The message has the path."""
    with pytest.raises(LogError, match="there is no scalar log"):
        ScalarLog.open(tmp_path / "log.sqlite")


def test_a_file_that_is_no_log_is_refused(tmp_path):
    """Any other file is not taken for a log."""
    path = tmp_path / "log.sqlite"
    path.write_bytes(b"not a database at all" * 100)
    with pytest.raises(LogError):
        ScalarLog.open(path)


def test_another_schema_is_refused(log):
    """A log of another schema version is not guessed at."""
    log.set_meta("schema", "99")
    with pytest.raises(LogError, match="schema version 99"):
        ScalarLog.open(log.path)
