"""``scalarfed tune``: the best settings of methods, by simulation."""

import json
from pathlib import Path
from typing import Annotated

import typer

from coordinator.cli.parameters import ExperimentFile, Json, Settings

__all__ = ["EXAMPLE", "tune"]

EXAMPLE = (
    "Examples:\n\n"
    "scalarfed tune examples/digits.toml --set rounds=150\n\n"
    "scalarfed tune examples/digits.toml --method deepstep --method hiso --target 0.85 --trials 8\n\n"
    "scalarfed tune examples/digits.toml --grid method.learning_rate=0.02,0.04 --grid method.batch_size=8,16"
)


def tune(
    experiment: ExperimentFile,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            help="A method to tune; may be repeated.",
            show_default="the experiment's",
        ),
    ] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE,VALUE",
            help="Values to try, all combinations of them; may be repeated.",
            show_default="learning rates, until the best lies between two others",
        ),
    ] = None,
    trials: Annotated[int, typer.Option(min=1, max=1000, help="Trials a method, without --grid.")] = 6,
    seeds: Annotated[int, typer.Option(min=1, max=100, help="Runs a trial, the same for all.")] = 2,
    target: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            help="An accuracy: the fewest rounds to it win.",
            show_default="the highest accuracy at the end wins",
        ),
    ] = None,
    settings: Settings = None,
    out: Annotated[Path | None, typer.Option(help="The folder.", show_default="runs/NAME-tuned")] = None,
    as_json: Json = False,
) -> None:
    """Try settings of one or more methods in simulation, and write the best experiment file.

    Every method gets the same number of trials on the same seeds, judged by a fifth of the training samples.
    Stopped with Ctrl-C, the same command goes on where it was.
    """
    from coordinator.cli.testbed import observing
    from coordinator.config import load_experiment

    chosen = load_experiment(experiment, settings or [])
    folder = (out or Path("runs") / f"{chosen.name}-tuned").resolve()
    with observing(silent=as_json) as observer:
        from coordinator import tune as tuning

        search = tuning.Search(
            tuple(dict.fromkeys(methods or [chosen.method.name])),
            dict(_axis(text) for text in grid or ()),
            trials=trials,
            seeds=seeds,
            target=target,
        )
        summary = tuning.tune(chosen, search, out=folder, observer=observer)
    if as_json:
        typer.echo(json.dumps(summary))
        return
    for method, found in summary["methods"].items():
        best = found[0]
        when = "" if best["rounds"] is None else f", {target:.0%} after {best['rounds']:g} rounds"
        typer.echo(f"{method}: {' '.join(best['settings'])}: {best['accuracy']:.1%}{when}")
    typer.echo(f"{folder / 'best.toml'}: {summary['best']}")


def _axis(text: str) -> tuple[str, list[str]]:
    from profiles.errors import ConfigError

    key, sign, values = text.partition("=")
    found = [value.strip() for value in values.split(",") if value.strip()]
    if not sign or not found:
        raise ConfigError(
            f"`--grid {text}` is no axis: it must look like key=value,value.",
            hint="For example --grid method.learning_rate=0.01,0.02,0.04.",
        )
    return key.strip(), found
