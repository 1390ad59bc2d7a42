"""Whether a run is well: what its scalars, losses and weights say, in plain words.

Looks at each record after it was applied and returns findings, each with its numbers and what to do. Does
no input or output, changes nothing, and says a thing again only after a while.
"""

import math
import statistics
from collections import deque

import numpy as np

from edge_agent.grid import WEIGHT_STEPS, bf16_to_float, step_scale
from edge_agent.replay import Replica
from edge_agent.wire import RoundRecord

__all__ = ["Health"]

_WINDOW = 20
_SPIKE = 2.0
_DIVERGED = 1.5
_LOOK_EVERY = 25
_SILENT_ROUNDS = 50
_SATURATED = 0.01
_SPREAD = 1e4


class Health:
    """Watches one run, record by record.

    Args:
        learning_rate: As the experiment has it, for the advice.

    Attributes:
        alarming: Whether something that the latest record brought asks for a lower learning rate.
        calmest: The round after which the loss was lowest, by the median of the rounds before it.
    """

    def __init__(self, learning_rate: float) -> None:
        self._learning_rate = learning_rate
        self._losses: deque[float] = deque(maxlen=_WINDOW)
        self._first: list[float] = []
        self._said: dict[str, int] = {}
        self.alarming = False
        self.calmest = 0
        self._lowest = math.inf

    def observe(self, record: RoundRecord, loss: float | None, replica: Replica) -> list[str]:
        """Take in a record and return what is not well.

        Args:
            record: Applied already.
            loss: Mean loss of the round, None when skipped.
            replica: After the record; only read.
        """
        round_ = record.plan.round
        self.alarming = False
        if record.skipped or loss is None:
            return []
        found = {**self._of_losses(loss), **self._of_scalars(record)}
        if round_ % _LOOK_EVERY == _LOOK_EVERY - 1:
            found |= self._of_replica(replica)
        fresh = [kind for kind in found if round_ - self._said.get(kind, -_SILENT_ROUNDS) >= _SILENT_ROUNDS]
        self._said.update(dict.fromkeys(fresh, round_))
        self.alarming = bool({"spike", "divergence", "saturation"}.intersection(fresh))
        if len(self._losses) == _WINDOW and (level := statistics.median(self._losses)) < self._lowest:
            self._lowest, self.calmest = level, round_ + 1
        return [found[kind] for kind in fresh]

    def _of_losses(self, loss: float) -> dict[str, str]:
        found = {}
        less = f"Set method.learning_rate to {self._learning_rate / 2:g} or less."
        if len(self._losses) == _WINDOW:
            before = statistics.median(self._losses)
            if loss > _SPIKE * before:
                found["spike"] = f"the loss jumped from {before:.3g} to {loss:.3g} in one round. {less}"
            first = statistics.median(self._first)
            if before > _DIVERGED * first:
                found["divergence"] = (
                    f"the loss diverges: {before:.3g} by the median of the last {_WINDOW} rounds, and "
                    f"{first:.3g} in the first {_WINDOW}. {less}"
                )
        self._losses.append(loss)
        if len(self._first) < _WINDOW:
            self._first.append(loss)
        return found

    def _of_scalars(self, record: RoundRecord) -> dict[str, str]:
        projected = record.scalars[:, : record.plan.projected].astype(np.float64)
        if not projected.any():
            return {
                "zeros": "all projected gradients are zero: the losses do not feel a step of "
                f"epsilon = {record.plan.epsilon:g}. Set method.epsilon to {10 * record.plan.epsilon:g}."
            }
        largest, middle = float(np.abs(projected).max()), float(np.median(np.abs(projected)))
        if projected.size >= 5 and middle > 0 and largest > 100 * middle:
            return {
                "outlier": f"one projected gradient is {largest:.3g}, their median {middle:.3g}: "
                "the loss has a cliff there. Set method.epsilon lower, or use more perturbations."
            }
        return {}

    def _of_replica(self, replica: Replica) -> dict[str, str]:
        found = {}
        stuck = 0
        for start, stop, exponent in replica.segments:
            limit = np.float32(WEIGHT_STEPS) / step_scale(exponent)
            stuck += int(np.count_nonzero(np.abs(replica.weights[start:stop]) >= limit))
        if stuck > _SATURATED * replica.weights.size:
            found["saturation"] = (
                f"{stuck / replica.weights.size:.1%} of the weights stand at the end of their grid: "
                f"the steps are too large. Set method.learning_rate to {self._learning_rate / 4:g}."
            )
        curvature = None if replica.curvature is None else bf16_to_float(replica.curvature)
        if replica.shared is not None:
            curvature = replica.shared.values
        if curvature is not None:
            low, high = (float(x) for x in np.quantile(curvature, [0.05, 0.95]))
            if low > 0 and high / low > _SPREAD and math.isfinite(high):
                found["spread"] = (
                    f"the curvature spreads from {low:.2g} to {high:.2g}: some perturbations are "
                    f"{math.sqrt(high / low):.0f} times others. Raise method.floor."
                )
        return found
