"""Tests of coordinator.aggregation and coordinator.outliers: exact sums, and what liars can do."""

import numpy as np
import pytest

from coordinator.aggregation import RULES, aggregate, tolerated
from coordinator.outliers import Outliers
from edge_agent.wire import Reply


def replies_of(rows, samples=16) -> dict[int, Reply]:
    counts = [samples] * len(rows) if isinstance(samples, int) else samples
    return {
        number: Reply(1, 0, 0, count, 0.5, 1, 0, np.asarray(row, np.float32))
        for number, (row, count) in enumerate(zip(rows, counts, strict=True))
    }


def test_the_mean_weighs_by_samples():
    """Three times the samples, three times the weight."""
    assert aggregate(replies_of([[1.0], [5.0]], samples=[48, 16])).tolist() == [2.0]


def test_the_mean_does_not_depend_on_the_order():
    """Values of very unlike size sum to the same bits in any order: the sum is exact, then rounded once."""
    rows = np.random.default_rng(1).normal(0, 1, (50, 4)) * 10.0 ** np.arange(-20, 5, 0.5)[:, None]
    forward, backward = aggregate(replies_of(rows)), aggregate(replies_of(rows[::-1]))
    assert forward.tobytes() == backward.tobytes()


@pytest.mark.parametrize("rule", RULES)
def test_equal_replies_are_their_own_aggregate(rule):
    """When all say the same, every rule says it too."""
    row = np.array([0.5, -3.0, 1e-20], np.float32)
    assert aggregate(replies_of([row] * 7), rule=rule).tobytes() == row.tobytes()


@pytest.mark.parametrize("rule", ["median", "trimmed", "krum"])
@pytest.mark.parametrize("lie", [1e9, -1e9, 0.0])
def test_a_tolerated_share_of_liars_stays_within_the_honest_values(rule, lie):
    """Two of ten say anything: each scalar of the result lies between the honest agents' extremes."""
    honest = np.random.default_rng(2).normal(3, 1, (8, 6)).astype(np.float32)
    result = aggregate(replies_of([*honest, [lie] * 6, [lie] * 6]), rule=rule, liars=0.2)
    assert np.all(honest.min(axis=0) <= result)
    assert np.all(result <= honest.max(axis=0))


def test_the_mean_is_at_a_liars_mercy():
    """The reason for the other rules: one of ten moves the mean wherever it likes."""
    assert aggregate(replies_of([[1.0]] * 9 + [[1e6]]))[0] > 1e4


@pytest.mark.parametrize(
    ("agents", "share", "expected"), [(10, 0.2, 2), (6, 0.2, 2), (3, 0.4, 1), (1, 0.4, 0)]
)
def test_fewer_than_half_are_tolerated(agents, share, expected):
    """The share is rounded up, but an honest majority is always needed."""
    assert tolerated(agents, share) == expected


def observe_rounds(lie, *, rounds=40) -> dict[int, str]:
    """Return who is suspected when eight honest agents see a common slope and agents 3 and 6 lie."""
    chance = np.random.default_rng(4)
    outliers = Outliers()
    found = {}
    for _ in range(rounds):
        slope = chance.normal(0, 1, 16)
        rows = slope + chance.normal(0, 1, (10, 16))
        for liar in (3, 6):
            rows[liar] = lie(rows[liar], chance)
        found.update(outliers.observe(replies_of(rows)))
    return found


@pytest.mark.parametrize(
    "lie",
    [
        lambda row, chance: -row,
        lambda row, chance: 1000 * row,
        lambda row, chance: chance.normal(0, 1.4, 16),
        lambda row, chance: np.zeros(16),
    ],
    ids=["sign flip", "1000 times", "random", "nothing"],
)
def test_liars_are_named(lie):
    """Two of ten lie in each of four ways: they are suspected, and nobody else is."""
    assert set(observe_rounds(lie)) == {3, 6}


def test_nobody_is_suspected_among_the_honest():
    """Agents whose noise is as large as their common slope give no cause."""
    assert observe_rounds(lambda row, chance: row, rounds=300) == {}


def test_three_agents_say_nothing_of_each_other():
    """Without a majority to compare with there is no outlier."""
    outliers = Outliers()
    for _ in range(50):
        assert outliers.observe(replies_of([[1.0], [1.0], [-1000.0]])) == []


def test_who_is_like_the_others_again_is_trusted_again():
    """An agent that lied for a while is suspected, then not: a fault that was mended is no life sentence."""
    chance = np.random.default_rng(4)
    outliers = Outliers()
    changes = []
    for round_ in range(200):
        slope = chance.normal(0, 1, 16)
        rows = slope + chance.normal(0, 1, (10, 16))
        if round_ < 30:
            rows[3] *= -1
        changes += outliers.observe(replies_of(rows))
    assert [(agent, bool(text)) for agent, text in changes] == [(3, True), (3, False)]
    assert outliers.suspects() == []
