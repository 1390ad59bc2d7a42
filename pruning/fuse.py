"""Faster variants of an exported graph, for boards that have the compiled kernel.

A variant computes what the graph computes, from the same inputs, with operators of our own library in
place of chains of ONNX's: :func:`fuse` joins GroupNorm, a residual and Hardswish, and the loss;
:func:`block` also lays images out in blocks of channels, as ONNX Runtime's fast convolutions on x86-64
want them, which it does by itself only where the weights are constants. Knows graphs, not weights.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

__all__ = ["BLOCKS", "block", "fuse", "has_pools"]

BLOCKS = (8, 16)
"""Channels that ONNX Runtime puts side by side: 16 with AVX-512, 8 on other x86-64 processors."""

_OWN = "scalarfed"
_BLOCKED = "com.microsoft.nchwc"


class _Graph:
    """A model under change: who makes a value and who reads it."""

    def __init__(self, model: bytes) -> None:
        import onnx

        self.model = onnx.load_model_from_string(model)
        self.nodes: list[Any] = list(self.model.graph.node)
        self.outputs = {value.name for value in self.model.graph.output}
        self.shapes = {
            value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
            for value in self.model.graph.input
        }
        self.constants = {
            tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in self.model.graph.initializer
        }
        for node in self.nodes:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self.constants[node.output[0]] = onnx.numpy_helper.to_array(node.attribute[0].t)

    def maker(self, value: str, op: str) -> Any:
        """Return the node of type ``op`` that makes a value, or None."""
        return next((node for node in self.nodes if value in node.output and node.op_type == op), None)

    def readers(self, value: str) -> list[Any]:
        """Return the nodes that read a value."""
        return [node for node in self.nodes if value in node.input]

    def only_reader(self, value: str, op: str) -> Any:
        """Return the node of type ``op`` that alone reads a value, or None."""
        found = self.readers(value)
        return found[0] if len(found) == 1 and found[0].op_type == op and value not in self.outputs else None

    def replace(self, old: Sequence[Any], new: Any) -> None:
        """Put a node in the place of the last of some."""
        self.nodes[self.nodes.index(old[-1])] = new
        for node in old[:-1]:
            self.nodes.remove(node)

    def drop_unread(self) -> None:
        """Remove the nodes and constants that no output needs."""
        needed, kept = set(self.outputs), []
        for node in reversed(self.nodes):
            if needed & set(node.output):
                needed |= set(node.input)
                kept.append(node)
        self.nodes = kept[::-1]
        constants = [tensor for tensor in self.model.graph.initializer if tensor.name in needed]
        del self.model.graph.initializer[:]
        self.model.graph.initializer.extend(constants)

    def serialise(self, domains: Iterable[str]) -> bytes:
        """Return the model with the present nodes."""
        import onnx

        self.drop_unread()
        del self.model.graph.node[:]
        self.model.graph.node.extend(self.nodes)
        del self.model.graph.value_info[:]
        for domain in domains:
            if domain not in {entry.domain for entry in self.model.opset_import}:
                self.model.opset_import.append(onnx.helper.make_opsetid(domain, 1))
        return bytes(self.model.SerializeToString(deterministic=True))


def _make(
    op: str, inputs: Sequence[str], outputs: Sequence[str], *, domain: str = "", **attributes: Any
) -> Any:
    import onnx

    return onnx.helper.make_node(op, list(inputs), list(outputs), domain=domain, **attributes)


def _attribute(node: Any, name: str, default: Any = None) -> Any:
    import onnx

    return next((onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def fuse(graph: bytes) -> bytes | None:
    """Join GroupNorm, residual and Hardswish, and the loss, into operators of our own.

    Args:
        graph: As :func:`pruning.export.export_graph` makes it.

    Returns:
        The variant, or None if there is no GroupNorm to join.
    """
    own = _Graph(graph)
    found = [chain for node in own.nodes if (chain := _group_norm(own, node)) is not None]
    for chain in found:
        _join_norm(own, *chain)
    if not found:
        return None
    _join_loss(own)
    return own.serialise([_OWN])


def has_pools(graph: bytes) -> bool:
    """Tell whether a graph has pools, which ONNX Runtime lays out in blocks by itself."""
    return any(node.op_type in ("MaxPool", "AveragePool") for node in _Graph(graph).nodes)


def _group_norm(own: _Graph, node: Any) -> tuple[list[Any], str, str, str, int] | None:
    """Return the nodes of the GroupNorm around an InstanceNormalization, its x, scale, bias and groups.

    torch exports Reshape(x, [0, G, -1]), InstanceNormalization by ones and zeros, Reshape back, then
    times scale and plus bias, each with two axes added.
    """
    if node.op_type != "InstanceNormalization":
        return None
    ones, zeros = (own.constants.get(name) for name in node.input[1:])
    split = own.maker(node.input[0], "Reshape")
    back = own.only_reader(node.output[0], "Reshape")
    if split is None or back is None or ones is None or zeros is None or (ones != 1).any() or zeros.any():
        return None
    shape = own.constants.get(split.input[1])
    scaled = own.only_reader(back.output[0], "Mul")
    shifted = None if scaled is None else own.only_reader(scaled.output[0], "Add")
    if shape is None or list(shape[::2]) != [0, -1] or len(shape) != 3 or shifted is None:
        return None
    sources = []
    for reader, value in ((scaled, back.output[0]), (shifted, scaled.output[0])):
        widened = own.maker(next(name for name in reader.input if name != value), "Unsqueeze")
        if widened is None or list(own.constants.get(widened.input[1], ())) != [1, 2]:
            return None
        sources.append(widened.input[0])
    return [split, node, back, scaled, shifted], split.input[0], sources[0], sources[1], int(shape[1])


def _join_norm(own: _Graph, chain: list[Any], x: str, scale: str, bias: str, groups: int) -> None:
    epsilon = _attribute(chain[1], "epsilon", 1e-5)
    inputs, end = [x, scale, bias], chain[-1]
    added = own.only_reader(end.output[0], "Add")
    acted = own.only_reader((added or end).output[0], "HardSwish")
    if added is not None and acted is not None:
        inputs.append(next(name for name in added.input if name != end.output[0]))
        chain = [*chain, added]
    elif added is not None:
        acted = None
    if acted is not None:
        chain = [*chain, acted]
    joined = _make(
        "Normalise",
        inputs,
        chain[-1].output,
        domain=_OWN,
        groups=groups,
        epsilon=float(epsilon),
        activation=int(acted is not None),
        block=0,
    )
    own.replace(chain, joined)


def _join_loss(own: _Graph) -> None:
    """Compute loss and count of correct answers in one operator, from the logits."""
    place = max(index for index, node in enumerate(own.nodes) if "logits" in node.output) + 1
    for node in [node for node in own.nodes if {"loss", "correct"} & set(node.output)]:
        own.nodes.remove(node)
    own.nodes.insert(place, _make("Loss", ["logits", "y"], ["loss", "correct"], domain=_OWN))


def block(fused: bytes, size: int) -> bytes | None:
    """Lay the images between convolutions out in blocks of channels.

    Every convolution of the first group becomes one on blocked images, with its filter blocked at each
    run, and what follows stays blocked as long as it can; a value that others read is laid back.

    Args:
        fused: From :func:`fuse`.
        size: One of BLOCKS.

    Returns:
        The variant, or None if no convolution can be blocked.
    """
    own = _Graph(fused)
    channels: dict[str, int] = {}  # of the blocked values, by the name of the value they stand for
    nodes: list[Any] = []
    plain: set[str] = set()

    def blocked(name: str) -> str:
        return f"{name}/blocked"

    def lay_back(node: Any) -> None:
        for name in dict.fromkeys(node.input):
            if name in channels and name not in plain:
                plain.add(name)
                nodes.append(
                    _make("ReorderOutput", [blocked(name)], [name], domain=_BLOCKED, channels=channels[name])
                )

    for node in own.nodes:
        if (made := _blocked_conv(own, node, size, channels, blocked)) is not None:
            if node.input[0] in made[-1].input:
                lay_back(node)
            nodes += made
            channels[node.output[0]] = own.shapes[node.input[1]][0]
        elif node.op_type == "Normalise" and all(
            name in channels for name in (node.input[0], *node.input[3:])
        ):
            inputs = [blocked(node.input[0]), *node.input[1:3], *(blocked(name) for name in node.input[3:])]
            attributes = {a.name: _attribute(node, a.name) for a in node.attribute} | {"block": size}
            nodes.append(_make("Normalise", inputs, [blocked(node.output[0])], domain=_OWN, **attributes))
            channels[node.output[0]] = channels[node.input[0]]
        elif node.op_type == "Add" and all(name in channels for name in node.input):
            nodes.append(_make("Add", [blocked(name) for name in node.input], [blocked(node.output[0])]))
            channels[node.output[0]] = channels[node.input[0]]
        else:
            lay_back(node)
            nodes.append(node)
    if not channels or own.outputs & set(channels):
        return None
    own.nodes = nodes
    return own.serialise([_OWN, _BLOCKED])


def _blocked_conv(
    own: _Graph, node: Any, size: int, channels: dict[str, int], blocked: Any
) -> list[Any] | None:
    """Return a convolution on blocked images with what prepares its filter and bias, or None.

    A filter is blocked by output and input channels where the image comes in blocks; by output channels
    alone where it comes plain with fewer channels than a block, or where every channel has its own.
    Other grouped convolutions stay as they are.
    """
    import onnx

    if node.op_type != "Conv" or len(own.shapes.get(node.input[1], ())) != 4:
        return None
    outputs, inputs, *_ = own.shapes[node.input[1]]
    groups = _attribute(node, "group", 1)
    ready = node.input[0] in channels
    each = ready and inputs == 1 and groups == outputs
    if not each and 2 * inputs <= size:
        ready = False  # more than half of the products would be with padding
    if (groups > 1 and not each) or (not ready and inputs >= size):
        return None
    padded = -(-outputs // size) * size
    filter_name = f"{node.output[0]}/filter"
    made = [
        _make(
            "BlockFilter",
            [node.input[1]],
            [filter_name],
            domain=_OWN,
            block=size,
            narrow=int(each or not ready),
        )
    ]
    sources = [blocked(node.input[0]) if ready else node.input[0], filter_name]
    if len(node.input) > 2:
        bias = node.input[2]
        if padded > outputs:
            pads = onnx.numpy_helper.from_array(np.array([0, padded - outputs], np.int64), f"{bias}/pads")
            own.model.graph.initializer.append(pads)
            bias = f"{node.output[0]}/bias"
            made.append(_make("Pad", [node.input[2], pads.name], [bias]))
        sources.append(bias)
    attributes = {a.name: _attribute(node, a.name) for a in node.attribute}
    attributes["group"] = padded if each else 1
    return [*made, _make("Conv", sources, [blocked(node.output[0])], domain=_BLOCKED, **attributes)]
