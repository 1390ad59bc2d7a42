"""Agents dealt into shares, each with perturbations of its own: what is sent, summed up and replayed."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from coordinator.aggregation import aggregate, aggregate_shares
from coordinator.config import load_experiment
from edge_agent.estimator import estimate
from edge_agent.grid import plan_segments, snap
from edge_agent.noise import values
from edge_agent.optimizer import METHODS
from edge_agent.plan import RoundPlan
from edge_agent.replay import Replica, apply_record
from edge_agent.wire import Reply, RoundRecord, decode_record, encode_record
from profiles.errors import ConfigError, WireError

SIZE = 800
HEAD = ((608, 668), (672, 678))
DIGITS = Path(__file__).parent.parent / "examples" / "digits.toml"


def replica() -> Replica:
    weights = np.random.default_rng(5).normal(0, 0.1, SIZE).astype(np.float32)
    segments = plan_segments(weights, [(0, 608), (608, SIZE)])
    snap(weights, segments)
    return Replica(weights, segments, tensors=((0, 600), *HEAD), head=HEAD)


def plan(round_: int = 0, *, shares: int = 3, exact: int = 20, steps: int = 1) -> RoundPlan:
    rule = METHODS["fanstep"]
    constants = rule.values({"shares": shares, "head_rate": 0.3, "smoothing": 0.8})
    return RoundPlan(round_, 7, rule.code, steps, 4, 1e-3, 0.01, constants, exact)


def reply(asked: RoundPlan, scalars: np.ndarray, samples: int = 8) -> Reply:
    return Reply(1, asked.round, 0, samples, 1.0, 0, 0, scalars.astype(np.float32).reshape(-1))


def test_agents_of_unlike_shares_look_along_unlike_directions():
    """On a slope, an agent's scalars are the slopes along the directions of its own share."""
    here, slope = replica(), np.random.default_rng(2).normal(size=SIZE)
    asked = plan(2)
    inside = np.concatenate([np.arange(*span) for span in HEAD])
    slope[inside] = 0
    start = here.weights.astype(np.float64)
    loss = lambda: float(slope @ (here.weights.astype(np.float64) - start))
    found = []
    for agent in range(6):
        share = asked.share_of(agent)
        made = estimate(
            here, asked, lambda batch: loss, central=True, share=share,
            head_gradient=lambda: np.zeros(66, np.float32),
        )  # fmt: skip
        expected = [slope @ values(key, 0, SIZE) for key in asked.keys(0)[4 * share :][:4]]
        assert made.scalars.shape == (1, 24)
        assert np.allclose(made.scalars[0, :4], expected, atol=0.05)
        found.append(tuple(made.scalars[0, :4]))
    assert len(set(found)) == 3


def test_each_agent_has_its_turn_in_every_share():
    """In as many rounds as there are shares, an agent is in each of them once."""
    assert sorted(plan(round_).share_of(4) for round_ in range(3)) == [0, 1, 2]


def test_a_share_is_the_mean_of_its_own_agents():
    """Projected gradients are summed up share by share, exact scalars over all; an empty share is zero."""
    asked = plan(1, steps=2)
    rng = np.random.default_rng(3)
    rows = {agent: rng.normal(size=(2, 24)) for agent in (0, 2, 3)}  # shares 1, 0, 1
    record = aggregate_shares({a: reply(asked, row) for a, row in rows.items()}, asked).reshape(2, 32)

    assert np.allclose(record[:, 4:8], (rows[0] + rows[3])[:, :4] / 2, atol=1e-6)
    assert np.allclose(record[:, :4], rows[2][:, :4], atol=1e-6)
    assert not record[:, 8:12].any()
    assert np.allclose(record[:, 12:], sum(rows.values())[:, 4:] / 3, atol=1e-6)


def test_one_share_is_the_plain_aggregate():
    """With a single share nothing differs from the methods that have none."""
    asked = plan(1, shares=1)
    replies = {a: reply(asked, np.random.default_rng(a).normal(size=24), 8 + a) for a in range(4)}
    assert np.array_equal(aggregate_shares(replies, asked), aggregate(replies))


def test_replay_agrees_with_a_float64_reference():
    """The mean over all measured directions, over their RMS; a share without an answer counts for nothing."""
    here = replica()
    weights, mean, weight = here.weights.astype(np.float64), 0.0, 0.0
    rng = np.random.default_rng(9)
    inside = np.concatenate([np.arange(*span) for span in HEAD])
    for round_ in range(8):
        asked = plan(round_, exact=66)
        scalars = (rng.normal(0, 3, (1, 78)) * np.r_[np.ones(12), np.full(66, 0.05)]).astype(np.float32)
        measured = np.arange(12)
        if round_ in (3, 6):
            scalars[:, 4:8] = 0
            measured = np.r_[0:4, 8:12]
        apply_record(here, RoundRecord(asked, 1, False, scalars, 0), check=False)
        g = scalars[0, measured].astype(np.float64)
        mean, weight = 0.8 * mean + 0.2 * np.mean(g**2), 0.8 * weight + 0.2
        z = np.stack([values(key, 0, SIZE) for key in asked.keys(0)]).astype(np.float64)[measured]
        z[:, inside] = 0
        weights -= asked.learning_rate / np.sqrt(mean / weight) * g @ z / len(g)
        from edge_agent.head import chosen

        weights[inside[chosen(asked, 0, [66])]] -= np.float32(0.3) * scalars[0, 12:].astype(np.float64)
    assert np.abs(weights - replica().weights).max() > 0.02
    assert np.abs(here.weights - weights).max() < 1e-5


def test_a_record_holds_the_scalars_of_all_shares():
    """Its bytes hold shares times P projected gradients, and come back as they were."""
    asked = plan(steps=2)
    record = RoundRecord(asked, 1, False, np.arange(64, dtype=np.float32).reshape(2, 32), 5)
    assert decode_record(encode_record(record)) == record
    assert len(encode_record(record)) == len(encode_record(replace(record, skipped=True))) + 4 * 64


@pytest.mark.parametrize("shares", [0.0, 256.0, float("nan"), -1.0])
def test_a_plan_with_impossible_shares_is_refused(shares):
    """No agent makes room for what nobody can mean."""
    asked = plan()
    bad = replace(asked, constants=(*asked.constants[:2], shares))
    good = encode_record(RoundRecord(asked, 1, True, np.zeros((1, 32), np.float32), 5))
    place = good.index(np.float32(3.0).tobytes(), 20)
    raw = good[:place] + np.float32(bad.constants[2]).tobytes() + good[place + 4 :]
    with pytest.raises(WireError):
        decode_record(raw)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["method.name=fanstep", "fleet.aggregation=median"], "with `method.shares` = 8 they do not"),
        (["method.name=fanstep", "method.shares=2.5"], "whole number"),
        (["method.name=fanstep", "method.shares=0"], "at least 1"),
        (["method.name=fanstep", "method.shares=200", "method.perturbations=500"], "scalars a step"),
        (["method.name=hybrid", "method.layers=0"], "at least 1"),
    ],
)
def test_shares_that_cannot_work_are_refused(settings, words):
    """The experiment's fault is named before anything starts."""
    with pytest.raises(ConfigError, match=words):
        load_experiment(DIGITS, settings)
