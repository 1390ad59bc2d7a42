"""``scalarfed serve``: the coordinator for boards elsewhere."""

import json
from pathlib import Path
from typing import Annotated

import typer

from coordinator.cli.parameters import Json, Settings

__all__ = ["EXAMPLE", "serve"]

EXAMPLE = (
    "Examples:\n\n"
    "scalarfed serve examples/digits.toml --listen 0.0.0.0\n\n"
    "scalarfed serve runs/digits --listen 192.168.1.5 --authority /srv/authority"
)
_CLEAR, _TLS, _WEB = 1883, 8883, 8443


def serve(
    what: Annotated[
        Path,
        typer.Argument(metavar="EXPERIMENT", help="An experiment file, or a run folder.", show_default=False),
    ],
    listen: Annotated[
        str, typer.Option(metavar="HOST", help="Address to listen on; 0.0.0.0 for all networks.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="The broker's port.", show_default="8883")
    ] = None,
    web_port: Annotated[int, typer.Option(min=0, max=65535, help="The web server's port.")] = _WEB,
    authority: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The authority's folder.", show_default="that of this user"),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Let everybody in, unencrypted: for a network of your own.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="The run folder.", show_default="runs/NAME of the experiment")
    ] = None,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Start a broker and run the rounds for boards that connect from elsewhere.

    Boards enrol with the tickets of `scalarfed enrol`, speak over mutual TLS, and take bundles and commands
    that are signed by this coordinator alone. A run folder that is there is gone on with. Ctrl-C stops in
    order.
    """
    from coordinator.authority import default_folder
    from coordinator.cli.testbed import observing, stopping_in_order
    from coordinator.config import load_experiment

    prepared = (what / "experiment.toml").is_file()
    experiment = load_experiment(what / "experiment.toml" if prepared else what, settings or [])
    folder = (what if prepared else out or Path("runs") / experiment.name).resolve()
    with observing(silent=as_json) as observer, stopping_in_order():
        from coordinator.serve_fleet import Address, serve_fleet
        from coordinator.testbed import prepare

        if not (folder / "experiment.toml").is_file():
            prepare(experiment, folder, observer=observer)
        address = Address(listen, (_CLEAR if insecure else _TLS) if port is None else port, web_port)
        try:
            ended = serve_fleet(
                folder,
                address=address,
                authority=None if insecure else authority or default_folder(),
                on_ready=lambda lines: typer.echo("\n".join(lines), err=as_json),
            )
        except KeyboardInterrupt:
            typer.echo("\nStopped in order. The same command goes on.", err=True)
            raise typer.Exit(130) from None
    if as_json:
        typer.echo(json.dumps(ended))
    else:
        typer.echo(f"{ended['rounds']} rounds, digest {ended['final_digest']}, run {folder}")
