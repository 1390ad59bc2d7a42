"""``scalarfed enrol``, ``devices certificates`` and ``devices revoke``: who may take part, and who not."""

import json
import time
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["EXAMPLE", "LIST_EXAMPLE", "REVOKE_EXAMPLE", "certificates", "enrol", "revoke"]

EXAMPLE = (
    "Examples:\n\n"
    "scalarfed enrol pi-1 pi-2 --url https://laptop.local:8443\n\n"
    "scalarfed enrol pi-1 --valid-h 1 --out /media/usb"
)
LIST_EXAMPLE = "Example: scalarfed devices certificates"
REVOKE_EXAMPLE = "Example: scalarfed devices revoke pi-3"

_Authority = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="The authority's folder.", show_default="that of this user"),
]
_EFFECT_S = 5.0


def enrol(
    names: Annotated[list[str], typer.Argument(help="The devices' names.", show_default=False)],
    url: Annotated[
        str,
        typer.Option(
            metavar="URL",
            help="Where the boards find the coordinator.",
            show_default="this machine, port 8443",
        ),
    ] = "",
    valid_h: Annotated[float, typer.Option(min=0.01, max=24 * 30, help="Hours that a ticket counts.")] = 24.0,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the tickets are put.")] = Path("tickets"),
    authority: _Authority = None,
) -> None:
    """Write a ticket for each device, with which it enrols once; makes the authority if there is none.

    A ticket is a secret: whoever has it first gets the device's certificate. Put it onto the board as
    ticket.json in the folder that the agent is given with --security. `scalarfed serve` must run when the
    board starts.
    """
    import socket

    from coordinator.authority import Authority, default_folder
    from coordinator.enrolment import ticket
    from edge_agent.credentials import write_secret

    made = Authority.create(authority or default_folder())
    if not url:
        url = f"https://{socket.gethostname().partition('.')[0]}.local:8443"
    out.mkdir(parents=True, exist_ok=True)
    for name in names:
        found = ticket(made, name, url=url, valid_s=valid_h * 3600)
        path = out / f"{name}.ticket.json"
        write_secret(path, json.dumps(found).encode())
        typer.echo(f"{path}: {name} may enrol once within {valid_h:g} h at {url}")
    typer.echo(f"authority: {made.folder}, SHA-256 {made.fingerprint}")


def certificates(
    authority: _Authority = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list.")] = False,
) -> None:
    """List the certificates that were given out: whose, until when, and which are revoked."""
    from coordinator.authority import Authority, default_folder

    rows = Authority(authority or default_folder()).certificates()
    if as_json:
        typer.echo(json.dumps([{**vars(row), "serial": f"{row.serial:x}"} for row in rows]))
        return
    width = max([len(row.name) for row in rows], default=4)
    typer.echo(f"{'name':{width}}  {'until':10}  {'state':9}  number")
    for row in rows:
        until = time.strftime("%Y-%m-%d", time.localtime(row.expires))
        state = "revoked" if row.revoked is not None else "expired" if row.expires < time.time() else "counts"
        typer.echo(f"{row.name:{width}}  {until}  {state:9}  {row.serial:x}")


def revoke(
    name: Annotated[str, typer.Argument(help="The device.", show_default=False)],
    authority: _Authority = None,
) -> None:
    """Shut a device out: its certificates and tickets count no more, and its connection ends.

    Waits until the running coordinator says that its broker goes by it. To let the device in again, enrol it
    again.
    """
    from coordinator.authority import Authority, default_folder

    used = Authority(authority or default_folder())
    count = used.revoke(name)
    typer.echo(f"{name}: {count} certificate{'' if count == 1 else 's'} revoked")
    deadline = time.monotonic() + _EFFECT_S
    while not used.is_applied() and time.monotonic() < deadline:
        time.sleep(0.1)
    if used.is_applied():
        typer.echo("in effect: the broker refuses it, and its connection was ended")
    else:
        typer.echo("no coordinator is running with this authority: it takes effect when one starts")
