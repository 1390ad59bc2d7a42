"""Derivatives by torch on the board, for the three methods that need them: slopes and last layers' gradients.

Reads the bundle's own ONNX graph and runs it by torch functions, so that no second program travels. The
weights are the replica's own memory, read at every call. Nothing else on a board imports this module or
torch; what it costs is in :mod:`profiles.budget`.

Source: Baydin et al., "Gradients without Backpropagation", arXiv 2202.08587 (a forward gradient is
(grad L . z) z, its factor one Jacobian-vector product).
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch.nn import functional

from edge_agent.bundle import Bundle
from profiles.errors import EstimateError, ModelError

__all__ = ["OPERATORS", "TorchForward"]

_Values = dict[str, Any]
_Step = tuple[Any, Callable[..., Any], list[str]]


class TorchForward:
    """Runs batches through a bundle's graph with the weights of one flat vector, as ``Forward`` does.

    Args:
        bundle: Whose graph it is.
        weights: Flat float32 vector; read at every call, never written and never copied.
        last: The spans of the weights whose gradient :meth:`head_gradient` tells; none for nothing.
        threads: Threads of torch, which are the process's.

    Raises:
        ModelError: The graph has an operator that is not in :data:`OPERATORS`.
    """

    def __init__(
        self,
        bundle: Bundle,
        weights: NDArray[np.float32],
        *,
        last: Sequence[tuple[int, int]] = (),
        threads: int = 1,
    ) -> None:
        torch.set_num_threads(threads)
        self._steps, self._constants = _program(bundle.graph_path)
        self._flat = torch.from_numpy(weights)
        self._tensors = bundle.tensors
        self._last = set(last)
        self._gradient: NDArray[np.float32] | None = None

    def loss(self, x: NDArray[np.float32], y: NDArray[np.int64], *, head: int = 0) -> float:
        """Return the mean loss of a batch; with ``head`` the last layers' gradient is kept."""
        if not head:
            with torch.inference_mode():
                return float(self._run(self._named(self._flat), x, y))
        named = self._named(self._flat)
        wanted = [t.name for t in self._tensors if (t.offset, t.offset + t.size) in self._last]
        with torch.enable_grad():
            for name in wanted:
                named[name] = named[name].detach().requires_grad_()
            loss = self._run(named, x, y)
            gradients = torch.autograd.grad(loss, [named[name] for name in wanted])
        self._gradient = torch.cat([gradient.reshape(-1) for gradient in gradients]).numpy()
        return float(loss.detach())

    def head_gradient(self) -> NDArray[np.float32]:
        """Return the gradient of the last layers at the latest loss that was asked for with ``head``."""
        if self._gradient is None:
            raise ValueError("no loss was evaluated with head=True")
        return self._gradient

    def slope(
        self, x: NDArray[np.float32], y: NDArray[np.int64], direction: NDArray[np.float32]
    ) -> tuple[float, float]:
        """Return the mean loss of a batch and its derivative along a direction, by one forward-mode pass.

        Args:
            x: Inputs.
            y: Labels.
            direction: Float32 of the weights' shape; only read.
        """
        with torch.no_grad():
            found = torch.func.jvp(
                lambda flat: self._run(self._named(flat), x, y), (self._flat,), (torch.from_numpy(direction),)
            )
        return float(found[0]), float(found[1])

    def _named(self, flat: torch.Tensor) -> _Values:
        return {t.name: flat[t.offset : t.offset + t.size].reshape(t.shape) for t in self._tensors}

    def _run(self, named: _Values, x: NDArray[np.float32], y: NDArray[np.int64]) -> torch.Tensor:
        found: _Values = {**self._constants, **named, "x": torch.from_numpy(x), "y": torch.from_numpy(y)}
        try:
            for node, run, last in self._steps:
                found[node.output[0]] = run(
                    {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute},
                    *(found[name] if name else None for name in node.input),
                )
                for name in last:
                    del found[name]
        except RuntimeError as error:
            if "allocate memory" in str(error):
                raise MemoryError(f"a forward pass of {len(y)} samples: {error}") from error
            raise EstimateError(f"a forward pass of {len(y)} samples failed in torch: {error}") from error
        return found["loss"]


def _program(path: Path) -> tuple[list[_Step], _Values]:
    """Return the steps to the loss, and the constants.

    A step is a node, its function, and the values that nobody needs after it.
    """
    graph = onnx.load(str(path)).graph
    needed = {"loss"}
    nodes: list[tuple[Any, list[str]]] = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            nodes.append((node, [name for name in {*node.input} - needed if name]))
            needed.update(node.input)
    unknown = sorted({node.op_type for node, _ in nodes} - set(OPERATORS))
    if unknown:
        raise ModelError(
            f"the graph has {', '.join(unknown)}, which no derivative is known for here",
            hint="Choose a method without torch, such as headstep.",
        )
    constants = {t.name: _tensor(t) for t in graph.initializer if t.name in needed}
    return [(node, OPERATORS[node.op_type], last) for node, last in reversed(nodes)], constants


def _tensor(constant: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(numpy_helper.to_array(constant)))


def _shape(values: torch.Tensor) -> list[int]:
    return [int(value) for value in values]


def _axes(attributes: _Values, given: torch.Tensor | None) -> list[int] | None:
    if given is not None:
        return _shape(given)
    axes = attributes.get("axes")
    return None if axes is None else list(axes)


