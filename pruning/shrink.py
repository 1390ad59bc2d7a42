"""Shrinking: the same net with fewer units per group.

Knows how tensors follow groups. Does not know which units are worth keeping.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from profiles.errors import ModelError
from pruning.structure import Axis, Structure

__all__ = ["kept_elements", "slice_weights"]


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
