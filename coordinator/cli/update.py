"""``scalarfed update``: a new release or bundle for boards that run."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import ssl

    from coordinator.boards import Board
    from coordinator.flash.payload import Payload
    from coordinator.update import Outcome
    from edge_agent.update import Offer

__all__ = ["EXAMPLE", "update"]

EXAMPLE = "Example: scalarfed update --canary 1"


def update(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME]...", help="Boards.", show_default="all that are online"),
    ] = None,
    *,
    canary: Annotated[
        int, typer.Option(min=0, metavar="N", help="So many boards first; the others when these are well.")
    ] = 1,
    bundle: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Another bundle.", show_default="they keep theirs")
    ] = None,
    run: Annotated[
        str, typer.Option(metavar="NAME", help="The run of that bundle.", show_default="that of the bundle")
    ] = "",
    broker: Annotated[
        str, typer.Option(metavar="URL", help="The broker.", show_default="as the boards were told")
    ] = "",
    address: Annotated[
        str,
        typer.Option(
            metavar="HOST", help="This machine, as the boards reach it.", show_default="their broker's host"
        ),
    ] = "",
    port: Annotated[int, typer.Option(help="Serve the files at this port.", show_default="any free one")] = 0,
    wait: Annotated[
        float, typer.Option("--wait", metavar="S", help="How long a board may take to be well again.")
    ] = 1800.0,
) -> None:
    """Bring this machine's release, or another bundle, to boards that were flashed from here.

    Boards fetch only what they lack, go on where they were cut off, and check the signature and every hash.
    A board that does not join its run with the new release returns to the former one by itself; if a canary
    does, the others are left alone.
    """
    from coordinator.authority import Authority, default_folder
    from coordinator.flash.plan import run_of_bundle
    from coordinator.operator import server_tls
    from coordinator.update import MqttRoom, Updater
    from edge_agent.bundle import sign_bundle
    from profiles.errors import FlashError

    boards = _boards(names or [])
    places = {(broker or board.broker, board.namespace, board.run) for board in boards}
    if len(places) > 1:
        raise FlashError(
            f"the boards are in {len(places)} runs: {', '.join(sorted(run for _, _, run in places))}",
            hint="Name the boards of one run.",
        )
    ((url, namespace, now),) = places
    if bundle is not None and url.startswith("mqtts://"):
        sign_bundle(bundle, Authority(default_folder()).signer())
    then = run or (run_of_bundle(bundle) if bundle is not None else now)
    with contextlib.ExitStack() as stack:
        kinds = _kinds(boards, url, namespace, now)
        payloads = _payloads(sorted(set(kinds.values())), bundle, then if bundle is not None else "")
        host = address or _host_of(url)
        offers = stack.enter_context(_offers(payloads, kinds, host, port, server_tls(url, host)))
        room = MqttRoom(url, namespace=namespace, run=now, also=[then])
        stack.callback(room.close)
        updater = Updater(room, tick=lambda text: typer.echo(f"  {text}"))
        outcomes = updater.roll_out(offers, canaries=canary, within_s=wait)
    _conclude(outcomes, {board.name: board for board in boards}, offers, then)


def _boards(names: list[str]) -> "list[Board]":
    from coordinator.boards import read_book
    from profiles.errors import FlashError

    book = read_book()
    unknown = [name for name in names if name not in book]
    if unknown:
        raise FlashError(
            f"no board called {', '.join(unknown)} was flashed from here",
            hint=f"`scalarfed devices list` shows them: {', '.join(book) or 'none yet'}.",
        )
    chosen = [book[name] for name in names] or list(book.values())
    local = [board.name for board in chosen if board.way == "local"]
    chosen = [board for board in chosen if board.way != "local"]
    if local:
        typer.echo(f"{', '.join(local)}: on this machine, and updated with it.")
    if not chosen:
        raise FlashError(
            "there is no board to update", hint="`scalarfed flash` makes one; `scalarfed devices list`."
        )
    return chosen


def _kinds(boards: "list[Board]", url: str, namespace: str, run: str) -> dict[str, tuple[str, str]]:
    """Return machine and Python by name of the boards that are online and can be updated."""
    from coordinator.presence import statuses
    from profiles.errors import FlashError

    told = statuses(url, namespace=namespace, run=run)
    kinds = {}
    for board in boards:
        status = told.get(board.name)
        if status is None or status["state"] == "offline":
            typer.echo(f"{board.name}: offline, left out; run this again when it is back.")
        elif not status.get("release"):
            typer.echo(f"{board.name}: its release takes no updates over the network: `scalarfed flash ssh`.")
        else:
            kinds[board.name] = (str(status["machine"]), str(status["python"]))
    if not kinds:
        raise FlashError("no board is online that could be updated", hint="`scalarfed devices list`.")
    return kinds


def _payloads(
    kinds: list[tuple[str, str]], bundle: Path | None, run: str
) -> "dict[tuple[str, str], Payload]":
    from coordinator.flash.payload import Target, make_update

    return {
        (machine, python): make_update(Target(python, machine), bundle=bundle, run=run)
        for machine, python in kinds
    }


@contextlib.contextmanager
def _offers(
    payloads: "dict[tuple[str, str], Payload]",
    kinds: dict[str, tuple[str, str]],
    host: str,
    port: int,
    tls: "Callable[[], ssl.SSLContext] | None",
) -> "Iterator[dict[str, Offer]]":
    from coordinator.authority import Authority, default_folder
    from coordinator.update import served
    from edge_agent.update import make_offer

    authority = Authority(default_folder())
    order = list(payloads)
    files = [payloads[kind].files for kind in order]
    with served(files, host="0.0.0.0", address=host, port=port, tls=tls) as urls:
        made = {}
        for kind, url in zip(order, urls, strict=True):
            machine, python = kind
            payload = payloads[kind]
            made[kind] = make_offer(
                url=url,
                number=time.time_ns() // 1_000_000,
                release=payload.release,
                machine=machine,
                python=python,
                files=payload.files,
                sign=authority.signer(),
            )
            kind_told = f"{machine} with Python {python}"
            typer.echo(f"{payload.release} for {kind_told}: {payload.size / 2**20:.1f} MiB, at {url}")
        yield {name: made[kind] for name, kind in kinds.items()}


def _host_of(url: str) -> str:
    from urllib.parse import urlsplit

    return urlsplit(url).hostname or ""


def _conclude(
    outcomes: "list[Outcome]", boards: "dict[str, Board]", offers: "dict[str, Offer]", run: str
) -> None:
    import dataclasses

    from coordinator.boards import keep_board

    for outcome in outcomes:
        typer.echo(f"  {'ok' if outcome.well else 'X ':2}  {outcome.name}: {outcome.state}: {outcome.said}")
        if outcome.well:
            board = boards[outcome.name]
            keep_board(dataclasses.replace(board, release=offers[outcome.name].release, run=run))
    if not all(outcome.well for outcome in outcomes):
        raise typer.Exit(1)
