"""Applies records to a replica: the only writer of weights.

A replica is what every side holds: flat weights on their grid, curvature where the method has it,
and how many records went into them. Whoever applies the same records to the same bundle has the same
bits. Everything here is elementwise and in a fixed order; see :mod:`edge_agent.grid`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from edge_agent.digest import fold, join, of_floats
from edge_agent.grid import (
    RESERVE_STEPS,
    WEIGHT_STEPS,
    Segment,
    bf16_to_float,
    chunks,
    finite,
    inverse_root,
    round_update,
    rounding_words,
    step_scale,
    weighted_noise,
    whole_scalars,
)
from edge_agent.noise import NOISE_VERSION
from edge_agent.optimizer import Normaliser, method_by_code
from edge_agent.wire import RoundPlan, RoundRecord
from profiles.errors import DigestError, LogError

__all__ = ["Replica", "apply_record", "apply_records"]

_ONE_BF16 = np.uint16(0x3F80)
_SMALLEST_CURVATURE = 1e-30  # far from denormals, which a processor may flush to zero
_LARGEST_CURVATURE = np.float32(1e30)
_LARGEST_DESCENT = np.float32(1e15)


@dataclass
class Replica:
    """A weight vector at a round.

    Attributes:
        weights: Flat float32 vector on the grid.
        segments: Its grids.
        round: Records applied so far, which is also the round that comes next.
        curvature: bfloat16 bits per weight, or None while no method asked for it.
        normaliser: Running mean square of the scalars.
    """

    weights: NDArray[np.float32]
    segments: Sequence[Segment]
    round: int = 0
    curvature: NDArray[np.uint16] | None = None
    normaliser: Normaliser = field(default_factory=Normaliser)

    def digest(self) -> int:
        """Return 64 bits of all that the next rounds depend on."""
        curvature = 0 if self.curvature is None else fold(self.curvature.view(np.uint32))
        scalars = of_floats(self.normaliser.mean_square, self.normaliser.weight)
        return join(fold(self.weights.view(np.uint32)), curvature, scalars)

    def curvature_for(self, plan: RoundPlan) -> NDArray[np.uint16] | None:
        """Return the curvature that the plan's method divides by; None stands for h = 1."""
        return self.curvature if method_by_code(plan.method).curvature else None

    def prepare(self, method_code: int) -> None:
        """Lay out the curvature, all ones, if the method has it and the replica not yet."""
        if method_by_code(method_code).curvature and self.curvature is None:
            self.curvature = np.full(self.weights.size, _ONE_BF16, np.uint16)


def apply_records(replica: Replica, records: Iterable[RoundRecord]) -> None:
    """Apply records in order; see :func:`apply_record`."""
    for record in records:
        apply_record(replica, record)


def apply_record(replica: Replica, record: RoundRecord, *, check: bool = True) -> None:
    """Bring a replica from ``record.plan.round`` to the next.

    For each local step w -= eta/P sum_p G_p z_p with z = u / sqrt(h), rounded to the grid; then, where
    the method learns curvature, h <- max((1 - nu) h + nu Dx^2, floor) from the last step's
    Dx = 1/P sum_p G_p z_p. A skipped round only counts.

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
    replica.prepare(plan.method)
    if not record.skipped:
        _update(replica, record)
    replica.round += 1
    if check and (digest := replica.digest()) != record.digest:
        raise DigestError(
            f"after round {plan.round} the replica has digest {digest:016x}, "
            f"the record says {record.digest:016x}"
        )


def _update(replica: Replica, record: RoundRecord) -> None:
    plan = record.plan
    method = method_by_code(plan.method)
    constants = method.named(plan.constants)
    rate = plan.learning_rate
    if constants["smoothing"] > 0:
        replica.normaliser.observe([float(g) for g in record.scalars.reshape(-1)], constants["smoothing"])
        rate = replica.normaliser.divide(rate)
    curvature = replica.curvature_for(plan)
    parts = [whole_scalars(step) for step in record.scalars]
    amounts = [finite(rate * unit / plan.perturbations) for _, unit in parts]
    for start, stop, exponent in chunks(replica.segments):
        scale = step_scale(exponent)
        limit = np.float32(WEIGHT_STEPS) / scale
        weights = replica.weights[start:stop]
        root = None if curvature is None else inverse_root(curvature[start:stop])
        for step, (wholes, _) in enumerate(parts):
            keys = plan.keys(step)
            total = weighted_noise(keys, wholes, start, stop - start)
            words = rounding_words(keys[0], start, stop - start)
            steps = total * (amounts[step] * scale)
            if root is not None:
                steps *= root
            round_update(steps, words, RESERVE_STEPS)
            steps /= scale
            weights -= steps
            np.clip(weights, -limit, limit, out=weights)
        if curvature is not None and root is not None:
            total *= finite(parts[-1][1] / plan.perturbations)
            total *= root
            curvature[start:stop] = _learn(
                curvature[start:stop], total, words, constants["nu"], constants["floor"]
            )


def _learn(
    curvature: NDArray[np.uint16],
    descent: NDArray[np.float32],
    words: NDArray[np.uint32],
    nu: float,
    floor: float,
) -> NDArray[np.uint16]:
    """Return the curvature after a round, in bfloat16 rounded up or down by the lower 16 random bits.

    Nearest rounding would never move h once nu times its change is under 0.4 %.
    """
    h = bf16_to_float(curvature) * np.float32(1.0 - nu)
    np.clip(descent, -_LARGEST_DESCENT, _LARGEST_DESCENT, out=descent)
    descent *= descent
    descent *= np.float32(nu)
    h += descent
    np.clip(h, np.float32(max(floor, _SMALLEST_CURVATURE)), _LARGEST_CURVATURE, out=h)
    return ((h.view(np.uint32) + (words & np.uint32(0xFFFF))) >> np.uint32(16)).astype(np.uint16)
