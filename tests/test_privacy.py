"""Private replies: clipped, noisy, without a loss; and what epsilon that buys."""

import math
from pathlib import Path

import numpy as np
import pytest
from scipy import optimize, stats

from coordinator.config import load_experiment
from coordinator.privacy import epsilon
from edge_agent.agent import Agent, Report
from edge_agent.privacy import Privacy, normal, privatise, read_privacy
from profiles.errors import ConfigError
from tests.fleet import BUNDLE, FleetInMemory, fresh_replica

ROOT = Path(__file__).resolve().parent.parent


def bytes_of(seed: int):
    """Random bytes that a test can repeat."""
    chance = np.random.default_rng(seed)
    return lambda count: chance.bytes(count)


def test_a_long_vector_is_shortened_and_a_short_one_is_not():
    """Without noise the result has at most the clip's length, and its direction is kept."""
    long, short = np.full(16, 5.0, np.float32), np.full(16, 0.1, np.float32)
    clipped = privatise(long, Privacy(2.0, 0.0), bytes_of(1))
    assert np.linalg.norm(clipped) == pytest.approx(2.0, rel=1e-6)
    assert np.ptp(clipped) == 0
    assert np.array_equal(privatise(short, Privacy(2.0, 0.0), bytes_of(1)), short)


def test_the_noise_is_gaussian_of_the_promised_size():
    """Of 200,000 values: no difference from a normal distribution of noise times clip (p > 0.001)."""
    noisy = privatise(np.zeros(200_000, np.float32), Privacy(3.0, 0.5), bytes_of(2)).astype(float)
    assert stats.kstest(noisy / 1.5, "norm").pvalue > 1e-3
    assert abs(np.corrcoef(noisy[:-1], noisy[1:])[0, 1]) < 0.01


def test_extreme_bytes_give_finite_noise():
    """All zeros and all ones are words like any other."""
    for byte in (b"\x00", b"\xff"):
        assert np.isfinite(normal(64, lambda count, byte=byte: byte * count)).all()


@pytest.mark.parametrize("told", [{"clip": 0, "noise": 1}, {"clip": 1, "noise": -1}, {"clip": "x"}, [], {}])
def test_a_wrong_request_for_privacy_is_refused(told):
    """An agent never guesses what protects it."""
    with pytest.raises((ValueError, KeyError, TypeError)):
        read_privacy({"privacy": told})


def exact_epsilon(noise: float, replies: int, delta: float) -> float:
    """Return epsilon of so many Gaussian mechanisms: they are one with sqrt(replies) less noise.

    Source: Balle & Wang, "Improving the Gaussian Mechanism", 2018, theorem 8.
    """
    mu = math.sqrt(replies) / noise

    def excess(e: float) -> float:
        return stats.norm.cdf(mu / 2 - e / mu) - math.exp(e) * stats.norm.cdf(-mu / 2 - e / mu) - delta

    return float(optimize.brentq(excess, 0, 500))


@pytest.mark.parametrize(("noise", "replies"), [(8.0, 300), (20.0, 100), (2.0, 1)])
def test_epsilon_agrees_with_the_closed_form(noise, replies):
    """The accountant's figure is the exact one for Gaussian mechanisms, to one percent, and not below it."""
    pytest.importorskip("dp_accounting")
    found, exact = epsilon(noise, replies, delta=1e-5), exact_epsilon(noise, replies, 1e-5)
    assert exact * (1 - 1e-6) <= found <= exact * 1.01


def test_no_reply_costs_nothing_and_no_noise_everything():
    """The two ends of the scale need no accountant."""
    assert epsilon(1.0, 0, delta=1e-5) == 0.0
    assert epsilon(0.0, 5, delta=1e-5) == math.inf


def test_noise_without_a_clip_is_refused():
    """Noise is counted in clips; the experiment says so."""
    with pytest.raises(ConfigError, match="counted in clips"):
        load_experiment(ROOT / "examples" / "digits.toml", ["privacy.noise=1"])


class PrivateFleet(FleetInMemory):
    """A fleet whose run asks for privacy."""

    PRIVACY = {"clip": 0.5, "noise": 0.1}  # noqa: RUF012

    def start_coordinator(self):
        super().start_coordinator()
        self.service._privacy = self.PRIVACY
        self.service.announce_state("running")


def test_replies_of_a_private_run_are_clipped_and_tell_no_loss(tmp_path):
    """All replicas agree; no reply is longer than clip and noise make it, and none tells a loss."""
    fleet = PrivateFleet(tmp_path, rounds=8)
    for board in fleet.boards:
        board.agent._secret = bytes_of(7)
    fleet.run(until=lambda: all(board.agent._privacy for board in fleet.boards))
    begun = fleet.rounds.next_round
    fleet.run()
    rows = fleet.log._db.execute("SELECT loss, scalars FROM replies WHERE round > ?", (begun,)).fetchall()
    assert rows
    assert {loss for loss, _ in rows} == {0.0}
    lengths = [np.linalg.norm(np.frombuffer(scalars, "<f4")) for _, scalars in rows]
    assert max(lengths) < 0.5 + 0.5 * 0.1 * 6 * 2
    assert len(fleet.digests()) == 1


def test_an_agent_without_secret_noise_refuses_a_private_run():
    """Rather than to send what the run promised not to ask for."""
    agent = Agent(
        name="board-0",
        bundle_identity=BUNDLE,
        replica=fresh_replica(),
        fresh_replica=fresh_replica,
        estimate=lambda *rest: None,
        peak_kib=lambda: 1,
    )
    control = {
        "bundle": BUNDLE,
        "epoch": 1,
        "shards": 1,
        "agents": ["board-0"],
        "privacy": {"clip": 1, "noise": 1},
    }
    (report,) = agent.on_control(control, 0.0)
    assert isinstance(report, Report)
    assert report.state == "refused"
