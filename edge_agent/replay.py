"""Applies records to a replica: the only writer of weights.

A replica is what every side holds: flat weights on their grid, curvature where the method has it,
and how many records went into them. Whoever applies the same records to the same bundle has the same
bits. Everything here is elementwise and in a fixed order; see :mod:`edge_agent.grid`.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from edge_agent.curvature import ONE_BF16, Shared, groups_of, learn_each, scales, sparse_mask
from edge_agent.digest import fold, join, of_floats
from edge_agent.directions import Guided, LowRank
from edge_agent.grid import (
    NO_LIMIT,
    RESERVE_STEPS,
    WEIGHT_STEPS,
    Noise,
    Segment,
    chunks,
    finite,
    inverse_root,
    nudge,
    round_update,
    rounding_words,
    step_scale,
    weighted_noise,
    whole_scalars,
)
from edge_agent.head import Span, chosen, flat_indices, head_size, outside, taking_part
from edge_agent.moments import Clock, descend, follow
from edge_agent.native.kernel import Bits, Learning, find_kernel
from edge_agent.noise import NOISE_VERSION, NoiseKey, values
from edge_agent.optimizer import Method, Normaliser, method_by_code
from edge_agent.orthogonal import orthogonal
from edge_agent.plan import RoundPlan
from edge_agent.wire import RoundRecord
from profiles.errors import DigestError, LogError

__all__ = ["Replica", "apply_record", "apply_records", "move_head"]

_SMALLEST_CURVATURE = 1e-30  # far from denormals, which a processor may flush to zero


@dataclass
class Replica:
    """A weight vector at a round, and what a method remembers beside it.

    Attributes:
        weights: Flat float32 vector on the grid.
        segments: Its grids.
        round: Records applied so far, which is also the round that comes next.
        curvature: bfloat16 bits per weight, or None while no method asked for it.
        normaliser: Running mean square of the scalars.
        threads: Threads that work on it, where there is a compiled kernel; no bit depends on them.
        tensors: Where each tensor lies, (start, stop) in order: the blocks of a block-wise method.
        widths: Elements of a row of each tensor, all of them in what is no matrix; may be left out with
            one row each.
        shared: Curvature of rows or tensors, or None while no method asked for it.
        head: Where the tensors of the last linear layer lie, if the graph tells their gradient.
        moments: Float32 of shape (rows, size): momentum, or both moments of Adam, then the running mean
            of the weights; None while no method asked for any.
        clock: How far the moments are from their start.
        layers: Where the tensors of each layer lie, in order.
        hidden: As ``head``, of the linear layer before the last.
        stops: Where each width of a family of nets ends in the vector, this replica's own last: a narrower
            net of the family is the vector up to there. Empty for a net of no family.
        averaged: Whether the last of the moments is the running mean of the weights.
    """

    weights: NDArray[np.float32]
    segments: Sequence[Segment]
    round: int = 0
    curvature: NDArray[np.uint16] | None = None
    normaliser: Normaliser = field(default_factory=Normaliser)
    threads: int = 1
    tensors: tuple[Span, ...] = ()
    widths: tuple[int, ...] = ()
    shared: Shared | None = None
    head: tuple[Span, ...] = ()
    moments: NDArray[np.float32] | None = None
    clock: Clock = field(default_factory=Clock)
    layers: tuple[tuple[Span, ...], ...] = ()
    hidden: tuple[Span, ...] = ()
    stops: tuple[int, ...] = ()
    averaged: bool = False
    _mask: tuple[tuple[int, float], NDArray[np.uint16]] | None = None
    _scales: tuple[int, Shared] | None = None

    def digest(self) -> int:
        """Return 64 bits of all that the next rounds depend on."""
        curvature = 0
        if self.curvature is not None:
            curvature = fold(self.curvature, threads=self.threads)
        elif self.shared is not None:
            curvature = fold(self.shared.values, threads=self.threads)
        scalars = of_floats(self.normaliser.mean_square, self.normaliser.weight)
        digest = join(fold(self.weights, threads=self.threads), curvature, scalars)
        if self.moments is None:
            return digest
        moments = fold(self.moments, threads=self.threads)
        return join(digest, moments, of_floats(self.clock.first, self.clock.second))

    @property
    def level(self) -> int:
        """Which width of its family it is, from 0 for the narrowest; 0 without a family."""
        return max(0, len(self.stops) - 1)

    def at_level(self, level: int) -> "Replica":
        """Return a narrower replica of the family: a view of this one's weights, with its normaliser.

        It is right until the next record is applied; only the widest may be written.
        """
        if level == self.level:
            return self
        stop = self.stops[level]
        return Replica(
            self.weights[:stop],
            _within(self.segments, (0, stop)),
            round=self.round,
            normaliser=self.normaliser,
            threads=self.threads,
            tensors=tuple(span for span in self.tensors if span[1] <= stop),
            stops=self.stops[: level + 1],
        )

    def digests(self) -> tuple[int, ...]:
        """Return the digests of all widths of the family that it holds, its own last."""
        return tuple(self.at_level(level).digest() for level in range(self.level + 1))

    def shells(self, plan: RoundPlan) -> list[tuple[range, Sequence[Segment]]]:
        """Return for every level what it adds to the one before: all perturbations, and the segments."""
        edges = (0, *(self.stops or (self.weights.size,)))
        return [(range(plan.perturbations), _within(self.segments, span)) for span in pairwise(edges)]

    def curvature_for(self, plan: RoundPlan) -> Bits | None:
        """Return the curvature that the plan's method divides by; None stands for h = 1.

        A sparse method's is 1 where a weight may move and beyond all measure elsewhere; it follows from
        the plan alone and is no state. The scales of tensors are those that the round began with: they must
        be asked for before it displaces a weight.
        """
        method = method_by_code(plan.method)
        if method.directions == "sparse":
            named = (plan.seed, method.named(plan.constants)["kept"])
            if self._mask is None or self._mask[0] != named:
                self._mask = (named, sparse_mask(self.weights.size, *named))
            return self._mask[1]
        if method.curvature == "scale":
            if self._scales is None or self._scales[0] != self.round:
                self._scales = (self.round, self.groups("tensor"))
                floor = method.named(plan.constants)["floor"]
                scales(self.weights, self.segments, self._scales[1], floor)
            return self._scales[1]
        if method.group:
            return self.shared
        return self.curvature if method.curvature else None

    def groups(self, kind: str) -> Shared:
        """Return a curvature of 1 for each "row" or "tensor"."""
        whole = [stop - start for start, stop in self.tensors]
        return groups_of(self.tensors, (self.widths or whole) if kind == "row" else whole, self.weights.size)

    def noise_for(self, plan: RoundPlan) -> tuple[Noise, float]:
        """Return what makes the plan's directions, and the factor that brings them to variance 1."""
        method = method_by_code(plan.method)
        if method.directions == "lowrank":
            rank = int(method.named(plan.constants)["rank"])
            widths = self.widths or [stop - start for start, stop in self.tensors]
            return LowRank(rank, self.tensors, widths), 1.0 / math.sqrt(rank)
        if method.guided and self.moments is not None:
            return Guided(self.moments[0]), 1.0
        return values, 1.0

    def exact_layers(self, plan: RoundPlan) -> list[tuple[Span, ...]]:
        """Return which layers have exact scalars, each as its spans; each sends a part of them."""
        method = method_by_code(plan.method)
        last = method.named(plan.constants).get("layers")
        if last is not None:
            return [tuple(span for layer in self.layers[-int(last) :] for span in layer)]
        layers = [layer for layer in (self.head, self.hidden)[: method.head] if layer]
        return layers[: taking_part(plan.exact, [head_size(layer) for layer in layers])]

    def exact_spans(self, plan: RoundPlan) -> tuple[Span, ...]:
        """Return the spans of all weights that have exact scalars, layer by layer."""
        return tuple(span for layer in self.exact_layers(plan) for span in layer)

    def reach(self, plan: RoundPlan) -> list[tuple[range, Sequence[Segment]]]:
        """Return which perturbations of a step move which part of the weights: numbers and segments.

        All move everything, except what has exact scalars; in a block-wise method perturbation p moves
        tensor p mod T alone, and in one that deals out the layers those of a share move the share's layers.
        """
        directions = method_by_code(plan.method).directions
        if directions == "layers" and self.layers:
            return [(plan.numbers(share), self._share(share, plan.shares)) for share in range(plan.shares)]
        if directions == "block" and self.tensors:
            blocks = min(len(self.tensors), plan.perturbations)
            first = plan.round * plan.perturbations  # so that all tensors have their turn where P < T
            return [
                (
                    range(block, plan.perturbations, blocks),
                    _within(self.segments, self.tensors[(first + block) % len(self.tensors)]),
                )
                for block in range(blocks)
            ]
        body = outside(self.segments, sorted(self.exact_spans(plan))) if plan.exact else self.segments
        return [(plan.numbers(), body)]

    def _share(self, share: int, shares: int) -> list[Segment]:
        """Return the segments of every ``shares``-th layer; the share after the last layer begins anew."""
        return [
            segment
            for layer in self.layers[share % len(self.layers) :: shares]
            for span in layer
            for segment in _within(self.segments, span)
        ]

    def evaluated(self) -> NDArray[np.float32]:
        """Return the weights that are judged and kept: a running mean where the method has one."""
        return self.moments[-1] if self.averaged and self.moments is not None else self.weights

    def prepare(self, method_code: int) -> None:
        """Lay out what the method remembers, if the replica has it not yet."""
        method = method_by_code(method_code)
        if method.curvature == "weight" and self.curvature is None:
            self.curvature = np.full(self.weights.size, ONE_BF16, np.uint16)
        if method.curvature in ("row", "tensor") and self.shared is None:
            self.shared = self.groups(method.curvature)
        if method.moments and (self.moments is None or len(self.moments) != method.moments):
            self.moments = np.zeros((method.moments, self.weights.size), np.float32)
            if method.averaged:
                self.moments[-1] = self.weights
        self.averaged = method.averaged


