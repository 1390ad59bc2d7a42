"""What a net costs before it runs: parameters, FLOPs, and the bytes that a forward pass holds at its peak.

Reads the ONNX graph of a bundle (weights are graph inputs), and nothing else: no data, no board, no run.
The package onnx is imported inside :func:`graph_cost` only.

Conventions. A multiply-add is 2 FLOPs; convolutions and matrix products count, biases and everything
elementwise do not: the numbers are those of torch's FlopCounterMode. What it leaves out is told apart as
``elementwise_flops``, one for every element that such an operator reads or writes, whichever are more.

Activations are found by liveness: nodes run in graph order, a value lives from the node that makes it to
its last reader, and shares memory with its input where onnxruntime lets it (views, and activation
functions whose input nobody else reads). Inputs (x, y, weights) belong to the caller and are not counted.
What lives at once is less than what becomes resident, since the arena (``arena``) has holes: both are told.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from profiles.arena import Arena
from profiles.errors import ModelError

if TYPE_CHECKING:
    import onnx

__all__ = ["Cost", "graph_cost", "samples_at_once"]

_BATCHES = (1, 32)
_LEAST_AT_ONCE = 8
_BYTES_AT_ONCE = 2**20
# The gradients of the last layers, which are made in a forward pass where a method asks for them: about once
# more these layers' multiply-adds, and not counted.
_BESIDE = ("hidden_gradient", "head_gradient")

# Outputs of these are other names for their first input.
_VIEWS = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Dropout"})
# These write into their input where nobody else reads it. Measured with onnxruntime 1.31 by tracking its
# allocations: all other elementwise operators, the ones with two operands too, take a new buffer.
_IN_PLACE = frozenset(
    ["Celu", "Clip", "Elu", "HardSigmoid", "LeakyRelu", "LogSoftmax", "Relu", "Selu", "Sigmoid"]
) | frozenset(["Softmax", "Softplus", "Softsign", "Tanh", "ThresholdedRelu"])
# These run as two operators, with a buffer between them that is as large as the output.
_TWO_STEPS = frozenset(["HardSwish", "Mish"])
# Shapes and constants: folded away before the first run, or a few bytes.
_FREE = frozenset({"Constant", "ConstantOfShape", "Shape", "Size", "Range"})


@dataclass(frozen=True)
class Cost:
    """The cost of one forward pass, linear in the batch size.

    Attributes:
        params: Elements of all trainable tensors.
        forward_flops: Per sample, 2 for a multiply-add, as torch's flop counter has it.
        elementwise_flops: Per sample, what the flop counter leaves out.
        activation_bytes_per_sample: Resident bytes that each sample adds, the holes of the arena included.
        activation_bytes_fixed: Resident bytes beside that.
        live_bytes_per_sample: What each sample adds to the bytes that live at once: the least that an
            allocator without holes could do.
        weight_bytes: Bytes of all trainable tensors, without the gaps of the bundle's layout.
        input_bytes_per_sample: Bytes of a sample and its label, as a batch holds them.
    """

    params: int
    forward_flops: int
    elementwise_flops: int
    activation_bytes_per_sample: int
    activation_bytes_fixed: int
    live_bytes_per_sample: int
    weight_bytes: int
    input_bytes_per_sample: int = 0

    def activation_bytes(self, batch_size: int) -> int:
        """Return the resident bytes of a forward pass of ``batch_size`` samples, inputs not counted."""
        return self.activation_bytes_fixed + batch_size * self.activation_bytes_per_sample

    @property
    def at_once(self) -> int:
        """The samples that a forward pass takes at once, see :func:`samples_at_once`."""
        return samples_at_once(self.activation_bytes_per_sample)

    def as_dict(self) -> dict[str, int]:
        """Return the fields by name, as a bundle's manifest keeps them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, int], *, params: int) -> Cost:
        """Read back what a manifest keeps; ``params`` stands beside it there.

        Raises:
            ModelError: A field is missing.
        """
        kept_later = {"elementwise_flops": 0, "live_bytes_per_sample": 0, "input_bytes_per_sample": 0}
        found = {**kept_later, **fields, "params": params}
        missing = cls.__dataclass_fields__.keys() - found.keys()
        if missing:
            raise ModelError(f"The manifest's cost lacks {', '.join(sorted(missing))}.")
        return cls(**{name: int(found[name]) for name in cls.__dataclass_fields__})


