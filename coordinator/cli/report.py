"""``scalarfed report``: the page about a run."""

from typing import Annotated

import typer

from coordinator.cli.parameters import RunFolder

__all__ = ["EXAMPLE", "report"]

EXAMPLE = "Example: scalarfed report runs/digits --open"


def report(
    run: RunFolder,
    show: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
) -> None:
    """Write report.html anew from the log of a run, also of one that goes on or was interrupted."""
    from coordinator.report import write_report

    page = write_report(run)
    typer.echo(str(page))
    if show:
        typer.launch(page.resolve().as_uri())
