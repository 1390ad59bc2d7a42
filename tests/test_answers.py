"""Answers to a run that is not well: facts of the log, and a run that goes on."""

import json
import sqlite3
from pathlib import Path

import pytest

from coordinator.config import load_experiment
from coordinator.plans import CHANGED
from coordinator.progress import Silence
from coordinator.rebuild import rebuild_run
from coordinator.scalar_log import ScalarLog
from coordinator.simulate import simulate
from profiles.errors import ConfigError

DIGITS = Path(__file__).parent.parent / "examples" / "digits.toml"
# A rate at which DeComFL learns for some rounds and then runs away.
WILD = [
    *("rounds=90", "pruning.method=none", "model.hidden=[16]", "method.name=decomfl", "seed=3"),
    *("method.learning_rate=0.6", "method.perturbations=4", "data.split=iid", "evaluation.every=30"),
]


def run(folder: Path, answer: str, *more: str) -> dict:
    asked = load_experiment(DIGITS, [*WILD, f"health.answer={answer}", *more])
    return simulate(asked, out=folder, observer=Silence())


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same wild run with each answer."""
    home = tmp_path_factory.mktemp("wild")
    return home, {answer: run(home / answer, answer) for answer in ("none", "halve", "rollback")}


def test_without_an_answer_the_rate_stays(runs):
    """What is not asked for is not done."""
    home, _ = runs
    with ScalarLog.open(home / "none" / "log.sqlite") as log:
        assert {round(record.plan.learning_rate, 6) for record in log.records()} == {0.6}
        assert log.texts_of("health")
        assert not log.texts_of("answered")


@pytest.mark.parametrize("answer", ["halve", "rollback"])
def test_the_records_carry_the_lower_rate(runs, answer):
    """From the round that the logged change names, each record has the halved rate, and none before."""
    home, told = runs
    with ScalarLog.open(home / answer / "log.sqlite") as log:
        changes = [json.loads(text) for text in log.texts_of(CHANGED)]
        rates = [record.plan.learning_rate for record in log.records()]
    assert changes
    for number, rate in enumerate(rates):
        halvings = sum(change["round"] <= number for change in changes)
        assert rate == pytest.approx(0.6 / 2**halvings, rel=1e-6)
    assert told[answer]["rounds"] == 90
    assert told[answer]["test_loss"] < told["none"]["test_loss"]


@pytest.mark.parametrize("answer", ["halve", "rollback"])
def test_an_answered_run_is_replayed_from_its_log(runs, answer):
    """Bundle and log alone lead to the digest with which the run ended."""
    home, told = runs
    _, replica = rebuild_run(home / answer)
    assert f"{replica.digest():016x}" == told[answer]["final_digest"]


def test_what_was_gone_back_from_is_kept_aside(runs):
    """The abandoned records are those of the unanswered run, and the log's chain is whole."""
    home, _ = runs
    with ScalarLog.open(home / "rollback" / "log.sqlite") as log:
        assert log.abandoned() > 0
        assert log.verify() == 90
        back = log.texts_of("answered")
    db = sqlite3.connect(home / "rollback" / "log.sqlite")
    kept = dict(db.execute("SELECT round, record FROM abandoned ORDER BY rowid DESC"))
    db.close()
    first = int(back[0].removeprefix("back to round ").partition(";")[0])
    with ScalarLog.open(home / "none" / "log.sqlite") as log:
        (old,) = log.records(first, first + 1)
    assert back[0].startswith("back to round")
    assert first in kept
    assert old.plan.learning_rate == pytest.approx(0.6)


def test_answers_are_given_as_often_as_allowed(tmp_path):
    """With `most = 1` the rate is halved once, whatever comes after."""
    run(tmp_path / "run", "halve", "health.most=1")
    with ScalarLog.open(tmp_path / "run" / "log.sqlite") as log:
        assert len(log.texts_of("answered")) == len(log.texts_of(CHANGED)) == 1


def test_an_unknown_answer_is_refused():
    """With the nearest one named."""
    with pytest.raises(ConfigError, match="rollback"):
        load_experiment(DIGITS, ["health.answer=roll-back"])