def apply_records(replica: Replica, records: Iterable[RoundRecord]) -> None:
    """Apply records in order; see :func:`apply_record`."""
    for record in records:
        apply_record(replica, record)


def apply_record(replica: Replica, record: RoundRecord, *, check: bool = True) -> None:
    """Bring a replica from ``record.plan.round`` to the next.

    For each local step w -= eta/P sum_p G_p z_p with z = u / sqrt(h), rounded to the grid; then, where
    the method learns curvature, h <- max((1 - nu) h + nu Dx^2, floor) from the last step's
    Dx = 1/P sum_p G_p z_p. In a family of widths, G is the mean over the agents that hold the weight. A
    skipped round only counts.

    Args:
        replica: Changed in place.
        record: The next record.
        check: Compare the digest afterwards; False only where the record is being made.

    Raises:
        LogError: The record is not the next one, or of another noise version.
        DigestError: The replica ends with another digest than the record says.
    """
    plan = record.plan
    if plan.round != replica.round:
        raise LogError(f"the replica stands before round {replica.round}; record {plan.round} cannot follow")
    if plan.noise_version != NOISE_VERSION:
        raise LogError(
            f"record {plan.round} needs noise version {plan.noise_version}; this release has {NOISE_VERSION}",
            hint="Install the release of scalarfed that wrote the log.",
        )
    if replica.level >= plan.levels:
        raise LogError(
            f"record {plan.round} is for {plan.levels} widths, the replica is number {replica.level + 1}"
        )
    replica.prepare(plan.method)
    if not record.skipped:
        _update(replica, record)
    replica.round += 1
    if check and (digest := replica.digest()) != (expected := record.digest_at(replica.level)):
        raise DigestError(
            f"after round {plan.round} the replica has digest {digest:016x}, the record says {expected:016x}"
        )


