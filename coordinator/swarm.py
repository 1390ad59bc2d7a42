"""Measures the coordinator and a broker under a large fleet: ``scalarfed swarm``.

Starts mosquitto (unless a broker is named) and a coordinator process with the real log, rounds and link,
and answers as N agents in this process. No net is evaluated: the agents send fixed scalars of the right
layout, so that what is measured is transport, coordinator and log.
"""

import contextlib
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from coordinator.actions import Terms
from coordinator.broker import Broker, open_broker, use_broker
from coordinator.collector import collecting
from coordinator.rounds import Rounds
from coordinator.scalar_log import ScalarLog
from coordinator.service import Service
from coordinator.swarm_agents import Swarm
from edge_agent.agent import Agent
from edge_agent.estimator import Estimate
from edge_agent.grid import plan_segments, snap
from edge_agent.link import MqttLink
from edge_agent.optimizer import METHODS
from edge_agent.plan import RoundPlan
from edge_agent.replay import Replica
from edge_agent.topics import Topics
from edge_agent.wire import RoundOpen, RoundRecord
from profiles.errors import BrokerError, ConfigError
from profiles.memory import peak_rss_mib

__all__ = ["Load", "run_coordinator", "run_swarm"]

_TOPICS = Topics("scalarfed", "swarm")
_BUNDLE = "5" * 64
_WEIGHTS = 1024
_SCALARS = 8
_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_SPARE_FILES = 200
_MOST_AGENTS = 20_000
_MOST_ROUNDS = 10_000
_MOST_COLLECTORS = 16


@dataclass(frozen=True)
class Load:
    """How large, how long.

    Attributes:
        agents: 1 to 20,000.
        rounds: 1 to 10,000, and one more to warm up.
        limit_s: Give up after this.
        collectors: Processes that read the replies and hand them up in packs, 0 to 16.
    """

    agents: int
    rounds: int
    limit_s: float = 300.0
    collectors: int = 0

    @property
    def names(self) -> list[str]:
        """The agents' names."""
        return [f"agent-{number}" for number in range(self.agents)]


def run_swarm(load: Load, *, broker_url: str = "", remote: bool = False) -> dict[str, Any]:
    """Run the load and return ``p50_ms``, ``p99_ms``, ``replies_lost``, ``coordinator_rss_mib``, ``broker``.

    A round's time runs from its announcement to the record that is on the disk.

    Args:
        load: How large, how long.
        broker_url: A running broker; empty to start one.
        remote: Allow a broker beyond this machine: the load may be unwelcome there.

    Raises:
        ConfigError: A count is out of range, or the broker is elsewhere and that is not allowed.
        BrokerError: The broker does not take the load.
    """
    if not (1 <= load.agents <= _MOST_AGENTS and 1 <= load.rounds <= _MOST_ROUNDS):
        raise ConfigError(
            f"{load.agents} agents and {load.rounds} rounds: at most {_MOST_AGENTS} and {_MOST_ROUNDS}",
            hint="Choose fewer --agents or --rounds.",
        )
    if broker_url and not remote and urlsplit(broker_url).hostname not in _LOOPBACK:
        raise ConfigError(
            f"{broker_url} is not this machine", hint="Add --remote if that broker is yours to load."
        )
    if not 0 <= load.collectors <= _MOST_COLLECTORS:
        raise ConfigError(
            f"{load.collectors} collectors: at most {_MOST_COLLECTORS}", hint="Choose fewer --collectors."
        )
    _raise_file_limit(load.agents)
    with tempfile.TemporaryDirectory(prefix="swarm-") as scratch, contextlib.ExitStack() as stack:
        folder = Path(scratch)
        broker = use_broker(broker_url) if broker_url else open_broker(folder)
        stack.callback(broker.stop)
        return _run(load, broker, folder)


