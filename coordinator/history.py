"""What happened in a run, read back from its folder as plain values.

Knows the tables of the scalar log that are for people, ``summary.json`` and the bundle's manifest. Never
writes to the log, and does not replay it. What an interrupted run did not leave behind is empty here.
"""

import contextlib
import json
import sqlite3
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coordinator.books import Entry, last_entries
from profiles.errors import LogError

__all__ = ["AgentHistory", "Event", "History", "Slopes", "read_history"]

_SLOPE_ROUNDS = 600
_EVENTS = 2000


@dataclass(frozen=True)
class Event:
    """Something that happened; ``round`` is the one that was open then."""

    at: float
    round: int
    kind: str
    agent: str
    text: str


@dataclass(frozen=True)
class AgentHistory:
    """One agent's part. None where nobody noted it.

    Attributes:
        answered: Rounds in which its reply was counted, ascending.
        peak_mib: Largest resident size that it measured of itself.
    """

    name: str
    profile: str
    budget_mib: float | None
    predicted_mib: float | None
    peak_mib: float | None
    samples: int | None
    flops_spent: float | None
    missed: int | None
    restarts: int
    answered: NDArray[np.int64]


@dataclass(frozen=True)
class Slopes:
    """Magnitudes of the agents' projected gradients: deciles 1, 5 and 9 of each of some rounds."""

    rounds: NDArray[np.int64]
    low: NDArray[np.float64]
    median: NDArray[np.float64]
    high: NDArray[np.float64]


@dataclass(frozen=True)
class History:
    """A run. Arrays of one group have equal lengths; ``loss`` is NaN where a round was skipped.

    Attributes:
        summary: What ``summary.json`` holds; empty if the run did not end.
        manifest: The bundle's, empty if there is none.
        experiment: The experiment file's text.
        evaluated: Rounds that were closed when the replica was evaluated.
        books: Each agent's account of its latest day.
    """

    path: Path
    meta: Mapping[str, str]
    summary: Mapping[str, Any]
    manifest: Mapping[str, Any]
    experiment: str
    rounds: NDArray[np.int64]
    opened_at: NDArray[np.float64]
    closed_at: NDArray[np.float64]
    loss: NDArray[np.float64]
    skipped: NDArray[np.bool_]
    evaluated: NDArray[np.int64]
    test_loss: NDArray[np.float64]
    test_accuracy: NDArray[np.float64]
    slopes: Slopes
    agents: tuple[AgentHistory, ...]
    events: tuple[Event, ...]
    books: tuple[Entry, ...]

    def answers(self) -> NDArray[np.int64]:
        """Return how many replies were counted in each round."""
        counts = np.zeros(len(self.rounds), np.int64)
        for agent in self.agents:
            counts[agent.answered] += 1
        return counts


def read_history(run: Path) -> History:
    """Read a run folder.

    Raises:
        LogError: There is no log in it, or it cannot be read.
    """
    path = run / "log.sqlite"
    if not path.is_file():
        raise LogError(f"{run} holds no log.sqlite.", hint="Name the folder of a run, such as runs/digits.")
    try:
        with contextlib.closing(_open(path)) as db:
            return _read(run, db)
    except sqlite3.Error as error:
        raise LogError(f"{path} cannot be read: {error}.") from error


def _open(path: Path) -> sqlite3.Connection:
    # A log that nobody writes has no journal beside it; a plain read-only reader would make one and leave it.
    where, journal = path.resolve().as_uri(), path.with_name(f"{path.name}-wal")
    return sqlite3.connect(f"{where}?{'mode=ro' if journal.exists() else 'immutable=1'}", uri=True)