def _update(replica: Replica, record: RoundRecord) -> None:
    plan = record.plan
    method = method_by_code(plan.method)
    constants = method.named(plan.constants)
    answered = _answered(record)
    rate = plan.learning_rate
    if constants.get("smoothing", 0.0) > 0 and answered:
        projected = record.scalars[:, answered]
        replica.normaliser.observe([float(g) for g in projected.reshape(-1)], constants["smoothing"])
        rate = replica.normaliser.divide(rate)
    replica.clock.tick(constants)
    scale = replica.noise_for(plan)[1]
    of_steps = [plan.keys(step) for step in range(plan.steps)]
    places = replica.shells(plan) if method.nested else replica.reach(plan)
    for level, (reached, segments) in enumerate(places):
        numbers = [number for number in reached if number in answered]
        if not numbers:
            continue
        own = record.scalars[:, level * plan.perturbations :] if method.nested else record.scalars
        keys = [[of_step[number] for number in numbers] for of_step in of_steps]
        directed = [
            _directed(method, plan, scalars, of_step, replica.weights.size)
            for of_step, scalars in zip(of_steps, own, strict=True)
        ]
        parts = [
            whole_scalars(factors if len(numbers) == len(factors) else factors[numbers])
            for factors in directed
        ]
        wholes = [whole for whole, _ in parts]
        if method.moments:
            _remember(replica, plan, segments, keys[0], parts[0], rate, constants)
            continue
        amounts = [finite(scale * rate * unit / len(numbers)) for _, unit in parts]
        floor = max(constants.get("floor", 0.0), _SMALLEST_CURVATURE)
        learning = Learning(float(finite(parts[-1][1] / len(numbers))), constants.get("nu", 0.0), floor)
        _descend(replica, plan, segments, keys, wholes, amounts, learning)
    if plan.exact:
        for step in range(plan.steps):
            exact = record.scalars[step, plan.projected : plan.projected + plan.exact]
            move_head(replica, plan, exact, step=step, limit=RESERVE_STEPS)


