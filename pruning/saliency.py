"""Saliency: how much each weight of a net matters before training.

Knows the published scores, all functions of the same shape ``(probe, masks, step) -> score per weight``.
Does not know schedules, widths or budgets.

Every score is the derivative of a scalar by the *mask* m that multiplies the weights, so that m * score
summed over a channel is the score of the channel (:func:`group_scores`).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from profiles.errors import ModelError
from pruning.masks import Masks
from pruning.structure import WEIGHTED, Axis, Structure
from pruning.threads import one_thread
from pruning.weights import Moments, derive_seed, draw_inputs, fresh_weights

__all__ = [
    "SCORES",
    "Probe",
    "Score",
    "group_scores",
    "last_layer",
    "make_probe",
    "ntk_draw",
    "ntk_sap",
    "output_layer",
    "sum_draws",
]


@dataclass(frozen=True)
class Probe:
    """A net and the way in which it is looked at.

    Attributes:
        module: The net; its own weights are used only by scores that start from given weights. It is
            never changed.
        prunable: Names of the weights that get a mask.
        kept: Names of the weights that count into the saliency but always stay: the output layer, and what is
            not trained.
        sample_shape: Shape of one input.
        draws: Independent draws that a score averages over, R in the papers.
        batch: Gaussian inputs per draw.
        epsilon: Standard deviation of the weights' perturbation in NTK-SAP.
        seed: Names all draws.
        labelled: Inputs and labels, for the scores that look at data.
        moments: Mean and deviation of the Gaussian inputs; 0 and 1 if None.
    """

    module: nn.Module
    prunable: tuple[str, ...]
    kept: tuple[str, ...]
    sample_shape: tuple[int, ...]
    draws: int = 5
    batch: int = 32
    epsilon: float = 0.01
    seed: int = 0
    labelled: tuple[Tensor, Tensor] | None = None
    moments: Moments | None = None

    def masks(self) -> Masks:
        """Return masks that keep everything."""
        parameters = dict(self.module.named_parameters())
        return {name: torch.ones(parameters[name].shape) for name in self.prunable}


Score = Callable[[Probe, Mapping[str, Tensor], int], dict[str, Tensor]]
"""Probe, masks of the moment and step of the schedule in; a score per weight out, higher stays longer."""


def make_probe(
    module: nn.Module,
    *,
    sample_shape: tuple[int, ...],
    keep_output: bool = True,
    draws: int = 5,
    batch: int = 32,
    epsilon: float = 0.01,
    seed: int = 0,
    labelled: tuple[Tensor, Tensor] | None = None,
    moments: Moments | None = None,
) -> Probe:
    """Return a probe of all weights of linear layers and convolutions.

    Args:
        module: Any net whose output is (n, classes).
        sample_shape: Shape of one input.
        keep_output: Never prune the last layer. (The reference implementation of NTK-SAP prunes it.)
        draws: Draws per step, at least 1.
        batch: Inputs per draw, at least 1.
        epsilon: See :class:`Probe`.
        seed: See :class:`Probe`.
        labelled: See :class:`Probe`; as the net takes them, hence standardised where ``module`` is not.
        moments: See :class:`Probe`; None for a net whose inputs are standardised.

    Raises:
        ModelError: The net holds nothing that could be pruned.
    """
    if draws < 1 or batch < 1 or epsilon <= 0:
        raise ValueError(f"need draws >= 1, batch >= 1, epsilon > 0; got {draws=}, {batch=}, {epsilon=}")
    owned = {id(p): name for name, p in module.named_parameters()}
    weights = [
        owned[id(layer.weight)]
        for layer in module.modules()
        if isinstance(layer, WEIGHTED) and id(layer.weight) in owned
    ]
    weights = list(dict.fromkeys(weights))
    last = output_layer(module, sample_shape=sample_shape) if keep_output else None
    frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
    prunable = tuple(name for name in weights if name != last and name not in frozen)
    if not prunable:
        raise ModelError(
            f"{type(module).__name__} has no layer that can be pruned",
            hint="Give a net with at least one linear layer or convolution before its output.",
        )
    kept = tuple(name for name in weights if name not in prunable)
    return Probe(module, prunable, kept, tuple(sample_shape), draws, batch, epsilon, seed, labelled, moments)


def output_layer(module: nn.Module, *, sample_shape: tuple[int, ...]) -> str | None:
    """Return the name of the weight whose layer runs last in a forward, or None if there is none."""
    path = last_layer(module, sample_shape=sample_shape)
    names = {id(p): name for name, p in module.named_parameters()}
    return None if path is None else names.get(id(module.get_submodule(path).weight))


def last_layer(module: nn.Module, *, sample_shape: tuple[int, ...]) -> str | None:
    """Return the path of the linear layer or convolution that runs last in a forward, or None."""
    ran: list[str] = []
    handles = [
        layer.register_forward_hook(lambda _layer, _i, _o, path=path: ran.append(path))
        for path, layer in module.named_modules()
        if isinstance(layer, WEIGHTED)
    ]
    training = module.training
    try:
        with torch.no_grad():
            module.eval()(torch.zeros(1, *sample_shape))
    finally:
        module.train(training)
        for handle in handles:
            handle.remove()
    return ran[-1] if ran else None


def ntk_sap(probe: Probe, masks: Mapping[str, Tensor], step: int = 0) -> dict[str, Tensor]:
    """Score each weight by its share of the neural tangent kernel's nuclear norm.

    S_j = | sum_i dJ_i / dm_j | over ``probe.draws`` draws, see :func:`ntk_draw`.

    Source: Wang et al., "NTK-SAP: Improving neural network pruning by aligning training dynamics",
    ICLR 2023, equation 10 and algorithm 1.
    """
    return sum_draws(ntk_draw(probe, masks, step, draw)[1] for draw in range(probe.draws))


def sum_draws(draws: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the absolute value of the sum of signed gradients, in float64 and in the order given."""
    total: dict[str, Tensor] = {}
    for draw in draws:
        for name, gradient in draw.items():
            total[name] = gradient.double() + total[name] if name in total else gradient.double()
    return {name: value.abs() for name, value in total.items()}


