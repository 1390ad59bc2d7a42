"""What a net costs before it runs: parameters, FLOPs, and the bytes that a forward pass holds at its peak.

Reads the ONNX graph of a bundle (weights are graph inputs), and nothing else: no data, no board, no run.
The package onnx is imported inside functions only.

Conventions. A multiply-add is 2 FLOPs; convolutions and matrix products count, biases and everything
elementwise do not: the numbers are those of torch's FlopCounterMode. What it leaves out is told apart as
``elementwise_flops``, one for every element that such an operator reads or writes, whichever are more.

Activations are found by the requests of a pass (``liveness``): what lives at once, and what becomes resident,
which is more, since the arena (``arena``) has holes. Inputs (x, y, weights) belong to the caller and are not
counted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from profiles.errors import ModelError
from profiles.liveness import CONSTANT, VIEWS, find_pass
from profiles.passes import Pass
from profiles.rewrites import node_attributes
from profiles.sized import SizedGraph, sized_graphs

if TYPE_CHECKING:
    import onnx

__all__ = ["Cost", "graph_cost", "graph_pass", "samples_at_once"]

_BATCHES = (1, 32)
_LEAST_AT_ONCE = 8
_BYTES_AT_ONCE = 2**20
# The gradients of the last layers, which are made in a forward pass where a method asks for them: about once
# more these layers' multiply-adds, and not counted.
_BESIDE = ("hidden_gradient", "head_gradient")


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
        constant_bytes: Bytes of the tensors that the graph holds itself, such as frozen layers.
    """

    params: int
    forward_flops: int
    elementwise_flops: int
    activation_bytes_per_sample: int
    activation_bytes_fixed: int
    live_bytes_per_sample: int
    weight_bytes: int
    input_bytes_per_sample: int = 0
    constant_bytes: int = 0

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
        kept_later = (
            "elementwise_flops",
            "live_bytes_per_sample",
            "input_bytes_per_sample",
            "constant_bytes",
        )
        found = {**dict.fromkeys(kept_later, 0), **fields, "params": params}
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
    one, many = _sized(graph, data, without=_BESIDE)
    found = graph_pass(graph, data=data)
    least, most = _BATCHES
    step = most - least
    # The chord between the two sizes, for what knows no passes. Regions grow by powers of two, so that the
    # arena is above it at most by a fifth at a size between two powers.
    resident = [found.resident_bytes(size) for size in _BATCHES]
    live = [found.live_bytes(size) for size in _BATCHES]
    per_sample = -(-(resident[1] - resident[0]) // step)
    return Cost(
        params=sum(one.size(name) for name in one.weights),
        forward_flops=(_flops(many) - _flops(one)) // step,
        elementwise_flops=(_elementwise(many) - _elementwise(one)) // step,
        activation_bytes_per_sample=per_sample,
        activation_bytes_fixed=max(0, resident[0] - per_sample * least),
        live_bytes_per_sample=-(-(live[1] - live[0]) // step),
        weight_bytes=sum(one.bytes(name) for name in one.weights),
        input_bytes_per_sample=sum(one.bytes(name) for name in one.data),
        constant_bytes=sum(one.bytes(name) for name in one.constants),
    )


def graph_pass(
    graph: bytes | Path | onnx.ModelProto, *, data: Sequence[str] = ("x", "y"), block: int = 0
) -> Pass:
    """Return what a bundle's graph, or a variant of it, asks of the allocator.

    Args:
        graph: As in :func:`graph_cost`.
        data: As in :func:`graph_cost`.
        block: Channels that the processor's pools take side by side: 16 with AVX-512, 8 on other x86-64
            processors with AVX, 0 elsewhere.

    Raises:
        ModelError: As in :func:`graph_cost`.
    """
    return find_pass(*_sized(graph, data, block=block), batch_sizes=_BATCHES)


def _sized(
    graph: bytes | Path | onnx.ModelProto, data: Sequence[str], *, without: Sequence[str] = (), block: int = 0
) -> tuple[SizedGraph, SizedGraph]:
    """Return the graph at the two batch sizes."""
    import onnx

    try:
        if isinstance(graph, Path):
            model = onnx.load(graph, load_external_data=False)
        else:
            model = onnx.load_from_string(graph) if isinstance(graph, bytes) else graph
        least, most = sized_graphs(model, batch_sizes=_BATCHES, data=data, without=without, block=block)
        return least, most
    except (OSError, ValueError, onnx.shape_inference.InferenceError, onnx.checker.ValidationError) as error:
        raise ModelError(f"The graph's cost cannot be told: {error}") from error
    except Exception as error:  # protobuf's DecodeError, which has no public home
        if type(error).__name__ != "DecodeError":
            raise
        raise ModelError("The graph is not an ONNX model.") from error


def _flops(graph: SizedGraph) -> int:
    return sum(_multiply_adds(graph, node) * 2 for node in graph.nodes)


def _multiply_adds(graph: SizedGraph, node: onnx.NodeProto) -> int:
    kind = node.op_type
    if kind == "MatMul":
        return graph.size(node.output[0]) * graph.shape(node.input[0])[-1]
    if kind == "Gemm":
        return (
            graph.size(node.output[0]) * graph.shape(node.input[0])[not node_attributes(node).get("transA")]
        )
    if kind == "Conv":  # weight: (out, in / group, *kernel)
        return graph.size(node.output[0]) * math.prod(graph.shape(node.input[1])[1:])
    if kind == "ConvTranspose":  # weight: (in, out / group, *kernel)
        return graph.size(node.input[0]) * math.prod(graph.shape(node.input[1])[1:])
    if kind == "Einsum":
        return _einsum(graph, node_attributes(node)["equation"].decode(), node)
    if kind in ("LSTM", "GRU", "RNN"):  # input (t, n, i), weight (directions, gates x hidden, i)
        steps, samples, inside = graph.shape(node.input[0])
        directions, gates, hidden = graph.shape(node.input[2])
        return steps * samples * directions * gates * (inside + hidden)
    return 0


def _einsum(graph: SizedGraph, equation: str, node: onnx.NodeProto) -> int:
    """Count a product of two operands: one multiply-add for every value of all its indices."""
    terms = equation.replace(" ", "").split("->")[0].split(",")
    if len(terms) != 2 or "." in equation:
        raise ValueError(f"node `{node.name}` (Einsum) has an equation that is not counted: {equation}")
    sizes: dict[str, int] = {}
    for term, name in zip(terms, node.input, strict=True):
        sizes.update(zip(term, graph.shape(name), strict=True))
    return math.prod(sizes.values())


def _elementwise(graph: SizedGraph) -> int:
    counted = 0
    for node in graph.nodes:
        moves = node.op_type in {"Gather", "Transpose", "Concat", "Slice", "Split", "Expand"}
        if moves or node.op_type in VIEWS | CONSTANT:
            continue
        if graph.width(node.output[0]) == 4 and not _multiply_adds(graph, node):
            counted += max(graph.size(name) for name in (*node.input, node.output[0]) if name)
    return counted
