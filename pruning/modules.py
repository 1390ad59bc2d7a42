"""Any torch module: which of its axes share a width, found by tracing or declared.

Knows layers by their torch types and Torch-Pruning's dependency graph (the extra `prune`). Does not know
which units are worth keeping, nor how tensors are cut.

Tracing follows linear layers, convolutions (transposed and split ones too), embeddings, norms and PReLU
through additions and flattening. A group that meets anything else (a concatenation, a bare parameter, an
unknown layer), or that cannot shrink without changing what the net computes, is left whole and named, never
guessed. Attention heads are declared by a :class:`Coupling`.
"""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from profiles.errors import ModelError
from pruning.saliency import last_layer
from pruning.shrink import narrow_module, trial_copy
from pruning.structure import (
    TRANSPOSED,
    WEIGHTED,
    Axis,
    Structure,
    TensorShape,
    WidthGroup,
    positions_of,
)

__all__ = ["Coupling", "Traced", "declare_structure", "trace_structure"]

_NORMS = (nn.GroupNorm, nn.LayerNorm, nn.modules.batchnorm._NormBase)
_FOLLOWERS = (*_NORMS, nn.PReLU, nn.Embedding)


@dataclass(frozen=True)
class Coupling:
    """Units that are made by some layers and read by others: FFN neurons, attention heads.

    Attributes:
        name: Of the group.
        units: How many there are.
        writes: Paths of the linear layers or convolutions whose outputs are the units.
        reads: Paths of those whose inputs are the units.
        norms: Paths of norms over the units.
    """

    name: str
    units: int
    writes: tuple[str, ...]
    reads: tuple[str, ...]
    norms: tuple[str, ...] = ()


@dataclass(frozen=True)
class Traced:
    """What tracing found.

    Attributes:
        structure: All groups that can be narrowed.
        left_whole: For every layer whose outputs keep their width, why.
    """

    structure: Structure
    left_whole: dict[str, str]


def declare_structure(
    module: nn.Module, couplings: Sequence[Coupling], *, sample_shape: tuple[int, ...]
) -> Structure:
    """Return the structure of a module whose couplings are known.

    Args:
        module: Any net.
        couplings: Every group; a unit's elements lie side by side, as a head's do in a projection.
        sample_shape: Shape of one float32 input.

    Raises:
        ModelError: A path is no linear layer, convolution or norm, or a size is no multiple of the units.
    """
    layers = dict(module.named_modules())
    found: dict[str, list[tuple[str, int]]] = {}
    for coupling in couplings:
        entries = []
        for path, axis, kinds in (
            *((p, 0, WEIGHTED) for p in coupling.writes),
            *((p, 1, WEIGHTED) for p in coupling.reads),
            *((p, 0, _NORMS) for p in coupling.norms),
        ):
            if not isinstance(layers.get(path), kinds):
                known = type(layers[path]).__name__ if path in layers else "no module"
                raise ModelError(
                    f"{coupling.name}: {path!r} is {known}, expected a layer or norm that it knows"
                )
            entries.append((path, axis))
        found[coupling.name] = entries
    groups = tuple(
        WidthGroup(c.name, c.units, *_norm_rule((layers[p] for p in c.norms), c.units)) for c in couplings
    )
    return _assemble(module, groups, found, sample_shape)