def _answered(record: RoundRecord) -> Sequence[int]:
    """Return the numbers of the perturbations that somebody measured: a share of zeros had no answer."""
    plan = record.plan
    if plan.shares == 1:
        return plan.numbers()
    return [
        number
        for share in range(plan.shares)
        for number in plan.numbers(share)
        if record.scalars[:, plan.numbers(share)].any()
    ]


def _directed(
    method: Method, plan: RoundPlan, scalars: NDArray[np.float32], keys: Sequence[NoiseKey], size: int
) -> NDArray[np.float32]:
    """Return the factors of a step's directions: its projected gradients, or what the rule makes of them."""
    projected = scalars[: plan.projected]
    if method.rule == "sign":
        return np.sign(projected)
    if method.rule == "choice":
        losses = [float(loss) for loss in scalars[-method.losses :]]
        best = min(range(len(losses)), key=lambda number: (losses[number], abs(method.candidates[number])))
        return projected * np.float32(method.candidates[best])
    if method.rule == "orthogonal":
        return orthogonal(projected, keys, size)
    return projected


def move_head(
    replica: Replica,
    plan: RoundPlan,
    scalars: NDArray[np.float32],
    *,
    step: int,
    limit: int,
    direction: int = 1,
    bounded: bool = True,
) -> None:
    """Take a step down the last layer's gradient by a step's exact scalars.

    Args:
        replica: Changed in place.
        plan: Of the round.
        scalars: The step's exact ones.
        step: Local step.
        limit: Grid steps that a weight may be displaced by.
        direction: +1, or -1 to take a private move back.
        bounded: Whether the weights stay within their grid's limit; a move that is to be taken back must not
            be cut off.
    """
    rate = np.float32(method_by_code(plan.method).named(plan.constants)["head_rate"])
    spans = replica.exact_spans(plan)
    places = chosen(plan, step, [head_size(layer) for layer in replica.exact_layers(plan)])
    words = np.concatenate([rounding_words(plan.keys(step)[0], start, stop - start) for start, stop in spans])
    nudge(
        replica.weights,
        replica.segments,
        flat_indices(places, spans),
        rate * scalars,
        words[places],
        limit=limit,
        direction=direction,
        largest=WEIGHT_STEPS if bounded else NO_LIMIT,
    )


