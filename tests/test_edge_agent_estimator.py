"""Tests of edge_agent.estimator and edge_agent.replay: right in the mean, exact in the bits."""

from dataclasses import replace

import numpy as np
import pytest

from edge_agent.estimator import estimate, one_sided, two_point
from edge_agent.grid import plan_segments, snap
from edge_agent.noise import values
from edge_agent.optimizer import METHODS
from edge_agent.plan import RoundPlan
from edge_agent.replay import Replica, apply_record, apply_records
from edge_agent.wire import RoundRecord
from profiles.errors import DigestError, EstimateError, LogError

SIZE = 2000


def replica(scale: float = 0.1) -> Replica:
    weights = np.random.default_rng(5).normal(0, scale, SIZE).astype(np.float32)
    segments = plan_segments(weights, [(0, 960), (960, SIZE)])
    snap(weights, segments)
    return Replica(weights, segments)


def plan(round_: int = 0, *, method: str = "decomfl", steps: int = 1, perturbations: int = 4, **constants):
    rule = METHODS[method]
    return RoundPlan(round_, 7, rule.code, steps, perturbations, 1e-3, 0.01, rule.values(constants))


def direction(plan_: RoundPlan, step: int, number: int) -> np.ndarray:
    """The perturbation in float64, made independently of the grid."""
    return values(plan_.keys(step)[number], 0, SIZE).astype(np.float64)


def quadratic(of: Replica, slope: np.ndarray, bend: np.ndarray):
    """A loss with a known gradient, in float64."""
    start = of.weights.astype(np.float64)

    def loss() -> float:
        moved = of.weights.astype(np.float64) - start
        return float(slope @ moved + 0.5 * bend @ (moved * moved))

    return loss


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("method", ["decomfl", "hiso"])
@pytest.mark.parametrize("central", [True, False])
def test_an_estimate_leaves_every_bit(steps, method, central):
    """Weights, curvature and digest are what they were, private moves included."""
    here = replica()
    here.prepare(METHODS[method].code)
    before = here.digest()
    slope = np.random.default_rng(1).normal(size=SIZE)
    loss = quadratic(here, slope, np.ones(SIZE))
    estimate(here, plan(method=method, steps=steps), lambda step: loss, central=central)
    assert here.digest() == before


def test_a_failing_loss_leaves_every_bit():
    """A loss that is not finite in the middle of the third local step is an error, and is undone."""
    here = replica()
    before = here.digest()
    calls = []

    def loss() -> float:
        calls.append(0)
        return float("nan") if len(calls) == 20 else 0.5 + 1e-3 * len(calls)

    with pytest.raises(EstimateError, match="nan"):
        estimate(here, plan(steps=3), lambda step: loss, central=True)
    assert here.digest() == before


def test_central_differences_are_the_slope_along_the_noise():
    """On a quadratic the estimate is z . grad, to what rounding to the grid leaves."""
    here, rng = replica(), np.random.default_rng(1)
    slope = rng.normal(size=SIZE)
    asked = plan()
    made = estimate(here, asked, lambda step: quadratic(here, slope, rng.uniform(0, 5, SIZE)), central=True)
    expected = [slope @ direction(asked, 0, number) for number in range(4)]
    assert np.allclose(made.scalars[0], expected, atol=0.05)


def test_forward_differences_err_by_half_epsilon_times_the_bend():
    """The one-sided estimate is off by epsilon / 2 * z'Hz, the central one is not."""
    here = replica()
    asked = replace(plan(), epsilon=1e-2)
    slope, bend = np.zeros(SIZE), np.full(SIZE, 3.0)
    loss = quadratic(here, slope, bend)
    made = estimate(here, asked, lambda step: loss, central=False)
    expected = [0.5 * 1e-2 * 3.0 * (direction(asked, 0, n) ** 2).sum() for n in range(4)]
    assert np.allclose(made.scalars[0], expected, rtol=1e-3)
    central = estimate(here, asked, lambda step: loss, central=True)
    assert np.abs(central.scalars).max() < 1e-3 * max(expected)


def test_forwards_are_counted():
    """2P forwards for central differences, P + 1 for forward differences, per local step."""
    here = replica()
    for central, expected in ((True, 2 * 4 * 3), (False, (4 + 1) * 3)):
        assert estimate(here, plan(steps=3), lambda step: lambda: 0.0, central=central).forwards == expected


def test_each_local_step_moves_by_its_own_scalars():
    """The second step is measured where the first one's private move leads."""
    here, rng = replica(), np.random.default_rng(1)
    slope, bend = rng.normal(size=SIZE), np.full(SIZE, 20.0)
    loss = quadratic(here, slope, bend)
    asked = replace(plan(steps=2), learning_rate=1e-3)
    made = estimate(here, asked, lambda step: loss, central=True)
    moved = -1e-3 / 4 * sum(float(made.scalars[0][n]) * direction(asked, 0, n) for n in range(4))
    gradient = slope + bend * moved
    expected = [gradient @ direction(asked, 1, n) for n in range(4)]
    assert np.allclose(made.scalars[1], expected, rtol=2e-2, atol=0.2)


