"""What a round costs an agent: memory by the prediction, FLOPs by the graph, bytes by the wire's layouts.

Puts a bundle's cost and a round's plan together. Keeps no accounts (``ledger``) and measures nothing.
"""

from collections.abc import Callable, Sequence

from coordinator.ledger import Price, Work
from edge_agent.bundle import Bundle
from edge_agent.optimizer import method_by_code
from profiles.budget import flops_per_step, predict_peak_mib
from profiles.cost import Cost
from profiles.passes import runnable_passes

__all__ = ["price_of"]

_REPLY_HEAD, _OPEN_HEAD, _RECORD_HEAD = 32, 46, 51
_RECENT = 4
_MQTT_BYTES = 70  # topic, heads and acknowledgement of a message at QoS 1


def price_of(
    bundle: Bundle, predicted_mib: Sequence[float | None], *, batch_size: int
) -> Callable[[Work], Price]:
    """Return the function that prices work.

    Args:
        bundle: What is trained.
        predicted_mib: By agent number, the peak that was predicted when the run was prepared; None prices
            memory at nothing.
        batch_size: For which that was.
    """
    cost = Cost.from_dict(bundle.cost, params=bundle.params)
    planned = predict_peak_mib(cost, batch_size=batch_size, passes=runnable_passes(bundle.passes))

    def less(size: int) -> float:
        """Return how much less the peak of a smaller batch is."""
        return planned.total_mib - planned.at_batch(size).total_mib

    def price(work: Work) -> Price:
        plan = work.plan
        step = flops_per_step(
            cost,
            batch_size=work.batch_size,
            perturbations=plan.perturbations,
            difference="central" if work.central else "forward",
            size=bundle.size,
            extra_forwards=method_by_code(plan.method).losses,
        )
        scalars = 4 * plan.steps * plan.scalars
        down = _OPEN_HEAD + _RECENT * (_RECORD_HEAD + scalars)
        predicted = predicted_mib[work.agent]
        return Price(
            peak_mib=0.0 if predicted is None else predicted - less(work.batch_size),
            flops=plan.steps * step,
            wire_bytes=_REPLY_HEAD + scalars + down + 2 * _MQTT_BYTES,
        )

    return price
