"""Arguments and options that several commands have, declared once, so that they read alike everywhere."""

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["Classes", "ExperimentFile", "Json", "RunFolder", "SampleShape", "Settings"]

Classes = Annotated[int | None, typer.Option(min=2, help="Number of classes.", show_default=False)]
ExperimentFile = Annotated[Path, typer.Argument(help="The experiment file, TOML.", show_default=False)]
RunFolder = Annotated[Path, typer.Argument(help="The run folder.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, nothing else.")]
SampleShape = Annotated[
    str | None, typer.Option(help="Shape of a sample, like 64 or 1x28x28.", show_default=False)
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change a key of the experiment; may be repeated.",
        show_default=False,
    ),
]
