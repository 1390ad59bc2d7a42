"""Who cannot have measured: scalars against mixtures of the classes' scalars, however uneven the labels."""

import numpy as np
import pytest

from coordinator.outliers import Outliers
from coordinator.plausibility import Plausibility
from edge_agent.wire import Reply

CLASSES, AGENTS, SCALARS = 10, 8, 16
LIARS = {1, 5}


class Samples:
    """Scalars of a fleet whose agents see one to three of ten classes, with a small batch's noise."""

    def __init__(self, seed: int, *, noise: float = 0.5) -> None:
        self.chance = np.random.default_rng(seed)
        self.shares = self.chance.dirichlet([0.1] * CLASSES, AGENTS)
        self.noise = noise

    def round(self):
        """Return the classes' scalars, (scalars, classes), and the agents', (agents, scalars)."""
        classes = self.chance.normal(0, 1, (SCALARS, CLASSES))
        noise = self.noise * self.chance.normal(0, 1, (AGENTS, SCALARS))
        return classes, self.shares @ classes.T + noise


def verdicts(samples, lie, rounds):
    """Return who is said what after some rounds in which agents 1 and 5 lie."""
    judge, suspected = Plausibility(), set()
    for _ in range(rounds):
        classes, rows = samples.round()
        lied = {n: lie(row, samples.chance) if n in LIARS else row for n, row in enumerate(rows)}
        judge.observe(lied, classes)
        suspected = {n for n in lied if judge.verdict(n, suspected=n in suspected)}
    return suspected


@pytest.mark.parametrize("seed", range(20))
def test_honest_agents_with_uneven_labels_are_trusted(seed):
    """In none of a hundred rounds is anybody suspected, though agents share hardly a class."""
    samples, judge = Samples(seed), Plausibility()
    for _ in range(100):
        classes, rows = samples.round()
        judge.observe(dict(enumerate(rows)), classes)
        assert [judge.verdict(n, suspected=False) for n in range(AGENTS)] == [""] * AGENTS


@pytest.mark.parametrize("seed", range(20))
def test_a_turned_sign_is_seen_in_five_rounds(seed):
    """Those who turn their scalars are suspected, and nobody else."""
    assert verdicts(Samples(seed), lambda row, chance: -row, 5) == LIARS


@pytest.mark.parametrize("seed", range(20))
def test_noise_is_seen_in_forty_rounds(seed):
    """Scalars that no sample had a part in are suspected, and nobody else's."""

    def lie(row, chance):
        return chance.normal(0, row.std(), row.shape)

    assert verdicts(Samples(seed), lie, 40) == LIARS


def test_a_turned_liar_stays_suspected_when_the_signal_fades():
    """Rounds of noise alone, as near the end of training, clear nobody."""
    samples, judge = Samples(3), Plausibility()
    for _ in range(10):
        classes, rows = samples.round()
        judge.observe({n: -row if n in LIARS else row for n, row in enumerate(rows)}, classes)
    for _ in range(300):
        judge.observe(dict(enumerate(samples.chance.normal(0, 1, (AGENTS, SCALARS)))), classes)
    assert {n for n in LIARS if judge.verdict(n, suspected=True)} == LIARS


def test_who_measures_again_is_trusted_again():
    """A hundred honest rounds clear an agent that had lied."""
    samples, judge = Samples(4), Plausibility()
    for round_ in range(160):
        classes, rows = samples.round()
        judge.observe({n: -row if n in LIARS and round_ < 10 else row for n, row in enumerate(rows)}, classes)
    assert not any(judge.verdict(n, suspected=True) for n in range(AGENTS))


def test_a_huge_reply_is_left_out_in_its_own_round():
    """Scalars far larger than the others' are named to be left out at once, before any statistic is sure."""
    classes, rows = Samples(5).round()
    rows[6] *= 1000
    outliers = Outliers()
    replies = {n: Reply(1, 0, 0, 16, 1.0, 1, 0, row.astype(np.float32)) for n, row in enumerate(rows)}
    outliers.observe(replies, [classes])
    assert outliers.least_trusted() == [6]


def test_a_fleet_of_zeros_is_nothing_to_judge():
    """Scalars that are all zero raise no error and accuse nobody."""
    outliers = Outliers()
    zeros = {n: Reply(1, 0, 0, 16, 1.0, 1, 0, np.zeros(SCALARS, np.float32)) for n in range(AGENTS)}
    assert outliers.observe(zeros, [np.zeros((SCALARS, CLASSES))]) == []
    assert outliers.suspects() == []
