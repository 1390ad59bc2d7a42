"""The rivals of NTK-SAP: SynFlow, SNIP, GraSP, magnitude, Erdos-Renyi and random.

Knows the published scores, all of the shape of :data:`pruning.saliency.Score`. Does not know schedules,
widths or budgets. All of them look at the net's own weights, as the papers do; SNIP and GraSP need the
probe to hold labelled samples.
"""

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from profiles.errors import ModelError
from pruning.saliency import SCORES, Probe, Score
from pruning.weights import derive_seed

__all__ = ["ALL_SCORES", "ONE_SHOT", "erdos_renyi", "grasp", "magnitude", "random", "snip", "synflow"]

_GRASP_TEMPERATURE = 200.0
_SKIPPED_BY_SYNFLOW = (
    *(nn.GroupNorm, nn.LayerNorm, nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm),
    *(nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU, nn.GELU, nn.LeakyReLU, nn.Hardtanh, nn.Tanh),
    *(nn.Sigmoid, nn.Hardsigmoid, nn.Dropout),
)


def synflow(probe: Probe, masks: Mapping[str, Tensor], step: int = 0) -> dict[str, Tensor]:
    """Score each weight by its synaptic flow, m dR/dm with R = 1' f(1; m |theta|), all weights positive.

    Norms and activation layers are taken as the identity and biases as zero, so that R is the l1 path norm
    and every layer's scores add up to R; computed in float64, since R grows with depth.

    Source: Tanaka et al., "Pruning neural networks without any data by iteratively conserving synaptic
    flow", arXiv 2006.05467, equation 1 and appendix 10.
    """
    net = copy.deepcopy(probe.module).double().eval()
    weights = {name: _flow_weight(name, p.detach(), probe) for name, p in net.named_parameters()}
    gates = {name: mask.double().requires_grad_() for name, mask in masks.items()}
    ones = torch.ones(1, *probe.sample_shape, dtype=torch.float64)
    handles = [
        layer.register_forward_hook(lambda _layer, inputs, _output: inputs[0])
        for layer in net.modules()
        if isinstance(layer, _SKIPPED_BY_SYNFLOW)
    ]
    try:
        flow = functional_call(net, _masked(weights, gates), (ones,)).sum()
    finally:
        for handle in handles:
            handle.remove()
    gradients = torch.autograd.grad(flow, list(gates.values()))
    return {k: (g * gates[k].detach()) for k, g in zip(gates, gradients, strict=True)}


def snip(probe: Probe, masks: Mapping[str, Tensor], step: int = 0) -> dict[str, Tensor]:
    """Score each weight by its connection sensitivity, | dL/dm | on the probe's labelled samples.

    Source: Lee et al., "SNIP: Single-shot network pruning based on connection sensitivity", ICLR 2019,
    equation 5.
    """
    gates = {name: mask.clone().requires_grad_() for name, mask in masks.items()}
    loss = _loss(probe, _masked(_parameters(probe), gates), temperature=1.0)
    gradients = torch.autograd.grad(loss, list(gates.values()))
    return {name: g.abs() for name, g in zip(gates, gradients, strict=True)}


def grasp(probe: Probe, masks: Mapping[str, Tensor], step: int = 0) -> dict[str, Tensor]:
    """Score each weight by what it adds to the gradient's flow, theta * (H g), higher stays.

    The paper removes the weights with the highest -theta * (H g); this is its negative. The logits are
    divided by a temperature of 200, as in the paper's experiments.

    Source: Wang et al., "Picking winning tickets before training by preserving gradient flow", ICLR 2020,
    equation 8 and algorithm 1.
    """
    parameters = _parameters(probe)
    weights = {name: (masks[name] * parameters[name]).requires_grad_() for name in masks}
    loss = _loss(probe, {**parameters, **weights}, temperature=_GRASP_TEMPERATURE)
    gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
    flow = torch.stack([(g * g.detach()).sum() for g in gradients]).sum()
    products = torch.autograd.grad(flow, list(weights.values()))
    return {k: (weights[k] * hg).detach() for k, hg in zip(weights, products, strict=True)}


def magnitude(probe: Probe, masks: Mapping[str, Tensor], step: int = 0) -> dict[str, Tensor]:
    """Score each weight by its absolute value."""
    parameters = _parameters(probe)
    return {name: parameters[name].abs() for name in masks}


def random(probe: Probe, masks: Mapping[str, Tensor], step: int = 0) -> dict[str, Tensor]:
    """Score each weight by a number from the probe's seed, so that every layer keeps the same fraction."""
    return {name: -uniform for name, uniform in _uniform(probe, masks)}


def erdos_renyi(probe: Probe, masks: Mapping[str, Tensor], step: int = 0) -> dict[str, Tensor]:
    """Score at random so that layers end with Erdos-Renyi-kernel densities.

    A layer keeps min(1, c r) of its weights, r = (n_in + n_out + sum of kernel sides) / (their product);
    with u uniform, u < c r means -u / r > -c, so that -u / r is the score and the budget finds c.

    Source: Evci et al., "Rigging the lottery", ICML 2020, section 3.1 (ERK).
    """
    scores = {}
    for name, uniform in _uniform(probe, masks):
        shape = masks[name].shape
        scores[name] = -uniform * (math.prod(shape) / sum(shape))
    return scores


def _flow_weight(name: str, values: Tensor, probe: Probe) -> Tensor:
    return values.abs() if name in {*probe.prunable, *probe.kept} else torch.zeros_like(values)


def _parameters(probe: Probe) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in probe.module.named_parameters()}


def _masked(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: masks[name] * w if name in masks else w for name, w in weights.items()}


def _uniform(probe: Probe, masks: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    # The same numbers at every step, so that a schedule ends where a single cut would.
    generator = torch.Generator().manual_seed(derive_seed("uniform", probe.seed))
    for name, mask in masks.items():
        yield name, torch.rand(mask.shape, generator=generator)


def _loss(probe: Probe, weights: Mapping[str, Tensor], *, temperature: float) -> Tensor:
    if probe.labelled is None:
        raise ModelError(
            "this saliency looks at labelled samples, and none were given",
            hint="Name a data file, or choose a data-free method: ntk, synflow, magnitude, erk or random.",
        )
    inputs, labels = probe.labelled
    with _evaluating(probe.module):
        logits = functional_call(probe.module, dict(weights), (inputs,))
    return functional.cross_entropy(logits / temperature, labels)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    training = module.training
    try:
        module.eval()
        yield
    finally:
        module.train(training)


ALL_SCORES: dict[str, Score] = {
    **SCORES,
    "synflow": synflow,
    "snip": snip,
    "grasp": grasp,
    "magnitude": magnitude,
    "erk": erdos_renyi,
    "random": random,
}
"""Every score by its name."""

ONE_SHOT = frozenset({"snip", "grasp", "magnitude", "erk", "random"})
"""Scores that are cut once, as published; the others follow a schedule."""
