"""The main job: prune, bundle, start a broker and a fleet of agent processes, train, look back.

Everything is checked and prepared in a folder beside the run folder before anything is started; the
run folder appears only when it is whole. What happened lies in the scalar log, so that an interrupted
run goes on where it stopped.
"""

import contextlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from coordinator.actions import Terms
from coordinator.answers import Answers, RolledBack
from coordinator.broker import Broker, open_broker
from coordinator.collector import collecting
from coordinator.config import dump, load_experiment
from coordinator.control import Control
from coordinator.evaluation import Evaluator, judge_widths
from coordinator.experiment import Experiment
from coordinator.family import deal_levels, folders_of, read_family
from coordinator.guard import Guard, connect, guard_of, needs_guard
from coordinator.health import Health
from coordinator.ledger import Ledger
from coordinator.local_fleet import local_fleet
from coordinator.partition import partition
from coordinator.plans import CHANGED, Plans
from coordinator.pricing import price_of
from coordinator.privacy import check_accountant
from coordinator.progress import Observer, Standing
from coordinator.rebuild import CHECKPOINT, resume_replica
from coordinator.reference import Reference
from coordinator.report import write_report
from coordinator.rounds import Rounds
from coordinator.scalar_log import ScalarLog
from coordinator.service import Service
from coordinator.summary import write_summary
from edge_agent.bundle import Bundle, read_bundle
from edge_agent.data import Samples, load_samples, to_inputs
from edge_agent.optimizer import METHODS
from edge_agent.replay import Replica
from edge_agent.topics import Topics
from edge_agent.wire import RoundRecord
from profiles.cost import graph_cost
from profiles.errors import ConfigError, DataError, ScalarfedError

__all__ = [
    "ledger_of",
    "make_bundle",
    "prepare",
    "privacy_of",
    "read_samples",
    "refuse_unmeasurable",
    "rounds_of",
    "run_testbed",
]


def run_testbed(experiment: Experiment, *, out: Path, resume: bool, observer: Observer) -> dict[str, Any]:
    """Run an experiment from the pruning to the report and return the summary.

    Args:
        experiment: What to run.
        out: The run folder: made here, or gone on with.
        resume: Go on with the run in ``out``.
        observer: Told of every stage and round.

    Raises:
        ScalarfedError: As the parts raise it; a fault of the experiment leaves no folder behind.
        KeyboardInterrupt: After everything was stopped in order; the run can be resumed.
    """
    if resume:
        _check_same(experiment, out)
        if (out / "summary.json").is_file():
            observer.line(f"the run in {out} is finished; writing its report again")
            write_report(out)
            return dict(json.loads((out / "summary.json").read_text(encoding="utf-8")))
        observer.stage(f"going on with {out}")
    else:
        _refuse_existing(out)
        needs_guard(experiment.broker)
        prepare(experiment, out, observer=observer)
    test = load_samples(experiment.data.path, "test")
    bundle = read_bundle(out / "bundle")
    with ScalarLog.open(out / "log.sqlite") as log, contextlib.ExitStack() as stack:
        try:
            guard = guard_of(experiment.broker, out)
            if guard is not None:
                guard.sign_bundles(out)
                broker = guard.start(out, host=experiment.broker.listen, port=experiment.broker.port)
            else:
                choice = experiment.broker
                broker = open_broker(out, url=choice.url, host=choice.listen, port=choice.port)
        except ScalarfedError:
            if not resume:  # nothing was trained yet
                stack.callback(shutil.rmtree, out)
                stack.callback(log.close)
            raise
        stack.callback(broker.stop)
        observer.line(f"broker: {broker.kind} at {broker.agents_url}")
        log.set_meta("broker", broker.kind)
        try:
            while True:
                try:
                    service = _train(
                        experiment, out, bundle, test, log=log, broker=broker, guard=guard, observer=observer
                    )
                    break
                except RolledBack as back:
                    observer.line(back.text)
        except BaseException as error:
            log.add_event("interrupted", "", f"{type(error).__name__}: {error}")
            raise
        observer.stage("writing the report")
        family = read_family(bundle.folder)
        widths = judge_widths(family, service.replica, service.levels, test) if bundle.stops else []
        summary = write_summary(out, experiment, family, log, service, widths=widths)
    write_report(out)
    return summary


def prepare(experiment: Experiment, out: Path, *, observer: Observer) -> None:
    """Make a run folder: data for every agent, bundle, empty log; check that every board can hold it.

    Raises:
        ScalarfedError: The data, the density or a board's budget do not allow it; ``out`` is not made.
    """
    staging = out.with_name(f".{out.name}.part")
    if staging.exists():
        shutil.rmtree(staging)
    try:
        staging.mkdir(parents=True)
        _prepare(experiment, staging, observer)
        staging.replace(out)
    finally:
        if staging.exists():
            shutil.rmtree(staging)