def _reshape(_: _Values, x: torch.Tensor, shape: torch.Tensor) -> torch.Tensor:
    wanted = [x.shape[place] if size == 0 else size for place, size in enumerate(_shape(shape))]
    return x.reshape(wanted)


def _unsqueeze(a: _Values, x: torch.Tensor, axes: torch.Tensor | None = None) -> torch.Tensor:
    for axis in sorted(_axes(a, axes) or []):
        x = x.unsqueeze(axis)
    return x


def _flatten(a: _Values, x: torch.Tensor) -> torch.Tensor:
    axis = a.get("axis", 1)
    return x.reshape(-1, int(np.prod(x.shape[axis:]))) if axis else x.reshape(1, -1)


def _gemm(a: _Values, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    x = x.T if a.get("transA") else x
    product = a.get("alpha", 1.0) * (x @ (w.T if a.get("transB") else w))
    return product if bias is None else product + a.get("beta", 1.0) * bias


def _padded(a: _Values, x: torch.Tensor, filler: float = 0.0) -> torch.Tensor:
    pads = a.get("pads") or [0] * (2 * (x.dim() - 2))
    if a.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        raise ModelError("the graph pads by its shape; only given paddings are known here")
    half = len(pads) // 2
    both = [size for place in reversed(range(half)) for size in (pads[place], pads[half + place])]
    return functional.pad(x, both, value=filler) if any(both) else x


def _convolve(a: _Values, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    plain = [1] * (x.dim() - 2)
    convolve = (functional.conv1d, functional.conv2d)[x.dim() - 3]
    return convolve(
        _padded(a, x),
        w,
        bias,
        stride=a.get("strides", plain),
        dilation=a.get("dilations", plain),
        groups=a.get("group", 1),
    )


def _normalise(a: _Values, x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return functional.instance_norm(x, weight=scale, bias=bias, eps=a.get("epsilon", 1e-5))


def _layer_norm(
    a: _Values, x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    return functional.layer_norm(x, x.shape[a.get("axis", -1) :], scale, bias, a.get("epsilon", 1e-5))


def _reduce(reduce: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def run(a: _Values, x: torch.Tensor, axes: torch.Tensor | None = None) -> torch.Tensor:
        along = _axes(a, axes) or list(range(x.dim()))
        return reduce(x, along, keepdim=bool(a.get("keepdims", 1)))

    return run


def _largest(a: _Values, x: torch.Tensor) -> torch.Tensor:
    size = a["kernel_shape"]
    return functional.max_pool2d(_padded(a, x, -torch.inf), size, a.get("strides", [1] * len(size)))


def _average(a: _Values, x: torch.Tensor) -> torch.Tensor:
    if any(a.get("pads", ())) and not a.get("count_include_pad"):
        raise ModelError("the graph averages over the edge; only padding that counts is known here")
    return functional.avg_pool2d(_padded(a, x), a["kernel_shape"], a.get("strides"))


def _entropy(_: _Values, logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits, y)


OPERATORS: dict[str, Callable[..., Any]] = {
    "Add": lambda _, x, y: x + y,
    "AveragePool": _average,
    "Cast": lambda a, x: x.to({1: torch.float32, 6: torch.int32, 7: torch.int64, 9: torch.bool}[a["to"]]),
    "Clip": lambda _, x, low=None, high=None: x.clamp(low, high),
    "Concat": lambda a, *parts: torch.cat(parts, a["axis"]),
    "Constant": lambda a: _tensor(a["value"]),
    "Conv": _convolve,
    "Div": lambda _, x, y: x / y if x.is_floating_point() else x // y,
    "Erf": lambda _, x: torch.erf(x),
    "Flatten": _flatten,
    "Gather": lambda a, x, index: x.index_select(a.get("axis", 0), index.reshape(-1)).reshape(
        *x.shape[: a.get("axis", 0)], *index.shape, *x.shape[a.get("axis", 0) + 1 :]
    ),
    "Gelu": lambda a, x: functional.gelu(x, approximate=a.get("approximate", b"none").decode()),
    "Gemm": _gemm,
    "GlobalAveragePool": lambda _, x: x.mean(list(range(2, x.dim())), keepdim=True),
    "HardSigmoid": lambda a, x: (a.get("alpha", 0.2) * x + a.get("beta", 0.5)).clamp(0, 1),
    "HardSwish": lambda _, x: functional.hardswish(x),
    "Identity": lambda _, x: x,
    "InstanceNormalization": _normalise,
    "LayerNormalization": _layer_norm,
    "MatMul": lambda _, x, y: x @ y,
    "MaxPool": _largest,
    "Mul": lambda _, x, y: x * y,
    "Pow": lambda _, x, y: x**y,
    "ReduceMean": _reduce(torch.mean),
    "ReduceSum": _reduce(torch.sum),
    "Relu": lambda _, x: x.relu(),
    "Reshape": _reshape,
    "Shape": lambda _, x: torch.tensor(x.shape),
    "Sigmoid": lambda _, x: x.sigmoid(),
    "Softmax": lambda a, x: x.softmax(a.get("axis", -1)),
    "SoftmaxCrossEntropyLoss": _entropy,
    "Sqrt": lambda _, x: x.sqrt(),
    "Sub": lambda _, x, y: x - y,
    "Tanh": lambda _, x: x.tanh(),
    "Transpose": lambda a, x: x.permute(a["perm"]),
    "Unsqueeze": _unsqueeze,
}
"""The ONNX operators that are known here, each as a function of its attributes and inputs."""
