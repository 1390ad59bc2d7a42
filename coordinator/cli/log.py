"""``scalarfed log``: looks into the scalar log of a run, and checks it."""

import json
from typing import Annotated, Any

import typer

from coordinator.cli.parameters import Json, RunFolder

__all__ = ["app", "compact", "show", "verify"]

app = typer.Typer(no_args_is_help=True, help="Look into the scalar log of a run, and check it.")


@app.command(epilog="Example: scalarfed log show runs/digits --last 5")
def show(
    run: RunFolder,
    last: Annotated[int, typer.Option(min=1, help="How many rounds, from the end.")] = 20,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object with all that is known of them.")
    ] = False,
) -> None:
    """Print the last rounds: loss, size of the scalars, counted replies, digest."""
    from coordinator.history import read_history
    from coordinator.scalar_log import ScalarLog

    history = read_history(run)
    start = max(0, len(history.rounds) - last)
    counted = history.answers()[start:].tolist()
    with ScalarLog.open(run / "log.sqlite") as log:
        records = list(log.records(start))
    rows: list[dict[str, Any]] = []
    for record, replies in zip(records, counted, strict=False):
        number = record.plan.round
        loss, took = history.loss[number], history.closed_at[number] - history.opened_at[number]
        rows.append(
            {
                "round": number,
                "skipped": record.skipped,
                "loss": None if loss != loss else float(loss),
                "rms_scalar": float((record.scalars.astype(float) ** 2).mean() ** 0.5),
                "learning_rate": record.plan.learning_rate,
                "counted": replies,
                "seconds": round(float(took), 3),
                "digest": f"{record.digest:016x}",
                "scalars": record.scalars.tolist(),
            }
        )
    if as_json:
        typer.echo(json.dumps({"rounds": len(history.rounds), "shown": rows}))
        return
    typer.echo("  round      loss  rms scalar  learning rate  counted  seconds  digest")
    for row in rows:
        loss_text = "skipped" if row["loss"] is None else f"{row['loss']:.4f}"
        typer.echo(
            f"{row['round']:7d}  {loss_text:>8}  {row['rms_scalar']:10.4g}  {row['learning_rate']:13.4g}"
            f"  {row['counted']:7d}  {row['seconds']:7.2f}  {row['digest']}"
        )


@app.command(epilog="Example: scalarfed log verify runs/digits")
def verify(
    run: RunFolder,
    as_json: Json = False,
) -> None:
    """Check that no row was altered, removed or added, and that replaying them gives every digest."""
    from coordinator.rebuild import rebuild_run

    _, replica = rebuild_run(run)
    digest = f"{replica.digest():016x}"
    if as_json:
        typer.echo(json.dumps({"rounds": replica.round, "digest": digest, "sound": True}))
    else:
        typer.echo(
            f"{replica.round} rounds: the chain is whole and every digest agrees; the last is {digest}"
        )


@app.command(epilog="Example: scalarfed log compact runs/digits --drop-replies")
def compact(
    run: RunFolder,
    drop_replies: Annotated[
        bool,
        typer.Option("--drop-replies", help="Forget the agents' own scalars too; replay needs none of them."),
    ] = False,
) -> None:
    """Check the whole log, keep the replica at its end as a checkpoint, and give back unused room.

    The next coordinator starts from the checkpoint, and late agents get it where it is less than the records.
    No record is ever removed: they are the run.
    """
    from coordinator.rebuild import CHECKPOINT, rebuild_run
    from coordinator.scalar_log import ScalarLog
    from edge_agent.state import save_replica

    bundle, replica = rebuild_run(run)
    with ScalarLog.open(run / "log.sqlite") as log:
        name = log.meta().get("name", "")
        save_replica(run / CHECKPOINT, replica, bundle_identity=bundle.identity, run=name)
        before, after = log.compact(keep_replies=not drop_replies)
    typer.echo(f"checkpoint of round {replica.round}, digest {replica.digest():016x}")
    typer.echo(f"log: {before:,} -> {after:,} bytes")