def _read(run: Path, db: sqlite3.Connection) -> History:
    summary = _json(run / "summary.json")
    rounds = db.execute(
        "SELECT round, opened_at, closed_at, loss, kind = 'skipped' FROM records ORDER BY round"
    ).fetchall()
    columns = list(zip(*rounds, strict=True)) or [()] * 5
    evaluations = db.execute("SELECT round, loss, accuracy FROM evaluations ORDER BY round").fetchall()
    test = list(zip(*evaluations, strict=True)) or [()] * 3
    closed_at = np.array(columns[2], float)
    found = db.execute(
        "SELECT at, kind, agent, text FROM events ORDER BY at DESC LIMIT ?", (_EVENTS,)
    ).fetchall()
    events = tuple(
        Event(row[0], int(np.searchsorted(closed_at, row[0])), *row[1:]) for row in reversed(found)
    )
    experiment = run / "experiment.toml"
    return History(
        path=run,
        meta=dict(db.execute("SELECT key, value FROM meta")),
        summary=summary,
        manifest=_json(run / "bundle" / "manifest.json"),
        experiment=experiment.read_text(encoding="utf-8") if experiment.is_file() else "",
        rounds=np.array(columns[0], np.int64),
        opened_at=np.array(columns[1], float),
        closed_at=closed_at,
        loss=np.array([np.nan if loss is None else loss for loss in columns[3]], float),
        skipped=np.array(columns[4], bool),
        evaluated=np.array(test[0], np.int64),
        test_loss=np.array(test[1], float),
        test_accuracy=np.array(test[2], float),
        slopes=_slopes(db, np.array(columns[0], np.int64)),
        agents=_agents(db, summary),
        events=events,
        books=_books(db),
    )


def _books(db: sqlite3.Connection) -> tuple[Entry, ...]:
    if db.execute("SELECT 1 FROM sqlite_master WHERE name = 'ledger'").fetchone() is None:
        return ()  # a log of an earlier release
    rows = db.execute("SELECT day, agent, account FROM ledger ORDER BY day, agent").fetchall()
    return tuple(last_entries(rows).values())


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise LogError(
            f"{path} cannot be read: {error}.", hint="Remove it; the log holds the run."
        ) from error
    return found if isinstance(found, dict) else {}


def _slopes(db: sqlite3.Connection, rounds: NDArray[np.int64]) -> Slopes:
    chosen = (
        rounds[np.unique(np.linspace(0, len(rounds) - 1, _SLOPE_ROUNDS).astype(int))]
        if len(rounds)
        else rounds
    )
    kept: list[int] = []
    deciles: list[NDArray[np.float64]] = []
    for round_ in chosen.tolist():
        blobs = [
            blob
            for (blob,) in db.execute("SELECT scalars FROM replies WHERE round = ? AND counted", (round_,))
        ]
        values = (
            np.abs(np.concatenate([np.frombuffer(blob, "<f4") for blob in blobs]).astype(float))
            if blobs
            else []
        )
        if len(values):
            kept.append(round_)
            deciles.append(np.quantile(values, [0.1, 0.5, 0.9]))
    low, median, high = np.array(deciles, float).reshape(-1, 3).T
    return Slopes(np.array(kept, np.int64), low, median, high)


def _agents(db: sqlite3.Connection, summary: Mapping[str, Any]) -> tuple[AgentHistory, ...]:
    noted: dict[str, Mapping[str, Any]] = {}
    if isinstance(summary.get("agents"), list):
        noted = {str(row.get("name")): row for row in summary["agents"] if isinstance(row, dict)}
    measured = dict(db.execute("SELECT agent, MAX(peak_kib) / 1024.0 FROM replies GROUP BY agent"))
    answered: dict[str, list[int]] = {}
    for agent, round_ in db.execute("SELECT agent, round FROM replies WHERE counted ORDER BY round"):
        answered.setdefault(agent, []).append(round_)
    happened = Counter(db.execute("SELECT agent, kind FROM events").fetchall())
    agents = []
    for _, name, profile, budget, predicted in db.execute(
        "SELECT id, name, profile, budget_mib, predicted_mib FROM agents ORDER BY id"
    ).fetchall():
        row = noted.get(name, {})
        peak = row.get("peak_rss_mib")
        agents.append(
            AgentHistory(
                name=name,
                profile=profile,
                budget_mib=budget,
                predicted_mib=predicted,
                peak_mib=measured.get(name) if peak is None else peak,
                samples=row.get("samples"),
                flops_spent=row.get("flops_spent"),
                missed=row.get("rounds_missed"),
                restarts=happened[name, "agent ended"],
                answered=np.array(answered.get(name, []), np.int64),
            )
        )
    return tuple(agents)
