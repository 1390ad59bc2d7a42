"""Folding: what a graph reckons from the shapes of its tensors becomes constants.

A net that reads ``x.shape`` is traced as nodes that take shapes apart and put them together. All but the
batch is known when the net is exported: the shapes are computed at three batch sizes, and what does not
depend on it is written into the graph. Knows ONNX; does not know torch.
"""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edge_agent.session import open_session

if TYPE_CHECKING:
    import onnx

__all__ = ["fold_shapes"]

_BATCHES = (2, 3, 5)
_SHAPING = {
    "ConstantOfShape": (0,),
    "Expand": (1,),
    "Gather": (1,),
    "Pad": (1,),
    "Reshape": (1,),
    "Resize": (3,),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "Tile": (1,),
    "Unsqueeze": (1,),
}
"""Which inputs of these operators say how a tensor is shaped, rather than what is in it."""


def fold_shapes(graph: bytes, *, sample_shape: tuple[int, ...]) -> bytes:
    """Return a graph in which no shape is computed that could have been known.

    Shapes that are another tensor's as a whole stay; a graph that has no others keeps its bytes.

    Args:
        graph: Takes ``x`` (n, *sample_shape) float32, ``y`` (n,) int64 and weights of fixed shapes.
        sample_shape: Shape of one input.
    """
    import onnx

    model = onnx.load_model_from_string(graph)
    known = _known(model.graph)
    whole = {name for node in model.graph.node if node.op_type == "Shape" for name in node.output}
    places = [
        (node, place)
        for node in model.graph.node
        for place in _SHAPING.get(node.op_type, ())
        if place < len(node.input) and node.input[place] in known - whole and node.output[0] not in known
    ]
    if not places:
        return graph
    names = sorted({node.input[place] for node, place in places})
    values = dict(zip(names, zip(*_evaluate(model, names, sample_shape), strict=True), strict=True))
    made: list[onnx.NodeProto] = []
    others = {node.input[place] for node, place in places if node.op_type != "Reshape"}
    simple = {
        name: _simple(model.graph, made, name, value, may_infer=name not in others)
        for name, value in values.items()
    }
    for node, place in places:
        node.input[place] = simple[node.input[place]]
    rest = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*made, *rest])
    _drop_unread(model.graph, known)
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString(deterministic=True))


def _known(graph: "onnx.GraphProto") -> set[str]:
    """Return the tensors that follow from shapes and constants, and from at least one shape."""
    constant = {tensor.name for tensor in graph.initializer}
    shaped: set[str] = set()
    for node in graph.node:
        if any(attribute.HasField("g") for attribute in node.attribute):
            continue
        if node.op_type == "Shape":
            shaped.update(node.output)
        elif all(name in constant or name in shaped for name in node.input if name):
            (shaped if any(name in shaped for name in node.input) else constant).update(node.output)
    return shaped


def _evaluate(
    model: "onnx.ModelProto", names: Iterable[str], sample_shape: tuple[int, ...]
) -> Iterator[list[NDArray[Any]]]:
    """Yield the values of the named tensors at each of the batch sizes."""
    import onnx

    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    typed = {entry.name: entry for entry in onnx.shape_inference.infer_shapes(model).graph.value_info}
    del probe.graph.output[:]
    probe.graph.output.extend(typed[name] for name in names)
    session = open_session(probe.SerializeToString())
    weights = {
        entry.name: np.zeros([dim.dim_value for dim in entry.type.tensor_type.shape.dim], np.float32)
        for entry in model.graph.input
        if entry.name not in ("x", "y")
    }
    for batch in _BATCHES:
        x, y = np.zeros((batch, *sample_shape), np.float32), np.zeros(batch, np.int64)
        feeds = {**weights, "x": x, "y": y}
        asked = {entry.name for entry in session.get_inputs()}
        found = session.run([*names], {name: value for name, value in feeds.items() if name in asked})
        yield [np.asarray(value) for value in found]


def _simple(
    graph: "onnx.GraphProto",
    nodes: "list[onnx.NodeProto]",
    name: str,
    values: tuple[NDArray[Any], ...],
    *,
    may_infer: bool,
) -> str:
    """Return the name of what has these values at all batch sizes: a constant, or a few nodes that are added.

    Where a size may be inferred, one that grows with the batch becomes -1. What moves otherwise is left:
    then it is ``name``.
    """
    from onnx import helper, numpy_helper

    def constant(suffix: str, value: NDArray[Any]) -> str:
        graph.initializer.append(numpy_helper.from_array(value, f"{name}.{suffix}"))
        return f"{name}.{suffix}"

    first = values[0]
    if any(value.shape != first.shape for value in values):
        return name
    moving = np.any([value != first for value in values], axis=0)
    if not moving.any():
        return constant("folded", first)
    grows = all(
        np.array_equal(value[moving] * _BATCHES[0], first[moving] * batch)
        for value, batch in zip(values, _BATCHES, strict=True)
    )
    if first.ndim != 1 or first.dtype != np.int64 or moving.sum() != 1 or not grows:
        return name
    if may_infer and (first > 0).all():
        return constant("folded", np.where(moving, -1, first))
    at = int(np.argmax(moving))
    batch, times = f"{name}.batch", first[at : at + 1] // _BATCHES[0]
    nodes.append(helper.make_node("Shape", ["x"], [batch], name=batch, start=0, end=1))
    if times[0] != 1:
        nodes.append(
            helper.make_node(
                "Mul", [batch, constant("times", times)], [f"{name}.grown"], name=f"{name}.grown"
            )
        )
    parts = [constant("before", first[:at])] if at else []
    parts.append(nodes[-1].output[0])
    parts += [constant("after", first[at + 1 :])] if at + 1 < len(first) else []
    nodes.append(helper.make_node("Concat", parts, [f"{name}.folded"], name=f"{name}.folded", axis=0))
    return f"{name}.folded"


def _drop_unread(graph: "onnx.GraphProto", known: set[str]) -> None:
    """Remove nodes that made known tensors which nobody reads any more."""
    while True:
        read = {name for node in graph.node for name in node.input} | {entry.name for entry in graph.output}
        kept = [n for n in graph.node if not set(n.output) <= known or set(n.output) & read]
        if len(kept) == len(graph.node):
            break
        del graph.node[:]
        graph.node.extend(kept)
    read = {name for node in graph.node for name in node.input}
    kept_constants = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.initializer[:]
    graph.initializer.extend(kept_constants)
