"""Graphs rewritten into what onnxruntime runs, with operators whose shapes ONNX can infer.

Some of ONNX's operators are functions, which onnxruntime runs as the nodes that they are made of: their
buffers are those that count; and it joins some chains into one. The operators of the compiled kernel
(``pruning/fuse.py``) ONNX does not know: others of the same shapes stand for them. Knows no sizes. The
package onnx is imported inside functions only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx

__all__ = [
    "BIAS_GELU",
    "INLINED",
    "block_pools",
    "drop_noops",
    "fuse_gelu",
    "inline_functions",
    "node_attributes",
    "put_known",
]

INLINED = "inlined"
"""How the names of the nodes begin that come out of functions."""

BIAS_GELU = "inlined/bias gelu"
"""How the names of the nodes begin that add a bias and take the Gelu of the sum."""

_KERNEL, _BLOCKED = "scalarfed", "com.microsoft.nchwc"

# Functions of one input x: their nodes, by operator and inputs. Each node makes the value of its own number.
_FUNCTIONS: dict[str, tuple[tuple[str, ...], ...]] = {
    "HardSwish": (("HardSigmoid", "x"), ("Mul", "x", "0")),
    "Mish": (("Softplus", "x"), ("Tanh", "0"), ("Mul", "x", "1")),
}


def node_attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """Return a node's attributes by name."""
    import onnx

    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


def inline_functions(model: onnx.ModelProto) -> None:
    """Replace functions by the nodes that onnxruntime runs in their place.

    Args:
        model: Changed in place.
    """
    from onnx import GraphProto, TensorProto, helper

    graph = model.graph
    replaced = GraphProto()
    for number, node in enumerate(graph.node):
        name = f"{INLINED}/{number}"
        if node.op_type in _FUNCTIONS and not node.domain:
            body = _FUNCTIONS[node.op_type]
            for place, (kind, *sources) in enumerate(body):
                inputs = [node.input[0] if source == "x" else f"{name}/{source}" for source in sources]
                last = place == len(body) - 1
                output = node.output[0] if last else f"{name}/{place}"
                replaced.node.append(helper.make_node(kind, inputs, [output], name=name))
        elif node.op_type == "SoftmaxCrossEntropyLoss" and len(node.input) == 2 and len(node.output) == 1:
            replaced.node.extend(_cross_entropy(node, name))
        else:
            replaced.node.append(node)
    if any(node.name.startswith(f"{INLINED}/") for node in replaced.node):
        for key, values in (("0", [0]), ("1", [1]), ("rank 3", [0, 0, -1]), ("rank 2", [0, 0])):
            tensor = helper.make_tensor(f"{INLINED}/{key}", TensorProto.INT64, [len(values)], values)
            graph.initializer.append(tensor)
        for key, value in (("zero", 0.0), ("one", 1.0)):
            graph.initializer.append(helper.make_tensor(f"{INLINED}/{key}", TensorProto.FLOAT, [], [value]))
    del graph.node[:]
    graph.node.extend(replaced.node)


def _cross_entropy(node: onnx.NodeProto, name: str) -> Iterator[onnx.NodeProto]:
    """Yield the nodes of a mean cross-entropy of (n, classes) and (n,) labels."""
    from onnx import TensorProto, helper

    def make(kind: str, output: str, *sources: str, **attributes: Any) -> onnx.NodeProto:
        inputs = [given.get(source, f"{name}/{source}") for source in sources]
        return helper.make_node(
            kind, inputs, [given.get(output, f"{name}/{output}")], name=name, **attributes
        )

    given = {"logits": node.input[0], "labels": node.input[1], "loss": node.output[0]}
    given |= {key: f"{INLINED}/{key}" for key in ("0", "1", "rank 3", "rank 2", "zero", "one")}
    yield make("Reshape", "logits of rank 3", "logits", "rank 3")
    yield make("LogSoftmax", "logarithms of rank 3", "logits of rank 3", axis=1)
    yield make("Reshape", "logarithms", "logarithms of rank 3", "rank 2")
    yield make("Unsqueeze", "column", "labels", "1")
    yield make("Sub", "none", "column", "column")
    yield make("Cast", "whole", "column", to=TensorProto.INT64)
    yield make("Equal", "ignored", "whole", "0")
    yield make("Where", "targets", "ignored", "none", "column")
    yield make("GatherElements", "gathered", "logarithms", "targets", axis=1)
    yield make("Where", "counted", "ignored", "zero", "gathered")
    yield make("Neg", "losses", "counted")
    yield make("Slice", "first", "losses", "0", "1", "1")
    yield make("Squeeze", "left out", "ignored", "1")
    yield make("Where", "weights", "left out", "zero", "one")
    yield make("Squeeze", "row", "first", "1")
    yield make("Mul", "weighted", "row", "weights")
    yield make("ReduceSum", "sum", "weighted", keepdims=0)
    yield make("ReduceSum", "weight", "weights", keepdims=0)
    yield make("Div", "loss", "sum", "weight")


def drop_noops(model: onnx.ModelProto) -> None:
    """Take out products with and quotients by a constant that is one number, and that one.

    Args:
        model: Changed in place.
    """
    from onnx import GraphProto, numpy_helper

    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    constants |= {
        node.output[0]: node.attribute[0].t
        for node in graph.node
        if node.op_type == "Constant" and node.attribute[0].name == "value"
    }
    stands_for: dict[str, str] = {}
    outputs = {entry.name for entry in graph.output}
    kept = GraphProto()
    for node in graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = stands_for.get(name, name)
        factor = constants.get(node.input[1]) if node.op_type in ("Mul", "Div") else None
        values = None if factor is None else numpy_helper.to_array(factor)
        if values is not None and values.size == 1 and values.item() == 1 and node.output[0] not in outputs:
            stands_for[node.output[0]] = node.input[0]
        else:
            kept.node.append(node)
    del graph.node[:]
    graph.node.extend(kept.node)


