"""The coordinator alone: runs the rounds of a prepared run folder while the agents live elsewhere.

Knows the run folder and the broker's address. Starts neither agents nor a broker, and may be killed at any
moment: whoever starts it again on the same folder goes on where the log ends.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from coordinator.collector import collecting
from coordinator.config import load_experiment
from coordinator.control import Control
from coordinator.family import read_family
from coordinator.plans import CHANGED, Plans
from coordinator.rebuild import CHECKPOINT, resume_replica
from coordinator.scalar_log import ScalarLog
from coordinator.service import Service
from coordinator.testbed import ledger_of, privacy_of, rounds_of
from edge_agent.bundle import read_bundle
from edge_agent.link import Link, MqttLink
from edge_agent.topics import Topics
from edge_agent.wire import RoundRecord

__all__ = ["serve_run"]


def serve_run(
    run: Path,
    *,
    broker: str,
    connect: Callable[[Topics], tuple[MqttLink, Link]] | None = None,
    on_commit: Callable[[RoundRecord, float | None], None] = lambda record, loss: None,
    on_idle: Callable[[Service], None] = lambda service: None,
    web: tuple[int, bool] | None = None,
    tls: Sequence[Path] = (),
    farewell_s: float = 20.0,
) -> dict[str, Any]:
    """Run what is left of a run's rounds over a broker, and return how it ended.

    Args:
        run: A folder that ``testbed.prepare`` made.
        broker: ``mqtt://HOST:PORT``; it may come and go.
        connect: Returns the connection to use instead, and the link over it.
        on_commit: Called after every record that is on the disk.
        on_idle: Called a few times a second.
        web: Port of the web server that hands out the checkpoint, and whether it wants certificates.
        tls: Files by which collectors get into the broker: authority, certificate, key; none in the clear.
        farewell_s: How long to wait for the agents' last word.

    Raises:
        ScalarfedError: The folder does not hold a run, or its log does not follow from its bundle.
    """
    experiment = load_experiment(run / "experiment.toml")
    bundle = read_bundle(run / "bundle")
    with ScalarLog.open(run / "log.sqlite") as log:
        replica = resume_replica(bundle, log, checkpoint=run / CHECKPOINT, run=experiment.name)
        epoch = log.next_epoch()
        log.add_event("coordinator started", "", f"epoch {epoch}, round {replica.round}")
        plans = Plans(experiment, bundle, log.texts_of(CHANGED))
        recent = list(log.records(max(0, replica.round - 4)))
        levels = json.loads(log.meta().get("levels", "[]"))
        ledger = ledger_of(experiment, bundle, log)
        rounds = rounds_of(
            experiment,
            bundle,
            replica,
            epoch=epoch,
            recent=recent,
            plans=plans,
            ledger=ledger,
            levels=levels,
        )
        topics = Topics("scalarfed", experiment.name)
        names = [agent.name for agent in experiment.agents]
        if connect is not None:
            carrier, link = connect(topics)
        else:
            link = carrier = MqttLink(broker, client_id=f"{experiment.name}-coordinator")

        def idle() -> None:
            control.poll()
            watch_collectors()
            on_idle(service)

        service = Service(
            link=link,
            topics=topics,
            log=log,
            rounds=rounds,
            agents=names,
            bundle_identity=bundle.identity,
            masked=experiment.privacy.masks != "none",
            narrower=[one.identity for one in read_family(bundle.folder)[:-1]],
            privacy=privacy_of(experiment),
            shards=experiment.fleet.shards,
            collected=experiment.fleet.collectors > 0,
            checkpoint=run / CHECKPOINT,
            web=web,
            on_commit=on_commit,
            on_idle=idle,
        )
        control = Control(log, plans, service)
        collectors = collecting(
            experiment.fleet.collectors,
            folder=run,
            broker=broker,
            topics=topics,
            agents=names,
            shards=experiment.fleet.shards,
            tls=tls,
            on_event=log.add_event,
        )
        try:
            with collectors as watch_collectors:
                service.run(stop=lambda: control.stopped, farewell_s=farewell_s)
        finally:
            service.announce_state("finished" if rounds.finished else "stopped")
            carrier.flush(2.0)
            carrier.close()
        return {
            "rounds": replica.round,
            "rounds_skipped": log.skipped(),
            "final_digest": f"{replica.digest():016x}",
            "agents": {
                name: {key: status.get(key) for key in ("state", "round", "digest")}
                for name, status in service.statuses.items()
            },
            "messages_dropped": dict(service.counts()),
        }


def _main(run: str, broker: str) -> None:
    print(json.dumps(serve_run(Path(run), broker=broker)), flush=True)


if __name__ == "__main__":
    import sys

    _main(*sys.argv[1:])