def read_samples(experiment: Experiment) -> tuple[Samples, Samples]:
    """Return the train and the test samples of an experiment.

    Raises:
        DataError: They cannot be read, do not fit each other, or have one class only.
    """
    train = load_samples(experiment.data.path, "train")
    classes = int(train.y.max()) + 1
    test = load_samples(experiment.data.path, "test", classes=classes)
    if to_inputs(test.x[:1]).shape[1:] != to_inputs(train.x[:1]).shape[1:]:
        raise DataError(
            f"{experiment.data.path}: x_train has samples {train.x.shape[1:]}, x_test {test.x.shape[1:]}"
        )
    if classes < 2:
        raise DataError(f"{experiment.data.path}: all labels are 0; at least two classes are needed")
    return train, test


def _prepare(experiment: Experiment, folder: Path, observer: Observer) -> None:
    if experiment.privacy.noise:
        check_accountant()
    observer.stage(f"reading {experiment.data.path}")
    train, _ = read_samples(experiment)
    agents = experiment.agents
    parts = partition(
        train.y,
        len(agents),
        split=experiment.data.split,
        alpha=experiment.data.alpha,
        min_samples=experiment.data.min_samples,
        seed=experiment.seed,
    )
    bundle = make_bundle(experiment, folder / "bundle", train, observer)
    slices = {agent.name: train.pick(part) for agent, part in zip(agents, parts, strict=True)}
    family = deal_levels(experiment, read_family(bundle.folder), slices)
    (folder / "agents").mkdir()
    for name, samples in slices.items():
        home = folder / "agents" / name
        home.mkdir()
        np.savez(home / "data.npz", x_train=samples.x, y_train=samples.y)
    (folder / "experiment.toml").write_text(dump(experiment), encoding="utf-8")
    with ScalarLog.create(
        folder / "log.sqlite",
        {
            "bundle": bundle.identity,
            "name": experiment.name,
            "rounds": str(experiment.rounds),
            "levels": json.dumps(family.levels),
        },
    ) as log:
        log.set_agents(
            [
                (agent.id, agent.name, agent.profile, agent.memory_mib, needed.total_mib)
                for agent, needed in zip(agents, family.predictions, strict=True)
            ]
        )


def make_bundle(experiment: Experiment, folder: Path, train: Samples, observer: Observer) -> Bundle:
    """Prune the experiment's model for its data and write it as a bundle.

    Where the experiment names widths, their bundles are written beside it, and the widest is returned.

    Raises:
        ConfigError: The method needs what the graph cannot tell.
        ModelError: The density cannot be reached, or the net cannot be exported.
    """
    from pruning.models import choose_model, standardisation
    from pruning.nested import write_family
    from pruning.prune import prune_model, write_pruned

    settings = experiment.pruning
    inputs, classes = to_inputs(train.x), int(train.y.max()) + 1
    model = choose_model(experiment.model.name, sample_shape=inputs.shape[1:])
    observer.stage(f"pruning {model} to density {settings.density:g} by {settings.method}")
    shared: dict[str, Any] = {
        "hidden": experiment.model.hidden if model == "mlp" else None,
        "standardise": standardisation(inputs),
    }
    pruned = prune_model(
        model,
        sample_shape=inputs.shape[1:],
        classes=classes,
        method=settings.method,
        density=settings.density,
        draws=settings.draws,
        schedule_steps=settings.schedule_steps,
        seed=experiment.seed,
        progress=observer.pruning,
        **shared,
    )
    observer.line(
        f"{pruned.model}: {pruned.params_dense:,} -> {pruned.params:,} parameters, "
        f"{pruned.macs_dense:,} -> {pruned.macs:,} MACs a sample"
    )
    if settings.widths:
        folders = folders_of(folder, len(settings.widths))[::-1]
        family = write_family(pruned, folders, fractions=settings.widths, cost=_cost, **shared)
        sizes = ", ".join(f"{bundle.params:,}" for bundle in family)
        observer.line(f"{len(family)} nested widths of {sizes} parameters")
        return family[-1]
    bundle = write_pruned(pruned, folder, cost=_cost)
    refuse_unmeasurable(experiment, bundle)
    return bundle


def refuse_unmeasurable(experiment: Experiment, bundle: Bundle) -> None:
    """Do nothing if an agent can measure what the method asks; else refuse.

    Raises:
        ConfigError: The method needs what the graph cannot tell.
    """
    method = METHODS[experiment.method.name]
    if method.head and not method.autodiff and experiment.method.exact and not bundle.head:
        raise ConfigError(
            f"`{experiment.method.name}` needs the last layer's gradient, and the last layer of "
            f"{bundle.model} is not linear",
            hint="Set method.name to decomfl or hiso, or method.exact to 0.",
        )


def _cost(graph: bytes) -> Mapping[str, int]:
    return graph_cost(graph).as_dict()


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


def ledger_of(experiment: Experiment, bundle: Bundle, log: ScalarLog) -> Ledger:
    """Return the books of a prepared run, as the log holds them."""
    agents = experiment.agents
    predicted = [row.predicted_mib for row in log.fleet()]
    batch_size, levels = experiment.method.batch_size, json.loads(log.meta().get("levels", "[]"))
    prices = [price_of(one, predicted, batch_size=batch_size) for one in read_family(bundle.folder)]
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