def trace_structure(
    module: nn.Module, *, sample_shape: tuple[int, ...], minimum: int = 1, keep: Iterable[str] = ()
) -> Traced:
    """Find the width groups of a module by Torch-Pruning's dependency graph, and try each of them.

    A group whose units cannot be taken out so that the net computes what its masked twin computes keeps
    its width; so does one that meets something which tracing cannot follow.

    Args:
        module: A net whose forward autograd can trace; the output layer keeps its width.
        sample_shape: Shape of one float32 input.
        minimum: The narrowest width of every group.
        keep: Paths of further layers whose outputs keep their width.

    Raises:
        ModelError: Torch-Pruning is not installed, cannot trace the module, or finds no group.
    """
    try:
        import torch_pruning
    except ImportError:
        raise ModelError(
            "pruning a module of your own needs Torch-Pruning, which is not installed",
            hint="Install it with: pip install 'scalarfed[prune]'.",
        ) from None
    last = last_layer(module, sample_shape=sample_shape)
    ignored = [module.get_submodule(path) for path in (*keep, *([] if last is None else [last]))]
    inputs = torch.randn(2, *sample_shape, generator=torch.Generator().manual_seed(0))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it does with bare parameters, which we leave whole
            graph = torch_pruning.DependencyGraph().build_dependency(module, inputs)
            candidates = list(graph.get_all_groups(ignored_layers=ignored))
    except Exception as error:  # it raises whatever its tracing meets
        raise ModelError(
            f"Torch-Pruning cannot trace {type(module).__name__}: {error}",
            hint="Declare the module's `couplings` (docs/pruning.md).",
        ) from error
    found = _join_split_layers(module, _read_candidates(module, graph, candidates))
    _mark_conflicts(module, found)
    groups = []
    for group in found:
        norms = [module.get_submodule(path) for path, _ in group.entries]
        try:
            multiple, least = _norm_rule(norms, group.units)
        except ModelError as error:
            group.reason = group.reason or str(error)
            continue
        groups.append(WidthGroup(group.name, group.units, multiple, min(max(least, minimum), group.units)))
    whole = {group.name: group.reason for group in found if group.reason}
    kept = tuple(group for group in groups if group.name not in whole)
    structure = _assemble(module, kept, {g.name: g.entries for g in found}, sample_shape)
    untrue = _try_groups(module, structure, sample_shape)
    whole |= untrue
    structure = structure.without(untrue)
    if not structure.groups:
        raise ModelError(
            f"{type(module).__name__} has no layer whose width could change"
            + "".join(f"; {k}: {v}" for k, v in whole.items()),
            hint="Declare its `couplings` (docs/pruning.md), or add a layer before the output.",
        )
    return Traced(structure, whole)


@dataclass
class _Found:
    """A group as tracing sees it: an entry is a layer's path, and 0 if it makes the units, 1 if it reads."""

    name: str
    units: int
    entries: list[tuple[str, int]]
    reason: str = ""


def _read_candidates(module: nn.Module, graph: Any, candidates: Iterable[Any]) -> list[_Found]:
    """Return Torch-Pruning's groups, those it cannot be trusted with marked."""
    paths = {id(layer): path for path, layer in module.named_modules()}
    paths |= {id(parameter): name for name, parameter in module.named_parameters()}
    found = []
    for candidate in candidates:
        name = paths.get(id(candidate[0].dep.target.module), "?")
        group = _Found(name, len(candidate[0].idxs), [])
        for item in candidate:
            target = item.dep.target.module
            path = paths.get(id(target))
            if isinstance(target, WEIGHTED + _FOLLOWERS) and path is not None:
                if not _blocks(item.idxs, item.root_idxs, group.units):
                    group.reason = f"{path} does not read it in equal neighbouring blocks"
                reads = not graph.is_out_channel_pruning_fn(item.dep.handler)
                if not (isinstance(target, nn.PReLU) and target.num_parameters == 1):
                    group.entries.append((path, int(reads)))
            elif isinstance(target, nn.Parameter) or (
                isinstance(target, nn.Module) and [*target.parameters()]
            ):
                group.reason = f"it meets {path or 'a parameter'} ({type(target).__name__})"
        group.entries = list(dict.fromkeys(group.entries))
        found.append(group)
    return found


def _join_split_layers(module: nn.Module, found: list[_Found]) -> list[_Found]:
    """Join the groups on both sides of convolutions that are split into parts, of which whole ones go."""
    for path, layer in module.named_modules():
        if not _is_split(layer):
            continue
        made, read = (next((g for g in found if (path, axis) in g.entries), None) for axis in (0, 1))
        if (made is None) != (read is None) and layer.groups == layer.out_channels:
            continue  # one channel a part: the tracer couples its sides by itself
        if made is None or read is None:
            for group in (made, read):
                if group is not None:
                    group.reason = f"{path} is split into parts whose other side keeps its width"
            continue
        units = math.gcd(made.units, read.units, int(layer.groups))
        entries = list(dict.fromkeys(made.entries + read.entries))
        joined = _Found(read.name, units, entries, made.reason or read.reason)
        if units == 1:
            joined.reason = f"the parts of {path} cannot be taken out one by one"
        found = [joined if g is read else g for g in found if g is read or g is not made]
    return found


def _mark_conflicts(module: nn.Module, found: list[_Found]) -> None:
    """Leave whole what two groups claim, and layers that share a weight."""
    owners: dict[int, str] = {}
    taken: dict[tuple[str, int], _Found] = {}
    for group in found:
        for path, axis in group.entries:
            other = taken.setdefault((path, axis), group)
            if other is not group:
                group.reason, other.reason = (f"{path} reads it beside {g.name}" for g in (other, group))
            for parameter in module.get_submodule(path).parameters(recurse=False):
                owner = owners.setdefault(id(parameter), path)
                if owner != path:
                    for one in found:
                        if {owner, path} & {p for p, _ in one.entries}:
                            one.reason = one.reason or f"{path} and {owner} share a weight"