def _run(load: Load, broker: Broker, folder: Path) -> dict[str, Any]:
    parts = urlsplit(broker.url)
    swarm = Swarm(
        load.names,
        topics=_TOPICS,
        agent=_agent(load.names[0]),
        host=str(parts.hostname),
        port=int(parts.port or 1883),
        shards=max(1, load.collectors),
    )
    begun = time.monotonic()
    swarm.connect(deadline_s=min(120.0, load.limit_s))
    connect_s = time.monotonic() - begun
    gc.freeze()
    options = json.dumps([load.agents, load.rounds, load.limit_s, load.collectors])
    command = [sys.executable, "-m", "coordinator.swarm", str(folder), broker.url, options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as coordinator:
        deadline = time.monotonic() + load.limit_s + 30.0
        try:
            swarm.serve(until=lambda: coordinator.poll() is not None or time.monotonic() > deadline)
        finally:
            if coordinator.poll() is None:
                coordinator.terminate()
            said = coordinator.stdout.read() if coordinator.stdout else b""
            swarm.close()
    try:
        measured: dict[str, Any] = json.loads(said)
    except ValueError:
        raise BrokerError("the coordinator ended without a result; its last words stand above") from None
    return {
        **measured,
        "agents": load.agents,
        "collectors": load.collectors,
        "broker": broker.kind,
        "connect_s": round(connect_s, 2),
        "connections_broken": swarm.broken,
        "replies_sent": swarm.replies,
    }


def run_coordinator(folder: Path, broker_url: str, load: Load) -> dict[str, Any]:
    """Run a coordinator for the swarm's agents, and return what it measured."""
    replica = _replica()
    closed: list[float] = []
    stop_at = time.monotonic() + load.limit_s
    with ScalarLog.create(folder / "log.sqlite", {"bundle": _BUNDLE}) as log:
        log.set_agents([(number, name, "swarm", None, None) for number, name in enumerate(load.names)])
        terms = Terms(
            plan_of=_plan,
            rounds=load.rounds + 1,
            batch_size=16,
            central=True,
            cohort=None,
            quorum=None,
            deadline_s=60.0,
            resend_s=5.0,
        )
        rounds = Rounds(
            fleet=load.agents,
            terms_of=lambda _: terms,
            epoch=log.next_epoch(),
            replica=replica,
            seed=1,
        )
        link = MqttLink(broker_url, client_id="swarm-coordinator")

        def on_commit(_record: RoundRecord, _loss: float | None) -> None:
            closed.append(time.perf_counter())

        service = Service(
            link=link,
            topics=_TOPICS,
            log=log,
            rounds=rounds,
            agents=load.names,
            bundle_identity=_BUNDLE,
            shards=max(1, load.collectors),
            collected=load.collectors > 0,
            on_commit=on_commit,
            on_idle=lambda: watch_collectors(),
        )
        begun_cpu = time.process_time()
        with collecting(
            load.collectors,
            folder=folder,
            broker=broker_url,
            topics=_TOPICS,
            agents=load.names,
            shards=max(1, load.collectors),
        ) as watch_collectors:
            service.run(stop=lambda: time.monotonic() > stop_at, farewell_s=0.0)
        cpu_s = time.process_time() - begun_cpu
        link.flush(2.0)
        link.close()
        counted = log.answered_at_once(1)
    took_ms = 1000 * np.diff(np.array(closed))  # the first round warms up
    done = len(took_ms)
    return {
        "p50_ms": round(float(np.percentile(took_ms, 50)), 2) if done else None,
        "p99_ms": round(float(np.percentile(took_ms, 99)), 2) if done else None,
        "rounds": done,
        "replies_lost": load.agents * load.rounds - counted,
        "coordinator_rss_mib": round(peak_rss_mib(), 1),
        "coordinator_cpu_us_per_reply": round(1e6 * cpu_s / max(1, load.agents * (done + 1)), 1),
        "messages_dropped": dict(service.counts()),
    }


def _plan(round_: int) -> RoundPlan:
    method = METHODS["decomfl"]
    return RoundPlan(round_, 7, method.code, 1, _SCALARS, 1e-3, 1e-3, method.values({}))


def _replica() -> Replica:
    weights = np.linspace(-0.1, 0.1, _WEIGHTS, dtype=np.float32)
    segments = plan_segments(weights, [(0, _WEIGHTS)])
    snap(weights, segments)
    return Replica(weights, segments)


def _agent(name: str) -> Agent:
    scalars = np.linspace(-1, 1, _SCALARS, dtype=np.float32)

    def estimate(_replica: Replica, opened: RoundOpen, _number: int) -> Estimate:
        shape = (opened.plan.steps, opened.plan.perturbations)
        return Estimate(np.resize(scalars, shape), loss=0.5, forwards=2 * _SCALARS)

    return Agent(
        name=name,
        bundle_identity=_BUNDLE,
        replica=_replica(),
        fresh_replica=_replica,
        estimate=estimate,
        peak_kib=lambda: 60_000,
    )


def _raise_file_limit(agents: int) -> None:
    """Allow this process, and the broker that it starts, a file for every connection.

    Raises:
        ConfigError: The system's hard limit is lower.
    """
    if os.name != "posix":
        return
    import resource

    wanted = agents + _SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        if hard != resource.RLIM_INFINITY and hard < wanted:
            raise ConfigError(
                f"{agents} agents need {wanted} open files; this system allows {hard}",
                hint="Raise it with `ulimit -Hn`, or take fewer --agents.",
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


if __name__ == "__main__":
    result = run_coordinator(Path(sys.argv[1]), sys.argv[2], Load(*json.loads(sys.argv[3])))
    print(json.dumps(result), flush=True)
