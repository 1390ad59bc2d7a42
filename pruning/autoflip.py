"""AutoFLIP without backpropagation: how far each agent alone would have moved each weight.

AutoFLIP lets agents explore for some epochs and prunes by the mean squared deviation of their weights from
the common start. Here an agent's exploration is its own scalars: whoever has them rebuilds where it would
stand, bit for bit, without a weight or a gradient having crossed the wire.

    guidance_j = mean_k (w_kj - w_0j)^2, scaled to [0, 1]

With far fewer perturbations than weights a deviation is mostly the noise that all weights share: the
guidance ranks weights only where the exploration takes about as many perturbations as there are weights.

Source: Internò et al., "Automated Federated Learning via Informed Pruning", arXiv 2405.10271, section 3.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from edge_agent.bundle import Bundle
from edge_agent.plan import RoundPlan
from edge_agent.replay import Replica, apply_record
from edge_agent.wire import RoundRecord
from profiles.errors import EstimateError
from pruning.masks import Masks, densities_of, keep_top

__all__ = ["Exploration", "explore", "guidance", "guided_densities", "guided_masks"]

Exploration = Sequence[tuple[RoundPlan, NDArray[np.float32]]]
"""Consecutive rounds from 0, each with one agent's scalars, float32 of shape (K, ``plan.scalars``)."""


def explore(bundle: Bundle, rounds: Exploration) -> Replica:
    """Return the replica of an agent that took its own scalars for the fleet's.

    Raises:
        EstimateError: The scalars do not fit their plan or are not finite.
    """
    replica = bundle.replica()
    for plan, scalars in rounds:
        if scalars.shape != (plan.steps, plan.scalars) or not np.isfinite(scalars).all():
            raise EstimateError(
                f"round {plan.round} has scalars of the shape {scalars.shape}, its plan asks "
                f"{(plan.steps, plan.scalars)} finite ones",
                hint="Leave the agent out of the exploration.",
            )
        apply_record(replica, RoundRecord(plan, 0, False, scalars.astype(np.float32), 0), check=False)
    return replica


def guidance(bundle: Bundle, explorations: Mapping[str, Exploration]) -> NDArray[np.float32]:
    """Return the mean squared deviation of every weight over the agents, scaled to [0, 1].

    Args:
        bundle: Where all of them started.
        explorations: Each agent's rounds; all of the same length.

    Returns:
        float32 in the layout of the bundle's flat vector; gaps are 0. Summed in float64 in the order of
        the agents' names. All zero if nobody moved.
    """
    if not explorations:
        raise ValueError("no agent explored")
    start = bundle.replica().weights.astype(np.float64)
    total = np.zeros(bundle.size)
    for name in sorted(explorations):
        total += np.square(explore(bundle, explorations[name]).weights - start)
    inside = np.zeros(bundle.size, bool)
    for tensor in bundle.tensors:
        inside[tensor.offset : tensor.offset + tensor.size] = True
    total[~inside] = 0.0
    largest = total.max()
    return (total / largest if largest > 0 else total).astype(np.float32)


def guided_masks(bundle: Bundle, explorations: Mapping[str, Exploration], *, density: float) -> Masks:
    """Return masks over the weights of layers that keep those which the agents moved the most.

    Biases, norms and the last layer are not masked. Their densities lead to widths by
    :func:`pruning.allocation.fractions_from_densities`, as those of a saliency do.

    Args:
        bundle: Where all agents started.
        explorations: See :func:`guidance`.
        density: Fraction of the masked weights that stays, in (0, 1].
    """
    found = guidance(bundle, explorations)
    layers = [t for t in bundle.tensors if len(t.shape) > 1 and t.name not in bundle.head]
    scores = {t.name: torch.from_numpy(found[t.offset : t.offset + t.size].reshape(t.shape)) for t in layers}
    masks = {name: torch.ones(score.shape) for name, score in scores.items()}
    return keep_top(scores, masks, density)


def guided_densities(
    bundle: Bundle, explorations: Mapping[str, Exploration], *, density: float
) -> dict[str, float]:
    """Return the fraction that :func:`guided_masks` keeps of each layer; no layer falls below one weight."""
    masks = guided_masks(bundle, explorations, density=density)
    return {name: max(kept, 1 / masks[name].numel()) for name, kept in densities_of(masks).items()}
