"""Many agents' scalars into one: the only place where sums over agents are taken.

Every sum is exact and rounded once (``math.fsum``), so that neither the order of the agents nor who added
up what (``partial``) changes a bit; the result is rounded to float32 and logged, and every replica uses the
logged value. Knows replies as rows of numbers. Does not know rounds, nor who is suspected (``outliers``).
"""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from coordinator.packing import Pack
from coordinator.partial import Partial
from edge_agent.plan import RoundPlan
from edge_agent.wire import Reply

__all__ = [
    "RULES",
    "aggregate",
    "aggregate_levels",
    "aggregate_shares",
    "mean_loss",
    "mean_of_packs",
    "tolerated",
]

_Matrix = NDArray[np.float64]


def aggregate(replies: Mapping[int, Reply], *, rule: str = "mean", liars: float = 0.2) -> NDArray[np.float32]:
    """Return one vector of scalars for the replies of a round: float32 of shape (K * P,).

    Args:
        replies: By agent number; at least one, none failed, all with the same number of scalars.
        rule: One of :data:`RULES`.
        liars: The share of the agents that may lie, 0 <= liars < 0.5; the mean trusts all.

    Raises:
        ValueError: The rule is unknown, or the share is out of range.
    """
    if rule not in RULES or not 0 <= liars < 0.5:
        raise ValueError(f"rule {rule!r} with a share of liars of {liars}")
    order = sorted(replies)
    rows = np.stack([replies[number].scalars for number in order]).astype(np.float64)
    samples = np.array([replies[number].samples for number in order], np.float64)
    return RULES[rule](rows, samples, tolerated(len(order), liars)).astype(np.float32)


def aggregate_levels(
    replies: Mapping[int, Reply],
    levels: Sequence[int],
    plan: RoundPlan,
    *,
    rule: str,
    liars: float,
    packs: Sequence[Pack] = (),
) -> NDArray[np.float32]:
    """Return a record's scalars: float32 of shape (K, ``plan.scalars``).

    Args:
        replies: As for :func:`aggregate_shares`.
        levels: By agent number, which width of a family it holds; the scalars of a level are taken over the
            agents that hold it or a wider one, and are 0 where nobody does.
        plan: Of the round.
        rule: As for :func:`aggregate`.
        liars: As for :func:`aggregate`.
        packs: In which replies came; their sums serve where the rule is a mean over all agents.
    """
    if packs and rule == "mean" and plan.levels == plan.shares == 1:
        return mean_of_packs(replies, packs).reshape(plan.steps, plan.scalars)
    parts = np.zeros((plan.levels, plan.steps, plan.scalars // plan.levels), np.float32)
    for level, part in enumerate(parts):
        holders = {agent: reply for agent, reply in replies.items() if levels[agent] >= level}
        if holders:
            part[...] = aggregate_shares(holders, plan, rule=rule, liars=liars).reshape(part.shape)
    return np.concatenate(list(parts), axis=1)


def aggregate_shares(
    replies: Mapping[int, Reply], plan: RoundPlan, *, rule: str = "mean", liars: float = 0.2
) -> NDArray[np.float32]:
    """Return a record's scalars: as :func:`aggregate`, the projected gradients share by share.

    Args:
        replies: By agent number; at least one, none failed.
        plan: Of the round; deals the agents into shares. A share without a reply stays zero.
        rule: As for :func:`aggregate`.
        liars: As for :func:`aggregate`.

    Returns:
        Float32 of shape (K * ``plan.scalars``,), of one level where there are several.
    """
    every = aggregate(replies, rule=rule, liars=liars)
    if plan.shares == 1:
        return every
    record = np.zeros((plan.steps, plan.scalars), np.float32)
    record[:, plan.projected :] = every.reshape(plan.steps, -1)[:, plan.perturbations :]
    for share in range(plan.shares):
        own = {number: reply for number, reply in replies.items() if plan.share_of(number) == share}
        if own:
            found = aggregate(own, rule=rule, liars=liars).reshape(plan.steps, -1)
            record[:, plan.numbers(share)] = found[:, : plan.perturbations]
    return record.reshape(-1)


def tolerated(agents: int, liars: float) -> int:
    """Return how many of so many agents may lie: their share, rounded up, but less than half of them."""
    return min(math.ceil(agents * liars - 1e-9), (agents - 1) // 2)


def mean_of_packs(replies: Mapping[int, Reply], packs: Sequence[Pack]) -> NDArray[np.float32]:
    """Return what :func:`aggregate` returns by the mean, with as little adding as can be.

    Args:
        replies: As for :func:`aggregate`.
        packs: The sum of one counts if every reply in it is among ``replies``: the very object, since an
            agent may have said two things.
    """
    rest = dict(replies)
    parts = []
    for pack in packs:
        own = dict(pack.replies)
        once = len(own) == len(pack.replies)
        if pack.partial is not None and once and all(rest.get(agent) is own[agent] for agent in own):
            parts.append(pack.partial)
            for agent in own:
                del rest[agent]
    if rest:
        rows = np.stack([reply.scalars for reply in rest.values()])
        parts.append(Partial.of(rows, np.array([reply.samples for reply in rest.values()])))
    return Partial.joined(parts).mean().astype(np.float32)


def mean_loss(replies: Mapping[int, Reply]) -> float:
    """Return the mean loss over the samples of all replies."""
    samples = sum(reply.samples for reply in replies.values())
    return math.fsum(reply.samples * reply.loss for reply in replies.values()) / samples


def _mean(rows: _Matrix, samples: _Matrix, _liars: int) -> _Matrix:
    """Return the mean of the rows, each weighted by its samples.

    The products are exact: 24 bits of a scalar times 16 bits of a count.
    """
    total = math.fsum(samples)
    return np.array([math.fsum(column) / total for column in (rows * samples[:, None]).T.tolist()])


def _median(rows: _Matrix, _samples: _Matrix, _liars: int) -> _Matrix:
    """Return the median of each scalar over the agents.

    Source: Yin et al., "Byzantine-Robust Distributed Learning", 2018, definition 1.
    """
    return np.median(rows, axis=0)


def _trimmed(rows: _Matrix, _samples: _Matrix, liars: int) -> _Matrix:
    """Return the mean of each scalar without its ``liars`` smallest and largest values.

    Source: Yin et al., "Byzantine-Robust Distributed Learning", 2018, definition 2.
    """
    kept = np.sort(rows, axis=0)[liars : len(rows) - liars]
    return np.array([math.fsum(column) / len(column) for column in kept.T.tolist()])


def _krum(rows: _Matrix, _samples: _Matrix, liars: int) -> _Matrix:
    """Return the mean of the n - f rows that lie nearest to their n - f - 2 neighbours (multi-Krum).

    Source: Blanchard et al., "Machine Learning with Adversaries", 2017, section 4 and the variant of 6.
    """
    count = len(rows)
    if count < 3:
        return _median(rows, _samples, liars)
    squares = np.array([((rows - row) ** 2).sum(axis=1) for row in rows])
    near = np.sort(squares, axis=1)[:, 1 : 1 + max(1, count - liars - 2)]  # without the row itself
    kept = rows[np.sort(np.argsort(near.sum(axis=1), kind="stable")[: count - liars])]
    return np.array([math.fsum(column) / len(column) for column in kept.T.tolist()])


RULES: Mapping[str, Callable[[_Matrix, _Matrix, int], _Matrix]] = {
    "mean": _mean,
    "median": _median,
    "trimmed": _trimmed,
    "krum": _krum,
}
"""Every way to aggregate, by its name in the experiment file."""
