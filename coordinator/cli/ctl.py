"""``scalarfed ctl``: steers a run that is going on."""

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from coordinator.cli.parameters import Json, RunFolder

__all__ = ["EXAMPLE", "ctl"]

EXAMPLE = (
    "Examples:\n\n"
    "scalarfed ctl runs/digits status\n\n"
    "scalarfed ctl runs/digits set learning_rate=0.01 fleet.quorum=4\n\n"
    "scalarfed ctl runs/digits pause"
)


def ctl(
    run: RunFolder,
    verb: Annotated[
        str, typer.Argument(help="pause, resume, stop, set or status.", metavar="VERB", show_default=False)
    ],
    assignments: Annotated[
        list[str] | None,
        typer.Argument(metavar="CONSTANT=VALUE", help="For set: what changes.", show_default=False),
    ] = None,
    within_s: Annotated[
        float, typer.Option("--within", min=0.1, max=3600, help="Seconds to wait for the coordinator.")
    ] = 10.0,
    as_json: Json = False,
) -> None:
    """Pause, resume or stop a run, change its constants, or ask how it is.

    A change takes effect with the next round; its record holds the new values, so that a replay follows.
    A paused run lets the open round end and opens no other. A stopped one ends in order; --resume goes on.
    """
    from coordinator.control import VERBS
    from coordinator.scalar_log import ScalarLog
    from profiles.errors import ConfigError

    if verb not in VERBS or (verb == "set") != bool(assignments):
        given = " ".join([verb, *(assignments or [])])
        raise ConfigError(
            f"`{given}` is no order. There are {', '.join(VERBS)}; `set` alone takes CONSTANT=VALUE.",
            hint="For example: scalarfed ctl RUN set learning_rate=0.01",
        )
    with ScalarLog.open(run / "log.sqlite") as log:
        answer = _ask(log, run, verb, assignments or [], within_s)
    if "error" in answer:
        raise ConfigError(str(answer["error"]), hint=str(answer.get("hint", "")))
    if as_json:
        typer.echo(json.dumps(answer))
    else:
        _show(answer)


def _ask(log: Any, run: Path, verb: str, assignments: list[str], within_s: float) -> dict[str, Any]:
    from profiles.errors import LogError

    number = log.add_order(verb, json.dumps(assignments))
    answer = None
    try:
        until = time.monotonic() + within_s
        while answer is None and time.monotonic() < until:
            time.sleep(0.05)
            answer = log.take_answer(number)
    finally:  # also after Ctrl-C: an order that nobody waits for is taken back
        withdrawn = answer is None and log.withdraw_order(number)
    if answer is None and not withdrawn:
        answer = log.take_answer(number)
    if answer is None:
        if verb == "status":
            return {"state": "no coordinator at work", "round": len(log)}
        raise LogError(
            f"no coordinator took the order within {within_s:g} s; it is withdrawn",
            hint=f"Is the run in {run} going on? Start it with --resume, or wait longer with --within.",
        )
    return dict(json.loads(answer))


def _show(answer: dict[str, Any]) -> None:
    rounds = f" of {answer['rounds']}" if "rounds" in answer else ""
    state = "stopping" if answer.get("stopping") else answer["state"]
    typer.echo(f"{state}, round {answer['round']}{rounds}")
    if "online" in answer:
        typer.echo(f"{answer['online']} of {answer['agents']} agents are there")
    for title, key in (("left out for silence", "excluded"), ("suspected", "suspects")):
        if answer.get(key):
            typer.echo(f"{title}: {', '.join(answer[key])}")
    if "constants" in answer:
        typer.echo(", ".join(f"{name} = {value:g}" for name, value in answer["constants"].items()))
    if "digest" in answer:
        typer.echo(f"digest {answer['digest']}, epoch {answer['epoch']}")
