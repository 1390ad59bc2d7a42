"""Pruning before training, in one call: saliency, widths, a narrower net with fresh weights.

Knows in which order the parts are called and what the result says of itself. Does not know data, boards or
how a net is trained.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edge_agent.bundle import Bundle
from profiles.errors import ModelError
from pruning.allocation import Spend, allocate, fractions_from_densities
from pruning.baselines import ALL_SCORES, ONE_SHOT
from pruning.conditioning import evenness, seek_widths
from pruning.export import export_bundle, export_graph
from pruning.masks import Masks, densities_of, schedule
from pruning.models import build_model, choose_model, model_structure
from pruning.saliency import Probe, make_probe
from pruning.structure import Structure
from pruning.threads import one_thread
from pruning.weights import derive_seed

__all__ = [
    "METHODS",
    "Allowance",
    "Pruned",
    "check_method",
    "describe_pruned",
    "find_masks",
    "plan_widths",
    "prune_model",
    "standardised",
    "write_pruned",
]

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


@dataclass(frozen=True)
class Pruned:
    """A net made narrower.

    Attributes:
        module: The narrow net, in evaluation mode.
        dense: The net that it was.
        sample_shape: Shape of one input.
        classes: Number of classes.
        model: Its name, never ``auto``.
        method: One of METHODS.
        density: Fraction of the parameters that was asked to stay; with another allowance, that did stay.
        seed: Names the saliency's draws and the fresh weights.
        widths_dense: Units per group before.
        widths: Units per group after.
        params_dense: Trainable values before.
        params: Trainable values after.
        macs_dense: Multiply-accumulates of one sample's forward before.
        macs: The same after.
        densities: Fraction that the saliency left standing, per layer; empty without a saliency.
        kept: Fraction of its weights that stays of each layer, at the new widths.
        left_whole: Layers whose outputs keep their width since tracing could not follow them, and why.
    """

    module: nn.Module
    dense: nn.Module
    sample_shape: tuple[int, ...]
    classes: int
    model: str
    method: str
    density: float
    seed: int
    widths_dense: dict[str, int]
    widths: dict[str, int]
    params_dense: int
    params: int
    macs_dense: int
    macs: int
    densities: dict[str, float]
    kept: dict[str, float] = field(default_factory=dict)
    left_whole: dict[str, str] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """Return what a manifest or a report says of the pruning, as plain values."""
        left_out = ("module", "dense", "sample_shape", "classes", "left_whole")
        facts = {key: value for key, value in vars(self).items() if key not in left_out}
        return facts | ({"left_whole": self.left_whole} if self.left_whole else {})


def prune_model(
    name: str,
    *,
    sample_shape: tuple[int, ...],
    classes: int,
    method: str = "uniform",
    density: float = 0.5,
    allowance: Allowance | None = None,
    draws: int = 5,
    schedule_steps: int = 20,
    seed: int = 0,
    hidden: Sequence[int] | None = None,
    standardise: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None,
    labelled: tuple[NDArray[np.float32], NDArray[np.int64]] | None = None,
    densities: Mapping[str, float] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Pruned:
    """Return a reference net that keeps ``density`` of its parameters, as narrower layers.

    Args:
        name: One of :data:`pruning.models.MODELS`.
        sample_shape: (features,) or (channels, height, width).
        classes: Number of classes.
        method: One of METHODS.
        density: Fraction of the parameters that stays, in (0, 1]; not used where there is an allowance.
        allowance: What the narrow net may cost; ``density`` of the parameters if None. Under one of
            ``macs`` the saliency of a weight counts per multiply-accumulate.
        draws: Independent draws per step of the schedule.
        schedule_steps: Cuts until the density is reached.
        seed: Names all draws and the fresh weights.
        hidden: Dense widths of the hidden layers of ``mlp``.
        standardise: Offset and scale of the net's first layer, see
            :func:`pruning.models.standardisation`; the identity if None.
        labelled: Raw inputs and labels for ``snip`` and ``grasp``.
        densities: Fraction that stays of each layer, as ``method`` found it elsewhere.
        progress: Called with the cuts done and all cuts.

    Raises:
        ModelError: The density is outside (0, 1], the allowance is below the narrowest net (the message has
            the minimum), the method needs labelled samples, or the net cannot be built for this input or
            output.
    """
    if densities is None:
        check_method(method)
    name = choose_model(name, sample_shape=sample_shape)
    structure = model_structure(name, sample_shape=sample_shape, classes=classes, hidden=hidden)
    plain = build_model(name, sample_shape=sample_shape, classes=classes, hidden=hidden, seed=seed)
    widths, densities = plan_widths(
        structure,
        lambda: make_probe(
            plain,
            sample_shape=sample_shape,
            draws=draws,
            seed=seed,
            labelled=None if labelled is None else standardised(labelled, standardise, classes),
        ),
        lambda widths: build_model(
            name, sample_shape=sample_shape, classes=classes, widths=widths, hidden=hidden
        ),
        sample_shape=sample_shape,
        draws=draws,
        name=name,
        method=method,
        density=density,
        allowance=allowance,
        steps=schedule_steps,
        seed=seed,
        densities=densities,
        progress=progress,
    )
    module = build_model(
        name,
        sample_shape=sample_shape,
        classes=classes,
        widths=widths,
        hidden=hidden,
        standardise=standardise,
        seed=seed,
    )
    return describe_pruned(
        module,
        plain,
        structure,
        widths,
        sample_shape=sample_shape,
        classes=classes,
        name=name,
        method=method,
        density=density if allowance is None else None,
        seed=seed,
        densities=densities,
    )


def describe_pruned(
    module: nn.Module,
    dense: nn.Module,
    structure: Structure,
    widths: Mapping[str, int],
    *,
    sample_shape: tuple[int, ...],
    classes: int,
    name: str,
    method: str,
    density: float | None,
    seed: int,
    densities: Mapping[str, float],
    left_whole: Mapping[str, str] | None = None,
) -> Pruned:
    """Return a narrow net with what is counted of it before and after.

    Args:
        module: The narrow net.
        dense: The net that it was.
        structure: Of the dense net.
        widths: Of the narrow net.
        sample_shape: As in :class:`Pruned`, and so are the following.
        classes: Number of classes.
        name: The model.
        method: One of METHODS.
        density: Fraction of the parameters that was asked to stay; None where something else was asked.
        seed: Named the draws and the fresh weights.
        densities: What the saliency left of each layer.
        left_whole: Layers that keep their width.
    """
    before, after = structure.params(structure.dense), structure.params(widths)
    return Pruned(
        module=module,
        dense=dense,
        sample_shape=tuple(sample_shape),
        classes=classes,
        model=name,
        method=method,
        density=after / before if density is None or method == "none" else density,
        seed=seed,
        widths_dense=structure.dense,
        widths=dict(widths),
        params_dense=before,
        params=after,
        macs_dense=structure.macs(structure.dense),
        macs=structure.macs(widths),
        densities=dict(densities),
        kept={t.name: t.size(widths) / t.size(structure.dense) for t in structure.layers},
        left_whole=dict(left_whole or {}),
    )


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
                lambda widths: evenness(build, widths, sample_shape=sample_shape, draws=draws, seed=seed),
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


def write_pruned(pruned: Pruned, folder: Path, *, cost: Callable[[bytes], Mapping[str, int]]) -> Bundle:
    """Export the narrow net as a bundle whose manifest compares it with the dense net.

    Args:
        pruned: What :func:`prune_model` returned.
        folder: Where the bundle goes.
        cost: Reads an ONNX file and returns what its forward takes, ``forward_flops`` among it; also used
            on the dense net, for ``pruning.forward_flops_dense`` and so on.
    """
    shape, classes = pruned.sample_shape, pruned.classes
    graph = export_graph(pruned.dense, sample_shape=shape, classes=classes, verify=False).graph
    before = {f"{key}_dense": value for key, value in cost(graph).items()}
    before["graph_bytes_dense"] = len(graph)
    return export_bundle(
        pruned.module,
        folder,
        model=pruned.model,
        sample_shape=shape,
        classes=classes,
        pruning={**pruned.summary(), **before},
        cost=cost,
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


def standardised(
    labelled: tuple[NDArray[np.float32], NDArray[np.int64]],
    standardise: tuple[NDArray[np.float32], NDArray[np.float32]] | None,
    classes: int,
) -> tuple[Tensor, Tensor]:
    """Return labelled samples as tensors that a net without standardisation takes.

    Args:
        labelled: Raw inputs (n, *sample_shape) and labels (n,).
        standardise: Offset and scale per feature or channel; the identity if None.
        classes: Number of classes.

    Raises:
        ModelError: The numbers differ, or a label is no class.
    """
    inputs, labels = labelled
    if len(labels) != len(inputs) or len(labels) == 0 or labels.min() < 0 or labels.max() >= classes:
        raise ModelError(
            f"{len(inputs)} inputs and {len(labels)} labels do not make samples of {classes} classes",
            hint="Give one label from 0 to classes - 1 per input.",
        )
    if standardise is not None:
        offset, scale = (np.reshape(v, (-1, *(1,) * (inputs.ndim - 2))) for v in standardise)
        inputs = (inputs - offset) * scale
    return torch.from_numpy(np.ascontiguousarray(inputs, np.float32)), torch.from_numpy(
        labels.astype(np.int64)
    )
