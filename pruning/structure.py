"""What shares a width in a net: the groups, and which axis of which tensor follows which group.

Knows shapes, and what parameters and multiply-accumulates they make at any widths. Does not know where a
net comes from, what a weight is worth, or which widths are good.

A *width group* is a set of tensor axes that can only grow or shrink together: the output channels of a
convolution, the norm behind it, the input channels of every layer that reads them, and on a residual stream
all of that for every block of the stage.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from profiles.errors import ModelError

__all__ = [
    "TRANSPOSED",
    "WEIGHTED",
    "Axis",
    "Structure",
    "TensorShape",
    "WidthGroup",
    "infer_structure",
    "positions_of",
]

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d)
"""Layers whose weight has its inputs along the first axis and its outputs along the second."""

WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, *TRANSPOSED)
"""Layers that multiply: they have widths, and their weights can be masked."""


@dataclass(frozen=True)
class WidthGroup:
    """A width that several tensors share.

    Attributes:
        name: The group's name, unique in its net.
        width: Units (channels, neurons, heads) in the dense net.
        multiple: Every legal width is divisible by it; more than 1 where a GroupNorm splits the channels.
        minimum: The narrowest legal width.
    """

    name: str
    width: int
    multiple: int = 1
    minimum: int = 1


@dataclass(frozen=True)
class Axis:
    """An axis that follows a group: ``block`` neighbouring elements for each unit of the group.

    The block is 1 for channels, height * width where a flattened image enters a linear layer, and the head
    dimension for attention heads.
    """

    group: str
    block: int = 1


@dataclass(frozen=True)
class TensorShape:
    """The shape of one trainable tensor, written in groups.

    Attributes:
        name: As in ``named_parameters``.
        axes: For each axis either its fixed size or the group it follows.
        positions: Multiply-accumulates per element and sample; 0 for biases and the weights of norms.
        writes: The axis along which the layer makes its outputs; by all others it reads.
    """

    name: str
    axes: tuple[Axis | int, ...]
    positions: int = 0
    writes: int = 0

    def shape(self, widths: Mapping[str, int]) -> tuple[int, ...]:
        """Return the tensor's shape at ``widths``."""
        return tuple(a if isinstance(a, int) else widths[a.group] * a.block for a in self.axes)

    def size(self, widths: Mapping[str, int]) -> int:
        """Return the number of elements at ``widths``."""
        return math.prod(self.shape(widths))

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups that the tensor's axes follow, in the order of its axes."""
        return tuple(a.group for a in self.axes if isinstance(a, Axis))


@dataclass(frozen=True)
class Structure:
    """All groups and trainable tensors of a net.

    Attributes:
        groups: What can be made narrower.
        tensors: As in ``named_parameters``; tied ones appear once.
        fixed_macs: Multiply-accumulates of a sample's forward that no tensor here accounts for, such as
            those of attention scores. Counted at the dense widths, hence never too few.
    """

    groups: tuple[WidthGroup, ...]
    tensors: tuple[TensorShape, ...]
    fixed_macs: int = 0

    @property
    def dense(self) -> dict[str, int]:
        """The widths of the dense net."""
        return {group.name: group.width for group in self.groups}

    @property
    def narrowest(self) -> dict[str, int]:
        """The smallest legal widths."""
        return {group.name: group.minimum for group in self.groups}

    @property
    def layers(self) -> tuple[TensorShape, ...]:
        """The tensors that multiply: weights of convolutions and linear layers, in forward order."""
        return tuple(tensor for tensor in self.tensors if tensor.positions)

    def params(self, widths: Mapping[str, int]) -> int:
        """Return the number of trainable values at ``widths``."""
        return sum(tensor.size(widths) for tensor in self.tensors)

    def macs(self, widths: Mapping[str, int]) -> int:
        """Return the multiply-accumulates of one sample's forward at ``widths``."""
        return self.fixed_macs + sum(tensor.positions * tensor.size(widths) for tensor in self.tensors)

    def at(self, widths: Mapping[str, int]) -> "Structure":
        """Return the structure of the net as it is at ``widths``: these become the dense ones.

        Raises:
            ModelError: See :meth:`check`.
        """
        self.check(widths)
        groups = (
            replace(g, width=widths[g.name], minimum=min(g.minimum, widths[g.name])) for g in self.groups
        )
        return replace(self, groups=tuple(groups))

    def without(self, names: Iterable[str]) -> "Structure":
        """Return the structure in which the named groups keep their dense widths."""
        gone = {group.name: group.width for group in self.groups if group.name in set(names)}
        tensors = tuple(
            replace(
                tensor,
                axes=tuple(
                    gone[axis.group] * axis.block if isinstance(axis, Axis) and axis.group in gone else axis
                    for axis in tensor.axes
                ),
            )
            for tensor in self.tensors
        )
        groups = tuple(group for group in self.groups if group.name not in gone)
        return replace(self, groups=groups, tensors=tensors)

    def check(self, widths: Mapping[str, int]) -> None:
        """Raise ModelError unless ``widths`` names every group with a legal width.

        A width above the dense one is legal.
        """
        faults = []
        known = self.dense
        for name in sorted(set(widths) ^ set(known)):
            faults.append(f"width group {name!r} is {'unknown' if name in widths else 'missing'}")
        for group in self.groups:
            width = widths.get(group.name, group.width)
            if width < group.minimum:
                faults.append(f"{group.name} = {width} is below its minimum of {group.minimum}")
            elif width % group.multiple:
                faults.append(f"{group.name} = {width} cannot be divided into {group.multiple} norm groups")
        if faults:
            raise ModelError(
                "; ".join(faults),
                hint=f"The net's groups: {', '.join(f'{k} = {v}' for k, v in known.items())}.",
            )


