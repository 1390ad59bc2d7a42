"""Losses in, projected gradients out; the replica comes back as it was, bit for bit.

Source: Malladi et al., "Fine-Tuning Language Models with Just Forward Passes", 2023, definition 1
(central differences, the noise named by a key and undone in place); Li et al., arXiv 2405.15861
(several local steps, whose private moves are thrown away).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_agent.grid import RESERVE_STEPS, Segment, chunks, displacer, move
from edge_agent.head import chosen, head_size
from edge_agent.native.kernel import Displace
from edge_agent.noise import NoiseKey, values
from edge_agent.optimizer import method_by_code
from edge_agent.plan import RoundPlan
from edge_agent.replay import Replica, move_head
from edge_agent.wire import LARGEST_SCALAR
from profiles.errors import EstimateError

__all__ = ["Estimate", "Slope", "batches_per_step", "estimate", "one_sided", "two_point"]

Slope = Callable[[NDArray[np.float32]], tuple[float, float]]
"""Takes a direction of the weights' shape; gives a batch's loss and its slope along it."""


@dataclass(frozen=True)
class Estimate:
    """What one agent measured in one round.

    Attributes:
        scalars: Float32 of shape (K, ``plan.reply_scalars``): a step's projected gradients first.
        loss: Mean of all losses that were evaluated.
        forwards: Forward passes that it took; one with a derivative counts as three.
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
    return np.float32(_quotient(loss_plus, loss_minus, 2.0 * epsilon))


def one_sided(loss_plus: float, loss_here: float, epsilon: float) -> np.float32:
    """Estimate the projected gradient from L(w + epsilon * z) and L(w); see :func:`two_point`."""
    return np.float32(_quotient(loss_plus, loss_here, epsilon))


def batches_per_step(plan: RoundPlan, *, central: bool) -> int:
    """Return how many batches a local step uses: P where every perturbation has its own, else one."""
    return plan.perturbations if central and method_by_code(plan.method).fresh else 1


def estimate(
    replica: Replica,
    plan: RoundPlan,
    loss_of: Callable[[int], Callable[[], float]],
    *,
    central: bool,
    share: int = 0,
    head_gradient: Callable[[], NDArray[np.float32]] | None = None,
    slope_of: Callable[[int], Slope] | None = None,
) -> Estimate:
    """Measure what a plan asks in each of K local steps: P projected gradients, and the exact scalars.

    Between two steps the replica makes a private move by its own scalars; at the end all moves are
    taken back.

    Args:
        replica: Perturbed in place; ends with the bits it had.
        plan: What to measure.
        loss_of: For the n-th batch of the round, a function that evaluates its loss at the replica's
            present weights. A step has :func:`batches_per_step` of them.
        central: Two forwards a perturbation and an error of order epsilon**2; else one, and one more a
            step, and an error of order epsilon.
        share: The agent's share of the perturbations.
        head_gradient: The last layer's gradient of the latest loss, where the plan asks for exact scalars.
        slope_of: For the n-th batch its loss and exact slope along a direction, where the method has them.

    Raises:
        EstimateError: A loss is not finite, or the graph has no such gradient; the replica is as it was.
    """
    if plan.exact and (head_gradient is None or not replica.exact_spans(plan)):
        raise EstimateError("the graph of this bundle tells no gradient of its last layer")
    scalars = np.zeros((plan.steps, plan.reply_scalars), np.float32)
    losses: list[float] = []
    forwards = 0
    moves: list[tuple[int, float]] = []
    batches = batches_per_step(plan, central=central)
    try:
        for step in range(plan.steps):
            own = [loss_of(step * batches + n) for n in range(batches)]
            meter = _Meter(replica, plan, own, losses, head_gradient, share)
            if slope_of is None:
                scalars[step, : plan.perturbations] = meter.measure(step, central=central)
            else:
                scalars[step, : plan.perturbations] = meter.slopes(step, slope_of(step * batches))
                forwards += 2 * plan.perturbations
            if plan.exact:
                scalars[step, plan.perturbations :] = meter.exact(step)
            if method_by_code(plan.method).losses:
                scalars[step, plan.perturbations :] = _candidates(replica, plan, scalars, own[0], losses)
            if step + 1 < plan.steps:
                moves.append((step, _private_rate(replica, plan, scalars[step])))
                _move(replica, plan, scalars[step], *moves[-1], share=share, direction=1)
    finally:
        for step, rate in reversed(moves):
            _move(replica, plan, scalars[step], step, rate, share=share, direction=-1)
    return Estimate(scalars, sum(losses) / len(losses), len(losses) + forwards)


