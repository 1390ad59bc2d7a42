"""A run that goes on: its replica, plans, books and rounds, as bundle and log leave them.

Put together once, here, for the test-bed and for a coordinator whose boards are elsewhere. Knows the run
folder. Knows no broker and starts no process but collectors.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from coordinator.actions import Terms
from coordinator.collector import collecting
from coordinator.experiment import Experiment
from coordinator.family import read_family
from coordinator.ledger import Ledger
from coordinator.plans import CHANGED, Plans
from coordinator.pricing import price_of
from coordinator.rebuild import CHECKPOINT, resume_replica
from coordinator.reference import Reference
from coordinator.rounds import Rounds
from coordinator.scalar_log import ScalarLog
from coordinator.service import Service
from edge_agent.bundle import Bundle
from edge_agent.data import load_samples
from edge_agent.link import Link
from edge_agent.replay import Replica
from edge_agent.topics import Topics
from edge_agent.wire import RoundRecord

__all__ = ["OpenRun", "open_run", "rounds_of"]


@dataclass(frozen=True)
class OpenRun:
    """What serves a run: see the module.

    Attributes:
        folder: The run folder.
        experiment: As the run began; ``plans`` knows what was changed since.
        bundle: What is trained, the widest of a family.
        log: Open; every record goes there first.
        replica: At the round to go on with.
        plans: What each round asks.
        rounds: The state machine, not yet started.
        levels: By agent number, the width of the family that it holds; empty without a family.
    """

    folder: Path
    experiment: Experiment
    bundle: Bundle
    log: ScalarLog
    replica: Replica
    plans: Plans
    rounds: Rounds
    levels: Sequence[int]

    @property
    def names(self) -> list[str]:
        """The agents' names, in the order of their numbers."""
        return [agent.name for agent in self.experiment.agents]

    @property
    def topics(self) -> Topics:
        """The topics of the run."""
        return Topics("scalarfed", self.experiment.name)

    def service(
        self,
        link: Link,
        *,
        on_commit: Callable[[RoundRecord, float | None], None],
        on_idle: Callable[[], None],
        web: tuple[int, bool] | None = None,
    ) -> Service:
        """Return what runs the rounds over a link; the arguments are those of :class:`Service`."""
        fleet, privacy = self.experiment.fleet, self.experiment.privacy
        return Service(
            link=link,
            topics=self.topics,
            log=self.log,
            rounds=self.rounds,
            agents=self.names,
            bundle_identity=self.bundle.identity,
            masked=privacy.masks != "none",
            narrower=[one.identity for one in read_family(self.bundle.folder)[:-1]],
            privacy={"clip": privacy.clip, "noise": privacy.noise} if privacy.clip else None,
            shards=fleet.shards,
            collected=fleet.collectors > 0,
            checkpoint=self.folder / CHECKPOINT,
            web=web,
            on_commit=on_commit,
            on_idle=on_idle,
        )

    def collectors(self, broker: str, tls: Sequence[Path]) -> AbstractContextManager[Callable[[], None]]:
        """Return the run's collectors, not yet started.

        Args:
            broker: Where they connect.
            tls: Files of the authority's certificate, the coordinator's certificate and its key; or none.
        """
        return collecting(
            self.experiment.fleet.collectors,
            folder=self.folder,
            broker=broker,
            topics=self.topics,
            agents=self.names,
            shards=self.experiment.fleet.shards,
            tls=tls,
            on_event=self.log.add_event,
        )


def open_run(folder: Path, experiment: Experiment, bundle: Bundle, log: ScalarLog) -> OpenRun:
    """Take up a prepared run where its log ends, as a new incarnation of its coordinator.

    Raises:
        ScalarfedError: The log does not follow from the bundle.
    """
    replica = resume_replica(bundle, log, checkpoint=folder / CHECKPOINT, run=experiment.name)
    epoch = log.next_epoch()
    log.add_event("coordinator started", "", f"epoch {epoch}, round {replica.round}")
    plans = Plans(experiment, bundle, log.texts_of(CHANGED))
    levels = json.loads(log.meta().get("levels", "[]"))
    rounds = rounds_of(
        experiment,
        bundle,
        replica,
        epoch=epoch,
        recent=list(log.records(max(0, replica.round - 4))),
        plans=plans,
        ledger=_ledger(experiment, bundle, log, levels),
        levels=levels,
    )
    return OpenRun(folder, experiment, bundle, log, replica, plans, rounds, levels)


def rounds_of(
    experiment: Experiment,
    bundle: Bundle,
    replica: Replica,
    *,
    epoch: int,
    recent: Sequence[RoundRecord] = (),
    plans: Plans | None = None,
    ledger: Ledger | None = None,
    levels: Sequence[int] = (),
) -> Rounds:
    """Return the state machine of an experiment's rounds, not yet started.

    Args:
        experiment: What to run.
        bundle: What is trained.
        replica: The coordinator's, at the round to go on with.
        epoch: Incarnation of the coordinator.
        recent: The records just before that round.
        plans: What each round asks; the experiment's own plans where left out.
        ledger: What the agents may spend.
        levels: By agent number, the width of the family that it holds.
    """
    asked = plans or Plans(experiment, bundle)
    return Rounds(
        fleet=len(experiment.agents),
        terms_of=lambda round_: _terms(asked.experiment(round_), asked),
        epoch=epoch,
        replica=replica,
        recent=recent,
        seed=experiment.seed,
        reference=_reference(experiment, bundle, replica),
        ledger=ledger,
        levels=levels,
    )


def _ledger(experiment: Experiment, bundle: Bundle, log: ScalarLog, levels: Sequence[int]) -> Ledger:
    """Return the books of a prepared run, as the log holds them."""
    agents = experiment.agents
    predicted = [row.predicted_mib for row in log.fleet()]
    prices = [
        price_of(one, predicted, batch_size=experiment.method.batch_size)
        for one in read_family(bundle.folder)
    ]
    return Ledger(
        [agent.name for agent in agents],
        [agent.budget for agent in agents],
        lambda work: prices[levels[work.agent] if levels else 0](work),
        today=lambda: datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        deadline_s=experiment.fleet.deadline_s,
        stored=log.accounts(),
    )


def _terms(experiment: Experiment, plans: Plans) -> Terms:
    fleet, method = experiment.fleet, experiment.method
    return Terms(
        plan_of=plans,
        rounds=experiment.rounds,
        batch_size=method.batch_size,
        central=method.difference == "central",
        cohort=None if fleet.cohort == "all" else fleet.cohort,
        quorum=None if fleet.quorum == "all" else fleet.quorum,
        deadline_s=fleet.deadline_s,
        resend_s=fleet.resend_s,
        rule=fleet.aggregation,
        liars=fleet.liars,
        private=experiment.privacy.clip > 0,
        masked=experiment.privacy.masks != "none",
    )


def _reference(experiment: Experiment, bundle: Bundle, replica: Replica) -> Reference | None:
    """Return what the coordinator measures itself to see who lies; the mean asks nobody.

    The test samples serve for it: they decide who is trusted, and enter no scalar.
    """
    if experiment.fleet.aggregation == "mean" or not experiment.data.path.is_file():
        return None
    return Reference(bundle, replica, load_samples(experiment.data.path, "test", classes=bundle.classes))
