"""What the scalars of a round are on samples that the coordinator holds itself, class by class.

A projected gradient is a mean over samples, so that an agent's is a mixture of the classes' with the shares
of its labels, whatever these are; ``plausibility`` makes use of that. No figure from here enters a record.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from edge_agent.bundle import Bundle
from edge_agent.data import Samples, to_inputs
from edge_agent.estimator import estimate
from edge_agent.forward import Forward
from edge_agent.head import chosen, head_size
from edge_agent.optimizer import method_by_code
from edge_agent.plan import RoundPlan
from edge_agent.replay import Replica
from edge_agent.wire import RoundOpen
from profiles.errors import EstimateError

__all__ = ["Reference"]

_MOST_SAMPLES = 512


class Reference:
    """Measures the first step of a round on the coordinator's samples.

    Args:
        bundle: What is trained.
        replica: The coordinator's; perturbed in place, and as it was when a call returns.
        samples: Such as no agent has; of each class about as many are taken, 512 in all.
    """

    def __init__(self, bundle: Bundle, replica: Replica, samples: Samples) -> None:
        self._replica = replica
        self._forward = Forward(bundle, replica.weights)
        self._classes = [int(label) for label in np.unique(samples.y)]
        each = max(1, _MOST_SAMPLES // len(self._classes))
        taken = np.concatenate([np.flatnonzero(samples.y == label)[:each] for label in self._classes])
        chosen = samples.pick(taken)
        self._x, self._y = to_inputs(chosen.x), chosen.y

    def __call__(self, opened: RoundOpen) -> list[NDArray[np.float64]]:
        """Return the scalars of the round's first step: of shape (P, classes), and exact ones (Q, classes).

        Raises:
            EstimateError: A loss is not finite, or only torch on a board knows the exact scalars.
        """
        plan = opened.plan
        if method_by_code(plan.method).autodiff == "gradient":
            raise EstimateError(f"the exact scalars of {method_by_code(plan.method).name} need torch")
        sizes = [head_size(layer) for layer in self._replica.exact_layers(plan)]
        losses: list[NDArray[np.float64]] = []

        def loss() -> float:
            losses.append(self._losses())
            return float(losses[-1].mean())

        estimate(
            self._replica,
            replace(plan, steps=1),
            lambda batch: loss,
            central=opened.central,
            head_gradient=lambda: np.zeros(sum(sizes), np.float32),
        )
        exact = [self._exact(plan, sizes)] if plan.exact else []
        found = np.array(losses)
        if opened.central:
            pairs = found[: 2 * plan.perturbations]
            return [(pairs[0::2] - pairs[1::2]) / (2.0 * plan.epsilon), *exact]
        return [(found[1 : plan.perturbations + 1] - found[0]) / plan.epsilon, *exact]

    def _exact(self, plan: RoundPlan, sizes: list[int]) -> NDArray[np.float64]:
        """Return the asked coordinates of the last layers' gradients, class by class."""
        columns = []
        for label in self._classes:
            mine = self._y == label
            self._forward.loss(np.ascontiguousarray(self._x[mine]), self._y[mine], head=len(sizes))
            gradient = self._forward.head_gradient().reshape(-1).astype(np.float64)
            columns.append(gradient[chosen(plan, 0, sizes)])
        return np.stack(columns, axis=1)

    def _losses(self) -> NDArray[np.float64]:
        """Return the mean cross-entropy of each class's samples at the replica's present weights."""
        logits = self._forward.logits(self._x).astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        right = logits[np.arange(len(self._y)), self._y]
        each = np.log(np.exp(logits).sum(axis=1)) - right
        return np.array([each[self._y == label].mean() for label in self._classes])