def infer_structure(
    build: Callable[[Mapping[str, int]], nn.Module],
    groups: tuple[WidthGroup, ...],
    *,
    sample_shape: tuple[int, ...],
) -> Structure:
    """Find out which axis follows which group, by widening one group after the other.

    Args:
        build: Makes the net at given widths. It is called on torch's meta device, so that nothing is
            allocated or drawn.
        groups: All width groups, with their dense widths.
        sample_shape: Shape of one input.

    Raises:
        ValueError: A tensor's axis does not grow in proportion to its group, or follows two groups.
    """
    dense = {group.name: group.width for group in groups}
    with torch.device("meta"):
        net = build(dense)
        axes: dict[str, list[Axis | int]] = {k: list(p.shape) for k, p in net.named_parameters()}
        shapes = {name: tuple(p.shape) for name, p in net.named_parameters()}
        for group in groups:
            wider = build({**dense, group.name: group.width + group.multiple})
            for name, parameter in wider.named_parameters():
                for axis, (size, old) in enumerate(zip(parameter.shape, shapes[name], strict=True)):
                    if size == old:
                        continue
                    block, rest = divmod(size - old, group.multiple)
                    if rest or old != block * group.width or isinstance(axes[name][axis], Axis):
                        raise ValueError(f"axis {axis} of {name} does not follow {group.name} alone")
                    axes[name][axis] = Axis(group.name, block)
        positions = positions_of(net, torch.empty(1, *sample_shape))
    tensors = tuple(TensorShape(name, tuple(a), positions.get(name, 0)) for name, a in axes.items())
    return Structure(groups, tensors)


def positions_of(net: nn.Module, inputs: torch.Tensor) -> dict[str, int]:
    """Return how often one sample's forward uses each element of each convolution's or linear weight.

    A weight that several layers share has the sum of their uses.
    """
    found: dict[str, int] = {}
    names = {id(parameter): name for name, parameter in net.named_parameters()}

    def note(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if isinstance(layer, TRANSPOSED):
            times = inputs[0].numel() // layer.in_channels
        elif isinstance(layer, nn.Linear):
            times = output.numel() // layer.out_features
        else:
            times = output.numel() // int(layer.out_channels)  # type: ignore[arg-type]
        weight = names.get(id(layer.weight))
        if weight is not None:  # a parametrised weight is no parameter
            found[weight] = found.get(weight, 0) + times

    handles = [layer.register_forward_hook(note) for layer in net.modules() if isinstance(layer, WEIGHTED)]
    try:
        with torch.no_grad():
            net(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found
