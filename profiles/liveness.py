"""Which buffers a graph's nodes take and give back while they run.

A buffer lives from the node that makes a value to the last reader of all values that lie in it. A value
shares memory with its input where onnxruntime lets it (views, and activation functions whose input nobody
else reads), or lies where an earlier value of the same shape has died. Inputs (x, y, weights) belong to
the caller and take nothing. Beside its output a convolution takes scratch to unfold its input into; one on
blocked images takes none. How the requests become resident is told elsewhere (``passes``).

Sources: onnxruntime 1.31's order of nodes, plan of its buffers (AllocationPlanner) and scratch of its
convolutions (MlasConvPrepare), held against its allocations as they were tracked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from profiles.passes import Pass
from profiles.rewrites import BIAS_GELU, INLINED, node_attributes
from profiles.sized import SizedGraph

if TYPE_CHECKING:
    import onnx

__all__ = ["CONSTANT", "VIEWS", "find_pass"]

VIEWS = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Dropout"})
"""Operators whose output is another name for their first input."""

CONSTANT = frozenset({"Constant", "ConstantOfShape", "Shape", "Size", "Range"})
"""Operators that make shapes and constants."""

# These write into their input where nobody else reads it. Measured with onnxruntime 1.31 by tracking its
# allocations: all other elementwise operators, the ones with two operands too, take a new buffer.
_IN_PLACE = frozenset(
    ["Cast", "Celu", "Clip", "Elu", "HardSigmoid", "LeakyRelu", "LogSoftmax", "Relu", "Selu", "Sigmoid"]
) | frozenset(["Softmax", "Softplus", "Softsign", "Tanh", "ThresholdedRelu"])
_SCRATCH = 4 * 128 * 128  # bytes into which a thread of a convolution unfolds a piece


def find_pass(few: SizedGraph, many: SizedGraph, *, batch_sizes: tuple[int, int]) -> Pass:
    """Return the requests of a graph's forward pass.

    Args:
        few: The graph at a small batch size.
        many: The graph at a larger one.
        batch_sizes: These two.
    """
    least, most = batch_sizes
    requests: list[tuple[int, ...]] = []
    numbers: dict[str, int] = {}
    taken = 0

    def take(value: str) -> tuple[int, int]:
        sizes = few.bytes(value), many.bytes(value)
        per_sample = -(-(sizes[1] - sizes[0]) // (most - least))
        return per_sample, max(0, sizes[1] - per_sample * most)

    plan = _Plan(many)
    for place, node in enumerate(plan.order):
        for value in plan.taken_at(place):
            numbers[value] = taken
            requests.append(take(value))
            taken += 1
        beside = [take(one) if isinstance(one, str) else one for one in _beside(many, node)]
        requests += beside
        requests += [(taken + number,) for number in range(len(beside))]
        taken += len(beside)
        requests += [(numbers[value],) for value in plan.given_back_at(place)]
    return Pass(tuple(requests))


class _Plan:
    """Where the values of a graph lie: in the buffer of the first value that lay there.

    Attributes:
        order: The nodes as they run.
    """

    def __init__(self, graph: SizedGraph) -> None:
        self._graph = graph
        self._folded = _folded(graph)
        self._read_through = {node.output[0] for node in graph.nodes if _fused(graph, node)}
        self.order = self._in_order()
        self._left: dict[str, int] = {}  # readers still to come; of a buffer, those of all that lies in it
        for node in self.order:
            for name in filter(None, node.input):
                self._left[name] = self._left.get(name, 0) + 1
        self._lies_in: dict[str, str] = {}
        self._first: dict[str, int] = {}
        self._last: dict[str, int] = {}
        self._dead: list[str] = []  # buffers that nobody reads any more, the latest first
        for place, node in enumerate(self.order):
            self._place(place, node)

    def taken_at(self, place: int) -> list[str]:
        """Return the buffers that a node takes."""
        return [buffer for buffer, first in self._first.items() if first == place]

    def given_back_at(self, place: int) -> list[str]:
        """Return the buffers that are given back after a node."""
        return [buffer for buffer, last in self._last.items() if last == place]

    def _place(self, place: int, node: onnx.NodeProto) -> None:
        graph = self._graph
        for name in filter(None, node.output):
            if name in self._read_through:
                continue
            buffer = None if name in graph.outputs else self._shared(node, name)
            if buffer is None:
                buffer = name
                self._first[name] = place
            else:
                self._left[buffer] += self._left.get(name, 0)
            self._lies_in[name] = buffer
            self._last[buffer] = place
        for name in (*node.input, *node.output):
            buffer = self._lies_in.get(name)
            if buffer is None:
                continue
            if name in node.input:
                self._left[buffer] -= 1
            if not self._left.get(buffer) and buffer not in (*graph.outputs, *self._dead):
                self._dead.insert(0, buffer)
            self._last[buffer] = len(self.order) if buffer in graph.outputs else place

    def _shared(self, node: onnx.NodeProto, name: str) -> str | None:
        """Return the buffer in which a value may lie, or None if it needs one of its own."""
        given = node.input[0] if node.input else ""
        below = self._lies_in.get(given)
        if node.op_type in VIEWS:
            if given not in self._graph.outputs:
                return below
        elif (
            node.op_type in _IN_PLACE
            and below is not None
            and below not in self._graph.outputs
            and self._left[below] == 1
            and self._same(name, given)
        ):
            return below
        for buffer in self._dead:
            if self._same(name, buffer):
                self._dead.remove(buffer)
                return buffer
        return None

    def _same(self, name: str, other: str) -> bool:
        """Tell whether onnxruntime knows before the first pass that two values have one size."""
        symbols = self._graph.symbols(name)
        same = symbols is not None and symbols == self._graph.symbols(other)
        return same and self._graph.width(name) == self._graph.width(other)

    def _in_order(self) -> list[onnx.NodeProto]:
        """Return the nodes in the order in which onnxruntime runs them.

        From what nobody reads back to the inputs, depth first, the node of the highest number first; nodes
        that it makes itself, out of functions and of fused ones, have higher numbers than the graph's own.
        """
        nodes = [
            node
            for node in self._graph.nodes
            if not all(name in self._folded for name in node.output if name)
        ]
        ranks = [(self._made(node), place) for place, node in enumerate(nodes)]
        maker = {name: place for place, node in enumerate(nodes) for name in node.output if name}
        before = [
            sorted({maker[n] for n in node.input if n in maker}, key=ranks.__getitem__) for node in nodes
        ]
        read = {place for places in before for place in places}
        stack = [(place, False) for place in sorted(set(range(len(nodes))) - read, key=ranks.__getitem__)]
        seen: set[int] = set()
        order = []
        while stack:
            place, left = stack.pop()
            if left:
                order.append(nodes[place])
            elif place not in seen:
                seen.add(place)
                stack.append((place, True))
                stack += [(earlier, False) for earlier in before[place] if earlier not in seen]
        return order

    def _made(self, node: onnx.NodeProto) -> int:
        """Return 1 for a node that comes out of a function, 2 for one of fused nodes, else 0."""
        if node.name.startswith(f"{INLINED}/"):
            return 1
        return 2 * (node.op_type == "MatMul" and any(name in self._read_through for name in node.input))


def _folded(graph: SizedGraph) -> set[str]:
    """Return the values that are known before the first pass."""
    found = set(graph.constants)
    for node in graph.nodes:
        if all(name in found for name in node.input if name):
            found.update(node.output)
    return found


def _fused(graph: SizedGraph, node: onnx.NodeProto) -> bool:
    """Tell whether onnxruntime reads through a transposition of the last two axes (FusedMatMul)."""
    if node.op_type != "Transpose":
        return False
    rank = len(graph.shape(node.input[0]))
    order = list(node_attributes(node).get("perm", range(rank)[::-1]))
    swapped = [*range(rank - 2), rank - 1, rank - 2]
    users = [other for other in graph.nodes if node.output[0] in other.input]
    return rank >= 2 and order == swapped and bool(users) and all(u.op_type == "MatMul" for u in users)


def _beside(graph: SizedGraph, node: onnx.NodeProto) -> Sequence[str | tuple[int, ...]]:
    """Return what a node takes beside its outputs: as much as a value, or the numbers of a scratch."""
    if node.name.startswith(BIAS_GELU):  # the sum
        return [str(node.output[0])]
    if node.op_type == "Where":  # what is taken of each
        return [str(node.output[0])] * 2
    if node.op_type in ("Softmax", "LogSoftmax"):  # over another axis than the last: transposed, and back
        rank = len(graph.shape(node.input[0]))
        last = int(node_attributes(node).get("axis", -1)) % rank == rank - 1
        return [] if last else [str(node.output[0])] * 2
    if node.op_type == "Conv" and not node.domain:
        return _unfolded(graph, node)
    if node.op_type == "ConvTranspose":
        outputs = math.prod(graph.shape(node.input[1])[1:])
        return [(4 * outputs * math.prod(graph.shape(node.input[0])[2:]), 0, 0)]
    return []


def _unfolded(graph: SizedGraph, node: onnx.NodeProto) -> list[tuple[int, ...]]:
    filters, *products = graph.shape(node.input[1])
    area = math.prod(graph.shape(node.output[0])[2:])
    attributes = node_attributes(node)
    groups = attributes.get("group", 1)
    moved = any(step != 1 for step in attributes.get("strides", ())) or any(attributes.get("pads", ()))
    if not moved and math.prod(products[1:]) == 1:
        return []  # a product of matrices as it is
    if filters // groups > area:
        return [(4 * area * math.prod(products), 0, 0)]
    return [(0, _SCRATCH, groups)]
