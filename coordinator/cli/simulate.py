"""``scalarfed simulate``: a whole fleet in one process, for trying things out."""

import json
from pathlib import Path
from typing import Annotated

import typer

from coordinator.cli.parameters import ExperimentFile, Json, Settings

__all__ = ["EXAMPLE", "simulate"]

EXAMPLE = (
    "Examples:\n\n"
    "scalarfed simulate examples/digits.toml\n\n"
    "scalarfed simulate examples/digits.toml --agents 1000 --set fleet.cohort=20 --set data.min_samples=1\n\n"
    "scalarfed simulate examples/digits.toml --set method.name=hiso --json"
)


def simulate(
    experiment: ExperimentFile,
    out: Annotated[
        Path | None, typer.Option(help="The run folder.", show_default="runs/NAME-simulated")
    ] = None,
    settings: Settings = None,
    agents: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=10_000,
            help="Simulate this many agents, all of the first device.",
            show_default="the experiment's",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Run an experiment in this process, with the protocol and the bits of a real fleet.

    All agents share one copy of the weights and differ in their samples alone. The run folder holds the
    bundle and the scalar log, so that `scalarfed replay` and `scalarfed log` work on it.
    """
    from coordinator.cli.testbed import observing
    from coordinator.config import load_experiment

    chosen = load_experiment(experiment, settings or [])
    with observing(silent=as_json) as observer:
        from coordinator import simulate as simulation

        if agents is not None:
            chosen = simulation.with_agents(chosen, agents)
        folder = out or Path("runs") / f"{chosen.name}-simulated"
        summary = simulation.simulate(chosen, out=folder.resolve(), observer=observer)
    if as_json:
        typer.echo(json.dumps(summary))
        return
    typer.echo(
        f"{summary['test_accuracy']:.1%} on the test samples after {summary['rounds']} rounds of "
        f"{summary['agents']} agents; {summary['payload_bytes_up_per_agent_round']:.0f} bytes up and "
        f"{summary['forwards_per_agent_round']:.0f} forwards an agent and round; "
        f"digest {summary['final_digest']}\n{folder}"
    )
