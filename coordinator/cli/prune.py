"""``scalarfed prune``: make a net small enough for a board, and write its bundle."""

import json
from pathlib import Path
from typing import Annotated

import typer

from coordinator.cli.parameters import Classes, Json, SampleShape

__all__ = ["EXAMPLE", "prune"]

EXAMPLE = (
    "Examples:\n\n"
    "scalarfed prune auto --data examples/digits.npz --density 0.5 -o bundle\n\n"
    "scalarfed prune resnet20 --shape 3x32x32 --classes 10 --macs 10e6 -o bundle\n\n"
    "scalarfed prune resnet20 --shape 3x32x32 --classes 10 --fit pi-zero-2w -o bundle\n\n"
    "scalarfed prune my_nets.py:make_net --data mine.npz --density 0.3 --json -o bundle\n\n"
    "scalarfed prune runs/digits --scores scores --density 0.5 -o bundle"
)


def prune(
    model: Annotated[
        str,
        typer.Argument(
            help="auto, mlp, lenet, resnet20, wrn10_2, dscnn, or FILE.py:FUNCTION that makes a module. With "
            "--scores the folder of a run, too.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The bundle's folder.", show_default=False)],
    data: Annotated[
        Path | None,
        typer.Option(help="An .npz: gives shape, classes and standardisation.", show_default=False),
    ] = None,
    shape: SampleShape = None,
    classes: Classes = None,
    density: Annotated[
        float | None, typer.Option(help="Fraction of the parameters that stays.", show_default=False)
    ] = None,
    params: Annotated[
        float | None, typer.Option(help="Parameters that may stay.", show_default=False)
    ] = None,
    macs: Annotated[
        float | None, typer.Option(help="Multiply-accumulates of a forward.", show_default=False)
    ] = None,
    fit: Annotated[
        str | None,
        typer.Option(metavar="PROFILE", help="Fit the memory of this board.", show_default=False),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples of a forward, for --fit.")] = 32,
    kernel: Annotated[
        bool | None,
        typer.Option(
            "--kernel/--no-kernel",
            help="Whether the board has the compiled kernel, for --fit; else the net fits with and without.",
            show_default=False,
        ),
    ] = None,
    trained_by: Annotated[
        str, typer.Option(metavar="METHOD", help="The update rule, whose state --fit counts.")
    ] = "headstep",
    method: Annotated[
        str | None,
        typer.Option(
            help="uniform, the default of layers; ntk, that of masks; ntk-widths, synflow, erk, random, "
            "magnitude, snip, grasp, autoflip or none.",
            show_default=False,
        ),
    ] = None,
    explored: Annotated[
        Path | None,
        typer.Option(help="For --method autoflip: a run of the same net, not pruned.", show_default=False),
    ] = None,
    scores: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Gate scores of a board, or a folder of them; may be repeated. See `scalarfed gates`.",
            show_default=False,
        ),
    ] = None,
    mode: Annotated[
        str, typer.Option(help="structured: narrower layers. mask: single weights, saves no memory.")
    ] = "structured",
    draws: Annotated[int, typer.Option(min=1, help="Draws of the saliency per step.")] = 5,
    seed: Annotated[
        int, typer.Option(min=0, max=2**63 - 1, help="Names the draws and the fresh weights.")
    ] = 0,
    as_json: Json = False,
) -> None:
    """Make a net smaller before training, and write it as a bundle with a picture.

    Exactly one of --density, --params, --macs and --fit says how small; without any, half of the parameters
    stay. Data is looked at for its shape and standardisation, and by snip and grasp; ntk needs none. A module
    of your own gets the values of the data as they are.

    With --scores the net has learnt before, and the units that are worth most for what they cost stay with
    their weights.
    """
    from coordinator.cli.testbed import observing
    from coordinator.prune_command import PruneRequest, prune_to_bundle

    request = PruneRequest(
        model=model,
        out=out,
        data=data,
        shape=shape,
        classes=classes,
        density=density,
        params=params,
        macs=macs,
        fit=fit,
        batch_size=batch_size,
        kernel=kernel,
        trained_by=trained_by,
        method=method,
        explored=explored,
        mode=mode,
        draws=draws,
        seed=seed,
        scores=tuple(scores or ()),
    )
    with observing(silent=as_json) as observer:
        facts = prune_to_bundle(request, observer=observer)
    if as_json:
        typer.echo(json.dumps(facts))
