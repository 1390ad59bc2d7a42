"""What a step costs over its bare forwards, and a forward over ONNX Runtime's best: ``scalarfed bench step``.

One process for each net, so that none inherits another's memory; in it everything that is compared is done by
turns, on one thread, and counted in CPU time.
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coordinator.bench.child import tell
from coordinator.bench.passes import medians
from edge_agent.bundle import Bundle
from edge_agent.estimator import estimate
from edge_agent.forward import Forward
from edge_agent.native.kernel import kernel_name
from edge_agent.optimizer import METHODS
from edge_agent.plan import RoundPlan
from edge_agent.replay import Replica, apply_record
from edge_agent.session import open_session
from edge_agent.wire import RoundRecord

__all__ = ["main", "make_step", "samples"]

_EPSILON = 1e-3
_RATE = 1e-6


def samples(bundle: Bundle, size: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return a batch: normal values for images, numbers of tokens for texts."""
    random = np.random.default_rng(0)
    shape = (size, *bundle.sample_shape)
    if len(bundle.sample_shape) == 1:
        x = random.integers(0, 30_000, shape).astype(np.float32)
    else:
        x = random.standard_normal(shape, np.float32)
    return x, random.integers(0, bundle.classes, size)


def make_step(
    replica: Replica, loss: Callable[[], float], *, method: str, perturbations: int, digest: bool = True
) -> Callable[[], None]:
    """Return a function that makes a whole step: P central differences, the record, its replay.

    Args:
        replica: Changed in place.
        loss: Of the one batch, at the replica's weights.
        method: Name of the update rule.
        perturbations: P.
        digest: Make the digest after each step, as an agent does.
    """
    rule = METHODS[method]

    def step() -> None:
        constants = rule.values({})
        plan = RoundPlan(replica.round, 7, rule.code, 1, perturbations, _EPSILON, _RATE, constants)
        found = estimate(replica, plan, lambda _: loss, central=True)
        apply_record(replica, RoundRecord(plan, 0, False, found.scalars, 0), check=False)
        if digest:
            replica.digest()

    return step


def _measure(model: str, folder: Path, *, perturbations: int, seconds: float) -> dict[str, Any]:
    from pruning.peers import PEERS, build_peer, torch_estimate, write_peer

    net = build_peer(model)
    bundle = write_peer(net, model, folder)
    batch_size = PEERS[model].batch_size
    own = _compare(bundle, batch_size, perturbations=perturbations, seconds=seconds)
    if model == "resnet20":
        own["batch_32"] = _compare(bundle, 32, perturbations=perturbations, seconds=seconds)
    x, y = samples(bundle, batch_size)
    replica = bundle.replica()
    forward = Forward(bundle, replica.weights)
    theirs = torch_estimate(net, x, y, epsilon=_EPSILON, rate=_RATE)
    single = make_step(replica, lambda: forward.loss(x, y), method="decomfl", perturbations=1)
    times = medians({"own": single, "torch": lambda: theirs(1)}, seconds=seconds)
    found = {"model": model, "kernel": kernel_name(), "variant": forward.variant, **own}
    return {**found, "torch_cpu_over_own": round(times["torch"] / times["own"], 3)}


def _compare(bundle: Bundle, batch_size: int, *, perturbations: int, seconds: float) -> dict[str, Any]:
    """Compare steps with their forwards, and forwards with those of constant weights, at one batch size."""
    from pruning.peers import constant_graph

    x, y = samples(bundle, batch_size)
    replica = bundle.replica()
    forward = Forward(bundle, replica.weights)

    def loss() -> float:
        return forward.loss(x, y)

    def bare() -> None:
        for _ in range(2 * perturbations):
            loss()

    times = medians(
        {
            "forwards": bare,
            "decomfl": make_step(replica, loss, method="decomfl", perturbations=perturbations),
            "hiso": make_step(replica, loss, method="hiso", perturbations=perturbations),
        },
        seconds=seconds,
    )
    session = open_session(constant_graph(bundle.folder))
    feeds = {"x": x, "y": y}
    forwards = medians(
        {"own": loss, "constant": lambda: session.run(["loss"], feeds)}, seconds=seconds, least=5
    )
    return {
        "batch_size": batch_size,
        "perturbations": perturbations,
        "forward_ms": round(1e3 * times["forwards"] / (2 * perturbations), 4),
        "step_over_forwards": round(times["decomfl"] / times["forwards"], 4),
        "hiso_step_over_forwards": round(times["hiso"] / times["forwards"], 4),
        "constant_forward_ms": round(1e3 * forwards["constant"], 4),
        "forward_over_constant": round(forwards["own"] / forwards["constant"], 4),
    }


def main(arguments: list[str]) -> int:
    """Measure one net: MODEL PERTURBATIONS SECONDS; print one JSON object."""
    model, perturbations, seconds = arguments[0], int(arguments[1]), float(arguments[2])
    with tempfile.TemporaryDirectory() as folder:
        tell(_measure(model, Path(folder), perturbations=perturbations, seconds=seconds))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
