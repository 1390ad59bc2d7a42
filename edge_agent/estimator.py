"""Losses in, projected gradients out; the replica comes back as it was, bit for bit.

Source: Malladi et al., "Fine-Tuning Language Models with Just Forward Passes", 2023, definition 1
(central differences, the noise named by a key and undone in place); Li et al., arXiv 2405.15861
(several local steps, whose private moves are thrown away).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_agent.grid import RESERVE_STEPS, Term, move, perturb
from edge_agent.optimizer import method_by_code
from edge_agent.replay import Replica
from edge_agent.wire import LARGEST_SCALAR, RoundPlan
from profiles.errors import EstimateError

__all__ = ["Estimate", "estimate", "one_sided", "two_point"]


@dataclass(frozen=True)
class Estimate:
    """What one agent measured in one round.

    Attributes:
        scalars: Projected gradients, float32 of shape (K, P).
        loss: Mean of all losses that were evaluated.
        forwards: Forward passes that it took.
    """

    scalars: NDArray[np.float32]
    loss: float
    forwards: int


def two_point(loss_plus: float, loss_minus: float, epsilon: float) -> np.float32:
    """Estimate the projected gradient from two losses.

    Args:
        loss_plus: Loss at w + epsilon * z, mean over the batch.
        loss_minus: Loss at w - epsilon * z, same batch.
        epsilon: Step, > 0; MeZO uses 1e-3.

    Returns:
        (loss_plus - loss_minus) / (2 * epsilon), an estimate of z . grad L(w).

    Raises:
        EstimateError: A loss is not finite, or the difference is beyond what a record may hold.
    """
    return _quotient(loss_plus, loss_minus, 2.0 * epsilon)


def one_sided(loss_plus: float, loss_here: float, epsilon: float) -> np.float32:
    """Estimate the projected gradient from L(w + epsilon * z) and L(w); see :func:`two_point`."""
    return _quotient(loss_plus, loss_here, epsilon)


def estimate(
    replica: Replica, plan: RoundPlan, loss_of_step: Callable[[int], Callable[[], float]], *, central: bool
) -> Estimate:
    """Measure the P projected gradients of each of K local steps.

    Between two steps the replica makes a private move by its own scalars; at the end all moves are
    taken back.

    Args:
        replica: Perturbed in place; ends with the bits it had.
        plan: What to measure.
        loss_of_step: For local step k, a function that evaluates the loss of its batch at the
            replica's present weights.
        central: Two forwards a perturbation and an error of order epsilon**2; else one, and one more a
            step, and an error of order epsilon.

    Raises:
        EstimateError: A loss is not finite; the replica is as it was.
    """
    scalars = np.zeros((plan.steps, plan.perturbations), np.float32)
    losses: list[float] = []
    moves: list[tuple[int, float]] = []
    try:
        for step in range(plan.steps):
            scalars[step] = _measure(replica, plan, step, loss_of_step(step), central=central, losses=losses)
            if step + 1 < plan.steps:
                moves.append((step, _private_rate(replica, plan, scalars[step])))
                _move(replica, plan, scalars, *moves[-1], direction=1)
    finally:
        for made in reversed(moves):
            _move(replica, plan, scalars, *made, direction=-1)
    return Estimate(scalars, sum(losses) / len(losses), len(losses))


def _measure(
    replica: Replica,
    plan: RoundPlan,
    step: int,
    loss: Callable[[], float],
    *,
    central: bool,
    losses: list[float],
) -> list[np.float32]:
    def displace(*terms: Term) -> None:
        perturb(
            replica.weights,
            replica.segments,
            terms,
            epsilon=plan.epsilon,
            curvature=replica.curvature_for(plan),
            threads=replica.threads,
        )

    def evaluate() -> float:
        losses.append(loss())
        return losses[-1]

    scalars: list[np.float32] = []
    here = 0.0 if central else evaluate()
    last: tuple[Term, ...] = ()  # what brings the replica back
    try:
        for key in plan.keys(step):
            displace(*last, Term(key, 1))  # back from the last direction and along this one in one pass
            last = (Term(key, -1),)
            plus = evaluate()
            if central:
                displace(Term(key, -2))
                last = (Term(key, 1),)
                scalars.append(two_point(plus, evaluate(), plan.epsilon))
            else:
                scalars.append(one_sided(plus, here, plan.epsilon))
    finally:
        displace(*last)
    return scalars


def _private_rate(replica: Replica, plan: RoundPlan, scalars: NDArray[np.float32]) -> float:
    """Return the learning rate of a private move, normalised by what the replica has seen."""
    method = method_by_code(plan.method)
    if not method.named(plan.constants)["smoothing"]:
        return plan.learning_rate
    if replica.normaliser.weight > 0:
        return replica.normaliser.divide(plan.learning_rate)
    mean_square = sum(float(g) * float(g) for g in scalars) / len(scalars)
    return plan.learning_rate / math.sqrt(mean_square) if mean_square > 0 else 0.0


def _move(
    replica: Replica,
    plan: RoundPlan,
    scalars: NDArray[np.float32],
    step: int,
    rate: float,
    *,
    direction: int,
) -> None:
    move(
        replica.weights,
        replica.segments,
        plan.keys(step),
        list(scalars[step]),
        rate=rate,
        limit=RESERVE_STEPS // plan.steps,
        direction=direction,
        curvature=replica.curvature_for(plan),
        threads=replica.threads,
    )


def _quotient(loss: float, other: float, distance: float) -> np.float32:
    for value in (loss, other):
        if not math.isfinite(value):
            raise EstimateError(f"a loss is {value}; a projected gradient needs finite losses")
    scalar = (loss - other) / distance
    if not abs(scalar) <= LARGEST_SCALAR:
        raise EstimateError(f"a projected gradient of {scalar:g} is beyond {LARGEST_SCALAR:g}")
    return np.float32(scalar)