@pytest.mark.parametrize("method", ["decomfl", "hiso"])
def test_replay_agrees_with_a_float64_reference(method):
    """Ten rounds of replay stay within grid rounding and bf16 of the published update in float64."""
    here = replica()
    weights, h = here.weights.astype(np.float64), np.ones(SIZE)
    rng = np.random.default_rng(9)
    for round_ in range(10):
        asked = plan(round_, method=method, **({"nu": 0.1, "floor": 1e-3} if method == "hiso" else {}))
        scalars = rng.normal(0, 3, (1, 4)).astype(np.float32)
        apply_record(here, RoundRecord(asked, 1, False, scalars, 0), check=False)
        mean = sum(float(scalars[0][n]) * direction(asked, 0, n) for n in range(4)) / 4
        root = 1 / np.sqrt(h) if method == "hiso" else np.ones(SIZE)
        weights -= asked.learning_rate * mean * root  # z = u / sqrt(h)
        if method == "hiso":
            h = np.maximum((1 - 0.1) * h + 0.1 * (mean * root) ** 2, 1e-3)
    assert np.abs(here.weights - weights).max() < 2e-3 if method == "hiso" else 3e-6


def test_curvature_in_bf16_keeps_its_mean():
    """Stochastic rounding lets h follow changes far below bfloat16's half step."""
    here = replica()
    asked = plan(method="hiso", nu=1e-4, floor=0.0)
    zero = np.zeros((1, 4), np.float32)
    for round_ in range(50):
        apply_record(here, RoundRecord(replace(asked, round=round_), 1, False, zero, 0), check=False)
    values = (here.curvature.astype(np.uint32) << 16).view(np.float32)
    assert abs(values.mean(dtype=np.float64) - (1 - 1e-4) ** 50) < 1e-3


def test_a_normalised_step_ignores_the_scale_of_the_scalars():
    """With smoothing on, scalars a thousand times larger move the weights alike."""
    scalars = np.random.default_rng(2).normal(size=(1, 4)).astype(np.float32)
    ends = []
    for factor in (1, 1000):
        here = replica()
        asked = plan(smoothing=0.9)
        apply_record(here, RoundRecord(asked, 1, False, scalars * np.float32(factor), 0), check=False)
        ends.append(here.weights.copy())
    assert np.abs(ends[0] - ends[1]).max() <= 2.0**-22


def test_weights_stay_within_their_headroom():
    """Absurd scalars saturate a weight at 3/4 of its grid's limit and break nothing."""
    here = replica()
    for round_ in range(16):
        huge = np.full((1, 4), 1e9, np.float32)
        apply_record(here, RoundRecord(plan(round_), 1, False, huge, 0), check=False)
    assert np.abs(here.weights).max() == 3.0
    before = here.digest()
    estimate(here, plan(16), lambda step: lambda: 0.0, central=True)
    assert here.digest() == before


def test_golden_digest():
    """Twenty rounds of HiSo with two local steps end with the digest that they always had."""
    here = replica()
    rng = np.random.default_rng(11)
    for round_ in range(20):
        asked = plan(round_, method="hiso", steps=2, smoothing=0.5)
        scalars = rng.normal(0, 2, (2, 4)).astype(np.float32)
        apply_record(here, RoundRecord(asked, 1, False, scalars, 0), check=False)
    assert f"{here.digest():016x}" == "8f03c307ab833948"


def test_a_record_that_leads_elsewhere_is_noticed():
    """A record with another digest than its replay gives raises."""
    record = RoundRecord(plan(), 1, False, np.ones((1, 4), np.float32), 123)
    with pytest.raises(DigestError, match="after round 0"):
        apply_record(replica(), record)


def test_records_out_of_order_are_refused():
    """Replay goes on with the next round or not at all."""
    record = RoundRecord(plan(3), 1, False, np.ones((1, 4), np.float32), 123)
    with pytest.raises(LogError, match="stands before round 0"):
        apply_records(replica(), [record])


def test_a_record_of_other_noise_is_refused():
    """Another noise version is not replayed with this one's bits."""
    record = RoundRecord(replace(plan(), noise_version=2), 1, False, np.ones((1, 4), np.float32), 123)
    with pytest.raises(LogError, match="noise version 2"):
        apply_record(replica(), record)


@pytest.mark.parametrize("losses", [(np.nan, 0.0), (0.0, np.inf), (1e30, 0.0)])
def test_losses_that_allow_no_estimate_are_refused(losses):
    """Not a number, infinite, or a quotient that no record may hold."""
    for quotient in (two_point, one_sided):
        with pytest.raises(EstimateError):
            quotient(*losses, 1e-3)
