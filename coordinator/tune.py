"""Finds the settings of methods by simulation: the same number of trials for each, on the same seeds.

A trial is judged by a fifth of the training samples, which no agent has then; the test samples are not seen.
Every finished run is written to the folder at once, so that the same command goes on where it was stopped.
Knows how settings are proposed and compared. Does not know what a method does.
"""

import itertools
import json
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from coordinator.actions import Commit
from coordinator.config import dump, with_settings
from coordinator.evaluation import Evaluator
from coordinator.experiment import Experiment
from coordinator.open_run import rounds_of
from coordinator.progress import Observer
from coordinator.simulate import Spending, deal, play
from coordinator.testbed import make_bundle, read_samples, refuse_unmeasurable
from edge_agent.bundle import Bundle, read_bundle
from edge_agent.data import Samples
from profiles.errors import BundleError, ConfigError

__all__ = ["Search", "Trial", "next_rate", "tune"]

_LOOKS = 40
_FIRST_STRIDE = 4.0


@dataclass(frozen=True)
class Search:
    """What is tried.

    Attributes:
        methods: Their names.
        grid: By dotted key the values to try, all combinations of them; the same for every method.
        trials: Trials of each method where there is no grid: learning rates, until the best is bracketed.
        seeds: Runs of each trial, from the experiment's seed on; the same for every trial.
        target: An accuracy; the fewest rounds to it win. None lets the accuracy at the end decide.
    """

    methods: tuple[str, ...]
    grid: Mapping[str, Sequence[str]]
    trials: int = 6
    seeds: int = 2
    target: float | None = None


@dataclass(frozen=True)
class Trial:
    """What came of one setting of a method.

    Attributes:
        method: Its name.
        settings: Overrides of the experiment, ``key=value`` each.
        accuracy: Mean over the seeds of the accuracy at the end; of the best, if there is a target.
        rounds: Mean over the seeds of the rounds to the target; None if a seed did not get there.
    """

    method: str
    settings: tuple[str, ...]
    accuracy: float
    rounds: float | None

    @property
    def rank(self) -> tuple[float, float]:
        """Sorts the better trial first."""
        return (math.inf if self.rounds is None else self.rounds, -self.accuracy)


def next_rate(tried: Mapping[float, tuple[float, float]], start: float) -> float:
    """Return the learning rate to try next: outwards while the best lies at an end, then between.

    Args:
        tried: Ranks by rate, the smaller the better.
        start: The first rate.
    """
    rates = sorted(tried)
    if not rates:
        return start
    best = rates.index(min(rates, key=lambda rate: tried[rate]))
    if best == len(rates) - 1:
        return rates[-1] * _FIRST_STRIDE
    if best == 0:
        return rates[0] / _FIRST_STRIDE
    below, above = rates[best] / rates[best - 1], rates[best + 1] / rates[best]
    neighbour = rates[best + 1] if above >= below else rates[best - 1]
    return math.sqrt(rates[best] * neighbour)


