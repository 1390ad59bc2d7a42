"""Two of ten agents lie while a real net learns digits: robust rules keep its accuracy, and the liars are named."""

import io
from pathlib import Path

import numpy as np
import pytest

from coordinator.config import load_experiment
from coordinator.progress import LineProgress
from coordinator.rounds import Note, Rounds
from coordinator.testbed import evaluate, plan_of, prepare
from edge_agent.bundle import read_bundle
from edge_agent.data import batch_indices, load_samples, to_inputs
from edge_agent.estimator import estimate
from edge_agent.forward import Forward
from edge_agent.wire import Reply

ROOT = Path(__file__).resolve().parent.parent
ROUNDS = 250
LIARS = (2, 7)
LIES = {
    "sign flip": lambda scalars, chance: -scalars,
    "1000 times": lambda scalars, chance: 1000 * scalars,
    "random": lambda scalars, chance: chance.normal(0, scalars.std() + 1e-9, scalars.shape),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An experiment of ten agents, prepared, and its folder."""
    folder = tmp_path_factory.mktemp("liars") / "run"
    settings = [f"rounds={ROUNDS}", "devices=[{profile='pi-4-2gb', count=10}]", "data.alpha=1.0"]
    experiment = load_experiment(ROOT / "examples" / "digits.toml", settings)
    prepare(experiment, folder, observer=LineProgress(io.StringIO()))
    return experiment, folder


def train(run, *, rule: str, lie=None) -> tuple[float, dict[int, str]]:
    """Return the test accuracy after all rounds, and who was suspected. All agents share one replica."""
    experiment, folder = run
    bundle = read_bundle(folder / "bundle")
    replica = bundle.replica()
    forward = Forward(bundle, replica.weights)
    parts = [
        load_samples(folder / "agents" / a.name / "data.npz", "train", classes=10) for a in experiment.agents
    ]
    rounds = Rounds(
        fleet=10,
        rounds=ROUNDS,
        plan_of=lambda round_: plan_of(experiment, round_),
        epoch=1,
        replica=replica,
        batch_size=experiment.method.batch_size,
        central=True,
        cohort=None,
        quorum=8,
        deadline_s=60.0,
        resend_s=2.0,
        seed=7,
        rule=rule,
    )
    chance = np.random.default_rng(8)
    suspects = {}
    rounds.start(0.0)
    while not rounds.finished:
        plan = plan_of(experiment, replica.round)
        digest = replica.digest()
        replies = []
        for number, part in enumerate(parts):

            def loss_of_step(step, number=number, part=part):
                chosen = batch_indices(plan.seed, number, plan.round, experiment.method.batch_size, len(part))
                batch = part.pick(chosen)
                x = to_inputs(batch.x)
                return lambda: forward.loss(x, batch.y)

            made = estimate(replica, plan, loss_of_step, central=True)
            scalars = made.scalars.reshape(-1)
            if lie is not None and number in LIARS:
                scalars = lie(scalars, chance).astype(np.float32)
            replies.append(
                Reply(1, plan.round, 0, experiment.method.batch_size, made.loss, 1, digest, scalars)
            )
        for number, reply in enumerate(replies):
            actions = rounds.on_reply(number, reply, float(plan.round))
            suspects.update({a.agent: a.text for a in actions if isinstance(a, Note) and a.kind == "suspect"})
    _, accuracy = evaluate(forward, load_samples(experiment.data.path, "test"))
    return accuracy, suspects


@pytest.fixture(scope="module")
def honest(run) -> float:
    """Accuracy when all ten are honest and trusted."""
    accuracy, suspects = train(run, rule="mean")
    assert suspects == {}
    assert accuracy > 0.85
    return accuracy


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["trimmed", "median"])
@pytest.mark.parametrize("lie", LIES)
def test_two_liars_of_ten_cost_at_most_two_points(run, honest, rule, lie):
    """The accuracy stays within 0.02 of the honest run's, and both liars are named, nobody else."""
    accuracy, suspects = train(run, rule=rule, lie=LIES[lie])
    assert accuracy >= honest - 0.02
    assert set(suspects) == set(LIARS)


@pytest.mark.slow
def test_two_liars_of_ten_ruin_a_mean_that_trusts_them(run, honest):
    """Without a robust rule the same lie costs far more: the test above tests something."""
    accuracy, _ = train(run, rule="mean", lie=LIES["1000 times"])
    assert accuracy < honest - 0.1
