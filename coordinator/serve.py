"""The coordinator alone: runs the rounds of a prepared run folder while the agents live elsewhere.

Knows the run folder and the broker's address. Starts neither agents nor a broker, and may be killed at any
moment: whoever starts it again on the same folder goes on where the log ends.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from coordinator.config import load_experiment
from coordinator.control import Control
from coordinator.open_run import open_run
from coordinator.scalar_log import ScalarLog
from coordinator.service import Service
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
        opened = open_run(run, experiment, bundle, log)
        if connect is not None:
            carrier, link = connect(opened.topics)
        else:
            link = carrier = MqttLink(broker, client_id=f"{experiment.name}-coordinator")

        def idle() -> None:
            control.poll()
            watch_collectors()
            on_idle(service)

        service = opened.service(link, on_commit=on_commit, on_idle=idle, web=web)
        control = Control(log, opened.plans, service)
        try:
            with opened.collectors(broker, tls) as watch_collectors:
                service.run(stop=lambda: control.stopped, farewell_s=farewell_s)
        finally:
            service.announce_state("finished" if opened.rounds.finished else "stopped")
            carrier.flush(2.0)
            carrier.close()
        return {
            "rounds": opened.replica.round,
            "rounds_skipped": log.skipped(),
            "final_digest": f"{opened.replica.digest():016x}",
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
