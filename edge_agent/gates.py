"""Gate scores: what each channel, neuron or head of a pretrained net is worth, by forward passes only.

A gate is a factor on everything that reads one unit; at 0 the unit is gone. Gates are tensors of the
bundle like any other, named ``gate.<group>``, so that this needs no second graph and no torch.

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

from edge_agent.bundle import Tensor
from edge_agent.grid import Term, perturb
from edge_agent.noise import NoiseKey
from edge_agent.replay import Replica
from profiles.errors import BundleError, EstimateError

__all__ = ["GATE_PREFIX", "GateScores", "gate_scores", "gates_of"]

GATE_PREFIX = "gate."
"""How the names of gates begin."""


@dataclass(frozen=True)
class GateScores:
    """What one agent measured.

    Attributes:
        scores: s_g per gate in the order of the bundle, mean over draws and inputs, float32.
        samples: Inputs per draw, the agent's weight in the sum over agents.
        forwards: Forward passes that it took: 2 (1 + G) per draw.
    """

    scores: NDArray[np.float32]
    samples: int
    forwards: int


def gates_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the gates among a bundle's tensors.

    Raises:
        BundleError: There are none.
    """
    gates = [tensor for tensor in tensors if tensor.name.startswith(GATE_PREFIX)]
    if not gates:
        raise BundleError(
            "the bundle has no gates, so that its units cannot be scored",
            hint="Export the bundle with gates: `scalarfed prune --from-weights`.",
        )
    return gates


def gate_scores(
    replica: Replica,
    gates: Sequence[Tensor],
    logits: Callable[[], NDArray[np.float32]],
    *,
    keys: Sequence[NoiseKey],
    epsilon: float,
    closing: float = 0.25,
) -> GateScores:
    """Score every gate with common inputs and common perturbations.

    Args:
        replica: Perturbed in place; ends with the bits it had, all gates at 1.
        gates: See :func:`gates_of`.
        logits: Evaluates the same inputs at the replica's present weights: (n, classes).
        keys: Perturbations, at least one; the same for every agent.
        epsilon: Standard deviation of the perturbation, > 0; 0.01 in NTK-SAP.
        closing: t, how far a gate closes, in (0, 1]. Spearman correlation with dJ/dc_g on a small MLP and
            a LeNet: 0.92 and 0.93 at 1, 0.98 and 0.99 at 0.5, 0.99 and 1.00 at 0.25.

    Raises:
        EstimateError: A logit is not finite; the replica is as it was.
    """
    if not keys or epsilon <= 0 or not 0 < closing <= 1:
        raise ValueError(
            f"need a key, epsilon > 0, closing in (0, 1]; got {len(keys)}, {epsilon=}, {closing=}"
        )
    places = np.concatenate([np.arange(gate.offset, gate.offset + gate.size) for gate in gates])
    weights = replica.weights
    weights[places] = 1.0
    total = np.zeros(len(places))
    forwards = samples = 0
    here = _sweep(weights, places, logits, closing)
    for key in keys:
        perturb(weights, replica.segments, [Term(key, 1)], epsilon=epsilon)
        weights[places] = 1.0
        try:
            moved = _sweep(weights, places, logits, closing)
        finally:
            perturb(weights, replica.segments, [Term(key, -1)], epsilon=epsilon)
            weights[places] = 1.0
        samples = here.shape[1]
        forwards += 2 * len(here)
        deviations = np.square(here.astype(np.float64) - moved).sum(axis=(1, 2))
        total += deviations[0] - deviations[1:]
    scores = (total / (len(keys) * samples * closing)).astype(np.float32)
    if not np.isfinite(scores).all():
        raise EstimateError(
            "a gate score is not finite", hint="Look for inputs or weights that are not finite."
        )
    return GateScores(scores, samples, forwards - (len(keys) - 1) * len(here))


def _sweep(
    weights: NDArray[np.float32],
    places: NDArray[np.int64],
    logits: Callable[[], NDArray[np.float32]],
    closing: float,
) -> NDArray[np.float32]:
    """Return the logits with all gates open, then with one after the other closing: (1 + G, n, classes)."""
    rows = [logits().copy()]
    for place in places:
        weights[place] = 1.0 - closing
        rows.append(logits().copy())
        weights[place] = 1.0
    return np.stack(rows)