def _descend(
    replica: Replica,
    plan: RoundPlan,
    segments: Sequence[Segment],
    keys: Sequence[Sequence[NoiseKey]],
    wholes: Sequence[Sequence[int]],
    amounts: Sequence[np.float32],
    learning: Learning,
) -> None:
    """Move the weights of some segments by all local steps, and learn their curvature."""
    curvature, noise = replica.curvature_for(plan), replica.noise_for(plan)[0]
    learned = curvature is not None and curvature is replica.curvature
    if isinstance(curvature, Shared) and curvature is replica.shared:
        before = Shared(curvature.starts, curvature.values.copy(), curvature.size)
        curvature.learn(segments, keys[-1], wholes[-1], learning)
        curvature = before
    if noise is values and (kernel := find_kernel()) is not None:
        kernel.update(
            replica.weights,
            segments,
            keys,
            wholes,
            amounts,
            largest_move=RESERVE_STEPS,
            largest_weight=WEIGHT_STEPS,
            direction=1,
            curvature=curvature,
            learning=learning if learned else None,
            threads=replica.threads,
        )
        return
    for start, stop, exponent in chunks(segments):
        scale = step_scale(exponent)
        limit = np.float32(WEIGHT_STEPS) / scale
        weights = replica.weights[start:stop]
        root = None if curvature is None else inverse_root(curvature[start:stop])
        for step, whole in enumerate(wholes):
            total = weighted_noise(keys[step], whole, start, stop - start, noise)
            words = rounding_words(keys[step][0], start, stop - start)
            steps = total * (amounts[step] * scale)
            if root is not None:
                steps *= root
            round_update(steps, words, RESERVE_STEPS)
            steps /= scale
            weights -= steps
            np.clip(weights, -limit, limit, out=weights)
        if learned and replica.curvature is not None and root is not None:
            total *= np.float32(learning.descent)
            total *= root
            replica.curvature[start:stop] = learn_each(replica.curvature[start:stop], total, words, learning)


def _remember(
    replica: Replica,
    plan: RoundPlan,
    segments: Sequence[Segment],
    keys: Sequence[NoiseKey],
    part: tuple[Sequence[int], float],
    rate: float,
    constants: Mapping[str, float],
) -> None:
    """Move the weights by a rule with moments; a round has one step."""
    wholes, unit = part
    if replica.moments is None:
        raise ValueError("the replica was not prepared for this method")
    amount = finite(unit / len(keys))
    noise = replica.noise_for(plan)[0]
    for start, stop, exponent in chunks(segments):
        scale = step_scale(exponent)
        limit = np.float32(WEIGHT_STEPS) / scale
        weights = replica.weights[start:stop]
        gradient = weighted_noise(keys, wholes, start, stop - start, noise) * amount
        steps = descend(gradient, weights, replica.moments[:, start:stop], replica.clock, constants)
        steps *= finite(rate) * scale
        round_update(steps, rounding_words(keys[0], start, stop - start), RESERVE_STEPS)
        steps /= scale
        weights -= steps
        np.clip(weights, -limit, limit, out=weights)
        if "average" in constants:
            follow(replica.moments[-1, start:stop], weights, constants["average"])


def _within(segments: Sequence[Segment], span: Span) -> list[Segment]:
    """Return what of the segments lies in a span."""
    start, stop = span
    return [
        Segment(max(start, segment.start), min(stop, segment.stop), segment.exponent)
        for segment in segments
        if segment.start < stop and start < segment.stop
    ]
