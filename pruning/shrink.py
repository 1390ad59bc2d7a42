"""Shrinking: the same net with fewer units per group, its weights cut rather than drawn anew.

Knows how tensors follow groups and what a torch layer remembers of its own sizes. Does not know which
units are worth keeping. A shrunk net is compared with the masked net, in which the same units are zero,
and what differs is an error: a layer that still has its old width, a size remembered elsewhere.
"""

import copy
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from profiles.errors import ModelError
from pruning.structure import TRANSPOSED, WEIGHTED, Axis, Structure
from pruning.weights import fresh_weights

__all__ = ["kept_elements", "masked_module", "narrow_module", "slice_weights", "trial_copy", "unit_masks"]

_TOLERANCE = 1e-5


def slice_weights(
    structure: Structure, weights: Mapping[str, Tensor], keep: Mapping[str, Sequence[int]]
) -> dict[str, Tensor]:
    """Cut every tensor down to the kept units of its groups.

    Args:
        structure: The net at its dense widths.
        weights: The dense net's tensors, one per name in the structure.
        keep: For each group the units that stay, ascending; a group that is missing stays whole.

    Raises:
        ModelError: A tensor does not have the shape that the structure prescribes.
    """
    cut = {}
    for tensor in structure.tensors:
        values = weights[tensor.name].detach()
        expected = tensor.shape(structure.dense)
        if tuple(values.shape) != expected:
            raise ModelError(f"{tensor.name} has the shape {tuple(values.shape)}, the net says {expected}")
        for axis, follows in enumerate(tensor.axes):
            if isinstance(follows, Axis) and follows.group in keep:
                values = values.index_select(axis, kept_elements(follows, keep[follows.group]))
        cut[tensor.name] = values.clone()
    return cut


def kept_elements(axis: Axis, units: Sequence[int]) -> Tensor:
    """Return the positions along an axis that belong to ``units`` of its group."""
    first = np.asarray(units, dtype=np.int64)[:, None] * axis.block
    return torch.from_numpy((first + np.arange(axis.block)).reshape(-1))


