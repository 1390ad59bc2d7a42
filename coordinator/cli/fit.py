"""``scalarfed fit``: whether a board can train a bundle, before anything is flashed."""

import json
from pathlib import Path
from typing import Annotated

import typer

from coordinator.cli.parameters import Json

__all__ = ["EXAMPLE", "fit"]

EXAMPLE = "Example: scalarfed fit runs/digits/bundle --device pi-zero-2w --batch-size 32"


def fit(
    bundle: Annotated[Path, typer.Argument(help="The bundle folder.", show_default=False)],
    device: Annotated[
        str,
        typer.Option(metavar="PROFILE", help="As `scalarfed profile list` prints it.", show_default=False),
    ],
    method: Annotated[str, typer.Option(help="The update rule.")] = "hiso",
    batch_size: Annotated[int, typer.Option(min=1, help="Samples of a forward pass.")] = 16,
    perturbations: Annotated[int, typer.Option(min=1, help="Random directions per step.")] = 8,
    local_steps: Annotated[int, typer.Option(min=1, help="Steps between two messages.")] = 1,
    samples: Annotated[int, typer.Option(min=0, help="Samples that the board holds in memory.")] = 0,
    memory_mib: Annotated[
        float | None, typer.Option(min=1, help="Memory budget.", show_default="the profile's")
    ] = None,
    as_json: Json = False,
) -> None:
    """Predict memory, work and bytes of a round on a board; refuse what does not fit, and say what would."""
    from coordinator.fit import Work, refuse_unfit
    from coordinator.fit import fit as predict
    from edge_agent.bundle import read_bundle
    from profiles.device import load_profile

    read = read_bundle(bundle)
    work = Work(method, batch_size, perturbations, local_steps, samples=samples)
    found = predict(read, load_profile(device), work, allowed_mib=memory_mib)
    if as_json:
        typer.echo(json.dumps(found.as_dict()))
    else:
        typer.echo(f"{read.model} on {device}: {found.prediction.describe()}")
        typer.echo(f"  allowed:           {found.allowed_mib:.0f} MiB")
        typer.echo(f"  largest batch:     {found.largest_batch}")
        typer.echo(f"  work of a round:   {found.flops_per_round / 1e6:,.1f} MFLOP", nl=False)
        typer.echo(f", about {found.seconds_per_round:.2g} s")
        typer.echo(f"  bytes of a reply:  {found.bytes_up}")
    refuse_unfit(found, read, device)
