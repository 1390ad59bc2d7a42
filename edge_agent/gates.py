"""Gate scores: what each channel, neuron or head of a pretrained net is worth, by forward passes only.

A gate is a factor on everything that reads one unit; at 0 the unit is gone. Gates are inputs of the graph
beside the weights, named ``gate.<group>``, so that this needs no torch and leaves the weights alone.

    J(c) = sum_b || f(X_b; w, c) - f(X_b; w + epsilon z, c) ||^2
    s_g  = (J(1) - J(c_g = 1 - t)) / t

J(1) is in expectation epsilon^2 times the trace of the neural tangent kernel over the inputs X. With t = 1
s_g is the part of it that goes with unit g, with t near 0 the derivative dJ/dc_g of NTK-SAP. The trace over
the union of the agents' inputs is the sum of their local traces, so that scores add up over agents,
weighted by their number of inputs.

Source of J: Wang et al., "NTK-SAP", ICLR 2023, equation 10; of its federated sum: arXiv 2405.04765.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_agent.bundle import Bundle
from edge_agent.grid import Term, perturb
from edge_agent.noise import NoiseKey
from edge_agent.replay import Replica
from profiles.errors import BundleError, EstimateError

__all__ = ["GATE_PREFIX", "GateScores", "Gates", "gate_scores", "open_gates"]

GATE_PREFIX = "gate."
"""How the names of gates begin."""


@dataclass(frozen=True)
class Gates:
    """The gates of a bundle, all of them in one vector.

    Attributes:
        values: One float32 per unit, 1 for an open gate; what the graph reads.
        inputs: Graph input -> its part of ``values``.
    """

    values: NDArray[np.float32]
    inputs: dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class GateScores:
    """What one agent measured.

    Attributes:
        scores: s_g per gate in the order of the bundle, mean over draws and inputs, float32.
        samples: Inputs per draw, the agent's weight in the sum over agents.
        forwards: Forward passes that it took.
    """

    scores: NDArray[np.float32]
    samples: int
    forwards: int


def open_gates(bundle: Bundle) -> Gates:
    """Return the bundle's gates, all open.

    Raises:
        BundleError: It has none.
    """
    widths = bundle.pruning.get("gates")
    if not widths:
        raise BundleError(
            f"{bundle.folder} has no gates, so that its units cannot be scored",
            hint="Let the coordinator write it with `scalarfed gates MODEL -o GATED`.",
        )
    values = np.ones(sum(width for _, width in widths), np.float32)
    inputs, start = {}, 0
    for group, width in widths:
        inputs[GATE_PREFIX + group] = values[start : start + width]
        start += width
    return Gates(values, inputs)


def gate_scores(
    replica: Replica,
    gates: Gates,
    logits: Callable[[], NDArray[np.float32]],
    *,
    keys: Sequence[NoiseKey],
    epsilon: float,
    closing: float = 0.25,
    progress: Callable[[int, int], None] | None = None,
) -> GateScores:
    """Score every gate with common inputs and common perturbations.

    Takes (1 + D) (1 + G) forward passes for D keys and G gates, and holds 2 (1 + G) sets of logits.

    Args:
        replica: Perturbed in place; ends with the bits it had.
        gates: See :func:`open_gates`; all open again at the end.
        logits: Evaluates the same inputs at the present weights and gates: (n, classes).
        keys: Perturbations, at least one; the same for every agent.
        epsilon: Standard deviation of the perturbation, > 0; 0.01 in NTK-SAP.
        closing: t, how far a gate closes, in (0, 1]. Spearman correlation with dJ/dc_g on a small MLP and
            a LeNet: 0.92 and 0.93 at 1, 0.98 and 0.99 at 0.5, 0.99 and 1.00 at 0.25.
        progress: Called with the forward passes done and all of them.

    Raises:
        EstimateError: A score is not finite; the replica is as it was.
    """
    if not keys or epsilon <= 0 or not 0 < closing <= 1:
        raise ValueError(
            f"need a key, epsilon > 0, closing in (0, 1]; got {len(keys)}, {epsilon=}, {closing=}"
        )
    passes = (1 + len(keys)) * (1 + len(gates.values))
    done = 0

    def counted() -> NDArray[np.float32]:
        nonlocal done
        found = logits()
        done += 1
        if progress is not None:
            progress(done, passes)
        return found

    here = _sweep(gates.values, counted, closing)
    total = np.zeros(len(gates.values))
    for key in keys:
        perturb(replica.weights, replica.segments, [Term(key, 1)], epsilon=epsilon)
        try:
            moved = _sweep(gates.values, counted, closing)
        finally:
            perturb(replica.weights, replica.segments, [Term(key, -1)], epsilon=epsilon)
        deviations = np.square(here.astype(np.float64) - moved).sum(axis=(1, 2))
        total += deviations[0] - deviations[1:]
    scores = (total / (len(keys) * here.shape[1] * closing)).astype(np.float32)
    if not np.isfinite(scores).all():
        raise EstimateError(
            "a gate score is not finite", hint="Look for inputs or weights that are not finite."
        )
    return GateScores(scores, here.shape[1], passes)


def _sweep(
    gates: NDArray[np.float32], logits: Callable[[], NDArray[np.float32]], closing: float
) -> NDArray[np.float32]:
    """Return the logits with all gates open, then with one after the other closing: (1 + G, n, classes)."""
    rows = [logits().copy()]
    for place in range(len(gates)):
        gates[place] = 1.0 - closing
        rows.append(logits().copy())
        gates[place] = 1.0
    return np.stack(rows)
