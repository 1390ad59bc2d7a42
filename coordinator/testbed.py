"""The main job: prune, bundle, start a broker and a fleet of agent processes, train, look back.

Everything is checked and prepared in a folder beside the run folder before anything is started; the
run folder appears only when it is whole. What happened lies in the scalar log, so that an interrupted
run goes on where it stopped.
"""

import contextlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from coordinator.answers import Answers, RolledBack
from coordinator.broker import Broker, open_broker
from coordinator.config import dump, load_experiment
from coordinator.control import Control
from coordinator.evaluation import Evaluator, judge_widths
from coordinator.experiment import Experiment
from coordinator.family import deal_levels, folders_of, read_family
from coordinator.guard import Guard, connect, guard_of, needs_guard
from coordinator.health import Health
from coordinator.local_fleet import local_fleet
from coordinator.open_run import open_run
from coordinator.partition import partition
from coordinator.privacy import check_accountant
from coordinator.progress import Observer, Standing
from coordinator.report import write_report
from coordinator.scalar_log import ScalarLog
from coordinator.service import Service
from coordinator.summary import write_summary
from edge_agent.bundle import Bundle, read_bundle
from edge_agent.data import Samples, load_samples, to_inputs
from edge_agent.optimizer import METHODS
from edge_agent.wire import RoundRecord
from profiles.cost import graph_cost
from profiles.errors import ConfigError, DataError, ScalarfedError

__all__ = [
    "make_bundle",
    "prepare",
    "read_samples",
    "refuse_unmeasurable",
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
    from pruning.models import choose_model, moments, standardisation
    from pruning.nested import write_family
    from pruning.prune import prune_model, write_pruned
    from pruning.prune_module import load_module, prune_module

    settings = experiment.pruning
    inputs, classes = to_inputs(train.x), int(train.y.max()) + 1
    own = ".py:" in experiment.model.name
    if own and settings.widths:
        raise ConfigError(
            f"pruning.widths and the model {experiment.model.name} do not go together",
            hint="Leave widths out, or take a reference net.",
        )
    model = experiment.model.name
    model = model if own else choose_model(model, sample_shape=inputs.shape[1:])
    observer.stage(f"pruning {model} to density {settings.density:g} by {settings.method}")
    asked: dict[str, Any] = {
        "sample_shape": inputs.shape[1:],
        "classes": classes,
        "method": settings.method,
        "density": settings.density,
        "draws": settings.draws,
        "schedule_steps": settings.schedule_steps,
        "seed": experiment.seed,
        "progress": observer.pruning,
    }
    shared: dict[str, Any] = {
        "hidden": experiment.model.hidden if model == "mlp" else None,
        "standardise": standardisation(inputs),
    }
    if own:
        module = load_module(model, seed=experiment.seed)
        pruned = prune_module(module, name=model.rpartition(":")[2], moments=moments(inputs), **asked)
    else:
        pruned = prune_model(model, **asked, **shared)
    observer.line(
        f"{pruned.model}: {pruned.params_dense:,} -> {pruned.params:,} parameters, "
        f"{pruned.macs_dense:,} -> {pruned.macs:,} MACs a sample"
    )
    for layer, reason in pruned.left_whole.items():
        observer.line(f"{layer} keeps its width: {reason}")
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
    run = open_run(out, experiment, bundle, log)
    replica, plans = run.replica, run.plans
    judge = Evaluator(bundle, replica, test)
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

    with (
        run.collectors(broker.url, () if guard is None else guard.files()) as watch_collectors,
        local_fleet(experiment, out, broker, log, guard, run.levels) as supervisor,
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

        carrier, link = connect(broker, run.topics, guard)
        service = run.service(link, on_commit=on_commit, on_idle=on_idle)
        control = Control(log, plans, service, on_change=lambda text: observer.line(f"changed: {text}"))
        observer.stage(f"training {len(experiment.agents)} agents by {experiment.method.name}")
        if replica.round == 0:
            evaluate_now()
        try:
            service.run(stop=lambda: control.stopped)
        finally:
            service.announce_state("finished" if run.rounds.finished else "stopped")
            carrier.flush(2.0)
            carrier.close()
        if not run.rounds.finished:
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
