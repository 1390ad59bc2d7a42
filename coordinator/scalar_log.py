"""The scalar log: every record in order, and what people want to know about how it came to be.

One SQLite file. ``records`` is the truth; its rows are chained by a hash, so that a row that was
altered, removed or put elsewhere is found. The other tables are for reports and change nothing.
A record is committed to the disk before anybody hears of it.
"""

import hashlib
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from coordinator.log_schema import SCHEMA_VERSION, create, migrate
from edge_agent.plan import RoundPlan
from edge_agent.wire import Reply, RoundRecord, decode_record, encode_record
from profiles.errors import DigestError, LogError, WireError

__all__ = ["FleetRow", "Order", "ScalarLog"]


class FleetRow(NamedTuple):
    """What the log holds of an agent; memory in MiB."""

    name: str
    profile: str
    budget_mib: float | None
    predicted_mib: float | None


class Order(NamedTuple):
    """What somebody asked of the run's coordinator: a verb with its arguments, and its number."""

    number: int
    verb: str
    arguments: str


class ScalarLog:
    """An open log; use :meth:`create` or :meth:`open`.

    Attributes:
        path: The file.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self._db = connection

    @classmethod
    def create(cls, path: Path, meta: Mapping[str, str]) -> "ScalarLog":
        """Make an empty log.

        Args:
            path: Must not exist yet.
            meta: At least ``bundle``, the bundle's identity, with which the chain begins.

        Raises:
            LogError: The file exists or cannot be made.
        """
        if path.exists():
            raise LogError(f"{path} exists already", hint="Go on with --resume, or choose another --out.")
        log = cls(path, cls._connect(path))
        try:
            create(log._db)
            with log._db:
                log._db.executemany("INSERT INTO meta VALUES (?, ?)", list(meta.items()))
        except sqlite3.Error as error:
            log.close()
            raise LogError(f"{path} cannot be made: {error}") from None
        return log

    @classmethod
    def open(cls, path: Path) -> "ScalarLog":
        """Open an existing log; one of an earlier release gets this one's tables.

        Raises:
            LogError: There is none, it is no log, or of a later release.
        """
        if not path.is_file():
            raise LogError(f"there is no scalar log {path}", hint="Name the folder of a run.")
        log = cls(path, cls._connect(path))
        try:
            version = log.meta().get("schema")
        except sqlite3.DatabaseError as error:
            log.close()
            raise LogError(f"{path} is not a scalar log: {error}") from None
        if version is None or not version.isdigit() or not 1 <= int(version) <= SCHEMA_VERSION:
            log.close()
            raise LogError(
                f"{path} has schema version {version}; this release reads 1 to {SCHEMA_VERSION}",
                hint="Install the release of scalarfed that wrote the log.",
            )
        try:
            migrate(log._db, int(version))
        except sqlite3.Error as error:
            log.close()
            raise LogError(
                f"{path} of schema version {version} cannot be brought to {SCHEMA_VERSION}: {error}",
                hint="Make the file writable, or work on a copy of the run folder.",
            ) from None
        return log

    @staticmethod
    def _connect(path: Path) -> sqlite3.Connection:
        try:
            db = sqlite3.connect(path, isolation_level="DEFERRED")
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")
        except sqlite3.Error as error:
            raise LogError(f"{path} cannot be opened: {error}") from None
        return db

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def __enter__(self) -> "ScalarLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        """Number of records, which is the round that comes next."""
        return int(self._db.execute("SELECT COALESCE(MAX(round) + 1, 0) FROM records").fetchone()[0])

    def meta(self) -> dict[str, str]:
        """Return all that was noted about the run."""
        return dict(self._db.execute("SELECT key, value FROM meta"))

    def set_meta(self, key: str, value: str) -> None:
        """Note something about the run, committed."""
        with self._db:
            self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    def next_epoch(self) -> int:
        """Count a new incarnation of the coordinator and return its number, from 1."""
        epoch = int(self.meta().get("epoch", "0")) + 1
        self.set_meta("epoch", str(epoch))
        return epoch

    def append(
        self,
        record: RoundRecord,
        *,
        loss: float | None,
        opened_at: float,
        closed_at: float,
        replies: Mapping[str, tuple[Reply, bool, float]],
        events: Sequence[tuple[float, str, str, str]] = (),
        accounts: Sequence[tuple[str, str, str]] = (),
    ) -> None:
        """Commit a record and the replies behind it; when this returns, they are on the disk.

        Args:
            record: The next one.
            loss: Mean loss of the round, None when skipped.
            opened_at: Unix time of the first announcement.
            closed_at: Unix time.
            replies: By agent name: the reply, whether it was counted, and when it came.
            events: What happened until then: Unix time, kind, agent, text.
            accounts: What the ledger holds: day, agent, text.

        Raises:
            LogError: The record is not the next one, or the disk does not take it.
        """
        expected = len(self)
        if record.plan.round != expected:
            raise LogError(f"record {record.plan.round} cannot follow {expected - 1}")
        data = encode_record(record)
        row = (
            record.plan.round,
            data,
            _link(self._chain_before(expected), data),
            opened_at,
            closed_at,
            loss,
            "skipped" if record.skipped else "applied",
        )
        try:
            with self._db:
                self._db.execute("INSERT INTO records VALUES (?, ?, ?, ?, ?, ?, ?)", row)
                self._insert_replies((a, reply, counted, at) for a, (reply, counted, at) in replies.items())
                self._insert_events(events)
                self._db.executemany("INSERT OR REPLACE INTO ledger VALUES (?, ?, ?)", accounts)
        except sqlite3.Error as error:
            raise LogError(
                f"round {record.plan.round} could not be written to {self.path}: {error}",
                hint="Free some disk space, then go on with --resume: nothing is lost.",
            ) from None

    def add_notes(
        self, events: Sequence[tuple[float, str, str, str]], late: Sequence[tuple[str, Reply, float]]
    ) -> None:
        """Note what happened, and replies that came after their round was closed; they change nothing.

        Args:
            events: Unix time, kind, agent, text.
            late: Agent, reply, Unix time.
        """
        with self._db:
            self._insert_events(events)
            self._insert_replies((agent, reply, False, at) for agent, reply, at in late)

    def _insert_events(self, events: Sequence[tuple[float, str, str, str]]) -> None:
        self._db.executemany("INSERT INTO events VALUES (?, ?, ?, ?)", events)

    def _insert_replies(self, replies: Iterable[tuple[str, Reply, bool, float]]) -> None:
        self._db.executemany(
            "INSERT INTO replies VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                (
                    reply.round,
                    agent,
                    reply.attempt,
                    reply.samples,
                    None if reply.failed else reply.loss,
                    reply.peak_kib,
                    f"{reply.digest:016x}",
                    reply.scalars.astype("<f4").tobytes(),
                    int(counted),
                    at,
                )
                for agent, reply, counted, at in replies
            ),
        )

    def add_evaluation(self, round_: int, loss: float, accuracy: float) -> None:
        """Note how the replica of a round does on the test part."""
        with self._db:
            self._db.execute("INSERT OR REPLACE INTO evaluations VALUES (?, ?, ?)", (round_, loss, accuracy))

    def add_event(self, kind: str, agent: str = "", text: str = "", *, at: float | None = None) -> None:
        """Note that something happened."""
        self.add_notes([(time.time() if at is None else at, kind, agent, text)], [])

    def set_agents(self, rows: Sequence[tuple[int, str, str, float | None, float | None]]) -> None:
        """Note the fleet: number, name, profile, budget and predicted peak in MiB."""
        with self._db:
            self._db.executemany("INSERT OR REPLACE INTO agents VALUES (?, ?, ?, ?, ?)", rows)

    def fleet(self) -> list["FleetRow"]:
        """Return the fleet, in the order of its numbers."""
        query = "SELECT name, profile, budget_mib, predicted_mib FROM agents ORDER BY id"
        return [FleetRow(*row) for row in self._db.execute(query)]

    def accounts(self) -> list[tuple[str, str, str]]:
        """Return the ledger, oldest day first: day, agent, text."""
        return list(self._db.execute("SELECT day, agent, account FROM ledger ORDER BY day, agent"))

    def add_order(self, verb: str, arguments: str) -> int:
        """Ask something of the coordinator at work, committed; return the order's number."""
        query = "INSERT INTO orders(at, verb, arguments) VALUES (?, ?, ?)"
        with self._db:
            return int(self._db.execute(query, (time.time(), verb, arguments)).lastrowid or 0)

    def open_orders(self) -> list[Order]:
        """Return the orders that have no answer yet, oldest first."""
        query = "SELECT id, verb, arguments FROM orders WHERE answer IS NULL ORDER BY id"
        return [Order(*row) for row in self._db.execute(query)]

    def answer_order(self, number: int, answer: str) -> None:
        """Answer an order, committed."""
        with self._db:
            self._db.execute("UPDATE orders SET answer = ? WHERE id = ?", (answer, number))

    def take_answer(self, number: int) -> str | None:
        """Return the answer to an order, None where there is none yet."""
        row = self._db.execute("SELECT answer FROM orders WHERE id = ?", (number,)).fetchone()
        return None if row is None else row[0]

    def withdraw_order(self, number: int) -> bool:
        """Take an order back; return False if it was answered already."""
        with self._db:
            found = self._db.execute("DELETE FROM orders WHERE id = ? AND answer IS NULL", (number,))
        return found.rowcount == 1

    def replies_of(self, agent: str) -> int:
        """Return how many replies of an agent came, late ones and failed ones too."""
        return self._count("SELECT COUNT(*) FROM replies WHERE agent = ?", agent)

    def explorations(self) -> dict[str, list[tuple[RoundPlan, NDArray[np.float32]]]]:
        """Return for each agent the plan of every round and its own scalars; zeros where it sent none."""
        query = "SELECT round, scalars FROM replies WHERE agent = ? AND LENGTH(scalars) > 0 ORDER BY round"
        plans = [record.plan for record in self.records()]
        found = {}
        for row in self.fleet():
            sent = {
                number: np.frombuffer(data, "<f4") for number, data in self._db.execute(query, (row.name,))
            }
            shapes = [(plan, (plan.steps, plan.scalars)) for plan in plans]
            found[row.name] = [
                (plan, sent.get(plan.round, np.zeros(shape, np.float32)).reshape(shape))
                for plan, shape in shapes
            ]
        return found

    def answered_at_once(self, start: int = 0) -> int:
        """Return how many replies from round ``start`` on were counted without a second announcement."""
        return self._count("SELECT COUNT(*) FROM replies WHERE attempt = 0 AND counted AND round >= ?", start)

    def count_events(self, kind: str, agent: str) -> int:
        """Return how often something happened to an agent."""
        return self._count("SELECT COUNT(*) FROM events WHERE kind = ? AND agent = ?", kind, agent)

    def roll_back(self, round_: int, *, changes: str, change: str) -> None:
        """Let the log end before a round; its records from there on are kept aside, for people.

        Args:
            round_: The first one that no longer counts, from 0 to the length of the log.
            changes: Kind of the events that tell changes of the plan: later ones no longer count either.
            change: The text of the change that counts from this round on.
        """
        now = time.time()
        with self._db:
            self._db.execute(
                "INSERT INTO abandoned SELECT ?, round, record, chain FROM records WHERE round >= ?",
                (now, round_),
            )
            self._db.execute("DELETE FROM records WHERE round >= ?", (round_,))
            self._db.execute("DELETE FROM evaluations WHERE round > ?", (round_,))
            self._db.execute("UPDATE replies SET counted = 0 WHERE round >= ?", (round_,))
            self._db.execute(
                "UPDATE events SET kind = kind || ', abandoned' "
                "WHERE kind = ? AND json_extract(text, '$.round') >= ?",
                (changes, round_),
            )
            self._insert_events([(now, changes, "", change)])

    def abandoned(self) -> int:
        """Return how many records were gone back from."""
        return self._count("SELECT COUNT(*) FROM abandoned")

    def texts_of(self, kind: str) -> list[str]:
        """Return what the events of a kind say, in the order in which they were noted."""
        query = "SELECT text FROM events WHERE kind = ? ORDER BY rowid"
        return [str(row[0]) for row in self._db.execute(query, (kind,))]

    def skipped(self) -> int:
        """Return how many rounds found no quorum."""
        return self._count("SELECT COUNT(*) FROM records WHERE kind = 'skipped'")

    def seconds_per_round(self) -> float | None:
        """Return the mean time from a round's first announcement to its record, None without rounds."""
        row = self._db.execute("SELECT AVG(closed_at - opened_at) FROM records").fetchone()
        return None if row[0] is None else float(row[0])

    def last_evaluation(self) -> tuple[float, float] | None:
        """Return loss and accuracy of the newest evaluation."""
        query = "SELECT loss, accuracy FROM evaluations ORDER BY round DESC LIMIT 1"
        row = self._db.execute(query).fetchone()
        return None if row is None else (float(row[0]), float(row[1]))

    def _count(self, query: str, *values: str | int) -> int:
        return int(self._db.execute(query, values).fetchone()[0])

    def records(self, start: int = 0, stop: int | None = None) -> Iterator[RoundRecord]:
        """Yield the records of rounds ``start`` to ``stop`` (all that follow if None), decoded.

        Raises:
            DigestError: A row does not hold a record, or not that of its round.
        """
        for number, data, _ in self._rows(start, stop):
            yield _decoded(number, data)

    def bytes_between(self, start: int, stop: int) -> int:
        """Return how many bytes the records of rounds ``start`` to ``stop`` have together."""
        query = "SELECT COALESCE(SUM(LENGTH(record)), 0) FROM records WHERE round >= ? AND round < ?"
        return self._count(query, start, stop)

    def compact(self, *, keep_replies: bool) -> tuple[int, int]:
        """Give back the room that the file does not need; return its size before and after, in bytes.

        Args:
            keep_replies: False drops the agents' own scalars too; they are for people, replay needs none.
        """
        before = self.path.stat().st_size
        if not keep_replies:
            with self._db:
                self._db.execute("DELETE FROM replies")
        self._db.execute("VACUUM")
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return before, self.path.stat().st_size

    def verify(self) -> int:
        """Check the chain and the order of all rows; return their number.

        Raises:
            DigestError: Names the first row that was altered or is missing.
        """
        chain = self._genesis()
        expected = 0
        for number, data, stored in self._rows(0, None):
            if number != expected:
                raise DigestError(f"round {expected} is missing from {self.path}")
            chain = _link(chain, data)
            if chain != stored:
                raise DigestError(f"round {number} in {self.path} was altered: the chain breaks")
            _decoded(number, data)
            expected += 1
        return expected

    def _rows(self, start: int, stop: int | None) -> Iterator[tuple[int, bytes, bytes]]:
        end = (1 << 62) if stop is None else stop
        query = "SELECT round, record, chain FROM records WHERE round >= ? AND round < ? ORDER BY round"
        yield from self._db.execute(query, (start, end))

    def _genesis(self) -> bytes:
        return _link(b"scalarfed", self.meta().get("bundle", "").encode())

    def _chain_before(self, round_: int) -> bytes:
        if round_ == 0:
            return self._genesis()
        row = self._db.execute("SELECT chain FROM records WHERE round = ?", (round_ - 1,)).fetchone()
        return bytes(row[0])


def _link(chain: bytes, data: bytes) -> bytes:
    return hashlib.blake2b(chain + data, digest_size=16).digest()


def _decoded(number: int, data: bytes) -> RoundRecord:
    try:
        record = decode_record(bytes(data))
    except WireError as error:
        raise DigestError(f"the row of round {number} holds no record: {error}") from None
    if record.plan.round != number:
        raise DigestError(f"the row of round {number} holds the record of round {record.plan.round}")
    return record
