"""Any torch module: which of its axes share a width, found by tracing or declared.

Knows layers by their torch types and Torch-Pruning's dependency graph (the extra `prune`). Does not know
which units are worth keeping, nor how tensors are cut.

Tracing follows convolutions, linear layers and norms through additions, flattening and depthwise
convolutions. A group that meets anything else (a concatenation, a bare parameter, an unknown layer) is left
whole and named, never guessed. FFN neurons and attention heads are declared by a :class:`Coupling`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from profiles.errors import ModelError
from pruning.saliency import output_layer
from pruning.structure import Axis, Structure, TensorShape, WidthGroup, positions_of

__all__ = ["Coupling", "Traced", "declare_structure", "trace_structure"]

_WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d)
_NORMS = (nn.GroupNorm, nn.LayerNorm, nn.BatchNorm1d, nn.BatchNorm2d)


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
            *((p, 0, _WEIGHTED) for p in coupling.writes),
            *((p, 1, _WEIGHTED) for p in coupling.reads),
            *((p, 0, _NORMS) for p in coupling.norms),
        ):
            if not isinstance(layers.get(path), kinds):
                known = type(layers[path]).__name__ if path in layers else "no module"
                raise ModelError(
                    f"{coupling.name}: {path!r} is {known}, expected a layer or norm that it knows"
                )
            entries.append((path, axis))
        found[coupling.name] = entries
    groups = tuple(WidthGroup(c.name, c.units, *_norm_rule(layers[p] for p in c.norms)) for c in couplings)
    return _assemble(module, groups, found, sample_shape)


def trace_structure(
    module: nn.Module, *, sample_shape: tuple[int, ...], minimum: int = 1, keep: Iterable[str] = ()
) -> Traced:
    """Find the width groups of a module by Torch-Pruning's dependency graph.

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
    paths = {id(layer): path for path, layer in module.named_modules()}
    last = output_layer(module, sample_shape=sample_shape)
    ignored = [module.get_submodule(path) for path in keep]
    if last is not None:
        ignored.append(module.get_submodule(last.rpartition(".")[0]))
    try:
        graph = torch_pruning.DependencyGraph().build_dependency(module, torch.randn(2, *sample_shape))
        candidates = list(graph.get_all_groups(ignored_layers=ignored))
    except Exception as error:  # it raises whatever its tracing meets
        raise ModelError(
            f"Torch-Pruning cannot trace {type(module).__name__}: {error}",
            hint="Declare the groups with pruning.modules.Coupling.",
        ) from error
    groups: list[WidthGroup] = []
    found: dict[str, list[tuple[str, int]]] = {}
    whole: dict[str, str] = {}
    taken: dict[tuple[str, int], str] = {}
    for candidate in candidates:
        name = paths.get(id(candidate[0].dep.target.module), "?")
        width = len(candidate[0].idxs)
        entries, norms = [], []
        reason = ""
        for item in candidate:
            target = item.dep.target.module
            path = paths.get(id(target))
            outward = graph.is_out_channel_pruning_fn(item.dep.handler)
            if isinstance(target, _WEIGHTED + _NORMS) and path is not None:
                if not _blocks(item.idxs, item.root_idxs, width):
                    reason = f"{path} does not read it in equal neighbouring blocks"
                entries.append((path, 0 if outward else 1))
                if isinstance(target, _NORMS):
                    norms.append(target)
            elif isinstance(target, nn.Parameter) or (
                isinstance(target, nn.Module) and [*target.parameters()]
            ):
                reason = f"it meets {path or 'a bare parameter'} ({type(target).__name__})"
        for entry in dict.fromkeys(entries):
            if entry in taken:
                reason = f"{entry[0]} reads it beside {taken[entry]}"
                whole[taken[entry]] = f"{entry[0]} reads it beside {name}"
        if reason:
            whole[name] = reason
        for entry in entries:
            taken.setdefault(entry, name)
        multiple, least = _norm_rule(norms)
        groups.append(WidthGroup(name, width, multiple, max(least, minimum)))
        found[name] = list(dict.fromkeys(entries))
    kept = tuple(g for g in groups if g.name not in whole)
    if not kept:
        raise ModelError(
            f"{type(module).__name__} has no layer whose width could change"
            + "".join(f"; {k}: {v}" for k, v in whole.items()),
            hint="Declare the groups with pruning.modules.Coupling, or prune with a mask.",
        )
    return Traced(_assemble(module, kept, {g.name: found[g.name] for g in kept}, sample_shape), whole)


def _norm_rule(norms: Iterable[nn.Module]) -> tuple[int, int]:
    """Return the divisor and the least width that these norms ask of their channels."""
    parts = max([n.num_groups for n in norms if isinstance(n, nn.GroupNorm)], default=1)
    return parts, 2 * parts if parts > 1 else 1


def _blocks(idxs: Sequence[int], roots: Sequence[int], width: int) -> bool:
    """Tell whether unit u is the u-th of ``width`` equal runs of neighbouring positions from 0."""
    block, rest = divmod(len(idxs), width)
    if rest or not block:
        return False
    return list(idxs) == list(range(len(idxs))) and list(roots) == [i // block for i in range(len(idxs))]


def _assemble(
    module: nn.Module,
    groups: tuple[WidthGroup, ...],
    found: dict[str, list[tuple[str, int]]],
    sample_shape: tuple[int, ...],
) -> Structure:
    axes: dict[str, list[Axis | int]] = {k: list(p.shape) for k, p in module.named_parameters()}
    for group in groups:
        for path, axis in found[group.name]:
            layer = module.get_submodule(path)
            for leaf, parameter in layer.named_parameters(recurse=False):
                place = axis if leaf == "weight" and isinstance(layer, _WEIGHTED) else 0
                if axis == 1 and leaf != "weight":
                    continue  # a bias does not follow the inputs
                if _is_depthwise(layer):
                    place = 0
                size, name = parameter.shape[place], f"{path}.{leaf}"
                block, rest = divmod(size, group.width)
                present = axes[name][place]
                if rest or (isinstance(present, Axis) and present != Axis(group.name, block)):
                    raise ModelError(
                        f"axis {place} of {name} has {size} elements and cannot follow {group.width} units "
                        f"of {group.name}",
                        hint="Couple each axis with one group, whose units divide it.",
                    )
                axes[name][place] = Axis(group.name, block)
    training = module.training
    try:
        counted = positions_of(module.eval(), torch.zeros(1, *sample_shape))
    finally:
        module.train(training)
    return Structure(groups, tuple(TensorShape(k, tuple(a), counted.get(k, 0)) for k, a in axes.items()))


def _is_depthwise(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv1d | nn.Conv2d) and layer.groups == layer.in_channels > 1