def _reached(replica: Replica, plan: RoundPlan, share: int) -> list[tuple[list[int], Sequence[Segment]]]:
    """Return which of a share's P perturbations, counted from 0, move which part of the weights."""
    own = plan.numbers(share)
    found = [([n - own.start for n in numbers if n in own], part) for numbers, part in replica.reach(plan)]
    return [(numbers, segments) for numbers, segments in found if numbers]


class _Meter:
    """Measures one local step.

    Args:
        replica: Perturbed in place.
        plan: What to measure.
        own: The losses of the step's batches: one for each perturbation, or one for all.
        losses: Every loss that is evaluated is added here.
        head_gradient: Of the latest loss.
        share: The agent's share of the perturbations.
    """

    def __init__(
        self,
        replica: Replica,
        plan: RoundPlan,
        own: Sequence[Callable[[], float]],
        losses: list[float],
        head_gradient: Callable[[], NDArray[np.float32]] | None,
        share: int,
    ) -> None:
        self._share = share
        self._replica = replica
        self._plan = plan
        self._own = own
        self._losses = losses
        self._head_gradient = head_gradient if plan.exact else None
        self._head_total: NDArray[np.float64] | float = 0.0
        self._head_count = 0

    def measure(self, step: int, *, central: bool) -> list[float]:
        """Return the P projected gradients of a step; the replica ends as it was."""
        plan = self._plan
        reuse = method_by_code(plan.method).reuse  # losses on the far side serve as each other's base
        both = central and not reuse
        here = 0.0 if central or reuse else self._evaluate(0)
        keys = plan.keys(step, self._share)
        displacers: dict[int, Displace] = {}
        for numbers, reached in _reached(self._replica, plan, self._share):
            displacers |= dict.fromkeys(numbers, self._displacer(reached, keys))
        found: list[float] = []
        number, back, latest = 0, 0, displacers[0]  # `back` is what brings the replica back
        # Nothing else between the forwards: each leaves cold caches to the next line of Python.
        try:
            for number in range(plan.perturbations):
                displace = displacers[number]
                if displace is latest and back:
                    displace(number - 1, back, 1)  # back and there in one pass
                else:
                    if back:
                        latest(number - 1, back)
                    displace(number, 1)
                    latest = displace
                back = -1
                found.append(self._evaluate(number))
                if both:
                    displace(number, -2)
                    back = 1
                    found.append(self._evaluate(number))
        finally:
            if back:
                latest(number, back)
        if both:
            pairs = zip(found[::2], found[1::2], strict=True)
            return [_quotient(plus, minus, 2.0 * plan.epsilon) for plus, minus in pairs]
        return [
            _quotient(loss, _mean_of_others(found, loss) if reuse else here, plan.epsilon) for loss in found
        ]

    def slopes(self, step: int, slope: Slope) -> list[np.float32]:
        """Return the P slopes of a step's batch along its directions; the replica is only read."""
        scalars: list[np.float32] = []
        segments = self._segments()
        direction = np.zeros(self._replica.weights.size, np.float32)
        for number, key in enumerate(self._plan.keys(step, self._share)):
            direction.fill(0)
            for start, stop, _ in chunks(segments[number]):
                direction[start:stop] = values(key, start, stop - start)
            loss, found = slope(direction)
            self._losses.append(loss)
            scalars.append(one_sided(found, 0.0, 1.0))
        return scalars

    def _segments(self) -> list[Sequence[Segment]]:
        """Return for each perturbation of the share what it moves."""
        segments = [self._replica.segments] * self._plan.perturbations
        for numbers, reached in _reached(self._replica, self._plan, self._share):
            for number in numbers:
                segments[number] = reached
        return segments

    def exact(self, step: int) -> NDArray[np.float32]:
        """Return the step's coordinates of the last layer's gradient, the mean over its forwards.

        At w + epsilon z and w - epsilon z together the error is of order epsilon**2, like that of the
        projected gradients; and no forward is made for it.
        """
        gradient = np.asarray(self._head_total / self._head_count, np.float64)
        layers = self._replica.exact_layers(self._plan)
        taken = gradient[chosen(self._plan, step, [head_size(layer) for layer in layers])]
        if not np.all(np.abs(taken) <= LARGEST_SCALAR):
            raise EstimateError(f"an exact scalar is not finite or beyond {LARGEST_SCALAR:g}")
        return taken.astype(np.float32)

    def _evaluate(self, number: int) -> float:
        loss = self._own[number % len(self._own)]()
        self._losses.append(loss)
        if self._head_gradient is not None:
            self._head_total = self._head_total + self._head_gradient().astype(np.float64)
            self._head_count += 1
        return loss

    def _displacer(self, segments: Sequence[Segment], keys: Sequence[NoiseKey]) -> Displace:
        replica, plan = self._replica, self._plan
        noise, scale = replica.noise_for(plan)
        return displacer(
            replica.weights,
            segments,
            keys,
            epsilon=plan.epsilon * scale,
            curvature=replica.curvature_for(plan),
            threads=replica.threads,
            noise=noise,
        )


