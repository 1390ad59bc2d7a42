"""Pruning before training, in one call: saliency, widths, a narrower net with fresh weights.

Knows in which order the parts are called and what the result says of itself. Does not know how a method
chooses widths, data, boards or how a net is trained.
"""

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
from pruning.export import export_bundle, export_graph, graph_passes, graph_variants
from pruning.models import build_model, choose_model, model_structure
from pruning.plan import Allowance, check_method, plan_widths
from pruning.saliency import make_probe
from pruning.structure import Structure

__all__ = ["Pruned", "describe_pruned", "prune_model", "standardised", "write_pruned"]


@dataclass(frozen=True)
class Pruned:
    """A net made narrower.

    Attributes:
        module: The narrow net, in evaluation mode.
        dense: The net that it was.
        sample_shape: Shape of one input.
        classes: Number of classes.
        model: Its name, never ``auto``.
        method: One of :data:`pruning.plan.METHODS`.
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
        method: One of :data:`pruning.plan.METHODS`.
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
        method: One of :data:`pruning.plan.METHODS`.
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


def write_pruned(
    pruned: Pruned,
    folder: Path,
    *,
    cost: Callable[[bytes], Mapping[str, int]],
    facts: Mapping[str, Any] | None = None,
) -> Bundle:
    """Export the narrow net as a bundle whose manifest compares it with the dense net.

    Args:
        pruned: What :func:`prune_model` returned.
        folder: Where the bundle goes.
        cost: Reads an ONNX file and returns what its forward takes, ``forward_flops`` among it; also used
            on the dense net, for ``pruning.forward_flops_dense`` and so on.
        facts: What else the manifest says of the pruning.
    """
    shape, classes = pruned.sample_shape, pruned.classes
    graph = export_graph(pruned.dense, sample_shape=shape, classes=classes, verify=False).graph
    before: dict[str, Any] = {f"{key}_dense": value for key, value in cost(graph).items()}
    before |= {"graph_bytes_dense": len(graph), "passes_dense": graph_passes(graph, graph_variants(graph))}
    return export_bundle(
        pruned.module,
        folder,
        model=pruned.model,
        sample_shape=shape,
        classes=classes,
        pruning={**pruned.summary(), **before, **(facts or {})},
        cost=cost,
    )


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
