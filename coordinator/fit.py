"""Whether a bundle fits a board: predicted before anything is flashed.

Puts a bundle's cost and a board's profile together. Measures nothing, and changes nothing.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

from edge_agent.bundle import Bundle
from edge_agent.optimizer import METHODS
from profiles.budget import Prediction, check_memory, flops_per_step, predict_peak_mib, predict_seconds
from profiles.cost import Cost
from profiles.device import Profile
from profiles.errors import ConfigError
from profiles.passes import runnable_passes

__all__ = ["Fit", "Work", "fit", "refuse_unfit"]

_REPLY_HEAD_BYTES = 32


@dataclass(frozen=True)
class Work:
    """What a round asks of an agent.

    Attributes:
        method: One of ``edge_agent.optimizer.METHODS``.
        batch_size: Samples of a forward pass.
        perturbations: P.
        local_steps: K.
        difference: ``central`` or ``forward``.
        samples: How many of its own the agent holds in memory.
    """

    method: str = "hiso"
    batch_size: int = 16
    perturbations: int = 8
    local_steps: int = 1
    difference: str = "central"
    samples: int = 0


@dataclass(frozen=True)
class Fit:
    """What was found.

    Attributes:
        prediction: Of the peak memory, term by term.
        allowed_mib: What the board allows.
        largest_batch: The largest batch that fits with this net; 0 if none does.
        density: The share of the dense net's parameters at which this batch would fit.
        flops_per_round: Of one agent.
        seconds_per_round: At a tenth of the board's arithmetic peak.
        bytes_up: Payload of a reply.
    """

    prediction: Prediction
    allowed_mib: float
    largest_batch: int
    density: float
    flops_per_round: int
    seconds_per_round: float
    bytes_up: int

    @property
    def fits(self) -> bool:
        """Whether the board can do this work."""
        return self.prediction.total_mib <= self.allowed_mib

    def as_dict(self) -> dict[str, Any]:
        """Return everything by name."""
        found = asdict(self)
        found["prediction"] = self.prediction.terms
        return {"fits": self.fits, "predicted_mib": round(self.prediction.total_mib, 2), **found}


def fit(bundle: Bundle, profile: Profile, work: Work, *, allowed_mib: float | None = None) -> Fit:
    """Return whether a board can train a bundle, and what would fit if it cannot.

    Args:
        bundle: What would be flashed.
        profile: Of the board.
        work: What a round asks.
        allowed_mib: The memory budget; the profile's if None.

    Raises:
        ConfigError: There is no such method.
    """
    if work.method not in METHODS:
        raise ConfigError(f"there is no method {work.method!r}; there are {', '.join(METHODS)}")
    rule = METHODS[work.method]
    cost = Cost.from_dict(bundle.cost, params=bundle.params)
    sample_bytes = 4 * math.prod(bundle.sample_shape) + 8
    prediction = predict_peak_mib(
        cost,
        batch_size=work.batch_size,
        passes=runnable_passes(bundle.passes, arch=profile.arch),
        curvature_bytes_per_param=rule.bytes_beyond(bundle.params, bundle.groups(rule.group)) / bundle.params,
        autodiff=rule.autodiff,
        data_bytes=work.samples * sample_bytes,
        graph_bytes=bundle.graph_path.stat().st_size,
    )
    allowed = profile.memory_mib.value if allowed_mib is None else allowed_mib
    kept = bundle.params / bundle.pruning.get("params_dense", bundle.params)
    step = flops_per_step(
        cost,
        batch_size=work.batch_size,
        perturbations=work.perturbations,
        difference=work.difference,
        size=bundle.size,
    )
    flops = step * work.local_steps
    return Fit(
        prediction=prediction,
        allowed_mib=allowed,
        largest_batch=prediction.largest_batch(allowed),
        density=math.floor(100 * kept * prediction.largest_density(allowed)) / 100,
        flops_per_round=flops,
        seconds_per_round=predict_seconds(flops, gflops=profile.fp32_gflops.value),
        bytes_up=_REPLY_HEAD_BYTES + 4 * work.perturbations * work.local_steps,
    )


def refuse_unfit(found: Fit, bundle: Bundle, device: str) -> None:
    """Do nothing if it fits.

    Raises:
        BudgetError: It does not; the hint names the density or the batch that would.
    """
    kept = bundle.params / bundle.pruning.get("params_dense", bundle.params)
    check_memory(found.prediction, found.allowed_mib, model=bundle.model, device=device, density=kept)
