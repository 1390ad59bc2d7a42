"""What ``scalarfed gates`` does: a pretrained net found, its gated bundle written whole or not at all.

Knows what the options mean together. Does not know what a gate is, nor the command line.
"""

from pathlib import Path
from typing import Any

from coordinator.gate_scores import find_pretrained, write_gates
from coordinator.out_folder import all_at_once, check_out
from coordinator.progress import Observer
from coordinator.prune_command import find_problem

__all__ = ["gates_to_bundle"]


def gates_to_bundle(
    model: str,
    out: Path,
    *,
    data: Path | None,
    shape: str | None,
    classes: int | None,
    draws: int,
    seed: int,
    observer: Observer,
) -> dict[str, Any]:
    """Write a gated bundle, and return what it is.

    Args:
        model: The folder of a run, or ``FILE.py:FUNCTION`` whose module carries its weights.
        out: The gated bundle's folder.
        data: An ``.npz`` of samples, for the shape and the classes.
        shape: Shape of a sample, such as ``1x28x28``.
        classes: Number of classes.
        draws: Perturbations by which every board scores.
        seed: Names these.
        observer: Is told how it goes on.

    Raises:
        ConfigError: Options contradict each other or are missing, or the model is no pretrained net.
        ModelError: The net cannot be used.
        DataError: The data file is missing or malformed.
    """
    check_out(out)
    problem = find_problem(model, data=data, shape=shape, classes=classes)
    observer.stage(f"gates of {model}")
    net = find_pretrained(model, sample_shape=problem.sample_shape, classes=problem.classes, seed=seed)
    with all_at_once(out) as folder:
        bundle = write_gates(net, folder, draws=draws, seed=seed)
    units = dict(bundle.pruning["gates"])
    passes = (1 + draws) * (1 + sum(units.values()))
    for name, why in net.found.left_whole.items():
        observer.line(f"{name} keeps its width: {why}")
    observer.line(f"gates {', '.join(f'{name} {width}' for name, width in units.items())}")
    observer.line(f"a board takes {passes:,} forward passes of its samples")
    observer.line(f"gated bundle {out}, {bundle.identity[:16]}")
    return {
        "gated": str(out),
        "identity": bundle.identity,
        "gates": units,
        "forwards": passes,
        "left_whole": dict(net.found.left_whole),
    }