def samples_at_once(activation_bytes_per_sample: int) -> int:
    """Return how many samples a forward pass takes at once; a larger batch runs in pieces.

    Eight, and more as long as what they hold is within a MiB: so a pass does not grow with the batch.
    Smaller pieces would cost time, since every pass has a start (60 us on x86-64) and reads all weights.

    Args:
        activation_bytes_per_sample: Of the plain graph.
    """
    return max(_LEAST_AT_ONCE, _BYTES_AT_ONCE // max(1, activation_bytes_per_sample))


def graph_cost(graph: bytes | Path | onnx.ModelProto, *, data: Sequence[str] = ("x", "y")) -> Cost:
    """Return the cost of a bundle's graph.

    Args:
        graph: The ONNX model, its bytes or its path. Its inputs are ``data``, whose first axis is the
            batch, and the trainable tensors, whose shapes are fixed.
        data: Names of the inputs that are not trainable.

    Raises:
        ModelError: The graph is no sound ONNX, has control flow, or a shape does not follow from its inputs.
    """
    import onnx

    try:
        if isinstance(graph, Path):
            model = onnx.load(graph, load_external_data=False)
        else:
            model = onnx.load_from_string(graph) if isinstance(graph, bytes) else graph
        one, many = (_Pass(_with_batch(model, data, batch), data) for batch in _BATCHES)
    except (OSError, ValueError, onnx.shape_inference.InferenceError, onnx.checker.ValidationError) as error:
        raise ModelError(f"The graph's cost cannot be told: {error}") from error
    except Exception as error:  # protobuf's DecodeError, which has no public home
        if type(error).__name__ != "DecodeError":
            raise
        raise ModelError("The graph is not an ONNX model.") from error
    least, most = _BATCHES
    step = most - least
    # The chord between the two sizes. The live peak is the greatest of several lines, so that the chord is
    # never below it in between; regions grow by powers of two, so that the arena is above it at most by a
    # fifth at a size between two powers.
    resident = one.resident_bytes(), many.resident_bytes()
    per_sample = -(-(resident[1] - resident[0]) // step)
    return Cost(
        params=one.params,
        forward_flops=(many.flops - one.flops) // step,
        elementwise_flops=(many.elementwise - one.elementwise) // step,
        activation_bytes_per_sample=per_sample,
        activation_bytes_fixed=max(0, resident[0] - per_sample * least),
        live_bytes_per_sample=-(-(many.live_bytes() - one.live_bytes()) // step),
        weight_bytes=one.weight_bytes,
        input_bytes_per_sample=one.input_bytes,
    )


def _with_batch(model: onnx.ModelProto, data: Sequence[str], batch: int) -> onnx.ModelProto:
    """Return a copy whose shapes are all numbers, for one batch size."""
    import onnx

    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    for output in _BESIDE:
        _drop_output(fixed.graph, output)
    del fixed.graph.value_info[:]
    for entry in fixed.graph.output:
        entry.type.tensor_type.ClearField("shape")
    for entry in fixed.graph.input:
        if entry.name in data and entry.type.tensor_type.shape.dim:
            entry.type.tensor_type.shape.dim[0].dim_value = batch
    return onnx.shape_inference.infer_shapes(fixed, check_type=True, strict_mode=True, data_prop=True)


def _drop_output(graph: onnx.GraphProto, name: str) -> None:
    """Remove an output and the nodes that nothing else needs."""
    kept = [entry for entry in graph.output if entry.name != name]
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


class _Pass:
    """One forward pass at one batch size: the shape and type of every value, what it costs, what lives."""

    def __init__(self, model: onnx.ModelProto, data: Sequence[str]) -> None:
        import onnx

        graph = model.graph
        self.nodes = list(graph.node)
        self.kept = {entry.name for entry in graph.output}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.widths: dict[str, int] = {}
        for entry in (*graph.input, *graph.value_info, *graph.output):
            tensor = entry.type.tensor_type
            if all(dim.HasField("dim_value") for dim in tensor.shape.dim):
                self.shapes[entry.name] = tuple(dim.dim_value for dim in tensor.shape.dim)
            self.widths[entry.name] = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).itemsize
        initial = {entry.name for entry in graph.initializer}
        for entry in graph.initializer:
            self.shapes[entry.name] = tuple(entry.dims)
            self.widths[entry.name] = onnx.helper.tensor_dtype_to_np_dtype(entry.data_type).itemsize
        weights = [entry.name for entry in graph.input if entry.name not in (*data, *initial)]
        self.inputs = {*weights, *data, *initial}
        self._check()
        self.params = sum(self.size(name) for name in weights)
        self.weight_bytes = sum(self.bytes(name) for name in weights)
        self.input_bytes = sum(self.bytes(name) for name in data if name in self.shapes)
        self.flops = sum(self._multiply_adds(node) * 2 for node in self.nodes)
        self.elementwise = sum(self._elementwise(node) for node in self.nodes)

    def _check(self) -> None:
        for node in self.nodes:
            if any(a.HasField("g") or a.graphs for a in node.attribute):
                raise ValueError(f"node `{node.name}` ({node.op_type}) is control flow")
            for name in (*node.input, *node.output):
                if name and name not in self.shapes:
                    made = node.output[0] == name
                    raise ValueError(
                        f"the shape of `{name}`, {'made' if made else 'read'} by node `{node.name}` "
                        f"({node.op_type}), does not follow from the inputs' shapes"
                    )

    def size(self, name: str) -> int:
        return math.prod(self.shapes[name])

    def bytes(self, name: str) -> int:
        return self.size(name) * self.widths[name]

    def _multiply_adds(self, node: onnx.NodeProto) -> int:
        kind = node.op_type
        if kind == "MatMul":
            return self.size(node.output[0]) * self.shapes[node.input[0]][-1]
        if kind == "Gemm":
            return self.size(node.output[0]) * self.shapes[node.input[0]][not _attributes(node).get("transA")]
        if kind == "Conv":  # weight: (out, in / group, *kernel)
            return self.size(node.output[0]) * math.prod(self.shapes[node.input[1]][1:])
        if kind == "ConvTranspose":  # weight: (in, out / group, *kernel)
            return self.size(node.input[0]) * math.prod(self.shapes[node.input[1]][1:])
        if kind == "Einsum":
            return self._einsum(_attributes(node)["equation"].decode(), node)
        if kind in ("LSTM", "GRU", "RNN"):  # input (t, n, i), weight (directions, gates x hidden, i)
            steps, samples, inside = self.shapes[node.input[0]]
            directions, gates, hidden = self.shapes[node.input[2]]
            return steps * samples * directions * gates * (inside + hidden)
        return 0

    def _einsum(self, equation: str, node: onnx.NodeProto) -> int:
        """Count a product of two operands: one multiply-add for every value of all its indices."""
        terms = equation.replace(" ", "").split("->")[0].split(",")
        if len(terms) != 2 or "." in equation:
            raise ValueError(f"node `{node.name}` (Einsum) has an equation that is not counted: {equation}")
        sizes: dict[str, int] = {}
        for term, name in zip(terms, node.input, strict=True):
            sizes.update(zip(term, self.shapes[name], strict=True))
        return math.prod(sizes.values())

    def _elementwise(self, node: onnx.NodeProto) -> int:
        free = node.op_type in _VIEWS | _FREE | {"Gather", "Transpose", "Concat", "Slice", "Split", "Expand"}
        if free or self._multiply_adds(node) or self.widths[node.output[0]] != 4:
            return 0
        return max(self.size(name) for name in (*node.input, node.output[0]) if name)

    def live_bytes(self) -> int:
        """Return the most bytes that live at once while the nodes run in order."""
        sizes: dict[int, int] = {}
        live = peak = 0
        for buffer, size in self._requests():
            live += size - sizes.get(buffer, 0)
            sizes[buffer] = size
            peak = max(peak, live)
        return peak

    def resident_bytes(self) -> int:
        """Return the bytes that onnxruntime's arena makes resident for the same."""
        arena, held = Arena(), {}
        for buffer, size in self._requests():
            if size:
                held[buffer] = arena.take(size)
            elif buffer in held:
                arena.give_back(held.pop(buffer))
        return arena.resident_bytes

    def _requests(self) -> Iterator[tuple[int, int]]:
        """Yield (buffer, bytes) where a buffer is taken, and (buffer, 0) where it is given back."""
        readers = self._readers()
        lies_in: dict[str, int] = {}  # value -> the buffer it lies in; inputs lie in none
        to_come: dict[int, int] = {}  # buffer -> readers still to come, of all values that lie in it
        fresh = itertools.count()
        for node in self.nodes:
            for name in filter(None, node.output):
                buffer = self._shared(node, name, readers, lies_in)
                if buffer is None and node.op_type not in _FREE and not self._fused(node):
                    buffer = next(fresh)
                    yield buffer, self.bytes(name)
                if buffer is not None:
                    lies_in[name] = buffer
                    to_come[buffer] = to_come.get(buffer, 0) + readers.get(name, 0) + (name in self.kept)
            if node.op_type in _TWO_STEPS:
                between = next(fresh)
                yield between, self.bytes(node.output[0])
                yield between, 0
            for name in filter(None, node.input):
                readers[name] -= 1
                if name in lies_in:
                    to_come[lies_in[name]] -= 1
            for buffer in {lies_in[name] for name in (*node.input, *node.output) if name in lies_in}:
                if not to_come[buffer]:
                    yield buffer, 0

    def _readers(self) -> dict[str, int]:
        readers: dict[str, int] = {}
        for node in self.nodes:
            for name in filter(None, node.input):
                readers[name] = readers.get(name, 0) + 1
        return readers

    def _shared(
        self, node: onnx.NodeProto, name: str, readers: Mapping[str, int], lies_in: Mapping[str, int]
    ) -> int | None:
        """Return the buffer of an input in which an output may lie."""
        if node.op_type in _VIEWS:
            return lies_in.get(node.input[0])
        if node.op_type == "Cast" and self.widths[name] == self.widths[node.input[0]]:
            return lies_in.get(node.input[0])
        if node.op_type in _IN_PLACE:
            given = node.input[0]
            if given in lies_in and readers[given] == 1 and given not in self.kept:
                return lies_in[given]
        return None

    def _fused(self, node: onnx.NodeProto) -> bool:
        """Tell whether onnxruntime reads through a transposition of the last two axes (FusedMatMul)."""
        if node.op_type != "Transpose":
            return False
        rank = len(self.shapes[node.input[0]])
        order = list(_attributes(node).get("perm", range(rank)[::-1]))
        swapped = [*range(rank - 2), rank - 1, rank - 2]
        users = [other for other in self.nodes if node.output[0] in other.input]
        return rank >= 2 and order == swapped and bool(users) and all(u.op_type == "MatMul" for u in users)


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    import onnx

    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
