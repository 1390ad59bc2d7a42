"""A whole fleet in one process: the protocol and the bits of a real one, without sockets.

All agents of a round stand at the same weights and differ in their samples alone, so one replica serves
any number of them. The rounds are those of the real coordinator, every reply goes through the bytes of
the wire, and what an agent measures is what an agent process measures; hence the digests of a
simulation and of a fleet agree, if no message of the fleet came too late.
"""

import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from coordinator.actions import Action, Announce, Commit
from coordinator.answers import Answers, RolledBack
from coordinator.config import dump
from coordinator.evaluation import Evaluator, judge_widths
from coordinator.experiment import Experiment
from coordinator.family import deal_levels, read_family
from coordinator.health import Health
from coordinator.open_run import rounds_of
from coordinator.partition import partition
from coordinator.plans import CHANGED, Plans
from coordinator.progress import Observer, Standing
from coordinator.rebuild import rebuild
from coordinator.rounds import Rounds
from coordinator.scalar_log import ScalarLog
from coordinator.testbed import make_bundle, read_samples
from edge_agent.bundle import Bundle
from edge_agent.data import Samples
from edge_agent.forward import Forward
from edge_agent.measure import forward_for, measure
from edge_agent.privacy import Privacy, privatise
from edge_agent.replay import Replica
from edge_agent.wire import Reply, RoundOpen, decode, encode
from profiles.errors import ConfigError, EstimateError
from profiles.memory import peak_rss_mib

if TYPE_CHECKING:
    from edge_agent.torch_forward import TorchForward

__all__ = ["Spending", "deal", "play", "simulate", "with_agents"]


@dataclass
class Spending:
    """What the agents of a simulation would have spent, all of them together.

    Attributes:
        replies: Replies that were sent.
        forwards: Forward passes behind them.
        bytes_up: Payload bytes of the replies.
        bytes_down: Payload bytes of the announcements, one for each agent that was asked.
    """

    replies: int = 0
    forwards: int = 0
    bytes_up: int = 0
    bytes_down: int = 0


def with_agents(experiment: Experiment, agents: int) -> Experiment:
    """Return the experiment with that many agents, all of its first device.

    Raises:
        ConfigError: A round asks more agents than that.
    """
    changed = replace(experiment, devices=(replace(experiment.devices[0], count=agents),))
    if changed.cohort_size > agents:
        raise ConfigError(
            f"a round asks {changed.cohort_size} agents, and there are {agents}",
            hint='Lower fleet.cohort, or write "all".',
        )
    return changed


