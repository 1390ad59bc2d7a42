"""A graph at one batch size: the shape and the bytes of every value.

Shapes follow from the inputs' by ONNX's own inference, of a graph rewritten for it (``rewrites``). Knows
neither costs nor the order in which buffers are taken. The package onnx is imported inside functions only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from profiles.rewrites import block_pools, drop_noops, fuse_gelu, inline_functions, put_known

if TYPE_CHECKING:
    import onnx

__all__ = ["SizedGraph", "sized_graphs"]


class SizedGraph:
    """A graph whose shapes are all numbers.

    Args:
        model: With shapes and types of all values.
        nodes: What runs, in the graph's order.
        data: Names of the inputs that are not trainable.
        symbols: Shapes that follow while the batch size has a name alone.

    Attributes:
        nodes: As given.
        outputs: Names of the values that are there at the end of a pass.
        weights: Names of the trainable inputs.
        data: Names of the others.
        constants: Names of the values that the graph holds itself.

    Raises:
        ValueError: There is control flow, or a shape does not follow.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        nodes: Iterable[onnx.NodeProto],
        data: Sequence[str],
        symbols: Mapping[str, tuple[str, ...]],
    ) -> None:
        import onnx

        graph = model.graph
        self.nodes = list(nodes)
        self._symbols = symbols
        self.outputs = {entry.name for entry in graph.output}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._widths: dict[str, int] = {}
        for entry in (*graph.input, *graph.value_info, *graph.output):
            tensor = entry.type.tensor_type
            if all(dim.HasField("dim_value") for dim in tensor.shape.dim):
                self._shapes[entry.name] = tuple(dim.dim_value for dim in tensor.shape.dim)
            self._widths[entry.name] = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).itemsize
        constants = [node.output[0] for node in self.nodes if node.op_type == "Constant"]
        self.constants = {*constants, *(entry.name for entry in graph.initializer)}
        for entry in graph.initializer:
            self._shapes[entry.name] = tuple(entry.dims)
            self._widths[entry.name] = onnx.helper.tensor_dtype_to_np_dtype(entry.data_type).itemsize
        made = {name for node in self.nodes for name in node.output}
        given = [entry.name for entry in graph.input if entry.name not in made]
        self.weights = [name for name in given if name not in (*data, *self.constants)]
        self.data = [name for name in given if name in data]
        self._check()

    def _check(self) -> None:
        for node in self.nodes:
            if any(a.HasField("g") or a.graphs for a in node.attribute):
                raise ValueError(f"node `{node.name}` ({node.op_type}) is control flow")
            for name in (*node.input, *node.output):
                if name and name not in self._shapes:
                    made = node.output[0] == name
                    raise ValueError(
                        f"the shape of `{name}`, {'made' if made else 'read'} by node `{node.name}` "
                        f"({node.op_type}), does not follow from the inputs' shapes"
                    )

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a value."""
        return self._shapes[name]

    def symbols(self, name: str) -> tuple[str, ...] | None:
        """Return a shape as it is known before there is a batch, or None."""
        return self._symbols.get(name)

    def size(self, name: str) -> int:
        """Return how many elements a value has."""
        return math.prod(self._shapes[name])

    def width(self, name: str) -> int:
        """Return the bytes of an element of a value."""
        return self._widths[name]

    def bytes(self, name: str) -> int:
        """Return the bytes of a value."""
        return self.size(name) * self._widths[name]


def sized_graphs(
    model: onnx.ModelProto,
    *,
    batch_sizes: Sequence[int],
    data: Sequence[str],
    without: Sequence[str] = (),
    block: int = 0,
) -> list[SizedGraph]:
    """Return a graph at some batch sizes.

    Args:
        model: Left as it is.
        batch_sizes: Values of the first axis of ``data``.
        data: Names of the inputs that are not trainable.
        without: Outputs that are left out, with the nodes that nothing else needs.
        block: Channels that the processor's pools take side by side; 0 for a processor whose pools do not.

    Raises:
        ValueError: See :class:`SizedGraph`; ONNX's inference raises what it does.
    """
    import onnx

    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    _drop_outputs(fixed.graph, without)
    del fixed.graph.value_info[:]
    for entry in fixed.graph.output:
        entry.type.tensor_type.ClearField("shape")
    drop_noops(fixed)
    inline_functions(fixed)
    fuse_gelu(fixed)
    symbols = _symbols(fixed)
    if block:
        block_pools(fixed, lambda name: _channels(symbols.get(name, ())), block)
        symbols = _symbols(fixed)
    whole = onnx.GraphProto()
    whole.node.extend(fixed.graph.node)
    put_known(fixed)
    found = []
    for batch_size in batch_sizes:
        for entry in fixed.graph.input:
            if entry.name in data and entry.type.tensor_type.shape.dim:
                entry.type.tensor_type.shape.dim[0].dim_value = batch_size
        inferred = onnx.shape_inference.infer_shapes(fixed, check_type=True, strict_mode=True, data_prop=True)
        found.append(SizedGraph(inferred, whole.node, data, symbols))
    return found


def _drop_outputs(graph: onnx.GraphProto, without: Sequence[str]) -> None:
    kept = [entry for entry in graph.output if entry.name not in without]
    if len(kept) == len(graph.output):
        return
    needed = {entry.name for entry in kept}
    nodes = []
    for node in reversed(graph.node):
        if needed & set(node.output):
            needed.update(node.input)
            nodes.append(node)
    nodes.reverse()
    del graph.output[:], graph.node[:]
    graph.output.extend(kept)
    graph.node.extend(nodes)


def _channels(symbols: Sequence[str]) -> int | None:
    """Return the channels of an image's shape, where they are known."""
    return int(symbols[1]) if len(symbols) == 4 and symbols[1].isdigit() else None


def _symbols(model: onnx.ModelProto) -> dict[str, tuple[str, ...]]:
    """Return the shapes that follow from a batch size without a number, as onnxruntime infers them."""
    import onnx

    inferred = onnx.shape_inference.infer_shapes(model, data_prop=False).graph
    found = {}
    for entry in (*inferred.input, *inferred.value_info, *inferred.output):
        tensor = entry.type.tensor_type
        dims = [
            str(dim.dim_value) if dim.HasField("dim_value") else dim.dim_param for dim in tensor.shape.dim
        ]
        if tensor.HasField("shape") and all(dim and not dim.startswith("unk__") for dim in dims):
            found[entry.name] = tuple(dims)
    return found
