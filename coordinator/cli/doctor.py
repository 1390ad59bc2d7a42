"""``scalarfed doctor``: what is wrong with a board, and what to do."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coordinator.cli.parameters import Json

if TYPE_CHECKING:
    from coordinator.doctor import Verdict
    from coordinator.flash.volume import BootVolume

__all__ = ["EXAMPLE", "doctor"]

EXAMPLE = "Example: scalarfed doctor pi-kitchen"
_MARKS = {"fine": "ok", "warning": "!", "fault": "X"}


def doctor(
    what: Annotated[
        str,
        typer.Argument(
            metavar="NAME|CARD", help="A board's name, its card, or an image.", show_default=False
        ),
    ],
    broker: Annotated[
        str, typer.Option(metavar="URL", help="The broker.", show_default="as the board was told")
    ] = "",
    run: Annotated[
        str, typer.Option(metavar="NAME", help="The run.", show_default="as the board was told")
    ] = "",
    as_json: Json = False,
) -> None:
    """Say what is wrong with a board, from its status message or from its card, and what to do.

    Exit code 0 if all is fine, 1 after a warning or a fault.
    """
    from coordinator.doctor import worst

    place = Path(what)
    verdicts = _of_card(place) if place.exists() else _of_board(what, broker, run)
    kind = worst(verdicts)
    if as_json:
        typer.echo(json.dumps({"verdict": kind, "evidence": [vars(verdict) for verdict in verdicts]}))
    else:
        for verdict in verdicts:
            typer.echo(f"  {_MARKS[verdict.kind]:2}  {verdict.text}")
            if verdict.next_step:
                typer.echo(f"      {verdict.next_step}")
    if kind != "fine":
        raise typer.Exit(1)


def _of_card(place: Path) -> "list[Verdict]":
    from coordinator.doctor import diagnose_report
    from coordinator.flash.card import FOLDER
    from coordinator.flash.volume import FolderVolume, boot_volume_of_image

    def look(volume: "BootVolume") -> "list[Verdict]":
        path = f"{FOLDER}/report.txt"
        report = volume.read(path).decode(errors="replace") if volume.exists(path) else None
        return diagnose_report(report, flashed=volume.is_folder(FOLDER))

    if place.is_dir():
        return look(FolderVolume(place))
    with boot_volume_of_image(place, writable=False) as volume:
        return look(volume)


def _of_board(name: str, broker: str, run: str) -> "list[Verdict]":
    from coordinator.boards import read_book
    from coordinator.doctor import diagnose_log, diagnose_status
    from coordinator.flash.local import local_folder
    from coordinator.presence import statuses
    from profiles.errors import FlashError

    board = read_book().get(name)
    if board is None and not (broker and run):
        raise FlashError(
            f"no board called {name} was flashed from here, and there is no such card",
            hint="`scalarfed devices list` shows the boards; for others say --broker and --run.",
        )
    url, run = broker or (board.broker if board else ""), run or (board.run if board else "")
    found = diagnose_status(statuses(url, run=run).get(name), board)
    log = local_folder(name) / "agent.log"
    if board is not None and board.way == "local" and log.is_file():
        found += diagnose_log(log.read_text(encoding="utf-8", errors="replace").splitlines()[-50:])
    return found
