"""Two of ten agents lie while a real net learns digits: robust rules keep its accuracy, liars are named."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from coordinator.actions import Note
from coordinator.config import load_experiment
from coordinator.evaluation import Evaluator
from coordinator.progress import LineProgress
from coordinator.rounds import Rounds
from coordinator.simulate import Spending, deal, play
from coordinator.testbed import make_bundle, read_samples, rounds_of

pytestmark = pytest.mark.timeout(1200)  # three hundred rounds of ten agents, five times

ROOT = Path(__file__).resolve().parent.parent
LIARS = (2, 7)
LIES = {
    "sign flip": lambda scalars, chance: -scalars,
    "1000 times": lambda scalars, chance: 1000 * scalars,
    "random": lambda scalars, chance: chance.normal(0, scalars.std() + 1e-9, scalars.shape),
}


class LyingFleet:
    """The rounds of a run whose agents 2 and 7 lie on their way to it."""

    def __init__(self, rounds: Rounds, lie) -> None:
        self.rounds, self.replica, self.start = rounds, rounds.replica, rounds.start
        self.suspects: dict[int, str] = {}
        self._lie = lie
        self._chance = np.random.default_rng(8)

    def on_reply(self, agent, reply, now):
        if self._lie is not None and agent in LIARS:
            lie = np.clip(self._lie(reply.scalars, self._chance), -1e9, 1e9)
            reply = replace(reply, scalars=lie.astype(np.float32))
        actions = self.rounds.on_reply(agent, reply, now)
        self.suspects.update(
            {a.agent: a.text for a in actions if isinstance(a, Note) and a.kind == "suspect"}
        )
        return actions


@pytest.fixture(scope="module", params=["iid", "dirichlet"])
def run(request, tmp_path_factory):
    """An experiment of ten agents with its samples and its bundle, labels even or uneven (alpha = 0.5)."""
    settings = [
        "rounds=300",
        f"data.split={request.param}",
        "devices=[{profile='pi-4-2gb', count=10}]",
        "pruning.schedule_steps=4",
        "fleet.liars=0.2",
    ]
    experiment = load_experiment(ROOT / "examples" / "digits.toml", settings)
    train, test = read_samples(experiment)
    folder = tmp_path_factory.mktemp("liars") / "bundle"
    bundle = make_bundle(experiment, folder, train, LineProgress(io.StringIO()))
    return experiment, bundle, train, test


def train_with(run, *, rule: str, lie=None) -> tuple[float, dict[int, str]]:
    """Return the test accuracy after all rounds, and who was suspected of what."""
    experiment, bundle, train, test = run
    chosen = replace(experiment, fleet=replace(experiment.fleet, aggregation=rule))
    replica = bundle.replica()
    fleet = LyingFleet(rounds_of(chosen, bundle, replica, epoch=1), lie)
    play(fleet, bundle, train, deal(chosen, train), on_commit=lambda commit: None, spent=Spending())
    _, accuracy = Evaluator(bundle, replica, test)()
    return accuracy, fleet.suspects


@pytest.fixture(scope="module")
def honest(run) -> float:
    """Accuracy when all ten are honest and trusted; nobody is suspected."""
    accuracy, suspects = train_with(run, rule="mean")
    assert suspects == {}
    assert accuracy > 0.75
    return accuracy


@pytest.mark.slow
@pytest.mark.parametrize("lie", LIES)
def test_two_liars_of_ten_cost_at_most_two_points(run, honest, lie):
    """With the trimmed mean the accuracy stays within 0.02 of the honest run's, and the liars are named.

    Accuracy is that of 360 test samples, so that 0.02 are seven of them.
    """
    accuracy, suspects = train_with(run, rule="trimmed", lie=LIES[lie])
    assert accuracy >= honest - 0.02
    assert set(suspects) == set(LIARS)


@pytest.mark.slow
def test_two_liars_of_ten_ruin_a_mean_that_trusts_them(run, honest):
    """Without a robust rule the same lie costs far more: the test above tests something."""
    accuracy, _ = train_with(run, rule="mean", lie=LIES["1000 times"])
    assert accuracy < honest - 0.1
