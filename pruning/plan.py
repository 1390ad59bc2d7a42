"""The widths and masks that a method gives a net under a budget.

Knows the methods by their names, and which saliency, search or factor each of them is. Does not know how a
net is rebuilt, exported or described.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import nn

from profiles.errors import ModelError
from pruning.allocation import Spend, allocate, fractions_from_densities
from pruning.baselines import ALL_SCORES, ONE_SHOT
from pruning.conditioning import evenness, seek_widths
from pruning.masks import Masks, densities_of, schedule
from pruning.saliency import Probe
from pruning.structure import Structure
from pruning.threads import one_thread
from pruning.weights import Moments, derive_seed

__all__ = ["METHODS", "Allowance", "check_method", "find_masks", "plan_widths", "widths_by_scores"]

METHODS = ("none", "uniform", "ntk-widths", *ALL_SCORES)
"""Names of all methods: none, one factor for all widths, the evenest kernel, and every saliency."""


@dataclass(frozen=True)
class Allowance:
    """What a narrow net may cost.

    Attributes:
        unit: ``params``, ``macs`` (of one sample's forward), or what ``spend`` counts.
        amount: The most that may be spent.
        spend: Cost of a net at given widths; follows from the unit where it is ``params`` or ``macs``.
        tolerance: Relative gap under the amount that counts as met.
    """

    unit: str
    amount: float
    spend: Spend | None = None
    tolerance: float = 0.01

    def __post_init__(self) -> None:
        if (self.spend is None) != (self.unit in ("params", "macs")):
            raise ValueError(f"an allowance of {self.unit!r} and spend={self.spend} do not go together")


def check_method(method: str) -> None:
    """Raise ModelError unless ``method`` is one of METHODS."""
    if method not in METHODS:
        raise ModelError(
            f"pruning method {method!r} is unknown", hint=f"Known methods: {', '.join(METHODS)}."
        )


def plan_widths(
    structure: Structure,
    probe: Callable[[], Probe],
    build: Callable[[Mapping[str, int]], nn.Module],
    *,
    sample_shape: tuple[int, ...],
    draws: int = 5,
    name: str,
    method: str,
    density: float = 0.5,
    allowance: Allowance | None = None,
    steps: int = 20,
    seed: int = 0,
    densities: Mapping[str, float] | None = None,
    moments: Moments | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, int], dict[str, float]]:
    """Return the widths that a method gives a net, and the layer densities that its saliency found.

    Args:
        structure: The net's groups.
        probe: Makes the probe; called only where the method has a saliency.
        build: Makes the net at given widths; called only where the method looks at narrow nets.
        sample_shape: Shape of one input.
        draws: See :func:`prune_model`.
        name: The net's name, for messages.
        method: One of METHODS.
        density: See :func:`prune_model`, and so are the following.
        allowance: What the narrow net may cost.
        steps: Cuts of the schedule.
        seed: Names the widths of method ``random``.
        densities: See :func:`prune_model`.
        moments: Mean and deviation of the net's inputs; 0 and 1 if None.
        progress: Called with the cuts done and all cuts.
    """
    widths = structure.dense
    if method == "none":
        return widths, {}
    allowed = _allowance_of_density(structure, name, density) if allowance is None else allowance
    spend = allowed.spend or getattr(structure, allowed.unit)
    if spend(widths) <= allowed.amount:
        return widths, {}
    if densities is not None:
        found = dict(densities)
        return _allocate(structure, fractions_from_densities(structure, found), spend, allowed), found
    widths = _allocate(structure, dict.fromkeys(widths, 1.0), spend, allowed)
    if method == "uniform":
        return widths, {}
    if method == "random":
        return _allocate(structure, _random_fractions(structure, seed), spend, allowed), {}
    if method == "ntk-widths":
        with one_thread():
            chosen = seek_widths(
                structure,
                lambda fractions: _allocate(structure, fractions, spend, allowed),
                lambda widths: evenness(
                    build, widths, sample_shape=sample_shape, draws=draws, seed=seed, moments=moments
                ),
                progress=progress,
            )
        return chosen, {}
    unit = "macs" if allowed.unit == "macs" else "params"
    count = getattr(structure, unit)
    found = densities_of(
        find_masks(
            probe(),
            method=method,
            density=count(widths) / count(structure.dense),
            steps=steps,
            costs={t.name: t.positions for t in structure.layers} if unit == "macs" else None,
            progress=progress,
        )
    )
    return _allocate(structure, fractions_from_densities(structure, found), spend, allowed), found


def widths_by_scores(
    structure: Structure,
    scores: Mapping[str, NDArray[np.float32]],
    *,
    name: str,
    density: float = 0.5,
    allowance: Allowance | None = None,
) -> dict[str, int]:
    """Return the widths at which the units with the highest scores for their cost stay.

    A unit costs what the net gets smaller by without it: multiply-accumulates where these are allowed, else
    parameters. Over all groups, units stay from the highest ratio down until the allowance is spent; then the
    widths are rounded, see :func:`pruning.allocation.allocate`.

    Args:
        structure: The dense net's groups.
        scores: One per unit of each group.
        name: The net's name, for messages.
        density: Fraction of the parameters that stays; not used where there is an allowance.
        allowance: What the narrow net may cost.

    Raises:
        ModelError: See :func:`plan_widths`.
    """
    allowed = _allowance_of_density(structure, name, density) if allowance is None else allowance
    spend = allowed.spend or getattr(structure, allowed.unit)
    dense = structure.dense
    if spend(dense) <= allowed.amount:
        return dense
    count = structure.macs if allowed.unit == "macs" else structure.params
    worth = {}
    for group in structure.groups:
        fewer = {**dense, group.name: group.width - 1}
        worth[group.name] = np.asarray(scores[group.name], np.float64) / (count(dense) - count(fewer))
    order = np.sort(np.concatenate(list(worth.values())))[::-1]

    def standing(units: int) -> dict[str, int]:
        floor = order[units - 1]
        return {g.name: max(g.minimum, int((worth[g.name] >= floor).sum())) for g in structure.groups}

    low, high = 1, len(order)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if spend(standing(middle)) <= allowed.amount else (low, middle - 1)
    fractions = {group: width / dense[group] for group, width in standing(low).items()}
    return _allocate(structure, fractions, spend, allowed)


def find_masks(
    probe: Probe,
    *,
    method: str,
    density: float,
    steps: int = 20,
    costs: Mapping[str, float] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Masks:
    """Return masks that keep ``density`` of a probe's prunable weights by the scores of a method.

    Args:
        probe: The net and its draws.
        method: One of :data:`pruning.baselines.ALL_SCORES`.
        density: Fraction that stays, in (0, 1], of the weights or of their cost.
        steps: Cuts of the schedule, for methods that follow one.
        costs: What a weight of each layer costs; 1 if None.
        progress: Called with the cuts done and all cuts.
    """
    with one_thread():
        return schedule(
            lambda masks, step: ALL_SCORES[method](probe, masks, step),
            probe.masks(),
            density,
            steps=1 if method in ONE_SHOT else steps,
            costs=costs,
            progress=progress,
        )


def _allowance_of_density(structure: Structure, name: str, density: float) -> Allowance:
    if not 0 < density <= 1:
        raise ModelError(
            f"density = {density} is outside (0, 1]", hint="Density is the fraction of parameters that stays."
        )
    total = structure.params(structure.dense)
    least = structure.params(structure.narrowest)
    if density * total < least:
        raise ModelError(
            f"density = {density} leaves {density * total:,.0f} of {total:,} parameters; the narrowest "
            f"`{name}` has {least:,}",
            hint=f"Choose a density of at least {math.ceil(least / total * 1e4) / 1e4}, or a smaller model.",
        )
    return Allowance("params", density * total)


def _allocate(
    structure: Structure, fractions: Mapping[str, float], spend: Spend, allowed: Allowance
) -> dict[str, int]:
    return allocate(
        structure,
        fractions,
        spend=spend,
        budget=allowed.amount,
        unit=allowed.unit,
        tolerance=allowed.tolerance,
        try_all=4 if allowed.spend is None else 0,
    ).widths


def _random_fractions(structure: Structure, seed: int) -> dict[str, float]:
    draw = np.random.default_rng(derive_seed("widths", seed))
    return {group.name: float(draw.uniform(0.1, 1.0)) for group in structure.groups}
