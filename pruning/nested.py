"""A nested family of nets: narrower ones are slices of the widest, and prefixes of its weights.

Knows how tensors are cut into pieces so that every narrower net's weights come first in the flat vector, and
how a graph puts its tensors together from pieces. Does not know which board holds which width, nor how the
family is trained.

Every tensor of width n is made of the tensor of the next narrower width and of what each of its axes adds:

    [ narrower | added inputs ]
    [     added outputs       ]

The narrowest net's tensors come first, then what the next width adds to all of them, and so on. So a
perturbation, which is named by position, is at once one of every width, each a slice of the same.
Source: Jia et al., "AdaptiveFL", arXiv 2311.13166 (widths cut by index, index-aligned averages).
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_agent.bundle import Bundle, flat_layout, write_bundle
from profiles.errors import ModelError
from pruning.export import Exported, export_graph, graph_passes, graph_variants
from pruning.models import build_model, model_structure
from pruning.prune import Pruned
from pruning.structure import Structure, TensorShape

__all__ = ["Piece", "fan_gain", "nested_widths", "pieces_of", "write_family"]

_Widths = Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Piece:
    """What one axis of a tensor adds at one width.

    Attributes:
        name: Of the graph input; the narrowest net's piece has the tensor's own name.
        level: The width at which it appears, 0 for the narrowest.
        axis: Along which it is appended; 0 for the narrowest net's piece.
        place: Where it lies in the widest tensor.
    """

    name: str
    level: int
    axis: int
    place: tuple[slice, ...]


def nested_widths(structure: Structure, widths: _Widths, fractions: Sequence[float]) -> list[dict[str, int]]:
    """Return the widths of a family: the given ones last, before them their fractions, the narrowest first.

    Args:
        structure: The net's groups.
        widths: Of the widest net.
        fractions: Of the other nets, in (0, 1), each once; rounded to legal widths.

    Raises:
        ModelError: Two of the nets would be the same.
    """
    family = []
    for fraction in sorted(fractions):
        family.append(
            {
                g.name: min(
                    widths[g.name],
                    max(g.minimum, round(widths[g.name] * fraction / g.multiple) * g.multiple),
                )
                for g in structure.groups
            }
        )
    family.append(dict(widths))
    for (fraction, narrow), wide in zip(
        zip(sorted(fractions), family, strict=False), family[1:], strict=True
    ):
        if narrow == wide:
            raise ModelError(
                f"the width {fraction:g} of this net is the same as the next wider one: "
                f"{', '.join(f'{k} = {v}' for k, v in narrow.items())}",
                hint="Name fewer widths, or keep more of the net with a higher density.",
            )
    return family


def pieces_of(tensor: TensorShape, family: Sequence[_Widths]) -> list[Piece]:
    """Return the pieces of a tensor, in the order in which they are appended to each other."""
    shapes = [tensor.shape(widths) for widths in family]
    pieces = [Piece(tensor.name, 0, 0, tuple(slice(0, size) for size in shapes[0]))]
    for level, (narrow, wide) in enumerate(itertools.pairwise(shapes), start=1):
        for axis, (start, stop) in enumerate(zip(narrow, wide, strict=True)):
            if stop > start:
                before = tuple(slice(0, size) for size in wide[:axis])
                after = tuple(slice(0, size) for size in narrow[axis + 1 :])
                name = f"{tensor.name}+{level}.{axis}"
                pieces.append(Piece(name, level, axis, (*before, slice(start, stop), *after)))
    return pieces


def write_family(
    pruned: Pruned,
    folders: Sequence[Path],
    *,
    fractions: Sequence[float],
    hidden: Sequence[int] | None = None,
    standardise: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None,
    cost: Callable[[bytes], Mapping[str, int]],
) -> list[Bundle]:
    """Export a reference net at several widths; every narrower bundle's weights are a prefix of the next.

    Args:
        pruned: The widest net.
        folders: One for each width, the widest first, since its bundle names the others' family.
        fractions: Of the widest net's widths, one less than there are folders.
        hidden: Dense widths of the hidden layers of ``mlp``.
        standardise: As the widest net has it.
        cost: Reads an ONNX file and returns what its forward takes.

    Returns:
        The bundles, the narrowest first.

    Raises:
        ModelError: Two of the nets would be the same.
    """
    shape, classes = pruned.sample_shape, pruned.classes
    structure = model_structure(pruned.model, sample_shape=shape, classes=classes, hidden=hidden)
    family = nested_widths(structure, pruned.widths, fractions)
    if len(folders) != len(family):
        raise ValueError(f"{len(folders)} folders for {len(family)} nets")
    cut = {tensor.name: pieces_of(tensor, family) for tensor in structure.tensors}
    widest = {name: p.detach().numpy() for name, p in pruned.module.named_parameters()}
    layout = sorted(itertools.chain(*cut.values()), key=lambda piece: piece.level)  # stable
    owner = {piece.name: tensor for tensor, pieces in cut.items() for piece in pieces}
    values = {p.name: np.ascontiguousarray(widest[owner[p.name]][p.place]) for p in layout}
    ends = [
        flat_layout([(p.name, values[p.name].shape) for p in layout if p.level <= level])[1]
        for level in range(len(family))
    ]
    dense = export_graph(pruned.dense, sample_shape=shape, classes=classes, verify=False).graph
    before = {f"{key}_dense": value for key, value in cost(dense).items()}
    before["graph_bytes_dense"] = len(dense)
    bundles: list[Bundle] = []
    for level, folder in zip(reversed(range(len(family))), folders, strict=True):
        net = build_model(
            pruned.model,
            sample_shape=shape,
            classes=classes,
            widths=family[level],
            hidden=hidden,
            standardise=standardise,
            seed=pruned.seed,
        )
        exported = export_graph(net, sample_shape=shape, classes=classes)
        held = {name: [p for p in pieces if p.level <= level] for name, pieces in cut.items()}
        gains = {t.name: fan_gain(t, family[level], family[-1]) for t in structure.layers}
        graph = _joined(exported, held, gains)
        tensors, size = flat_layout([(p.name, values[p.name].shape) for p in layout if p.level <= level])
        flat = np.zeros(size, np.float32)
        for tensor in tensors:
            flat[tensor.offset : tensor.offset + tensor.size] = values[tensor.name].reshape(-1)
        facts = {
            **pruned.summary(),
            "widths": family[level],
            "params": structure.params(family[level]),
            "macs": structure.macs(family[level]),
            **before,
        }
        variants = graph_variants(graph)
        bundles.append(
            write_bundle(
                folder,
                graph=graph,
                weights=flat,
                tensors=tensors,
                model=pruned.model,
                classes=classes,
                sample_shape=tuple(shape),
                cost=cost(graph),
                pruning=facts,
                variants=variants,
                passes=graph_passes(graph, variants),
                stops=ends[: level + 1],
                family=bundles[0].identity if bundles else "",
            )
        )
    return bundles[::-1]


def fan_gain(tensor: TensorShape, narrow: _Widths, wide: _Widths) -> float:
    """Return by what a narrow net multiplies a weight that it shares with the widest.

    The root of how many times fewer inputs its units sum over: fresh weights then give outputs of the same
    variance at every width, and no width's loss drowns in the others'.
    """
    inputs = [
        1 if isinstance(axis, int) else wide[axis.group] / narrow[axis.group] for axis in tensor.axes[1:]
    ]
    return math.sqrt(math.prod(inputs))


def _joined(exported: Exported, held: Mapping[str, Sequence[Piece]], gains: Mapping[str, float]) -> bytes:
    """Return the graph with a tensor's pieces as inputs, joined and multiplied before they are read."""
    import onnx

    model = onnx.load_model_from_string(exported.graph)
    joins: dict[str, list[onnx.NodeProto]] = {}  # by the name of what they make
    names = {}
    for name, pieces in held.items():
        nodes = []
        joined = pieces[0].name
        for number, piece in enumerate(pieces[1:], start=1):
            result = f"{name}={number}"
            nodes.append(
                onnx.helper.make_node(
                    "Concat", [joined, piece.name], [result], name=f"{name}.join{number}", axis=piece.axis
                )
            )
            joined = result
        if gains.get(name, 1.0) != 1.0:
            gain = onnx.numpy_helper.from_array(np.array(gains[name], np.float32), f"{name}.gain")
            model.graph.initializer.append(gain)
            result = f"{name}=gained"
            nodes.append(onnx.helper.make_node("Mul", [joined, gain.name], [result], name=f"{name}.multiply"))
            joined = result
        names[name] = joined
        joins[joined] = nodes
    ordered = []  # a tensor is joined where it is first read: few of the copies live at once
    for node in model.graph.node:
        for place, read in enumerate(node.input):
            node.input[place] = names.get(read, read)
            ordered += joins.pop(node.input[place], [])
        ordered.append(node)
    inputs = [value for value in model.graph.input if value.name not in held]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    for pieces in held.values():
        for piece in pieces:
            sizes = [place.stop - place.start for place in piece.place]
            model.graph.input.append(onnx.helper.make_tensor_value_info(piece.name, 1, sizes))
    del model.graph.node[:]
    model.graph.node.extend(ordered)
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString(deterministic=True))