def ntk_draw(
    probe: Probe, masks: Mapping[str, Tensor], step: int, draw: int
) -> tuple[float, dict[str, Tensor]]:
    """Return J and its signed gradient by the masks, for one draw named by (seed, step, draw).

    J(m) = sum_b || f(X_b; m theta) - f(X_b; m (theta + D)) ||^2 with fresh weights theta, Gaussian inputs
    X ~ N(0, I) and D = epsilon N(0, I) on every linear and convolution weight. The gradient runs through
    both branches. E J = epsilon^2 sum_j m_j^2 ||df / dtheta_j||^2.

    Statistics of BatchNorm layers are taken from this draw's inputs and weights, and are the same in both
    branches. The same draw gives the same bits whoever computes it on a machine of the same kind.

    Raises:
        ModelError: The net's outputs are not finite under redrawn weights.
    """
    seed = derive_seed("ntk", probe.seed, step, draw)
    generator = torch.Generator().manual_seed(seed)
    inputs = draw_inputs(probe.batch, probe.sample_shape, generator=generator, moments=probe.moments)
    theta = fresh_weights(probe.module, seed=derive_seed(seed, "weights"))
    shift = {
        name: probe.epsilon * torch.randn(theta[name].shape, generator=generator)
        for name in (*probe.prunable, *probe.kept)
    }
    gates = {name: mask.clone().requires_grad_() for name, mask in masks.items()}
    plain = _masked(theta, gates)
    moved = _masked({k: v + shift[k] if k in shift else v for k, v in theta.items()}, gates)
    with one_thread():
        forward = _forward(probe.module, plain, inputs)
        deviation = (forward(plain) - forward(moved)).square().sum()
        if not torch.isfinite(deviation):
            raise ModelError(
                f"{type(probe.module).__name__} gives outputs that are not finite under redrawn weights",
                hint="Add a norm after the layers whose output grows, or draw smaller weights.",
            )
        gradients = torch.autograd.grad(deviation, list(gates.values()))
    return float(deviation.detach()), dict(zip(gates, gradients, strict=True))


def group_scores(
    structure: Structure, scores: Mapping[str, Tensor], masks: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return for every width group the score of each unit: the sum of m * dJ/dm over its weights.

    Args:
        structure: Which axis follows which group.
        scores: Signed gradients by the masks.
        masks: The masks at which the gradients were taken.
    """
    result = {group.name: torch.zeros(group.width, dtype=torch.float64) for group in structure.groups}
    for tensor in structure.tensors:
        if tensor.name not in scores:
            continue
        value = scores[tensor.name].double() * masks[tensor.name]
        for axis, follows in enumerate(tensor.axes):
            if isinstance(follows, Axis):
                along = value.movedim(axis, 0).reshape(-1, follows.block * value.numel() // value.shape[axis])
                result[follows.group] += along.sum(1)
    return result


def _masked(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: masks[name] * w if name in masks else w for name, w in weights.items()}


def _forward(
    module: nn.Module, refresh_with: Mapping[str, Tensor], inputs: Tensor
) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """Return f(weights) at ``inputs``, BatchNorm statistics taken once at ``refresh_with``."""
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    training = module.training
    if norms:
        momenta = [norm.momentum for norm in norms]
        try:
            module.eval()
            for norm in norms:
                norm.train()
                norm.momentum = 1.0  # the running statistics become this batch's
            with torch.no_grad():
                functional_call(module, {**refresh_with, **buffers}, (inputs,))
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
            module.train(training)

    def forward(weights: Mapping[str, Tensor]) -> Tensor:
        try:
            module.eval()
            output: Tensor = functional_call(module, {**weights, **buffers}, (inputs,))
        finally:
            module.train(training)
        return output

    return forward


SCORES: dict[str, Score] = {"ntk": ntk_sap}
"""Every score by its name."""