def privacy_of(experiment: Experiment) -> dict[str, float] | None:
    """Return what the control message asks of agents for privacy's sake, None for nothing."""
    privacy = experiment.privacy
    return {"clip": privacy.clip, "noise": privacy.noise} if privacy.clip else None


def _reference(experiment: Experiment, bundle: Bundle, replica: Replica) -> Reference | None:
    """Return what the coordinator measures itself to see who lies; the mean asks nobody.

    The test samples serve for it: they decide who is trusted, and enter no scalar.
    """
    if experiment.fleet.aggregation == "mean" or not experiment.data.path.is_file():
        return None
    return Reference(bundle, replica, load_samples(experiment.data.path, "test", classes=bundle.classes))


def _train(
    experiment: Experiment,
    out: Path,
    bundle: Bundle,
    test: Samples,
    *,
    log: ScalarLog,
    broker: Broker,
    guard: Guard | None,
    observer: Observer,
) -> Service:
    epoch = log.next_epoch()
    replica = resume_replica(bundle, log, checkpoint=out / CHECKPOINT, run=experiment.name)
    judge = Evaluator(bundle, replica, test)
    levels = json.loads(log.meta().get("levels", "[]"))
    family = read_family(bundle.folder)
    log.add_event("coordinator started", "", f"epoch {epoch}, round {replica.round}")
    plans = Plans(experiment, bundle, log.texts_of(CHANGED))
    recent = list(log.records(max(0, replica.round - 4)))
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
    accuracy: float | None = None

    def evaluate_now() -> None:
        nonlocal accuracy
        loss, accuracy = judge()
        log.add_evaluation(replica.round, loss, accuracy)

    health = Health(experiment.method.learning_rate)
    answers = Answers(experiment, plans, log, health)

    def on_commit(record: RoundRecord, loss: float | None) -> None:
        done = record.plan.round + 1
        present = plans.experiment(done)
        for text in health.observe(record, loss, replica):
            log.add_event("health", "", f"round {record.plan.round}: {text}")
            observer.line(f"round {done}: {text}")
        if done % present.evaluation.every == 0 or done == present.rounds:
            evaluate_now()
        agents = len(experiment.agents)
        observer.round(
            Standing(done, present.rounds, loss, accuracy, service.online(), agents, *service.bytes_seen())
        )
        if text := answers.after(record.plan.round):
            observer.line(f"round {done}: {text}")

    topics = Topics("scalarfed", experiment.name)
    names = [agent.name for agent in experiment.agents]
    with (
        collecting(
            experiment.fleet.collectors,
            folder=out,
            broker=broker.url,
            topics=topics,
            agents=names,
            shards=experiment.fleet.shards,
            tls=() if guard is None else guard.files(),
            on_event=log.add_event,
        ) as watch_collectors,
        local_fleet(experiment, out, broker, log, guard, levels) as supervisor,
    ):

        def on_idle() -> None:
            control.poll()
            supervisor.watch()
            watch_collectors()
            if guard is not None:
                service.shut_out(guard.watch())
            # A broker that is not ours comes back by itself or by whoever runs it; the link waits for it.
            if broker.pid is not None and not broker.alive():
                log.add_event("broker ended", "", f"starting {broker.kind} again")
                broker.restart()

        carrier, link = connect(broker, topics, guard)
        service = Service(
            link=link,
            topics=topics,
            log=log,
            rounds=rounds,
            agents=names,
            bundle_identity=bundle.identity,
            masked=experiment.privacy.masks != "none",
            narrower=[one.identity for one in family[:-1]],
            privacy=privacy_of(experiment),
            shards=experiment.fleet.shards,
            collected=experiment.fleet.collectors > 0,
            checkpoint=out / CHECKPOINT,
            on_commit=on_commit,
            on_idle=on_idle,
        )
        control = Control(log, plans, service, on_change=lambda text: observer.line(f"changed: {text}"))
        observer.stage(f"training {len(experiment.agents)} agents by {experiment.method.name}")
        if replica.round == 0:
            evaluate_now()
        try:
            service.run(stop=lambda: control.stopped)
        finally:
            service.announce_state("finished" if rounds.finished else "stopped")
            carrier.flush(2.0)
            carrier.close()
        if not rounds.finished:
            raise KeyboardInterrupt("scalarfed ctl stop")
    return service


def _refuse_existing(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(
            f"{out} exists already", hint="Go on with it by --resume, or choose another folder with --out."
        )


def _check_same(experiment: Experiment, out: Path) -> None:
    """Refuse to go on with a run under another experiment."""
    saved_path = out / "experiment.toml"
    if not saved_path.is_file():
        raise ConfigError(f"there is no run in {out} to go on with", hint="Start it without --resume.")
    saved = load_experiment(saved_path)
    wanted = replace(experiment, broker=saved.broker)  # messages may travel another way
    if dump(saved) != dump(wanted):
        lines = zip(dump(saved).splitlines(), dump(wanted).splitlines(), strict=False)
        first = next((f"{old!r} there, {new!r} now" for old, new in lines if old != new), "it has other keys")
        raise ConfigError(
            f"the run in {out} was started with another experiment: {first}",
            hint="Resume with the same experiment and the same --set, or start anew with another --out.",
        )
