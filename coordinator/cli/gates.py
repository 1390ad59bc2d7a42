"""``scalarfed gates``: a bundle with which boards score the units of a pretrained net."""

import json
from pathlib import Path
from typing import Annotated

import typer

from coordinator.cli.parameters import Classes, Json, SampleShape

__all__ = ["EXAMPLE", "gates"]

EXAMPLE = (
    "Example, for two boards:\n\n"
    "scalarfed gates runs/digits -o gated\n\n"
    "scp -r gated pi-1: ; ssh pi-1 python -m edge_agent.scores gated samples.npz -o scores.json\n\n"
    "mkdir scores ; scp pi-1:scores.json scores/pi-1.json  (and so on for pi-2)\n\n"
    "scalarfed prune runs/digits --scores scores --density 0.5 -o bundle"
)


def gates(
    model: Annotated[
        str,
        typer.Argument(
            help="The folder of a run, or FILE.py:FUNCTION that makes a module with its weights.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The gated bundle's folder.", show_default=False)],
    data: Annotated[
        Path | None,
        typer.Option(help="An .npz: gives shape and classes. A run knows them.", show_default=False),
    ] = None,
    shape: SampleShape = None,
    classes: Classes = None,
    draws: Annotated[int, typer.Option(min=1, help="Perturbations by which each board scores.")] = 5,
    seed: Annotated[
        int, typer.Option(min=0, max=2**63 - 1, help="Names the perturbations; the same at `prune`.")
    ] = 0,
    as_json: Json = False,
) -> None:
    """Write a gated bundle: boards score a pretrained net's units with it, on their own samples.

    A gate switches one channel, neuron or head off. A board closes one after the other and tells what each is
    worth: forward passes alone, no torch, and a file with one number per unit. `scalarfed prune --scores`
    sums the files and keeps the units that are worth most for what they cost, with their weights.
    """
    from coordinator.cli.testbed import observing
    from coordinator.gates_command import gates_to_bundle

    with observing(silent=as_json) as observer:
        facts = gates_to_bundle(
            model, out, data=data, shape=shape, classes=classes, draws=draws, seed=seed, observer=observer
        )
    if as_json:
        typer.echo(json.dumps(facts))
