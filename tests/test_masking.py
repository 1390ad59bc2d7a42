"""Secure sums: exact, whoever drops out, and nothing of one agent to be read."""

import itertools

import numpy as np
import pytest
from scipy import stats

from edge_agent.masking import (
    LARGEST,
    combine,
    from_fixed,
    majority,
    mask,
    open_share,
    seal_share,
    session_of,
    split_secret,
    tell_masks,
    to_fixed,
)

AGENTS, SCALARS, SAMPLES = 8, 12, 16
SESSION = session_of("run", 3, {n: bytes([n]) * 32 for n in range(AGENTS)})


class Cohort:
    """Eight agents with a key for each pair, their vectors, and what they sent."""

    def __init__(self, seed: int) -> None:
        chance = np.random.default_rng(seed)
        pairs = {pair: chance.bytes(32) for pair in itertools.combinations(range(AGENTS), 2)}
        self.keys = [{m: pairs[min(n, m), max(n, m)] for m in range(AGENTS) if m != n} for n in range(AGENTS)]
        self.vectors = chance.normal(0, 3, (AGENTS, SCALARS)).astype(np.float32)
        self.fixed = [to_fixed(vector, SAMPLES) for vector in self.vectors]
        self.sent = [
            mask(self.fixed[n], agent=n, session=SESSION, keys=self.keys[n], secret=chance.bytes)
            for n in range(AGENTS)
        ]

    def shares_of(self, agent: int, tellers) -> dict[int, bytes]:
        """Return the shares of an agent's own mask that others tell."""
        found = {}
        for teller in tellers:
            if teller == agent:
                found[teller] = self.sent[agent].own_share
            else:
                sealed, key = self.sent[agent].shares[teller], self.keys[teller][agent]
                found[teller] = open_share(sealed, key, SESSION, sender=agent, receiver=teller)
        return found

    def unmask(self, survivors, tellers=None):
        """Return the sum that the coordinator finds."""
        dropped = set(range(AGENTS)) - set(survivors)
        told = {n: tell_masks(n, dropped, self.keys[n], SESSION, SCALARS) for n in survivors if dropped}
        return combine(
            {n: self.sent[n].values for n in survivors},
            told,
            {n: self.shares_of(n, tellers or survivors) for n in survivors},
            SESSION,
            majority(AGENTS),
        )


def plain_sum(cohort: Cohort, survivors) -> np.ndarray:
    """Return the sum of the same fixed-point vectors without any mask."""
    total = np.zeros(SCALARS, np.uint64)
    for n in survivors:
        total = total + cohort.fixed[n]
    return total


def test_the_sum_of_all_is_exact():
    """Masks of a whole cohort leave no bit behind."""
    cohort = Cohort(1)
    assert np.array_equal(cohort.unmask(range(AGENTS)), plain_sum(cohort, range(AGENTS)))


@pytest.mark.parametrize("dropped", list(itertools.combinations(range(AGENTS), 2)))
def test_two_of_eight_may_drop_out(dropped):
    """Whichever two: the sum of the other six is exact."""
    survivors = [n for n in range(AGENTS) if n not in dropped]
    cohort = Cohort(2)
    assert np.array_equal(cohort.unmask(survivors), plain_sum(cohort, survivors))


def test_a_majority_of_shares_is_enough():
    """With all vectors there, three agents may fall silent before the shares are told."""
    cohort = Cohort(3)
    assert np.array_equal(cohort.unmask(range(AGENTS), [0, 2, 3, 5, 7]), plain_sum(cohort, range(AGENTS)))
    with pytest.raises(ValueError, match="4 shares of 5"):
        cohort.unmask(range(AGENTS), [0, 2, 3, 5])


def test_one_masked_reply_looks_like_chance():
    """A thousand masked zeros: every byte value comes equally often (chi-square, p > 0.001)."""
    seen = []
    chance = np.random.default_rng(4)
    keys = {n: chance.bytes(32) for n in range(1, AGENTS)}
    zero = np.zeros(SCALARS, np.uint64)
    for round_ in range(1000):
        session = session_of("run", round_, {})
        seen.append(mask(zero, agent=0, session=session, keys=keys, secret=chance.bytes).values)
    found = np.frombuffer(np.concatenate(seen).tobytes(), np.uint8)
    assert stats.chisquare(np.bincount(found, minlength=256)).pvalue > 1e-3


def test_masks_of_the_dropped_alone_do_not_unmask_anybody():
    """Without the shares of its own mask an agent stays hidden, though all others told theirs with it."""
    cohort = Cohort(5)
    others = [n for n in range(AGENTS) if n]
    told = sum((tell_masks(n, [0], cohort.keys[n], SESSION, SCALARS) for n in others), start=np.uint64(0))
    left = cohort.sent[0].values + told  # its pairwise masks are gone
    assert not np.array_equal(left, cohort.fixed[0])
    assert (np.abs((left - cohort.fixed[0]).astype(np.int64).astype(float)) > 2**40).all()


def test_fewer_shares_than_a_majority_say_nothing():
    """For four shares of a seed every other seed is as possible: a fifth share fits each of them."""
    chance = np.random.default_rng(6)
    holders = list(range(AGENTS))
    shares = split_secret(12345, holders, 5, chance.bytes)
    assert len({shares[n] for n in holders}) == AGENTS
    again = split_secret(12345, holders, 5, chance.bytes)
    assert not {shares[n] for n in holders} & {again[n] for n in holders}


def test_a_sealed_share_is_for_one_agent_session_and_direction():
    """With another key, session, sender or receiver, or a changed byte, it does not open."""
    key = b"k" * 32
    sealed = seal_share(b"s" * 16, key, SESSION, sender=1, receiver=2)
    assert open_share(sealed, key, SESSION, sender=1, receiver=2) == b"s" * 16
    assert open_share(sealed, b"q" * 32, SESSION, sender=1, receiver=2) is None
    assert open_share(sealed, key, b"another!", sender=1, receiver=2) is None
    assert open_share(sealed, key, SESSION, sender=2, receiver=1) is None
    for at in range(len(sealed)):
        changed = bytearray(sealed)
        changed[at] ^= 1
        assert open_share(bytes(changed), key, SESSION, sender=1, receiver=2) is None


def test_a_mean_by_fixed_point_is_within_half_a_step():
    """The mean over unequal samples differs from the exact one by less than a step of 2^-20."""
    chance = np.random.default_rng(7)
    vectors, samples = chance.normal(0, 2, (5, 4)).astype(np.float32), [1, 16, 7, 32, 65535]
    total = np.zeros(4, np.uint64)
    for vector, count in zip(vectors, samples, strict=True):
        total = total + to_fixed(vector, count)
    exact = np.average(vectors.astype(float), axis=0, weights=samples)
    assert np.abs(from_fixed(total, sum(samples)) - exact).max() < 2**-20


def test_a_hundred_of_the_largest_do_not_overflow():
    """A hundred agents with the largest scalar and the largest batch have that scalar as their mean."""
    one = to_fixed(np.array([LARGEST, -LARGEST, 1e9], np.float32), 65535)
    total = np.zeros(3, np.uint64)
    for _ in range(100):
        total = total + one
    assert np.array_equal(from_fixed(total, 100 * 65535), np.array([LARGEST, -LARGEST, LARGEST], np.float32))
