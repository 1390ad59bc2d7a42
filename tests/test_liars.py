"""Two of ten agents lie while a real net learns digits: robust rules keep its accuracy, liars are named."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from coordinator.actions import Commit, Note
from coordinator.config import load_experiment
from coordinator.evaluation import Evaluator
from coordinator.open_run import rounds_of
from coordinator.progress import LineProgress
from coordinator.rounds import Rounds
from coordinator.simulate import Spending, deal, play
from coordinator.testbed import make_bundle, read_samples
from edge_agent.wire import decode, encode
from profiles.errors import WireError

pytestmark = pytest.mark.timeout(1200)  # three hundred rounds of ten agents, ten times for each of four runs

ROOT = Path(__file__).resolve().parent.parent
AGENTS, LIARS = 10, (2, 7)
LIES = {
    "sign flip": lambda scalars, chance: -scalars,
    "1000 times": lambda scalars, chance: 1000 * scalars,
    "random": lambda scalars, chance: chance.normal(0, scalars.std() + 1e-9, scalars.shape),
    "not a number": lambda scalars, chance: np.full_like(scalars, np.nan),
}

DEEPSTEP = """
seed = 7
[model]
name = "mlp"
hidden = [64, 32]
[data]
path = "digits.npz"
alpha = 0.5
[pruning]
method = "ntk"
density = 0.5
[method]
name = "deepstep"
learning_rate = 0.02
exact = 66
batch_size = 32
[[devices]]
profile = "pi-4-2gb"
"""


class LyingFleet:
    """The rounds of a run whose agents 2 and 7 lie on their way to it."""

    def __init__(self, rounds: Rounds, lie) -> None:
        self.rounds, self.replica, self.start = rounds, rounds.replica, rounds.start
        self.suspects: dict[int, str] = {}
        self._lie = lie
        self._now = 0.0
        self._silent = False
        self._chance = np.random.default_rng(8)

    def on_reply(self, agent, reply, now):
        if self._lie is not None and agent in LIARS:
            lie = np.clip(self._lie(reply.scalars, self._chance), -1e9, 1e9)
            reply = replace(reply, scalars=lie.astype(np.float32))
        try:
            actions = self.rounds.on_reply(agent, decode(encode(reply)), self._now)
        except WireError:  # as the service does
            self.rounds.on_nonsense(agent)
            self._silent = True
            actions = []
        if self._silent and agent == AGENTS - 1:
            actions = self._wait()
        self.suspects.update(
            {a.agent: a.text for a in actions if isinstance(a, Note) and a.kind in ("suspect", "excluded")}
        )
        return actions

    def _wait(self):
        """Let the time pass until the round is closed without those that said nothing."""
        self._silent, actions = False, []
        while not any(isinstance(action, Commit) for action in actions):
            self._now += 1.0
            told = self.rounds.on_tick(self._now)
            actions = told if any(isinstance(action, Commit) for action in told) else []
        return actions


@pytest.fixture(
    scope="module",
    params=[("hiso", "iid"), ("hiso", "dirichlet"), ("deepstep", "iid"), ("deepstep", "dirichlet")],
    ids="-".join,
)
def run(request, tmp_path_factory):
    """An experiment of ten agents with its samples and its bundle, labels even or uneven (alpha = 0.5)."""
    method, split = request.param
    settings = [
        f"data.split={split}",
        "devices=[{profile='pi-4-2gb', count=10}]",
        "pruning.schedule_steps=4",
        "fleet.liars=0.2",
        "fleet.quorum=8",
        "fleet.deadline_s=5",
    ]
    folder = tmp_path_factory.mktemp("liars")
    if method == "hiso":
        experiment = load_experiment(ROOT / "examples" / "digits.toml", ["rounds=300", *settings])
    else:
        path = folder / "deepstep.toml"
        path.write_text(DEEPSTEP, encoding="utf-8")
        data = f"data.path={ROOT / 'examples' / 'digits.npz'}"
        experiment = load_experiment(path, [data, "rounds=200", *settings])
    train, test = read_samples(experiment)
    bundle = make_bundle(experiment, folder / "bundle", train, LineProgress(io.StringIO()))
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
@pytest.mark.parametrize("rule", ["trimmed", "median"])
def test_two_liars_of_ten_cost_at_most_two_points(run, honest, rule, lie):
    """With a robust rule the accuracy stays within 0.02 of the honest run's, and the liars are named.

    Accuracy is that of 360 test samples, so that 0.02 are seven of them.
    """
    accuracy, suspects = train_with(run, rule=rule, lie=LIES[lie])
    assert accuracy >= honest - 0.02
    assert set(suspects) == set(LIARS)


@pytest.mark.slow
def test_two_liars_of_ten_ruin_a_mean_that_trusts_them(run, honest):
    """Without a robust rule a lie costs far more: the test above tests something."""
    accuracy, _ = train_with(run, rule="mean", lie=lambda scalars, chance: -1000 * scalars)
    assert accuracy < honest - 0.1