def fuse_gelu(model: onnx.ModelProto) -> None:
    """Replace x (1 + erf(x / sqrt 2)) / 2 by one node, with the sum of a bias before it, as onnxruntime does.

    Args:
        model: Changed in place.
    """
    from onnx import GraphProto, helper

    graph = model.graph
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    gone: set[str] = set()
    fused: dict[str, onnx.NodeProto] = {}
    makers = {node.output[0]: node for node in graph.node}
    for number, node in enumerate(graph.node):
        if node.op_type != "Div":
            continue
        found = [node]
        for kind in ("Erf", "Add", "Mul", "Mul"):
            following = readers.get(found[-1].output[0], [])
            if len(following) != 1 or following[0].op_type != kind:
                break
            found.append(following[0])
        whole = node.input[0]
        if len(found) < 5 or whole not in (*found[3].input, *found[4].input):
            continue
        sum_of = makers.get(whole)
        before = [sum_of] if sum_of and sum_of.op_type == "Add" and len(readers[whole]) == 2 else []
        sources = sum_of.input if before and sum_of else [whole]
        gone |= {n.output[0] for n in (*found, *before)}
        end = found[-1].output[0]
        kind, name = ("Add", f"{BIAS_GELU}/{number}") if before else ("Erf", f"{INLINED}/{number}")
        fused[end] = helper.make_node(kind, sources, [end], name=name)
    kept = GraphProto()
    kept.node.extend(fused.get(n.output[0], n) for n in graph.node if n.output[0] not in gone - fused.keys())
    del graph.node[:]
    graph.node.extend(kept.node)


def block_pools(model: onnx.ModelProto, channels_of: Callable[[str], int | None], block: int) -> None:
    """Put a copy before and after each pool whose channels fill blocks, as onnxruntime does on x86-64.

    Args:
        model: Changed in place.
        channels_of: Returns the channels of an image, or None where they are not known before the first pass.
        block: Channels that the processor's pools take side by side.
    """
    from onnx import GraphProto, helper

    replaced = GraphProto()
    for number, node in enumerate(model.graph.node):
        channels = channels_of(node.input[0]) if node.op_type in ("MaxPool", "AveragePool") else None
        if not channels or channels % block or len(node.output) > 1:
            replaced.node.append(node)
            continue
        name, attributes = f"{INLINED}/pool {number}", node_attributes(node)
        replaced.node.append(helper.make_node("Neg", node.input, [f"{name}/in"], name=name))
        pool = helper.make_node(node.op_type, [f"{name}/in"], [f"{name}/out"], name=name, **attributes)
        replaced.node.append(pool)
        replaced.node.append(helper.make_node("Neg", [f"{name}/out"], node.output, name=name))
    del model.graph.node[:]
    model.graph.node.extend(replaced.node)


def put_known(model: onnx.ModelProto) -> None:
    """Replace the compiled kernel's operators by ONNX's whose outputs have the same shapes.

    A blocked image has the shape (n, C, H, W) with C a multiple of the block, a blocked filter likewise:
    convolutions of them are convolutions to the inference. A blocked filter becomes an input.

    Args:
        model: Changed in place, if it has such operators.
    """
    from onnx import GraphProto, TensorProto, helper

    graph = model.graph
    if not any(node.domain in (_KERNEL, _BLOCKED) for node in graph.node):
        return
    shapes = {
        entry.name: [dim.dim_value for dim in entry.type.tensor_type.shape.dim] for entry in graph.input
    }
    nodes: list[onnx.NodeProto] = []
    numbers: dict[str, list[int]] = {"from/0": [0], "axis/1": [1]}
    for node in graph.node:
        known = node_attributes(node) if node.domain in (_KERNEL, _BLOCKED) else {}
        if node.domain == _BLOCKED and node.op_type == "ReorderOutput":
            end = f"to/{known['channels']}"
            numbers[end] = [known["channels"]]
            nodes.append(helper.make_node("Slice", [node.input[0], "from/0", end, "axis/1"], node.output))
        elif node.domain == _BLOCKED:
            nodes.append(helper.make_node(node.op_type, node.input, node.output, **known))
        elif node.domain == _KERNEL and node.op_type == "Normalise":
            nodes.append(helper.make_node("Identity", node.input[:1], node.output))
        elif node.domain == _KERNEL and node.op_type == "BlockFilter":
            block, inner = known["block"], 1 if known["narrow"] else known["block"]
            rows, columns, *cells = shapes[node.input[0]]
            shape = [-(-rows // block) * block, -(-columns // inner) * inner, *cells]
            graph.input.append(helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, shape))
        elif node.domain == _KERNEL:  # Loss: two scalars
            for source, output in zip(node.input, node.output, strict=True):
                nodes.append(helper.make_node("ReduceMax", [source], [output], keepdims=0))
        else:
            nodes.append(node)
    for name, values in numbers.items():
        graph.initializer.append(helper.make_tensor(name, TensorProto.INT64, [len(values)], values))
    replaced = GraphProto()
    replaced.node.extend(nodes)
    del graph.node[:]
    graph.node.extend(replaced.node)
