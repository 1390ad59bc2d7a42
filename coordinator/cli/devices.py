"""``scalarfed devices``: the boards that were flashed from here, and how they are."""

import dataclasses
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coordinator.cli.parameters import Json

if TYPE_CHECKING:
    from coordinator.boards import Board

__all__ = ["app", "list_devices", "locate", "logs", "rename", "show"]

app = typer.Typer(no_args_is_help=True, help="The boards that were flashed from here, and how they are.")

_Name = Annotated[str, typer.Argument(help="As `scalarfed devices list` prints it.", show_default=False)]
_Broker = Annotated[
    str, typer.Option(metavar="URL", help="Where the broker is now.", show_default="as the board was told")
]


@app.command(name="list", epilog="Example: scalarfed devices list")
def list_devices(broker: _Broker = "", as_json: Json = False) -> None:
    """List the boards with their state, temperature and memory, as they last reported."""
    from coordinator.boards import read_book

    boards = read_book()
    told = _statuses(list(boards.values()), broker)
    if as_json:
        rows = {
            name: dataclasses.asdict(board) | {"status": told.get(name)} for name, board in boards.items()
        }
        typer.echo(json.dumps(rows))
        return
    if not boards:
        typer.echo("No board was flashed from here yet: `scalarfed flash` begins.")
        return
    width = max(len(board.shown_as or name) for name, board in boards.items())
    typer.echo(f"{'name':{width}}  {'state':10}  {'round':>6}  {'MiB':>11}  {'°C':>5}  run")
    for name, board in boards.items():
        status = told.get(name) or {}
        telemetry = status.get("telemetry") or {}
        used = f"{status['rss_mib']:.0f} of {board.memory_mib:.0f}" if "rss_mib" in status else ""
        typer.echo(
            f"{board.shown_as or name:{width}}  {status.get('state', 'never seen'):10}  "
            f"{status.get('round', ''):>6}  {used:>11}  {telemetry.get('temperature_c', ''):>5}  {board.run}"
        )


@app.command(epilog="Example: scalarfed devices show pi-kitchen")
def show(name: _Name, broker: _Broker = "", as_json: Json = False) -> None:
    """Show all that is known of a board: how it was flashed, and its last status."""
    board = _board(name)
    status = _statuses([board], broker).get(board.name)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(board) | {"status": status}))
        return
    for key, value in dataclasses.asdict(board).items():
        if value not in ("", None):
            typer.echo(f"{key:14} {value}")
    for key, value in (status or {"state": "never seen"}).items():
        if isinstance(value, dict):
            for inner, figure in value.items():
                typer.echo(f"{key + '.' + inner:34} {figure}")
        elif key not in ("name", "profile"):
            typer.echo(f"{key:34} {value}")


@app.command(epilog="Example: scalarfed devices logs pi-kitchen --host pi@pi-kitchen.local")
def logs(
    name: _Name,
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="How many of the last lines.")] = 50,
    host: Annotated[
        str, typer.Option(metavar="USER@HOST", help="For SSH.", show_default="as flashed, else NAME.local")
    ] = "",
) -> None:
    """Show the last lines of an agent's log: the file of a local one, else the board's journal over SSH."""
    from coordinator.flash.local import local_folder
    from coordinator.flash.ssh import Host

    board = _board(name)
    if board.way == "local":
        path = local_folder(board.name) / "agent.log"
        text = path.read_text(encoding="utf-8", errors="replace")
        typer.echo("\n".join(text.splitlines()[-lines:]))
        return
    with Host(host or (board.where if board.way == "ssh" else f"{board.name}.local")) as there:
        there.look()
        typer.echo(there.log(lines).rstrip() or "the journal there is empty, or that user may not read it")


@app.command(epilog="Example: scalarfed devices rename pi-3 'window sill'")
def rename(
    name: _Name,
    shown_as: Annotated[str, typer.Argument(metavar="NEW", help="What to call it here.", show_default=False)],
) -> None:
    """Give a board a name for people; in logs of runs it keeps the one that it was flashed with."""
    from coordinator.boards import rename_board

    board = _board(name)
    rename_board(board.name, "" if shown_as == board.name else shown_as)
    typer.echo(f"{board.name} is shown as {shown_as}")


@app.command(epilog="Example: scalarfed devices locate pi-kitchen")
def locate(
    name: _Name,
    seconds: Annotated[int, typer.Option(min=1, max=60, help="How long.")] = 20,
    broker: _Broker = "",
) -> None:
    """Let a board's activity light blink, so that you see which one it is."""
    from coordinator.update import MqttRoom
    from profiles.errors import FlashError

    board = _board(name)
    room = MqttRoom(broker or board.broker, namespace=board.namespace, run=board.run)
    try:
        said = room.ask(board.name, {"do": "locate", "seconds": seconds}, within_s=15.0)
    finally:
        room.close()
    if said is None:
        raise FlashError(
            f"{name} does not answer", hint=f"`scalarfed doctor {board.name}` says what is wrong with it."
        )
    typer.echo(f"{name}: {said}")


def _board(name: str) -> "Board":
    from coordinator.boards import read_book
    from profiles.errors import FlashError

    boards = read_book()
    for board in boards.values():
        if name in (board.name, board.shown_as):
            return board
    raise FlashError(
        f"no board called {name} was flashed from here",
        hint=f"`scalarfed devices list` shows them: {', '.join(boards) or 'none yet'}.",
    )


def _statuses(boards: "list[Board]", broker: str) -> dict[str, Mapping[str, Any]]:
    """Return the last statuses by name; of runs whose broker does not answer there are none."""
    from coordinator.presence import statuses
    from profiles.errors import BrokerError

    told: dict[str, Mapping[str, Any]] = {}
    for url, namespace, run in sorted({(broker or b.broker, b.namespace, b.run) for b in boards}):
        try:
            told |= statuses(url, namespace=namespace, run=run, within_s=4.0)
        except BrokerError as error:
            typer.echo(f"{error}", err=True)
    return told
