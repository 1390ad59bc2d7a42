"""What a device may spend, what work on it will need, and whether that fits before anything starts.

Predicts an agent's peak memory and FLOPs from a net's cost and the experiment's numbers. Knows nothing of
graphs (``cost``), measures nothing (``memory``) and keeps no accounts over time (the coordinator's ledger).

The constants were fitted to fresh processes with Python 3.11, numpy 2.4, onnxruntime 1.31, paho-mqtt 2.2
and psutil 7.2 on x86-64 Linux, weights bound as inputs by pointer, no memory pattern: see
``tests/test_profiles_budget.py``, which measures again.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from profiles.cost import Cost
from profiles.errors import BudgetError
from profiles.passes import Pass

__all__ = [
    "Budget",
    "Prediction",
    "Spent",
    "check_memory",
    "flops_per_step",
    "forwards_per_step",
    "predict_peak_mib",
    "predict_seconds",
]

_MIB = 2**20
_IMPORTS_MIB = 33.0  # what stays of Python and the libraries; edge_agent/footprint.py gives the rest back
_SESSION_MIB = 11.1  # the runtime's own pages that passes go on needing
_START_MIB = 4.0  # pages that only opening a session needs, before the first pass
_SESSION_PER_GRAPH_BYTE = 25.0  # nodes and kernels: a graph of 147 KB takes 3.7 MiB
_CHUNK_BYTES = int(5.4 * _MIB)  # buffers of noise and replay, and the code that goes with rounds
_SCRATCH = 1.05  # what kernels pack and unfold beside the buffers between them, where no pass tells it
_BATCHES_HELD = 2.25  # the batch, the one before, and what was picked from samples of bytes
_THREAD_MIB = 0.2  # the touched part of a stack and of an allocator's arena
_DIFFERENCES = ("central", "forward")
_SHARE_OF_PEAK = 0.1  # small nets on small boards reach about a tenth of their arithmetic peak
_LARGEST_BATCH = 2**20
_TORCH = {
    # MiB of torch and onnx beside the agent's imports, of torch's own pages once it has run, and what a
    # pass holds of the activations: upper bounds from LeNet, ResNet-20 and WRN-10-2 at batches 8 and 64.
    "": (0.0, 0.0, 1.0),
    "gradient": (190.0, 20.0, 3.3),
    "slope": (190.0, 95.0, 7.0),
}


@dataclass(frozen=True)
class Prediction:
    """The predicted peak of an agent's resident memory, in MiB, term by term.

    Attributes:
        batch_size: Samples of one forward pass.
        imports: What stays of Python and the agent's libraries.
        session: The runtime's own, and the graph.
        weights: The one copy of the trainable tensors.
        curvature: Optimizer state beyond the weights.
        activations: What a forward pass of one batch holds.
        batch: The inputs of a pass, and those of the pass before while they are made.
        data: The device's own samples.
        chunks: What rounds hold beside their passes: buffers for noise and replay, code.
        threads: What each thread beyond the first adds.
        at_batch: Returns the same prediction for another batch size.
    """

    batch_size: int
    imports: float
    session: float
    weights: float
    curvature: float
    activations: float
    batch: float
    data: float
    chunks: float
    threads: float
    at_batch: Callable[[int], Prediction] = field(repr=False, compare=False)

    @property
    def terms(self) -> dict[str, float]:
        """Every term by name; their sum is the peak.

        ``start`` is what the imports and opening a session need beyond all that is there later.
        """
        fields = {
            each.name: getattr(self, each.name)
            for each in dataclasses.fields(self)
            if each.name not in ("batch_size", "at_batch")
        }
        return {**fields, "start": max(0.0, _START_MIB - self._later)}

    @property
    def _later(self) -> float:
        """What comes after the start, in the place of pages that it has given back."""
        return self.curvature + self.activations + self.batch + self.chunks + self.threads

    @property
    def total_mib(self) -> float:
        """The predicted peak."""
        return sum(self.terms.values())

    def describe(self) -> str:
        """Return one line with the total and every term that is not nothing."""
        terms = ", ".join(f"{name} {mib:.1f}" for name, mib in self.terms.items() if mib >= 0.05)
        return f"{self.total_mib:.1f} MiB: {terms}"

    def largest_batch(self, allowed_mib: float) -> int:
        """Return the largest batch size whose predicted peak is within ``allowed_mib``; 0 if none is."""
        fits, beyond = 0, 1
        while self.at_batch(beyond).total_mib <= allowed_mib:
            fits, beyond = beyond, 2 * beyond
            if fits >= _LARGEST_BATCH:
                return fits
        while beyond - fits > 1:
            middle = (fits + beyond) // 2
            if self.at_batch(middle).total_mib <= allowed_mib:
                fits = middle
            else:
                beyond = middle
        return fits

    def largest_density(self, allowed_mib: float) -> float:
        """Return the share of this net's parameters that would fit at this batch size, 0 to 1.

        Narrower layers that keep a share d of the parameters keep about sqrt(d) of every width, and so of
        the activations. Rounded down to two decimals; 0 if not even an empty net fits.
        """
        left = allowed_mib - (self.imports + self.session + self.data)
        before = _density_within(left - _START_MIB, linear=self.weights, root=0.0)
        after = _density_within(
            left - self.batch - self.chunks - self.threads,
            linear=self.weights + self.curvature,
            root=self.activations,
        )
        return min(before, after)


def _density_within(left: float, *, linear: float, root: float) -> float:
    """Return the largest d in [0, 1], in hundredths, with ``linear * d + root * sqrt(d) <= left``, or 0."""
    if left <= 0:
        return 0.0
    if linear + root <= left:
        return 1.0
    if linear == 0:
        return math.floor(100 * (left / root) ** 2) / 100
    # The positive s = sqrt(d) with linear * s**2 + root * s = left.
    width = (math.sqrt(root**2 + 4 * linear * left) - root) / (2 * linear)
    return math.floor(100 * width**2) / 100


@dataclass(frozen=True)
class Budget:
    """What a device may spend; None is no limit.

    Attributes:
        memory_mib: Resident memory of the agent.
        flops_per_round: FLOPs in one round.
        flops_per_day: FLOPs in 24 hours.
        bytes_per_day: Bytes on the wire, both ways, in 24 hours.
        temperature_c: The board's hottest zone.
        battery_percent: The charge below which the board is left alone.
        energy_wh_per_day: Watt-hours in 24 hours, where the board reports its power.
    """

    memory_mib: float | None = None
    flops_per_round: int | None = None
    flops_per_day: int | None = None
    bytes_per_day: int | None = None
    temperature_c: float | None = None
    battery_percent: float | None = None
    energy_wh_per_day: float | None = None

    def exceeded(self, spent: Spent) -> list[str]:
        """Return one sentence for each limit that ``spent`` exceeds, with both numbers."""
        pairs = (
            ("peak memory in MiB", spent.peak_memory_mib, self.memory_mib),
            ("FLOPs in a round", spent.flops_in_round, self.flops_per_round),
            ("FLOPs today", spent.flops_today, self.flops_per_day),
            ("bytes today", spent.bytes_today, self.bytes_per_day),
        )
        return [
            f"{what}: {used:,.10g} of {allowed:,.10g} allowed"
            for what, used, allowed in pairs
            if allowed is not None and used > allowed
        ]


@dataclass(frozen=True)
class Spent:
    """What a device has spent, or would have spent after the next round.

    Attributes:
        peak_memory_mib: Highest resident memory, measured or predicted.
        flops_in_round: FLOPs of the round in question.
        flops_today: FLOPs since midnight UTC.
        bytes_today: Bytes on the wire since midnight UTC.
    """

    peak_memory_mib: float = 0.0
    flops_in_round: int = 0
    flops_today: int = 0
    bytes_today: int = 0

    def after(self, *, flops: int, wire_bytes: int, peak_memory_mib: float = 0.0) -> Spent:
        """Return the account after one more round that costs this much."""
        return Spent(
            peak_memory_mib=max(self.peak_memory_mib, peak_memory_mib),
            flops_in_round=flops,
            flops_today=self.flops_today + flops,
            bytes_today=self.bytes_today + wire_bytes,
        )


def predict_peak_mib(
    cost: Cost,
    *,
    batch_size: int,
    passes: Sequence[Pass] = (),
    curvature_bytes_per_param: float = 0.0,
    threads: int = 1,
    data_bytes: int = 0,
    chunk_bytes: int = _CHUNK_BYTES,
    graph_bytes: int = 50_000,
    imports_mib: float = _IMPORTS_MIB,
    autodiff: str = "",
) -> Prediction:
    """Predict the peak resident memory of an agent that trains, in MiB, within 5 %.

    Args:
        cost: Of the bundle's graph.
        batch_size: Samples of one forward pass, >= 1.
        passes: What the graphs that may run ask of the allocator; the greediest counts. Without any the
            cost's own line does, which is up to a fifth off at some batches; and where torch runs.
        curvature_bytes_per_param: Optimizer state: 0 for none or one value a tensor, 2 for bf16 curvature, 4
            for float32, 8 for Adam.
        threads: Of the forward pass, >= 1.
        data_bytes: What the device's samples take in memory.
        chunk_bytes: What rounds hold beside their forward passes, which does not grow with the net.
        graph_bytes: Length of ``graph.onnx``.
        imports_mib: Resident memory after the imports; an agent can say its own.
        autodiff: What torch computes on the board: nothing, a "slope" along a direction (which is a vector
            as large as the weights) or a "gradient" of the last layers.

    Raises:
        ValueError: A count is less than it can be.
    """
    if batch_size < 1 or threads < 1:
        raise ValueError(f"batch_size {batch_size} and threads {threads} must be at least 1")
    if min(curvature_bytes_per_param, data_bytes, chunk_bytes, graph_bytes, imports_mib) < 0:
        raise ValueError("sizes must not be negative")
    torch_mib, torch_pages_mib, held = _TORCH[autodiff]
    moments = curvature_bytes_per_param + 4.0 * (autodiff == "slope")

    nodes_bytes = max(0, graph_bytes - cost.constant_bytes)
    graph_mib = (cost.constant_bytes + _SESSION_PER_GRAPH_BYTE * nodes_bytes) / _MIB

    def at_batch(size: int) -> Prediction:
        if passes and not autodiff:
            activations: float = max(
                each.resident_bytes(size, at_once=cost.at_once, threads=threads) for each in passes
            )
        else:  # torch takes the whole batch
            together = size if autodiff else min(size, cost.at_once)
            activations = _SCRATCH * cost.activation_bytes(together)
        return Prediction(
            batch_size=size,
            imports=imports_mib + torch_mib,
            session=torch_pages_mib + _SESSION_MIB + graph_mib,
            weights=cost.weight_bytes / _MIB,
            curvature=cost.params * moments / _MIB,
            activations=held * activations / _MIB,
            batch=_BATCHES_HELD * cost.input_bytes_per_sample * size / _MIB,
            data=data_bytes / _MIB,
            chunks=chunk_bytes / _MIB,
            threads=_THREAD_MIB * (threads - 1),
            at_batch=at_batch,
        )

    return at_batch(batch_size)


def forwards_per_step(*, perturbations: int, difference: str) -> int:
    """Return how many forward passes one step takes: 2P for central differences, P + 1 for forward ones.

    Args:
        perturbations: P, >= 1.
        difference: ``central`` or ``forward``.

    Raises:
        ValueError: Another difference, or P < 1.
    """
    if difference not in _DIFFERENCES or perturbations < 1:
        raise ValueError(f"difference {difference!r} of {perturbations} perturbations")
    return 2 * perturbations if difference == "central" else perturbations + 1


def flops_per_step(
    cost: Cost, *, batch_size: int, perturbations: int, difference: str, size: int, extra_forwards: int = 0
) -> int:
    """Return the FLOPs of one local step: its forward passes, and the passes over the weights.

    A pass adds one multiple of a perturbation to every weight, two FLOPs each: every forward but the one at
    the unperturbed weights has one before it, the last one is undone, and P of them apply the record.

    Args:
        cost: Of the bundle's graph.
        batch_size: Samples of one forward pass.
        perturbations: P.
        difference: ``central`` (2P forwards) or ``forward`` (P + 1).
        size: Elements of the flat vector of weights, its gaps included.
        extra_forwards: What a method evaluates beside its differences.
    """
    forwards = forwards_per_step(perturbations=perturbations, difference=difference) + extra_forwards
    perturbed = 2 * perturbations if difference == "central" else perturbations
    passes = perturbed + 1 + perturbations
    return forwards * batch_size * cost.forward_flops + 2 * size * passes


def predict_seconds(flops: int, *, gflops: float) -> float:
    """Return about how long a board works on so many FLOPs: an estimate, no promise.

    Args:
        flops: Of :func:`flops_per_step`.
        gflops: The board's rate of large matrix products, > 0; small nets reach a tenth of it.
    """
    return flops / (1e9 * gflops * _SHARE_OF_PEAK)


def check_memory(
    prediction: Prediction, allowed_mib: float, *, model: str, device: str, density: float = 1.0
) -> None:
    """Do nothing if the prediction is within what is allowed; else refuse with what would fit.

    Args:
        prediction: Of the work that is planned.
        allowed_mib: The device's memory budget.
        model: The net's name, for the message.
        device: The device's name, for the message.
        density: The share of the dense net's parameters that this net has kept, so that the density in the
            hint is one of the dense net.

    Raises:
        BudgetError: The device may not use what the work needs.
    """
    if prediction.total_mib <= allowed_mib:
        return
    batch = prediction.largest_batch(allowed_mib)
    share = math.floor(100 * density * prediction.largest_density(allowed_mib)) / 100
    ways = []
    if share > 0:
        ways.append(f"prune to `--density {share:g}` or lower")
    if batch > 0:
        ways.append(f"set `batch_size = {batch}`")
    if not ways:
        bare = dataclasses.replace(prediction, weights=0.0, curvature=0.0, activations=0.0, batch=0.0)
        ways.append(f"leave the device out: {bare.total_mib:.0f} MiB are needed before any net")
    hint = ", or ".join(ways)
    raise BudgetError(
        f"Training `{model}` needs {prediction.total_mib:.0f} MiB on the device; `{device}` allows "
        f"{allowed_mib:.0f} MiB ({prediction.describe()}).",
        hint=f"{hint[0].upper()}{hint[1:]}.",
    )
