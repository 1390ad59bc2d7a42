"""The questions of ``scalarfed flash`` without a sub-command: four at most, each with an answer to accept.

An answer that cannot be is said why, and asked for again: nobody begins anew for a slip of the pen. Knows a
person at a terminal. Does not know how a board is flashed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import typer

from profiles.errors import ScalarfedError

__all__ = ["Answers", "ask"]


@dataclass(frozen=True)
class Answers:
    """What a person wants.

    Attributes:
        place: A mounted boot partition, or None for ``host``.
        host: USER@HOST for SSH; empty for a card.
        name: The board's.
        bundle: The bundle folder.
        broker: As the board reaches it.
    """

    place: Path | None
    host: str
    name: str
    bundle: Path
    broker: str


def ask() -> Answers:
    """Ask where, who, what and for whom; the suggestions are what most people would say."""
    from coordinator.flash.plan import mounted_cards
    from coordinator.flash.settings import check_address, own_addresses

    cards = mounted_cards()
    where = _until_right(
        "1/4  Card (where its small partition is mounted), or USER@HOST for a board that runs",
        str(cards[0]) if len(cards) == 1 else None,
        _check_place,
    )
    name = _until_right("2/4  Name of the board", _first_free(), _check_name)
    bundle = _until_right("3/4  Bundle, the folder `bundle` of a run", _newest_bundle(), _check_bundle)
    addresses = own_addresses()
    broker = _until_right(
        "4/4  Broker, as the board reaches it",
        f"mqtt://{addresses[0]}:1883" if addresses else None,
        check_address,
    )
    if "@" in where:
        return Answers(None, where, name, Path(bundle).expanduser(), broker)
    return Answers(Path(where).expanduser(), "", name, Path(bundle).expanduser(), broker)


def _until_right(question: str, suggestion: str | None, check: Callable[[str], object]) -> str:
    while True:
        answer = str(typer.prompt(question, default=suggestion)).strip()
        try:
            check(answer)
        except ScalarfedError as error:
            typer.echo(f"     {error}\n     {error.hint}")
        else:
            return answer


def _check_place(answer: str) -> None:
    from coordinator.flash.card import look
    from coordinator.flash.volume import FolderVolume

    if "@" not in answer:
        look(FolderVolume(Path(answer).expanduser()))


def _check_name(answer: str) -> None:
    from coordinator.boards import read_book
    from coordinator.flash.settings import check_names, expand_names
    from profiles.errors import FlashError

    names = expand_names(answer)
    if len(names) > 1:
        raise FlashError(
            f"{answer} is {len(names)} names, and this is one board",
            hint="For many boards: scalarfed flash image.",
        )
    check_names(names, list(read_book()))


def _check_bundle(answer: str) -> None:
    from edge_agent.bundle import read_bundle

    read_bundle(Path(answer).expanduser())


def _first_free() -> str:
    from coordinator.boards import read_book

    taken = read_book()
    return next(f"pi-{number}" for number in range(1, len(taken) + 2) if f"pi-{number}" not in taken)


def _newest_bundle() -> str | None:
    """Return the bundle of the newest run folder below here, which is what one has just made."""
    found = sorted(Path("runs").glob("*/bundle/manifest.json"), key=lambda path: path.stat().st_mtime)
    return str(found[-1].parent) if found else None