def tune(experiment: Experiment, search: Search, *, out: Path, observer: Observer) -> dict[str, Any]:
    """Try settings, write the best experiments, and return what came out.

    The folder gets ``runs.json`` (every run), ``tune.json`` (what is returned), ``best-METHOD.toml`` for each
    method and ``best.toml``. A folder with runs of the same search is gone on with.

    Raises:
        ScalarfedError: A method or key cannot be, or the folder belongs to another experiment.
    """
    for method in search.methods:
        _settled(experiment, method, [f"{key}={values[0]}" for key, values in search.grid.items()])
    train, _ = read_samples(experiment)
    bench = _Bench(experiment, search, _Journal(out, experiment), *_held_out(train), observer)
    found = {method: bench.trials(method) for method in search.methods}
    ranked = sorted(found, key=lambda method: found[method][0].rank)
    for method in search.methods:
        best = _settled(experiment, method, found[method][0].settings)
        (out / f"best-{method}.toml").write_text(dump(best), encoding="utf-8")
    (out / "best.toml").write_bytes((out / f"best-{ranked[0]}.toml").read_bytes())
    summary = {
        "experiment": experiment.name,
        "rounds": experiment.rounds,
        "seeds": [experiment.seed + n for n in range(search.seeds)],
        "target": search.target,
        "best": ranked[0],
        "methods": {
            method: [
                {"settings": list(t.settings), "accuracy": round(t.accuracy, 4), "rounds": t.rounds}
                for t in trials
            ]
            for method, trials in found.items()
        },
    }
    (out / "tune.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return summary


def _settled(experiment: Experiment, method: str, settings: Sequence[str]) -> Experiment:
    return with_settings(experiment, [f"method.name={method}", *settings])


def _held_out(train: Samples) -> tuple[Samples, Samples]:
    """Return four fifths to train with and one to judge by, the same in every search."""
    order = np.random.default_rng(0).permutation(len(train))
    return train.pick(order[len(train) // 5 :]), train.pick(order[: len(train) // 5])


class _Journal:
    """The runs so far, in a file that is whole after each of them.

    Raises:
        ConfigError: The folder holds the runs of another experiment.
    """

    def __init__(self, folder: Path, experiment: Experiment) -> None:
        self.folder = folder
        self._path = folder / "runs.json"
        self._runs: dict[str, list[float]] = {}
        self._experiment = dump(experiment)
        if self._path.is_file():
            try:
                saved = json.loads(self._path.read_text(encoding="utf-8"))
                same, runs = saved["experiment"] == self._experiment, dict(saved["runs"])
            except (ValueError, KeyError, TypeError):
                same, runs = False, {}
            if not same:
                raise ConfigError(
                    f"{folder} holds the runs of another experiment",
                    hint="Choose another folder with --out, or tune the experiment that was tuned there.",
                )
            self._runs = runs
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, key: str) -> list[float] | None:
        """Return the accuracies of a run that is finished."""
        return self._runs.get(key)

    def put(self, key: str, accuracies: list[float]) -> None:
        """Keep a run."""
        self._runs[key] = accuracies
        part = self._path.with_suffix(".part")
        part.write_text(json.dumps({"experiment": self._experiment, "runs": self._runs}), encoding="utf-8")
        os.replace(part, self._path)


class _Bench:
    """Runs trials."""

    def __init__(
        self,
        experiment: Experiment,
        search: Search,
        journal: _Journal,
        train: Samples,
        judged: Samples,
        observer: Observer,
    ) -> None:
        self._experiment = experiment
        self._search = search
        self._journal = journal
        self._train = train
        self._judged = judged
        self._observer = observer
        self._every = max(1, experiment.rounds // _LOOKS)

    def trials(self, method: str) -> list[Trial]:
        """Return all trials of a method, the best first."""
        self._observer.stage(f"tuning {method}")
        keys, axes = list(self._search.grid), list(self._search.grid.values())
        if keys:
            done = [
                self._trial(method, [f"{key}={value}" for key, value in zip(keys, values, strict=True)])
                for values in itertools.product(*axes)
            ]
            return sorted(done, key=lambda trial: trial.rank)
        done = []
        tried: dict[float, tuple[float, float]] = {}
        while len(done) < self._search.trials:
            rate = float(f"{next_rate(tried, self._experiment.method.learning_rate):.6g}")
            done.append(self._trial(method, [f"method.learning_rate={rate:.6g}"]))
            tried[rate] = done[-1].rank
        return sorted(done, key=lambda trial: trial.rank)

    def _trial(self, method: str, settings: Sequence[str]) -> Trial:
        target = self._search.target
        ends, reached = [], []
        for offset in range(self._search.seeds):
            seed = self._experiment.seed + offset
            looks = self._run(method, settings, seed)
            ends.append(max(looks) if target is not None else looks[-1])
            at = next(
                (n for n, accuracy in enumerate(looks) if target is not None and accuracy >= target), None
            )
            reached.append(None if at is None else min((at + 1) * self._every, self._experiment.rounds))
        known = [rounds for rounds in reached if rounds is not None]
        rounds = statistics.mean(known) if len(known) == len(reached) else None
        trial = Trial(method, tuple(settings), statistics.mean(ends), rounds)
        when = (
            ""
            if target is None
            else f", {target:.0%} {'never' if rounds is None else f'after {rounds:g} rounds'}"
        )
        self._observer.line(f"{method} {' '.join(settings)}: {trial.accuracy:.1%}{when}")
        return trial

    def _run(self, method: str, settings: Sequence[str], seed: int) -> list[float]:
        """Return the accuracies at the looks of one run, from the journal if it is there."""
        key = json.dumps([method, list(settings), seed, self._search.target])
        if (saved := self._journal.get(key)) is not None:
            return saved
        chosen = _settled(self._experiment, method, [*settings, f"seed={seed}"])
        bundle = self._bundle(chosen)
        refuse_unmeasurable(chosen, bundle)
        replica = bundle.replica()
        judge = Evaluator(bundle, replica, self._judged)
        looks: list[float] = []

        def on_commit(action: Commit) -> None:
            done = action.record.plan.round + 1
            if done % self._every == 0 or done == chosen.rounds:
                looks.append(judge()[1])

        def stop() -> bool:
            return bool(looks) and self._search.target is not None and looks[-1] >= self._search.target

        play(
            rounds_of(chosen, bundle, replica, epoch=1),
            bundle,
            self._train,
            deal(chosen, self._train),
            on_commit=on_commit,
            spent=Spending(),
            stop=stop,
        )
        self._journal.put(key, looks)
        return looks

    def _bundle(self, chosen: Experiment) -> Bundle:
        """Return the bundle of a seed: every method starts from the same weights."""
        folder = self._journal.folder / "bundles" / str(chosen.seed)
        try:
            return read_bundle(folder)
        except BundleError:
            return make_bundle(chosen, folder, self._train, self._observer)
