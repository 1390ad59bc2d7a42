"""What an agent does with its own samples: the batches of a round, their losses, the estimate.

The agent process and the simulation both measure through this one function, so that the same
experiment has the same bits in both.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edge_agent.bundle import Bundle
from edge_agent.data import Samples, batch_indices, to_inputs
from edge_agent.estimator import Estimate, Slope, batches_per_step, estimate
from edge_agent.forward import Forward
from edge_agent.optimizer import method_by_code
from edge_agent.plan import RoundPlan
from edge_agent.replay import Replica
from edge_agent.wire import RoundOpen
from profiles.errors import ConfigError

if TYPE_CHECKING:
    from edge_agent.torch_forward import TorchForward

__all__ = ["forward_for", "measure", "refuse_without_torch"]


def refuse_without_torch(method: str) -> None:
    """Do nothing where torch and onnx can be imported; else refuse a method that needs them.

    Raises:
        ConfigError: One of them is not installed.
    """
    missing = [name for name in ("torch", "onnx") if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"`{method}` needs {' and '.join(missing)} on the board, and here there is none",
            hint="Install scalarfed[torch-agent] there, or choose a method that needs no derivatives.",
        )


def forward_for(
    bundle: Bundle, replica: Replica, plan: RoundPlan, *, threads: int = 1
) -> "Forward | TorchForward":
    """Return what runs a plan's forward passes: ONNX Runtime, or torch where the method needs derivatives.

    Args:
        bundle: Whose graph it is.
        replica: Whose weights are read.
        plan: Names the method, and which layers' gradients it asks.
        threads: Of a forward pass.

    Raises:
        ConfigError: The method needs torch, and there is none.
    """
    method = method_by_code(plan.method)
    if not method.autodiff:
        return Forward(bundle, replica.weights, threads=threads)
    refuse_without_torch(method.name)
    from edge_agent.torch_forward import TorchForward

    last = replica.exact_spans(plan) if plan.exact else ()
    return TorchForward(bundle, replica.weights, last=last, threads=threads)


def measure(
    forward: "Forward | TorchForward",
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
        forward: Reads the replica's weights; from :func:`forward_for`.
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

    method = method_by_code(plan.method)

    def batch_of(batch: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        size = len(samples) if own is None else len(own)
        indices = batch_indices(plan.seed, number, first + batch, opened.batch_size, size)
        taken = samples.pick(indices if own is None else own[indices])
        return to_inputs(taken.x), taken.y

    def loss_of(batch: int) -> Callable[[], float]:
        x, y = batch_of(batch)

        def loss() -> float:
            on_pass()
            return forward.loss(x, y, head=method.head if plan.exact else 0)

        return loss

    def slope_of(batch: int) -> Slope:
        x, y = batch_of(batch)

        def slope(direction: NDArray[np.float32]) -> tuple[float, float]:
            on_pass()
            return forward.slope(x, y, direction)  # type: ignore[union-attr]  # forward_for made it for this

        return slope

    return estimate(
        replica,
        plan,
        loss_of,
        central=opened.central,
        share=plan.share_of(number),
        head_gradient=forward.head_gradient if plan.exact else None,
        slope_of=slope_of if method.autodiff == "slope" else None,
    )
