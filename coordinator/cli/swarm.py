"""``scalarfed swarm``: how long a round takes with thousands of agents."""

import json
from typing import Annotated

import typer

from coordinator.cli.parameters import Json

__all__ = ["EXAMPLE", "swarm"]

EXAMPLE = "Example: scalarfed swarm --agents 1000 --rounds 30 --json"


def swarm(
    agents: Annotated[int, typer.Option(min=1, help="How many agents, each with its own connection.")] = 1000,
    rounds: Annotated[int, typer.Option(min=1, help="How many rounds, after one to warm up.")] = 20,
    as_json: Json = False,
    broker: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Use a running MQTT broker, mqtt://HOST:PORT.", show_default=False),
    ] = None,
    remote: Annotated[
        bool, typer.Option("--remote", help="Allow a broker beyond this machine; only if it is yours.")
    ] = False,
    collectors: Annotated[
        int, typer.Option(min=0, help="Processes that read the replies and hand them up in packs.")
    ] = 0,
    limit_s: Annotated[float, typer.Option(min=1, help="Give up after so many seconds.")] = 300.0,
) -> None:
    """Measure rounds with a large fleet: a real broker, coordinator and log, agents that evaluate no net."""
    from coordinator.swarm import Load, run_swarm

    result = run_swarm(Load(agents, rounds, limit_s, collectors), broker_url=broker or "", remote=remote)
    if as_json:
        typer.echo(json.dumps(result))
        return
    typer.echo(f"{result['agents']} agents, {result['rounds']} rounds over {result['broker']}")
    typer.echo(f"  a round:          {result['p50_ms']} ms (median), {result['p99_ms']} ms (99 %)")
    typer.echo(f"  replies lost:     {result['replies_lost']}")
    typer.echo(f"  coordinator:      {result['coordinator_rss_mib']} MiB, ", nl=False)
    typer.echo(f"{result['coordinator_cpu_us_per_reply']} us of CPU a reply")