def _try_groups(module: nn.Module, structure: Structure, sample_shape: tuple[int, ...]) -> dict[str, str]:
    """Take a unit of each group out of a trial copy; return the groups where that goes wrong, and how.

    All at once first: only where that goes wrong it is one group after the other.
    """
    trial = trial_copy(module, sample_shape=sample_shape)
    keep = {}
    for group in structure.groups:
        part = group.width // group.multiple
        units = [unit for unit in range(group.width) if unit % part != part // 2]
        if len(units) >= group.minimum:
            keep[group.name] = units
    try:
        narrow_module(trial, structure, keep, sample_shape=sample_shape)
    except ModelError:
        untrue = {}
        for name, units in keep.items():
            try:
                narrow_module(trial, structure, {name: units}, sample_shape=sample_shape)
            except ModelError as error:
                untrue[name] = str(error)
        return untrue
    return {}


def _norm_rule(layers: Iterable[nn.Module], units: int) -> tuple[int, int]:
    """Return the divisor and the least width that the norms among these layers ask of ``units``.

    Where a unit holds whole parts of a GroupNorm, these go with it.

    Raises:
        ModelError: A GroupNorm's parts cut through units.
    """
    parts = 1
    for layer in layers:
        if isinstance(layer, nn.GroupNorm) and layer.num_groups % units:
            parts = math.lcm(parts, layer.num_groups)
    if units % parts:
        raise ModelError(
            f"{units} units cannot be divided into the {parts} parts that their GroupNorms ask for",
            hint="Choose widths that the norms' groups divide.",
        )
    return parts, min(units, 2 * parts) if parts > 1 else 1


def _blocks(idxs: Sequence[int], roots: Sequence[int], width: int) -> bool:
    """Tell whether unit u is the u-th of ``width`` equal runs of neighbouring positions from 0."""
    block, rest = divmod(len(idxs), width)
    if rest or not block:
        return False
    return list(idxs) == list(range(len(idxs))) and list(roots) == [i // block for i in range(len(idxs))]


def _assemble(
    module: nn.Module,
    groups: tuple[WidthGroup, ...],
    found: Mapping[str, Sequence[tuple[str, int]]],
    sample_shape: tuple[int, ...],
) -> Structure:
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    axes: dict[str, list[Axis | int]] = {k: list(p.shape) for k, p in module.named_parameters()}
    writes = {
        names[id(layer.weight)]: 1
        for layer in module.modules()
        if isinstance(layer, TRANSPOSED) and layer.groups == 1 and id(layer.weight) in names
    }
    for group in groups:
        for path, axis in found[group.name]:
            layer = module.get_submodule(path)
            for leaf, parameter in layer.named_parameters(recurse=False):
                place = _place(layer, leaf, axis)
                if place is None:
                    continue
                size, name = parameter.shape[place], names[id(parameter)]
                block, rest = divmod(size, group.width)
                present = axes[name][place]
                if rest or (isinstance(present, Axis) and present != Axis(group.name, block)):
                    raise ModelError(
                        f"axis {place} of {path}.{leaf} has {size} elements and cannot follow {group.width} "
                        f"units of {group.name}",
                        hint="Couple each axis with one group, whose units divide it.",
                    )
                axes[name][place] = Axis(group.name, block)
    training = module.training
    try:
        counted = positions_of(module.eval(), torch.zeros(1, *sample_shape))
        # Only so is attention made of products that can be counted: with gradients, by its definition.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
            module(torch.zeros(1, *sample_shape))
    finally:
        module.train(training)
    tensors = tuple(TensorShape(k, tuple(a), counted.get(k, 0), writes.get(k, 0)) for k, a in axes.items())
    structure = Structure(groups, tensors)
    rest = counter.get_total_flops() // 2 - structure.macs(structure.dense)
    return replace(structure, fixed_macs=max(0, rest))


def _place(layer: nn.Module, leaf: str, axis: int) -> int | None:
    """Return along which axis a layer's tensor follows what it makes (0) or reads (1), or None."""
    if isinstance(layer, nn.Embedding):
        return 1 if axis == 0 else None  # rows are tokens
    if leaf != "weight" or not isinstance(layer, WEIGHTED):
        return 0 if axis == 0 else None  # a bias does not follow the inputs
    if _is_split(layer):
        return 0
    return 1 - axis if isinstance(layer, TRANSPOSED) else axis


def _is_split(layer: nn.Module) -> bool:
    return isinstance(layer, WEIGHTED) and not isinstance(layer, nn.Linear) and int(layer.groups) > 1
