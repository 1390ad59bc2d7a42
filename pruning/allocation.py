"""Allocation: from layer densities to widths that meet a budget.

Knows counts of units, parameters and multiply-accumulates. Does not know torch, nor where a density comes
from.

A layer between groups a and b keeps the fraction a * b of its weights when the groups keep the fractions a
and b of their units. Densities of all layers are met as well as possible in the sense of least squares of
the logarithms; then all widths together move until the budget is met, and are rounded.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from profiles.errors import ModelError
from pruning.structure import Structure

__all__ = ["Allocation", "Spend", "allocate", "fractions_from_densities"]

_FAR = 1.5
Spend = Callable[[Mapping[str, int]], float]
"""What a net at given widths costs; it must not fall when a width grows."""


@dataclass(frozen=True)
class Allocation:
    """Widths that meet a budget.

    Attributes:
        widths: One per group.
        spent: What they cost, at most ``budget``.
        budget: What they were allowed to cost.
        multiple: All widths are divisible by it, except those of the dense or narrowest net.
    """

    widths: dict[str, int]
    spent: float
    budget: float
    multiple: int


def fractions_from_densities(
    structure: Structure, densities: Mapping[str, float], *, weights: Mapping[str, float] | None = None
) -> dict[str, float]:
    """Return the fraction of its units that each group keeps, so that layers have about these densities.

    Solves min sum_l c_l (sum_g n_lg log a_g - log rho_l)^2 subject to a_g <= 1, where n_lg counts the axes
    of layer l that follow group g, by projected coordinate descent. A group that no density speaks of
    gets the mean of the others.

    Args:
        structure: The net.
        densities: Fraction that stays, in (0, 1], per layer; layers may be missing.
        weights: c_l, 1 where missing.
    """
    names = [group.name for group in structure.groups]
    layers = [layer for layer in structure.layers if layer.name in densities and layer.groups]
    rows = np.zeros((len(layers), len(names)))
    for row, layer in zip(rows, layers, strict=True):
        for group in layer.groups:
            row[names.index(group)] = 1 if _depthwise(layer.groups) else row[names.index(group)] + 1
    wanted = np.array([-math.log(densities[layer.name]) for layer in layers])
    scale = np.sqrt([1.0 if weights is None else weights.get(layer.name, 1.0) for layer in layers])
    shrunk = _nonnegative_least_squares(rows * scale[:, None], wanted * scale)
    spoken = rows.any(axis=0)
    if spoken.any():
        shrunk[~spoken] = shrunk[spoken].mean()
    return {name: float(math.exp(-value)) for name, value in zip(names, shrunk, strict=True)}


def allocate(
    structure: Structure,
    fractions: Mapping[str, float],
    *,
    spend: Spend,
    budget: float,
    unit: str = "",
    multiple: int = 4,
    tolerance: float = 0.01,
    try_all: int = 4,
) -> Allocation:
    """Scale the fractions together until the widths cost ``budget``, and round them.

    Args:
        structure: The net.
        fractions: Fraction of units that each group would like to keep, > 0.
        spend: Cost of a net at given widths, in the unit of the budget.
        budget: The most that may be spent.
        unit: What is spent, for messages.
        multiple: Round widths to multiples of it (and of the norm groups). Where no such widths come
            within ``tolerance`` under the budget, its halves are tried too, down to 1.
        tolerance: Relative gap under the budget at which the search ends.
        try_all: Up to so many groups, all combinations of widths near the wanted ones are compared; 0
            where ``spend`` is slow.

    Returns:
        The widths of the coarsest multiple that come within the tolerance and keep near the wanted ones;
        if none do, those that spend most without exceeding the budget.

    Raises:
        ModelError: Even the narrowest net costs more than the budget.
    """
    least = spend(structure.narrowest)
    if budget < least:
        raise ModelError(
            f"the budget of {budget:,.0f} {unit} is below the narrowest net, which needs {least:,.0f}",
            hint=f"Allow at least {math.ceil(least):,}, or choose a smaller model.",
        )
    if spend(structure.dense) <= budget:
        return Allocation(structure.dense, spend(structure.dense), budget, 1)
    ideal = _scale_to_budget(structure, fractions, spend, budget)
    best: Allocation | None = None
    grid = max(1, multiple)
    while True:
        widths = _round(structure, ideal, spend, budget, grid, tolerance, try_all)
        if widths is not None:
            found = Allocation(widths, spend(widths), budget, grid)
            if found.spent >= budget * (1 - tolerance) and _near(widths, ideal):
                return found
            if best is None or found.spent > best.spent:
                best = found
        if grid == 1:
            break
        grid //= 2
    return best if best is not None else Allocation(structure.narrowest, least, budget, 1)


def _depthwise(groups: tuple[str, ...]) -> bool:
    return len(groups) == 1


def _nonnegative_least_squares(
    rows: NDArray[np.float64], wanted: NDArray[np.float64], sweeps: int = 2000
) -> NDArray[np.float64]:
    """Minimise ||rows v - wanted||^2 over v >= 0; a small ridge makes the answer unique."""
    gram = rows.T @ rows + 1e-6 * np.eye(rows.shape[1])
    right = rows.T @ wanted
    v = np.zeros(rows.shape[1])
    for _ in range(sweeps):
        before = v.copy()
        for g in range(len(v)):
            v[g] = max(0.0, v[g] + (right[g] - gram[g] @ v) / gram[g, g])
        if np.abs(v - before).max() < 1e-12:
            break
    return v


def _scale_to_budget(
    structure: Structure, fractions: Mapping[str, float], spend: Spend, budget: float
) -> dict[str, float]:
    """Return real-valued widths, all fractions times one factor, whose net spends the budget."""

    def at(factor: float) -> dict[str, float]:
        return {
            g.name: min(float(g.width), max(float(g.minimum), g.width * fractions[g.name] * factor))
            for g in structure.groups
        }

    low, high = 0.0, 1.0 / min(fractions.values())
    for _ in range(60):
        middle = (low + high) / 2
        if spend(_whole(at(middle))) > budget:
            high = middle
        else:
            low = middle
    return at(low)


def _whole(widths: Mapping[str, float]) -> dict[str, int]:
    return {name: round(width) for name, width in widths.items()}


def _round(
    structure: Structure,
    ideal: Mapping[str, float],
    spend: Spend,
    budget: float,
    multiple: int,
    tolerance: float,
    try_all: int,
) -> dict[str, int] | None:
    """Return legal widths near the ideal ones that cost at most the budget and nearly all of it."""
    ladders = {g.name: _ladder(g.width, g.minimum, math.lcm(multiple, g.multiple)) for g in structure.groups}
    if len(ladders) <= try_all:
        return _nearest(ladders, ideal, spend, budget, tolerance)
    return _greedy(ladders, ideal, spend, budget, tolerance)


def _near(widths: Mapping[str, int], ideal: Mapping[str, float]) -> bool:
    """Return whether no width is further from its ideal one than half as much again."""
    return all(1 / _FAR <= width / ideal[name] <= _FAR for name, width in widths.items())


def _nearest(
    ladders: Mapping[str, list[int]],
    ideal: Mapping[str, float],
    spend: Spend,
    budget: float,
    tolerance: float,
) -> dict[str, int] | None:
    """Try all combinations of the six legal widths around each ideal one."""
    choices = []
    for name, ladder in ladders.items():
        below = sum(width <= ideal[name] + 1e-9 for width in ladder)
        choices.append(ladder[max(0, below - 3) : below + 3])
    best: dict[str, int] | None = None
    merit = -math.inf
    for combination in itertools.product(*choices):
        widths = dict(zip(ladders, combination, strict=True))
        gap = 1 - spend(widths) / budget
        if gap < 0:
            continue
        distance = sum(math.log(width / ideal[name]) ** 2 for name, width in widths.items())
        found = -distance - (1e3 * gap if gap > tolerance else 0.0)
        if found > merit:
            best, merit = widths, found
    return best


def _greedy(
    ladders: Mapping[str, list[int]],
    ideal: Mapping[str, float],
    spend: Spend,
    budget: float,
    tolerance: float,
) -> dict[str, int] | None:
    """Round down, then spend what is left where the shortfall is largest."""
    place = {
        name: max([i for i, w in enumerate(ladder) if w <= ideal[name] + 1e-9], default=0)
        for name, ladder in ladders.items()
    }

    def cost(steps: Mapping[str, int]) -> float:
        return spend({name: ladders[name][i] for name, i in steps.items()})

    def excess(name: str) -> float:
        return ladders[name][place[name]] / ideal[name]

    while cost(place) > budget:  # where minima were rounded up, take it from the others
        wide = [name for name in place if place[name] > 0]
        if not wide:
            return None
        place[max(wide, key=excess)] -= 1
    grown = True
    while grown and cost(place) < budget * (1 - tolerance):
        grown = False
        for name in sorted(place, key=excess):
            trial = {**place, name: place[name] + 1}
            if trial[name] < len(ladders[name]) and cost(trial) <= budget:
                place, grown = trial, True
                break
    current = cost(place)
    while current < budget * (1 - tolerance):  # one step up against one or two down elsewhere
        trials = [
            {**place, up: place[up] + 1, down: place[down] - count}
            for up, down, count in itertools.product(place, place, (1, 2))
            if up != down and place[down] >= count and place[up] + 1 < len(ladders[up])
        ]
        better = [(spent, i) for i, trial in enumerate(trials) if current < (spent := cost(trial)) <= budget]
        if not better:
            break
        current, chosen = max(better)
        place = trials[chosen]
    return {name: ladders[name][i] for name, i in place.items()}


def _ladder(width: int, minimum: int, multiple: int) -> list[int]:
    """Return the legal widths of a group, ascending: the minimum, the multiples, and the dense width."""
    steps = range(math.ceil(minimum / multiple) * multiple, width, multiple)
    return sorted({minimum, *steps, width})
