"""``scalarfed testbed``: a whole run on this machine, every board a process of its own."""

import contextlib
import json
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coordinator.cli.parameters import ExperimentFile, Json, RunFolder, Settings

if TYPE_CHECKING:
    from coordinator.progress import Observer

__all__ = ["app", "observing", "run", "status", "stopping_in_order"]

app = typer.Typer(
    no_args_is_help=True,
    help="Run an experiment on this machine: every board is a process with its own budget.",
)


@app.command(
    epilog="Examples:\n\n"
    "scalarfed testbed run examples/digits.toml\n\n"
    "scalarfed testbed run examples/digits.toml --set rounds=50 --set devices.0.count=4 --out runs/short\n\n"
    "scalarfed testbed run examples/digits.toml --set data.path=my.npz --json > summary.json"
)
def run(
    experiment: ExperimentFile,
    out: Annotated[
        Path | None, typer.Option(help="The run folder.", show_default="runs/NAME of the experiment")
    ] = None,
    settings: Settings = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the folder.")] = False,
    as_json: Json = False,
    broker: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Use a running MQTT broker, mqtt://HOST:PORT.", show_default=False),
    ] = None,
    insecure: Annotated[
        bool,
        typer.Option("--insecure", help="Let messages go over a network in the clear: for one of your own."),
    ] = False,
) -> None:
    """Prune, export, start a broker and the agents, train, and write the report.

    The run folder holds the experiment as it was run, the scalar log, the bundle, the agents' logs,
    summary.json and report.html. Ctrl-C stops in order; the same command with --resume goes on without losing
    a round.
    """
    from coordinator.config import load_experiment

    overrides = [*(settings or []), *([f'broker.url="{broker}"'] if broker else [])]
    overrides += ['broker.security="insecure"'] if insecure else []
    chosen = load_experiment(experiment, overrides)
    folder = out or Path("runs") / chosen.name
    try:
        with observing(silent=as_json) as observer, stopping_in_order():
            from coordinator.testbed import run_testbed

            summary = run_testbed(chosen, out=folder.resolve(), resume=resume, observer=observer)
    except KeyboardInterrupt:
        _tell_how_to_go_on(folder)
        raise typer.Exit(130) from None
    if as_json:
        typer.echo(json.dumps(summary))
    else:
        _show(summary, folder)


@app.command(epilog="Example: scalarfed testbed status runs/digits")
def status(
    run: RunFolder,
    as_json: Json = False,
) -> None:
    """Print a run's ledger: what each board was to spend, what it spent, what is left, who is left out.

    Reads the log; the run may be going on.
    """
    from dataclasses import asdict

    from coordinator.history import read_history

    history = read_history(run)
    if as_json:
        rows = [
            asdict(entry) | {"flops_left": entry.flops_left, "bytes_left": entry.bytes_left}
            for entry in history.books
        ]
        typer.echo(json.dumps({"rounds": len(history.rounds), "ledger": rows}))
        return
    typer.echo(f"{len(history.rounds)} rounds are closed")
    width = max((len(entry.agent) for entry in history.books), default=5)
    typer.echo(
        f"{'agent':{width}}  {'batch':>5}  {'MiB: predicted':>14}  {'measured':>8}  {'allowed':>7}  "
        f"{'FLOPs: predicted':>16}  {'spent':>9}  {'left':>9}  {'bytes: spent':>12}  {'left':>9}  left out"
    )
    for entry in history.books:
        typer.echo(
            f"{entry.agent:{width}}  {entry.batch_size:5d}  {entry.peak_predicted_mib:14.1f}  "
            f"{entry.peak_measured_mib:8.1f}  {_figure(entry.memory_mib):>7}  "
            f"{_figure(entry.flops_predicted):>16}  {_figure(entry.flops_spent):>9}  "
            f"{_figure(entry.flops_left):>9}  {_figure(entry.bytes_spent):>12}  "
            f"{_figure(entry.bytes_left):>9}  {entry.refused or 'no'}"
        )


def _figure(value: float | None) -> str:
    return "any" if value is None else f"{value:.4g}"


@contextlib.contextmanager
def observing(*, silent: bool) -> Iterator["Observer"]:
    """Give an observer for the terminal at hand; ``silent`` keeps stdout for a JSON object."""
    from rich.console import Console

    from coordinator.progress import BarProgress, LineProgress, Silence

    console = Console(stderr=silent)
    if silent:
        # Whatever a library prints must not get into the JSON.
        with contextlib.redirect_stdout(sys.stderr):
            yield Silence()
    elif console.is_terminal:
        with BarProgress(console) as bar:
            yield bar
    else:
        yield LineProgress(sys.stdout)


@contextlib.contextmanager
def stopping_in_order() -> Iterator[None]:
    """Let SIGTERM stop a run as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _tell_how_to_go_on(folder: Path) -> None:
    if (folder / "log.sqlite").exists():
        typer.echo("\nStopped in order. Go on with the same command and --resume.", err=True)
    else:
        typer.echo("\nStopped before the run began; nothing is left behind.", err=True)


def _show(summary: dict[str, Any], folder: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in _rows(summary, folder):
        table.add_row(f"[bold]{name}[/bold]", value)
    Console(highlight=False, soft_wrap=True).print(table)


def _rows(summary: dict[str, Any], folder: Path) -> Sequence[tuple[str, str]]:
    accuracy, dense, kept = (
        summary.get("test_accuracy"),
        summary.get("params_dense"),
        summary.get("params_pruned"),
    )
    up, down = summary.get("bytes_up_per_agent_round"), summary.get("bytes_down_per_agent_round")
    peaks = [agent["peak_rss_mib"] for agent in summary.get("agents", []) if agent.get("peak_rss_mib")]
    where = "on every side" if summary.get("digests_agree") else "[red]not on every side[/red]"
    rows = [
        (
            "test accuracy",
            "not evaluated" if accuracy is None else f"{accuracy:.1%} after {summary['rounds']} rounds",
        ),
        ("parameters", "" if not dense else f"{kept:,} of {dense:,}"),
        ("bytes", "" if up is None else f"{up:.0f} up, {down:.0f} down per agent and round"),
        ("peak memory", f"{max(peaks):.0f} MiB" if peaks else ""),
        ("digest", f"{summary.get('final_digest', '?')} {where}"),
        ("report", str(folder / "report.html")),
    ]
    return [(name, value) for name, value in rows if value]
