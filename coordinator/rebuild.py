"""The model of any round, rebuilt from a run folder and written as an ONNX file.

Knows bundle, scalar log and the layout of the graph. Does not train, and trusts nothing
that it has not compared.
"""

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from coordinator.scalar_log import ScalarLog
from edge_agent.bundle import Bundle, read_bundle
from edge_agent.replay import Replica, apply_record
from edge_agent.state import load_replica
from profiles.errors import DigestError, LogError, StateError

__all__ = ["CHECKPOINT", "rebuild", "rebuild_run", "resume_replica", "write_model"]

CHECKPOINT = "checkpoint.state"
"""Name of the file in a run folder that holds the replica of some round."""


def rebuild_run(run: Path, rounds: int | None = None) -> tuple[Bundle, Replica]:
    """Check a run folder's log and return its bundle with the replica after ``rounds`` rounds.

    Args:
        run: The run folder.
        rounds: From 0, the fresh net, to the length of the log; all where left out.

    Raises:
        LogError: There is no log, or it does not reach that far.
        BundleError: The bundle is not what its manifest says.
        DigestError: The log was altered, belongs to another bundle, or leads elsewhere than it says.
    """
    with ScalarLog.open(run / "log.sqlite") as log:
        bundle = read_bundle(run / "bundle")
        if log.meta().get("bundle") != bundle.identity:
            raise DigestError(
                f"The log of {run} belongs to bundle {log.meta().get('bundle')}, but {run / 'bundle'} is "
                f"{bundle.identity}."
            )
        log.verify()
        return bundle, rebuild(bundle, log, rounds)


def resume_replica(bundle: Bundle, log: ScalarLog, *, checkpoint: Path, run: str) -> Replica:
    """Return the replica after the whole log, from the checkpoint on if there is one that the log bears out.

    Raises:
        DigestError: A record leads elsewhere than it says.
    """
    try:
        found = load_replica(checkpoint, bundle.replica(), bundle_identity=bundle.identity, run=run)
    except StateError:
        found = None
    if found is None or not 0 < found.round <= len(log):
        return rebuild(bundle, log)
    (last,) = log.records(found.round - 1, found.round)
    if last.digest != found.digest():
        return rebuild(bundle, log)
    for record in log.records(found.round):
        apply_record(found, record)
    return found


def rebuild(bundle: Bundle, log: ScalarLog, rounds: int | None = None) -> Replica:
    """Return the replica after ``rounds`` rounds, or after the whole log if None, comparing every digest.

    Raises:
        DigestError: A record leads elsewhere than it says.
        LogError: The log does not reach that far.
    """
    length = len(log)
    stop = length if rounds is None else rounds
    if not 0 <= stop <= length:
        raise LogError(f"Round {stop} is not in the log, which has {length}.", hint=f"Choose 0 to {length}.")
    replica = bundle.replica()
    for record in log.records(0, stop):
        apply_record(replica, record)
    return replica


def write_model(bundle: Bundle, weights: NDArray[np.float32], path: Path) -> None:
    """Write an ONNX model that takes ``x`` and gives ``logits``, with the weights inside.

    The file appears when it is whole.

    Args:
        bundle: Whose graph it is.
        weights: Flat, as the bundle lays them out.
        path: Is replaced if it exists.
    """
    import onnx
    from onnx import numpy_helper
    from onnx.utils import Extractor

    model = onnx.load(bundle.graph_path)
    names = {tensor.name for tensor in bundle.tensors}
    kept = Extractor(model).extract_model([x.name for x in model.graph.input if x.name != "y"], ["logits"])
    inputs = [value for value in kept.graph.input if value.name not in names]
    del kept.graph.input[:]
    kept.graph.input.extend(inputs)
    for tensor in bundle.tensors:
        values = weights[tensor.offset : tensor.offset + tensor.size].reshape(tensor.shape)
        kept.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(values), tensor.name))
    kept.producer_name = "scalarfed"
    onnx.checker.check_model(kept)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    onnx.save(kept, part)
    os.replace(part, path)