def unit_masks(structure: Structure, keep: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Return for every tensor a mask of ones where all its axes belong to kept units."""
    masks = {}
    for tensor in structure.tensors:
        mask = torch.ones(tensor.shape(structure.dense))
        for axis, follows in enumerate(tensor.axes):
            if isinstance(follows, Axis) and follows.group in keep:
                along = torch.zeros(mask.shape[axis])
                along[kept_elements(follows, keep[follows.group])] = 1.0
                mask *= along.reshape(-1, *(1,) * (mask.dim() - axis - 1))
        masks[tensor.name] = mask
    return masks


def masked_module(module: nn.Module, structure: Structure, keep: Mapping[str, Sequence[int]]) -> nn.Module:
    """Return a copy in which the units that do not stay are zero and no norm counts them.

    Equal in function to the shrunk net, but of the dense net's shape.
    """
    twin = copy.deepcopy(module).eval()
    masks = unit_masks(structure, keep)
    parameters = dict(twin.named_parameters())
    with torch.no_grad():
        for name, mask in masks.items():
            parameters[name].mul_(mask)
    for path, layer in list(twin.named_modules()):
        counted = masks.get(f"{path}.weight")
        if counted is not None and not counted.all() and isinstance(layer, nn.GroupNorm | nn.LayerNorm):
            parent, _, leaf = path.rpartition(".")
            setattr(twin.get_submodule(parent), leaf, _CountingNorm(layer, counted))
    return twin


def narrow_module(
    module: nn.Module,
    structure: Structure,
    keep: Mapping[str, Sequence[int]],
    *,
    sample_shape: tuple[int, ...],
    sizes: Mapping[str, int] | None = None,
) -> nn.Module:
    """Return a copy of a module with only the kept units, checked against the masked net.

    Args:
        module: Any net; it is left as it is.
        structure: Its groups, see :mod:`pruning.modules`.
        keep: For each group the units that stay, ascending; a group that is missing stays whole.
        sample_shape: Shape of one float32 input.
        sizes: Attributes by their path that must change too, such as ``{"block.attention.heads": 3}``.

    Raises:
        ModelError: A width is illegal, or the narrow net fails or differs from the masked one by more than
            1e-5 of the largest output.
    """
    structure.check({g.name: len(keep.get(g.name, range(g.width))) for g in structure.groups})
    twin = copy.deepcopy(module).eval()
    axes = {tensor.name: tensor.axes for tensor in structure.tensors}
    old = dict(twin.named_parameters())
    owners: dict[int, list[tuple[nn.Module, str]]] = {}  # more than one where layers share a tensor
    for layer in twin.modules():
        for leaf, parameter in layer.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((layer, leaf))
    for name, values in slice_weights(structure, old, keep).items():
        tensor = nn.Parameter(values, requires_grad=old[name].requires_grad)
        for layer, leaf in owners[id(old[name])]:
            setattr(layer, leaf, tensor)
            if leaf == "weight":
                _resize(layer, values, axes[name][0], keep)
    for name, value in (sizes or {}).items():
        path, _, leaf = name.rpartition(".")
        owner = twin.get_submodule(path)
        if not isinstance(getattr(owner, leaf, None), int):
            raise ModelError(f"{name} is not a whole number of {type(owner).__name__}")
        setattr(owner, leaf, value)
    _compare(twin, masked_module(module, structure, keep), sample_shape)
    return twin.train(module.training)


def trial_copy(module: nn.Module, *, sample_shape: tuple[int, ...]) -> nn.Module:
    """Return a copy whose weights hide nothing: none is zero, and activations keep their size with depth.

    A norm that starts at zero, as the last of a residual block often does, would make every cut look right.
    The module's own weights are kept where the redrawn ones give outputs that are not finite.
    """
    twin = copy.deepcopy(module).eval()
    weights = {f"{path}.weight".lstrip(".") for path, m in twin.named_modules() if isinstance(m, WEIGHTED)}
    generator = torch.Generator().manual_seed(0)
    parameters = dict(twin.named_parameters())
    with torch.no_grad():
        for name, values in fresh_weights(twin, seed=0).items():
            if name in weights:
                parameters[name].copy_(values * math.sqrt(6.0))  # variance 2 / fan_in
            else:
                parameters[name].copy_(values + 0.2 * torch.randn(values.shape, generator=generator))
        finite = bool(torch.isfinite(twin(torch.randn(4, *sample_shape, generator=generator))).all())
    return twin if finite else copy.deepcopy(module).eval()


def _resize(layer: nn.Module, weight: Tensor, first: Axis | int, keep: Mapping[str, Sequence[int]]) -> None:
    """Tell a layer the sizes of its new weight."""
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = weight.shape
    elif isinstance(layer, TRANSPOSED):
        layer.groups = max(1, layer.groups * weight.shape[0] // layer.in_channels)
        layer.in_channels, layer.out_channels = weight.shape[0], weight.shape[1] * layer.groups
    elif isinstance(layer, nn.Conv1d | nn.Conv2d):
        layer.groups = max(1, layer.groups * weight.shape[0] // layer.out_channels)
        layer.out_channels, layer.in_channels = weight.shape[0], weight.shape[1] * layer.groups
    elif isinstance(layer, nn.GroupNorm):
        if isinstance(first, Axis) and layer.num_groups % (layer.num_channels // first.block) == 0:
            layer.num_groups = layer.num_groups * len(weight) // layer.num_channels  # whole parts went
        layer.num_channels = len(weight)
    elif isinstance(layer, nn.LayerNorm):
        layer.normalized_shape = tuple(weight.shape)
    elif isinstance(layer, nn.Embedding):
        layer.embedding_dim = weight.shape[1]
    elif isinstance(layer, nn.PReLU):
        layer.num_parameters = len(weight)
    elif isinstance(layer, nn.modules.batchnorm._NormBase):
        layer.num_features = len(weight)
        if isinstance(first, Axis) and first.group in keep:
            for name in ("running_mean", "running_var"):
                buffer = getattr(layer, name)
                if buffer is not None:
                    setattr(layer, name, buffer[kept_elements(first, keep[first.group])].clone())


def _compare(narrow: nn.Module, masked: nn.Module, sample_shape: tuple[int, ...]) -> None:
    inputs = torch.randn(4, *sample_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = masked(inputs)
        try:
            found = narrow(inputs)
        except (RuntimeError, ValueError) as error:
            raise ModelError(
                f"{type(narrow).__name__} does not run after shrinking: {error}",
                hint="Couple the layer that kept its width, or name sizes that its code remembers.",
            ) from error
    gap = float((found - expected).abs().max()) / max(1.0, float(expected.abs().max()))
    if not gap <= _TOLERANCE:
        raise ModelError(
            f"{type(narrow).__name__} differs from its masked net by {gap:.1e} after shrinking",
            hint="Couple every layer that reads or normalises the group, or leave the group whole.",
        )


class _CountingNorm(nn.Module):
    """A GroupNorm or LayerNorm whose mean and variance are those of the kept channels alone."""

    mask: Tensor

    def __init__(self, norm: nn.GroupNorm | nn.LayerNorm, mask: Tensor) -> None:
        super().__init__()
        self.norm = norm
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        if isinstance(norm, nn.LayerNorm):
            axes = tuple(range(-len(norm.normalized_shape), 0))
            present, shape = self.mask.expand_as(x), self.mask.shape
            values = x
        else:
            shape = torch.Size((-1, *(1,) * (x.dim() - 2)))
            values = x.reshape(len(x), norm.num_groups, -1)
            present = self.mask.reshape(shape).expand_as(x).reshape_as(values)
            axes = (-1,)
        count = present.sum(axes, keepdim=True).clamp_min(1.0)
        mean = (values * present).sum(axes, keepdim=True) / count
        variance = ((values - mean).square() * present).sum(axes, keepdim=True) / count
        flat = ((values - mean) * torch.rsqrt(variance + norm.eps) * present).reshape(x.shape)
        bias = torch.zeros_like(norm.weight) if norm.bias is None else norm.bias
        return flat * norm.weight.reshape(shape) + bias.reshape(shape)
