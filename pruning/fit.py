"""Fitting: the allowance under which a net's training stays within a board's memory.

Knows how to ask :mod:`profiles.budget` what a net at given widths will need, by exporting it. Does not
know how widths are chosen.
"""

from collections.abc import Mapping, Sequence

from profiles.budget import predict_peak_mib
from profiles.cost import graph_cost
from pruning.export import export_graph
from pruning.models import build_model, choose_model, model_structure
from pruning.prune import Allowance

__all__ = ["fit_memory"]


def fit_memory(
    allowed_mib: float,
    name: str,
    *,
    sample_shape: tuple[int, ...],
    classes: int,
    hidden: Sequence[int] | None = None,
    batch_size: int = 32,
    curvature_bytes_per_param: float = 0.0,
    threads: int = 1,
    data_bytes: int = 0,
) -> Allowance:
    """Return an allowance of the agent's predicted peak memory, in MiB.

    Args:
        allowed_mib: What the board's profile allows.
        name: One of :data:`pruning.models.MODELS`.
        sample_shape: Shape of one input.
        classes: Number of classes.
        hidden: Dense widths of the hidden layers of ``mlp``.
        batch_size: Samples of one forward pass.
        curvature_bytes_per_param: Optimizer state, see :func:`profiles.budget.predict_peak_mib`.
        threads: Of the forward pass.
        data_bytes: What the board's samples take.
    """
    model = choose_model(name, sample_shape=sample_shape)
    structure = model_structure(model, sample_shape=sample_shape, classes=classes, hidden=hidden)
    known: dict[tuple[int, ...], float] = {}

    def spend(widths: Mapping[str, int]) -> float:
        # While it looks for the right scale, the allocation asks for widths between the legal ones.
        widths = {g.name: -(-widths[g.name] // g.multiple) * g.multiple for g in structure.groups}
        key = tuple(widths.values())
        if key not in known:
            net = build_model(
                model,
                sample_shape=sample_shape,
                classes=classes,
                widths=widths,
                hidden=hidden,
            )
            graph = export_graph(net, sample_shape=sample_shape, classes=classes, verify=False).graph
            known[key] = predict_peak_mib(
                graph_cost(graph),
                batch_size=batch_size,
                curvature_bytes_per_param=curvature_bytes_per_param,
                threads=threads,
                data_bytes=data_bytes,
                graph_bytes=len(graph),
            ).total_mib
        return known[key]

    return Allowance("MiB of predicted peak memory", allowed_mib, spend, tolerance=0.005)
