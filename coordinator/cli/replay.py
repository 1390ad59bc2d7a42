"""``scalarfed replay``: the model of any round, rebuilt from the log."""

import json
from pathlib import Path
from typing import Annotated

import typer

from coordinator.cli.parameters import Json, RunFolder

__all__ = ["EXAMPLE", "replay"]

EXAMPLE = "Example: scalarfed replay runs/digits --round 350 --export digits-350.onnx"


def replay(
    run: RunFolder,
    round_: Annotated[
        int | None,
        typer.Option("--round", help="Rounds to replay; 0 is the untrained net.", show_default="all of them"),
    ] = None,
    export: Annotated[
        Path | None,
        typer.Option(metavar="FILE.onnx", help="Write the model for use elsewhere.", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """Rebuild the model of a round, bit for bit, from the bundle and the scalar log alone.

    Every digest on the way is compared with the log; a broken chain or another digest is refused, and nothing
    is written. The exported model takes the values as they are in the data file and gives logits.
    """
    from coordinator.rebuild import rebuild_run, write_model

    bundle, replica = rebuild_run(run, round_)
    if export is not None:
        write_model(bundle, replica.weights, export)
    digest = f"{replica.digest():016x}"
    if as_json:
        typer.echo(
            json.dumps({"round": replica.round, "digest": digest, "file": str(export) if export else None})
        )
        return
    typer.echo(f"after round {replica.round} the digest is {digest}, as the log says")
    if export is not None:
        typer.echo(f"{export}: {bundle.model}, {export.stat().st_size:,} bytes")