def simulate(experiment: Experiment, *, out: Path, observer: Observer) -> dict[str, Any]:
    """Run an experiment in this process and return its summary.

    The folder holds the experiment, the bundle, the scalar log and ``summary.json``, as a real run's does.

    Raises:
        ScalarfedError: As the parts raise it; nothing is left behind.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists already", hint="Choose another folder with --out.")
    staging = out.with_name(f".{out.name}.part")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        summary = _simulate(experiment, staging, observer)
        staging.replace(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return summary


def _simulate(experiment: Experiment, folder: Path, observer: Observer) -> dict[str, Any]:
    train, test = read_samples(experiment)
    parts = deal(experiment, train)
    bundle = make_bundle(experiment, folder / "bundle", train, observer)
    family = None
    if bundle.stops:
        slices = {a.name: train.pick(part) for a, part in zip(experiment.agents, parts, strict=True)}
        family = deal_levels(experiment, read_family(bundle.folder), slices)
    (folder / "experiment.toml").write_text(dump(experiment), encoding="utf-8")
    meta = {"bundle": bundle.identity, "name": experiment.name, "rounds": str(experiment.rounds)}
    names = [agent.name for agent in experiment.agents]
    with ScalarLog.create(folder / "log.sqlite", meta) as log:
        log.set_agents([(a.id, a.name, a.profile, a.memory_mib, None) for a in experiment.agents])
        observer.stage(f"simulating {len(names)} agents by {experiment.method.name}")
        spent = Spending()

        def run() -> Replica:
            replica = rebuild(bundle, log)
            plans = Plans(experiment, bundle, log.texts_of(CHANGED))
            recent = list(log.records(max(0, replica.round - 4)))
            rounds = rounds_of(
                experiment,
                bundle,
                replica,
                epoch=log.next_epoch(),
                recent=recent,
                plans=plans,
                levels=levels,
            )
            watch = _Watch(experiment, log, observer, names, Evaluator(bundle, replica, test), plans, spent)
            if replica.round == 0:
                log.add_evaluation(0, *watch.judge())
            play(
                rounds,
                bundle,
                train,
                parts,
                narrower=narrower,
                on_commit=lambda action: watch.on_commit(action, replica),
                spent=spent,
                privacy=privacy,
            )
            return replica

        narrower, levels = (family.bundles[:-1], family.levels) if family is not None else ((), ())
        asked = experiment.privacy
        privacy = Privacy(asked.clip, asked.noise) if asked.clip else None
        while True:
            try:
                replica = run()
                break
            except RolledBack as back:
                observer.line(back.text)
        loss, accuracy = log.last_evaluation() or (None, None)
        summary = {
            "name": experiment.name,
            "method": experiment.method.name,
            "agents": len(names),
            "rounds": len(log),
            "rounds_skipped": log.skipped(),
            "test_loss": loss,
            "test_accuracy": accuracy,
            "params": bundle.params,
            "final_digest": f"{replica.digest():016x}",
            "payload_bytes_up_per_agent_round": spent.bytes_up / max(1, spent.replies),
            "payload_bytes_down_per_agent_round": spent.bytes_down / max(1, spent.replies),
            "forwards_per_agent_round": spent.forwards / max(1, spent.replies),
            "peak_rss_mib": round(peak_rss_mib(), 1),
            "bundle": bundle.identity,
            "seed": experiment.seed,
        }
        if family is not None:
            summary["widths"] = judge_widths(family.bundles, replica, levels, test)
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return summary


class _Watch:
    """Writes what a simulation brings, and looks after its health."""

    def __init__(
        self,
        experiment: Experiment,
        log: ScalarLog,
        observer: Observer,
        names: Sequence[str],
        judge: Evaluator,
        plans: Plans,
        spent: Spending,
    ) -> None:
        self.judge = judge
        self._experiment = experiment
        self._log = log
        self._observer = observer
        self._names = names
        self._spent = spent
        self._health = Health(experiment.method.learning_rate)
        self._answers = Answers(experiment, plans, log, self._health)

    def on_commit(self, action: Commit, replica: Replica) -> None:
        """Take in a record that was applied.

        Raises:
            RolledBack: The log was cut for the sake of health.
        """
        round_, names, log, spent = action.record.plan.round, self._names, self._log, self._spent
        done = round_ + 1
        replies = {names[number]: (*reply, 0.0) for number, reply in action.replies.items()}
        log.append(action.record, loss=action.loss, opened_at=0.0, closed_at=0.0, replies=replies)
        for text in self._health.observe(action.record, action.loss, replica):
            log.add_event("health", "", f"round {round_}: {text}")
            self._observer.line(f"round {done}: {text}")
        if done % self._experiment.evaluation.every == 0 or done == self._experiment.rounds:
            log.add_evaluation(done, *self.judge())
        known = log.last_evaluation()
        accuracy, agents, rounds = known[1] if known else None, len(names), self._experiment.rounds
        self._observer.round(
            Standing(done, rounds, action.loss, accuracy, agents, agents, spent.bytes_up, spent.bytes_down)
        )
        if text := self._answers.after(round_):
            self._observer.line(f"round {done}: {text}")


def deal(experiment: Experiment, train: Samples) -> list[NDArray[np.int64]]:
    """Return for each agent the indices of its samples, as a test-bed deals them."""
    return partition(
        train.y,
        len(experiment.agents),
        split=experiment.data.split,
        alpha=experiment.data.alpha,
        min_samples=experiment.data.min_samples,
        seed=experiment.seed,
    )


def play(
    rounds: Rounds,
    bundle: Bundle,
    train: Samples,
    parts: Sequence[NDArray[np.int64]],
    *,
    narrower: Sequence[Bundle] = (),
    on_commit: Callable[[Commit], None],
    spent: Spending,
    stop: Callable[[], bool] = lambda: False,
    privacy: Privacy | None = None,
) -> None:
    """Play all rounds, one agent after the other.

    Args:
        rounds: Not yet started; its replica serves all agents too.
        bundle: What is trained.
        train: All samples.
        parts: For each agent the indices of its own.
        narrower: Of a nested family, the other bundles, the narrowest first.
        on_commit: Called with every record, in order.
        spent: Counts what the agents would have spent.
        stop: Asked after every record; True ends the simulation.
        privacy: What the agents do to their replies; its noise differs every time.
    """
    replica = rounds.replica
    views = [*(replica.at_level(level) for level in range(len(narrower))), replica]
    forwards: list[Forward | TorchForward] = []
    pending: deque[Action] = deque(rounds.start(0.0))
    while pending:
        action = pending.popleft()
        if isinstance(action, Commit):
            on_commit(action)
            if stop():
                return
        elif isinstance(action, Announce) and not action.message.closing:
            opened, size = action.message, len(encode(action.message))
            digests = [view.digest() for view in views]
            held = zip([*narrower, bundle], views, strict=True)
            forwards = forwards or [forward_for(one, view, opened.plan) for one, view in held]
            for number in range(len(parts)):
                if number in opened.cohort:
                    level = rounds.levels[number] if narrower else 0
                    seen = forwards[level], views[level], digests[level]
                    reply = _reply(*seen, train, parts[number], opened, number, spent)
                    if privacy is not None:
                        scalars = privatise(reply.scalars, privacy, os.urandom)
                        reply = replace(reply, scalars=scalars, loss=0.0)
                    spent.bytes_down += size
                    pending.extend(rounds.on_reply(number, reply, 0.0))


def _reply(
    forward: "Forward | TorchForward",
    replica: Replica,
    digest: int,
    train: Samples,
    part: NDArray[np.int64],
    opened: RoundOpen,
    number: int,
    spent: Spending,
) -> Reply:
    """Return what an agent answers, after its way through the bytes of the wire."""
    reply = Reply(
        epoch=opened.epoch,
        round=opened.plan.round,
        attempt=opened.attempt,
        samples=opened.batch_size,
        loss=float("nan"),
        peak_kib=0,
        digest=digest,
    )
    try:
        made = measure(forward, train, replica, opened, number, own=part)
        reply = replace(reply, loss=made.loss, scalars=made.scalars.reshape(-1))
        spent.forwards += made.forwards
    except EstimateError:
        pass
    payload = encode(reply)
    spent.replies += 1
    spent.bytes_up += len(payload)
    received = decode(payload)
    if not isinstance(received, Reply):
        raise ValueError("a reply was decoded as something else")
    return received
