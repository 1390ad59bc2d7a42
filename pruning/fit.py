"""Fitting: the allowance under which a net's training stays within a board's memory.

Knows how to ask :mod:`profiles.budget` what a net at given widths will need, by exporting it. Does not
know how widths are chosen.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import nn

from profiles.budget import predict_peak_mib
from profiles.cost import graph_cost
from profiles.passes import runnable_passes
from pruning.export import export_graph, graph_passes, graph_variants
from pruning.models import build_model, choose_model, model_structure
from pruning.plan import Allowance
from pruning.structure import Structure

__all__ = ["MemoryBudget", "fit_memory", "fit_structure"]


@dataclass(frozen=True)
class MemoryBudget:
    """What training may hold on a board, and what decides how much it holds there, the net aside.

    Attributes:
        allowed_mib: Predicted peak memory of the agent, in MiB.
        batch_size: Samples of a batch.
        curvature_bytes_per_param: Optimizer state, see :func:`profiles.budget.predict_peak_mib`.
        threads: Of the forward pass.
        data_bytes: What the board's samples take.
        arch: Of the board, see :func:`profiles.passes.runnable_passes`, and so are the following.
        kernel: Whether it has the compiled kernel; None if it may.
        image_block: Channels that its processor lays out side by side.
    """

    allowed_mib: float
    batch_size: int = 32
    curvature_bytes_per_param: float = 0.0
    threads: int = 1
    data_bytes: int = 0
    arch: str = ""
    kernel: bool | None = None
    image_block: int | None = None


def fit_memory(
    budget: MemoryBudget,
    name: str,
    *,
    sample_shape: tuple[int, ...],
    classes: int,
    hidden: Sequence[int] | None = None,
    standardise: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None,
) -> Allowance:
    """Return an allowance of the agent's predicted peak memory, in MiB.

    Args:
        budget: Of the board.
        name: One of :data:`pruning.models.MODELS`.
        sample_shape: Shape of one input.
        classes: Number of classes.
        hidden: Dense widths of the hidden layers of ``mlp``.
        standardise: See :func:`pruning.models.build_model`: where there is nothing to do, a pass is smaller.
    """
    model = choose_model(name, sample_shape=sample_shape)
    return fit_structure(
        budget,
        model_structure(model, sample_shape=sample_shape, classes=classes, hidden=hidden),
        lambda widths: build_model(
            model,
            sample_shape=sample_shape,
            classes=classes,
            widths=widths,
            hidden=hidden,
            standardise=standardise,
        ),
        sample_shape=sample_shape,
        classes=classes,
    )


def fit_structure(
    budget: MemoryBudget,
    structure: Structure,
    build: Callable[[Mapping[str, int]], nn.Module],
    *,
    sample_shape: tuple[int, ...],
    classes: int,
) -> Allowance:
    """Return the allowance of :func:`fit_memory` for any net.

    Args:
        budget: Of the board.
        structure: The net's groups.
        build: Makes the net at given widths.
        sample_shape: Shape of one input.
        classes: Number of classes.
    """
    known: dict[tuple[int, ...], float] = {}

    def spend(widths: Mapping[str, int]) -> float:
        # While it looks for the right scale, the allocation asks for widths between the legal ones.
        widths = {g.name: -(-widths[g.name] // g.multiple) * g.multiple for g in structure.groups}
        key = tuple(widths.values())
        if key not in known:
            graph = export_graph(
                build(widths), sample_shape=sample_shape, classes=classes, verify=False
            ).graph
            known[key] = predict_peak_mib(
                graph_cost(graph),
                batch_size=budget.batch_size,
                passes=runnable_passes(
                    graph_passes(graph, graph_variants(graph)),
                    arch=budget.arch,
                    kernel=budget.kernel,
                    image_block=budget.image_block,
                ),
                curvature_bytes_per_param=budget.curvature_bytes_per_param,
                threads=budget.threads,
                data_bytes=budget.data_bytes,
                graph_bytes=len(graph),
            ).total_mib
        return known[key]

    return Allowance("MiB of predicted peak memory", budget.allowed_mib, spend, tolerance=0.005)
