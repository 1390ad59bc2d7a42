"""Arguments and options that several commands have, declared once, so that they read alike everywhere."""

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["ExperimentFile", "Json", "RunFolder", "Settings"]

ExperimentFile = Annotated[Path, typer.Argument(help="The experiment file, TOML.", show_default=False)]
RunFolder = Annotated[Path, typer.Argument(help="The run folder.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, nothing else.")]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change a key of the experiment; may be repeated.",
        show_default=False,
    ),
]
