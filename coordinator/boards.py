"""The book of boards: which names were flashed, when, how, with what; one JSON file on this machine.

Knows what was done here, not how the boards are now (``presence``). It holds no secrets: of a token, only
its hash.
"""

import dataclasses
import datetime
import hashlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from profiles.errors import StateError

__all__ = ["Board", "book_path", "forget_board", "keep_board", "read_book", "record_board", "rename_board"]


@dataclass(frozen=True)
class Board:
    """One line of the book.

    Attributes:
        name: In the fleet.
        way: ``card``, ``image``, ``ssh`` or ``local``.
        where: The card's path, the image, USER@HOST or a folder.
        broker: As the board was told.
        namespace: Likewise.
        run: Likewise.
        profile: Likewise; may be empty.
        memory_mib: Its budget.
        release: What was installed.
        flashed_at: ISO time, UTC.
        token_sha256: Of the token it was given; empty without one.
        shown_as: A person's name for it; empty for none.
    """

    name: str
    way: str
    where: str
    broker: str
    namespace: str
    run: str
    profile: str
    memory_mib: float
    release: str
    flashed_at: str = ""
    token_sha256: str = ""
    shown_as: str = ""


def book_path() -> Path:
    """Return where the book lies; ``$SCALARFED_BOOK`` names another place."""
    if chosen := os.environ.get("SCALARFED_BOOK"):
        return Path(chosen)
    if sys.platform == "win32":
        base = os.environ.get("APPDATA") or str(Path.home())
    else:
        base = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(base) / "scalarfed" / "boards.json"


def read_book(path: Path | None = None) -> dict[str, Board]:
    """Return all boards by name, in the order in which they were flashed.

    Raises:
        StateError: The book is damaged.
    """
    path = path or book_path()
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["boards"]
        return {row["name"]: Board(**row) for row in rows}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StateError(
            f"the book of boards {path} cannot be read: {error}",
            hint="Move it away: it is begun anew, and boards that were flashed before stay as they are.",
        ) from None


def record_board(board: Board, *, token: str = "", path: Path | None = None) -> None:
    """Write a board into the book, in the place of one of the same name."""
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    hashed = hashlib.sha256(token.encode()).hexdigest() if token else ""
    kept = {name: old for name, old in read_book(path).items() if name != board.name}
    kept[board.name] = dataclasses.replace(board, flashed_at=now, token_sha256=hashed)
    _write(kept, path)


def keep_board(board: Board, *, path: Path | None = None) -> None:
    """Write what changed of a board that is in the book; when it was flashed stays."""
    boards = read_book(path)
    if board.name in boards:
        boards[board.name] = board
        _write(boards, path)


def forget_board(name: str, *, path: Path | None = None) -> bool:
    """Strike a board from the book; return whether it stood there."""
    boards = read_book(path)
    known = boards.pop(name, None) is not None
    if known:
        _write(boards, path)
    return known


def rename_board(name: str, shown_as: str, *, path: Path | None = None) -> None:
    """Give a board a name for people. In the fleet it keeps its own, under which its replies are logged.

    Raises:
        StateError: There is no such board, or another goes by that name.
    """
    boards = read_book(path)
    if name not in boards:
        raise StateError(
            f"no board called {name} was flashed from here",
            hint=f"`scalarfed devices list` shows them: {', '.join(boards) or 'none yet'}.",
        )
    for other in boards.values():
        if other.name != name and shown_as and shown_as in (other.name, other.shown_as):
            raise StateError(f"{shown_as} is another board's name", hint="Choose another name.")
    boards[name] = dataclasses.replace(boards[name], shown_as=shown_as)
    _write(boards, path)


def _write(boards: dict[str, Board], path: Path | None) -> None:
    path = path or book_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".new")
    rows = [dataclasses.asdict(board) for board in boards.values()]
    beside.write_text(json.dumps({"format": 1, "boards": rows}, indent=1) + "\n", encoding="utf-8")
    beside.replace(path)
