"""Pretrained nets and the boards' scores of their units, as the command line names them.

Knows which net a command line means, and that scores count for one gated bundle alone. Does not know how a
board scores, nor how widths follow from scores.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from coordinator.rebuild import rebuild_run
from edge_agent.bundle import Bundle
from edge_agent.scores import read_scores
from profiles.cost import graph_cost
from profiles.errors import ConfigError

if TYPE_CHECKING:
    from pruning.pretrained import Pretrained

__all__ = ["find_pretrained", "is_run", "sum_scores", "write_gates"]


def is_run(model: str) -> bool:
    """Return whether a model is named by the folder of a run."""
    return (Path(model) / "log.sqlite").is_file()


def find_pretrained(model: str, *, sample_shape: tuple[int, ...], classes: int, seed: int) -> "Pretrained":
    """Return the pretrained net that a command line means.

    Args:
        model: The folder of a run, whose last round's weights are meant, or ``FILE.py:FUNCTION``.
        sample_shape: Shape of one input; a run knows its own.
        classes: Number of classes; a run knows its own.
        seed: For what the function draws.

    Raises:
        ConfigError: It is neither.
        LogError: The run's log cannot be read or replayed, and so on for its bundle.
        ModelError: The net cannot be used.
    """
    from pruning.pretrained import load_pretrained, rebuild_pretrained

    if is_run(model):
        bundle, replica = rebuild_run(Path(model))
        return rebuild_pretrained(bundle, replica.weights)
    if ":" not in model:
        raise ConfigError(
            f"{model} names no pretrained net",
            hint="Give the folder of a run, or FILE.py:FUNCTION whose module carries its weights.",
        )
    return load_pretrained(model, sample_shape=sample_shape, classes=classes, seed=seed)


def write_gates(net: "Pretrained", folder: Path, *, draws: int, seed: int) -> Bundle:
    """Write the gated bundle of a net: equal nets, draws and seeds give one with the same identity.

    Args:
        net: With its weights.
        folder: Made if it is not there.
        draws: Perturbations by which every board scores.
        seed: Names these.
    """
    from pruning.gates import export_gated_bundle

    return export_gated_bundle(
        net.module,
        folder,
        net.found.structure,
        model=net.name,
        sample_shape=net.sample_shape,
        classes=net.classes,
        cost=lambda graph: graph_cost(graph).as_dict(),
        draws=draws,
        seed=seed,
    )


def sum_scores(
    net: "Pretrained", paths: Sequence[Path], *, draws: int, seed: int
) -> tuple[NDArray[np.float32], dict[str, Any]]:
    """Return the scores over all boards' samples, in the order of the net's gates, and what they are of.

    Args:
        net: As it was when ``scalarfed gates`` wrote its gated bundle.
        paths: Files of boards, or folders of such files.
        draws: As in :func:`write_gates`, and so is the following.
        seed: Names the perturbations.

    Raises:
        ConfigError: There is no file, or one belongs to another gated bundle.
        DataError: A file holds no scores.
        EstimateError: A board's scores do not fit the others'.
    """
    from pruning.federated import sum_gate_scores

    files = [file for path in paths for file in (sorted(path.glob("*.json")) if path.is_dir() else [path])]
    if not files:
        raise ConfigError(
            f"no file of scores in {', '.join(map(str, paths))}",
            hint="Copy the boards' files there; their names end in .json.",
        )
    if doubled := sorted({str(file) for file in files if files.count(file) > 1}):
        raise ConfigError(f"{', '.join(doubled)} is given twice", hint="Each board counts once.")
    boards = {str(file): read_scores(file) for file in files}
    with tempfile.TemporaryDirectory() as folder:
        gated = write_gates(net, Path(folder), draws=draws, seed=seed)
    for name, board in boards.items():
        if board.gated != gated.identity:
            raise ConfigError(
                f"{name} has the scores of another gated bundle: {board.gated[:16]} of {board.model}, and "
                f"{net.name} as it is now, with draws = {draws} and seed = {seed}, makes "
                f"{gated.identity[:16]}",
                hint="Give the MODEL, --draws and --seed with which `scalarfed gates` was called, or score "
                "the net as it is now, by this release, on the boards.",
            )
    total = sum_gate_scores([(name, board.found) for name, board in boards.items()])
    samples = sum(board.found.samples for board in boards.values())
    return total, {"gated": gated.identity, "boards": len(boards), "samples_scored": samples}