def _candidates(
    replica: Replica,
    plan: RoundPlan,
    scalars: NDArray[np.float32],
    loss: Callable[[], float],
    losses: list[float],
) -> list[np.float32]:
    """Return the losses after each candidate: a multiple of the step that the agent's own scalars ask for."""
    found: list[np.float32] = []
    for multiple in method_by_code(plan.method).candidates:
        rate = multiple * _private_rate(replica, plan, scalars[0])
        if multiple:
            _move(replica, plan, scalars[0], 0, rate, direction=1)
        try:
            losses.append(loss())
        finally:
            if multiple:
                _move(replica, plan, scalars[0], 0, rate, direction=-1)
        if not math.isfinite(losses[-1]):
            raise EstimateError(f"a loss is {losses[-1]}; a choice needs finite losses")
        found.append(np.float32(losses[-1]))
    return found


def _private_rate(replica: Replica, plan: RoundPlan, scalars: NDArray[np.float32]) -> float:
    """Return the learning rate of a private move, normalised by what the replica has seen."""
    method = method_by_code(plan.method)
    if not method.named(plan.constants).get("smoothing", 0.0):
        return plan.learning_rate
    if replica.normaliser.weight > 0:
        return replica.normaliser.divide(plan.learning_rate)
    projected = scalars[: plan.perturbations]
    mean_square = sum(float(g) * float(g) for g in projected) / len(projected)
    return plan.learning_rate / math.sqrt(mean_square) if mean_square > 0 else 0.0


def _move(
    replica: Replica,
    plan: RoundPlan,
    scalars: NDArray[np.float32],
    step: int,
    rate: float,
    *,
    share: int = 0,
    direction: int,
) -> None:
    """Make the private move of a step, or take it back."""
    limit = RESERVE_STEPS // plan.steps
    factors = scalars[: plan.perturbations]
    if method_by_code(plan.method).rule == "sign":
        factors = np.sign(factors)
    keys = plan.keys(step, share)
    noise, scale = replica.noise_for(plan)
    for numbers, segments in _reached(replica, plan, share):
        move(
            replica.weights,
            segments,
            [keys[number] for number in numbers],
            [factors[number] for number in numbers],
            rate=rate * scale,
            limit=limit,
            direction=direction,
            curvature=replica.curvature_for(plan),
            threads=replica.threads,
            noise=noise,
        )
    if plan.exact:
        exact = scalars[plan.perturbations : plan.perturbations + plan.exact]
        move_head(replica, plan, exact, step=step, limit=limit, direction=direction, bounded=False)


def _mean_of_others(losses: Sequence[float], own: float) -> float:
    """Return the mean of all losses but one: a base that does not depend on that one's direction."""
    return (math.fsum(losses) - own) / (len(losses) - 1)


def _quotient(loss: float, other: float, distance: float) -> float:
    scalar = (loss - other) / distance
    if abs(scalar) <= LARGEST_SCALAR:  # not so if it is no number
        return scalar
    for value in (loss, other):
        if not math.isfinite(value):
            raise EstimateError(f"a loss is {value}; a projected gradient needs finite losses")
    raise EstimateError(f"a projected gradient of {scalar:g} is beyond {LARGEST_SCALAR:g}")
