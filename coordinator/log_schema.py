"""The tables of a scalar log, and how a log of an earlier release gets those of this one.

Knows SQL and version numbers. Does not know what the rows mean. A migration adds; it changes no record.
"""

import sqlite3

__all__ = ["SCHEMA_VERSION", "create", "migrate"]

SCHEMA_VERSION = 3

_FIRST = """
CREATE TABLE meta(key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE records(round INTEGER PRIMARY KEY, record BLOB NOT NULL, chain BLOB NOT NULL,
    opened_at REAL NOT NULL, closed_at REAL NOT NULL, loss REAL, kind TEXT NOT NULL);
CREATE TABLE replies(round INTEGER NOT NULL, agent TEXT NOT NULL, attempt INTEGER NOT NULL,
    samples INTEGER NOT NULL, loss REAL, peak_kib INTEGER NOT NULL, digest TEXT NOT NULL,
    scalars BLOB NOT NULL, counted INTEGER NOT NULL, received_at REAL NOT NULL);
CREATE INDEX replies_by_round ON replies(round);
CREATE TABLE evaluations(round INTEGER PRIMARY KEY, loss REAL NOT NULL, accuracy REAL NOT NULL);
CREATE TABLE events(at REAL NOT NULL, kind TEXT NOT NULL, agent TEXT NOT NULL, text TEXT NOT NULL);
CREATE TABLE agents(id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, profile TEXT NOT NULL,
    budget_mib REAL, predicted_mib REAL);
"""

_SECOND = """
CREATE TABLE orders(id INTEGER PRIMARY KEY, at REAL NOT NULL, verb TEXT NOT NULL, arguments TEXT NOT NULL,
    answer TEXT);
CREATE TABLE ledger(day TEXT NOT NULL, agent TEXT NOT NULL, account TEXT NOT NULL,
    PRIMARY KEY(day, agent)) WITHOUT ROWID;
"""

_THIRD = """
CREATE TABLE abandoned(at REAL NOT NULL, round INTEGER NOT NULL, record BLOB NOT NULL, chain BLOB NOT NULL);
"""

_STEPS = (_FIRST, _SECOND, _THIRD)


def create(db: sqlite3.Connection) -> None:
    """Make the tables of this release in an empty file, all or none."""
    _take(db, 0)


def migrate(db: sqlite3.Connection, version: int) -> None:
    """Bring a log of an earlier version up to this release's, all or nothing.

    Args:
        db: The log.
        version: What it is, 1 to :data:`SCHEMA_VERSION`.

    Raises:
        sqlite3.Error: The file cannot be written; it is as it was.
    """
    if version < SCHEMA_VERSION:
        _take(db, version)


def _take(db: sqlite3.Connection, version: int) -> None:
    script = "".join(_STEPS[version:])
    stamp = f"INSERT OR REPLACE INTO meta VALUES ('schema', '{SCHEMA_VERSION}');"
    try:
        db.executescript(f"BEGIN IMMEDIATE;{script}{stamp}COMMIT;")
    except sqlite3.Error:
        if db.in_transaction:
            db.rollback()
        raise
