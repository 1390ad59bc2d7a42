"""What an agent does with its own samples: the batches of a round, their losses, the estimate.

The agent process and the simulation both measure through this one function, so that the same
experiment has the same bits in both.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from edge_agent.data import Samples, batch_indices, to_inputs
from edge_agent.estimator import Estimate, batches_per_step, estimate
from edge_agent.forward import Forward
from edge_agent.replay import Replica
from edge_agent.wire import RoundOpen

__all__ = ["measure"]


def measure(
    forward: Forward,
    samples: Samples,
    replica: Replica,
    opened: RoundOpen,
    number: int,
    *,
    own: NDArray[np.int64] | None = None,
    on_pass: Callable[[], None] = lambda: None,
) -> Estimate:
    """Measure what a round asks of one agent.

    Args:
        forward: Reads the replica's weights.
        samples: The agent's, or those of many.
        replica: Perturbed in place; ends with the bits it had.
        opened: The round.
        number: The agent's number in the fleet, which decides with the run's seed which samples it takes.
        own: Which of the samples are the agent's; None for all.
        on_pass: Told before each forward pass that work goes on.

    Raises:
        EstimateError: A loss is not finite; the replica is as it was.
    """
    plan = opened.plan
    first = plan.round * plan.steps * batches_per_step(plan, central=opened.central)

    def loss_of(batch: int) -> Callable[[], float]:
        size = len(samples) if own is None else len(own)
        indices = batch_indices(plan.seed, number, first + batch, opened.batch_size, size)
        taken = samples.pick(indices if own is None else own[indices])
        x = to_inputs(taken.x)

        def loss() -> float:
            on_pass()
            return forward.loss(x, taken.y, head=plan.exact > 0)

        return loss

    return estimate(
        replica,
        plan,
        loss_of,
        central=opened.central,
        head_gradient=forward.head_gradient if plan.exact else None,
    )
