"""Export: a torch net becomes an ONNX graph with its weights as inputs, and a bundle.

Knows the contract of the graph (inputs ``x``, ``y`` and every trainable tensor; outputs ``loss``,
``correct``, ``logits``) and checks it in ONNX Runtime against torch. Does not know pruning.
"""

import copy
import io
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from edge_agent.bundle import Bundle, flat_layout, write_bundle
from edge_agent.forward import open_session
from profiles.errors import ModelError
from pruning.weights import derive_seed

__all__ = ["TOLERANCE", "Exported", "export_bundle", "export_graph", "write_exported"]

TOLERANCE = 1e-5
"""Largest difference allowed between torch and ONNX Runtime, relative to the largest logit."""

_OPSET = 18
_INPUTS = ("x", "y")
_OUTPUTS = ("loss", "correct", "logits")


@dataclass(frozen=True)
class Exported:
    """A graph and the weights that belong to it.

    Attributes:
        graph: The ONNX file. Its bytes depend on the net's layers, shapes and constants only.
        weights: The net's trainable tensors by name, in the order of ``named_parameters``, float32.
        error: Largest difference found between torch and ONNX Runtime, relative to the largest logit.
    """

    graph: bytes
    weights: dict[str, NDArray[np.float32]]
    error: float


class _WithLoss(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.net(x)
        correct = (logits.argmax(1) == y).sum()
        return functional.cross_entropy(logits, y), correct, logits


def export_graph(
    module: nn.Module, *, sample_shape: tuple[int, ...], classes: int, verify: bool = True
) -> Exported:
    """Export a net with the mean cross-entropy and the count of correct answers inside the graph.

    Args:
        module: Takes (n, *sample_shape) float32, gives (n, classes). It is left as it is; parameters with
            ``requires_grad`` off become constants.
        sample_shape: Shape of one input.
        classes: Number of classes.
        verify: Run the graph in ONNX Runtime: outputs equal torch's within TOLERANCE at three batch
            sizes, and every tensor moves the loss.

    Raises:
        ModelError: The graph cannot follow a layer, loses a tensor, or disagrees with torch.
    """
    names = [name for name, p in module.named_parameters() if p.requires_grad]
    if clash := set(names) & {*_INPUTS, *_OUTPUTS}:
        raise ModelError(
            f"{', '.join(sorted(clash))}: a parameter may not have the name of an input or output"
        )
    twin = copy.deepcopy(module).eval()
    _jitter(twin)
    x, y = _example(sample_shape, classes, 2)
    graph = _weights_as_inputs(_trace(twin, x, y), names)
    weights = {
        name: p.detach().to(torch.float32).contiguous().numpy().copy()
        for name, p in module.named_parameters()
        if p.requires_grad
    }
    error = _verify(graph, module, twin, names, sample_shape, classes) if verify else 0.0
    return Exported(graph, weights, error)


def export_bundle(
    module: nn.Module,
    folder: Path,
    *,
    model: str,
    sample_shape: tuple[int, ...],
    classes: int,
    pruning: Mapping[str, Any],
    cost: Callable[[bytes], Mapping[str, int]],
) -> Bundle:
    """Export a net, check it, and write it as a bundle.

    Args:
        module: As in :func:`export_graph`.
        folder: Where the bundle goes; made if it is not there.
        model: The net's name in the manifest.
        sample_shape: Shape of one input.
        classes: Number of classes.
        pruning: What the manifest says of how the net was made smaller.
        cost: Reads an ONNX file and returns what its forward takes.

    Raises:
        ModelError: See :func:`export_graph`.
    """
    return write_exported(
        export_graph(module, sample_shape=sample_shape, classes=classes),
        folder,
        model=model,
        sample_shape=sample_shape,
        classes=classes,
        pruning=pruning,
        cost=cost,
    )


def write_exported(
    exported: Exported,
    folder: Path,
    *,
    model: str,
    sample_shape: tuple[int, ...],
    classes: int,
    pruning: Mapping[str, Any],
    cost: Callable[[bytes], Mapping[str, int]],
) -> Bundle:
    """Write a graph and its weights as a bundle; arguments as in :func:`export_bundle`."""
    tensors, size = flat_layout([(name, values.shape) for name, values in exported.weights.items()])
    flat = np.zeros(size, np.float32)
    for tensor in tensors:
        flat[tensor.offset : tensor.offset + tensor.size] = exported.weights[tensor.name].reshape(-1)
    return write_bundle(
        folder,
        graph=exported.graph,
        weights=flat,
        tensors=tensors,
        model=model,
        classes=classes,
        sample_shape=tuple(sample_shape),
        cost=cost(exported.graph),
        pruning=pruning,
    )


def _jitter(module: nn.Module) -> None:
    """Make all parameters differ: the exporter merges tensors of equal values, such as two norms' ones."""
    generator = torch.Generator().manual_seed(derive_seed("export"))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)


def _example(sample_shape: tuple[int, ...], classes: int, n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(derive_seed("example", n))
    x = torch.randn(n, *sample_shape, generator=generator)
    return x, torch.randint(0, classes, (n,), generator=generator)


def _trace(module: nn.Module, x: Tensor, y: Tensor) -> bytes:
    buffer = io.BytesIO()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's own deprecation and tracer notes
            # The legacy exporter keeps parameter names; constant folding would bake transposed weights in.
            torch.onnx.export(
                _WithLoss(module).eval(),
                (x, y),
                buffer,  # type: ignore[arg-type]  # the legacy exporter takes a file, its stub does not say so
                dynamo=False,
                do_constant_folding=False,
                input_names=list(_INPUTS),
                output_names=list(_OUTPUTS),
                dynamic_axes={"x": {0: "n"}, "y": {0: "n"}, "logits": {0: "n"}},
                opset_version=_OPSET,
            )
    except (torch.onnx.errors.OnnxExporterError, RuntimeError, TypeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{type(module).__name__} cannot be exported to ONNX: {reason}",
            hint="Replace the named operation by one that ONNX has.",
        ) from error
    return buffer.getvalue()


def _weights_as_inputs(graph: bytes, names: list[str]) -> bytes:
    """Turn the named initializers into graph inputs, in the given order, and drop what is not needed."""
    import onnx

    model = onnx.load_model_from_string(graph)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    missing = [name for name in names if f"net.{name}" not in constants]
    if missing:
        raise ModelError(
            f"the graph does not read {', '.join(missing)}",
            hint="Remove parameters that the forward does not use, or turn their requires_grad off.",
        )
    trainable = {f"net.{name}": name for name in names}
    kept = [tensor for tensor in model.graph.initializer if tensor.name not in trainable]
    for traced, name in trainable.items():
        model.graph.input.append(onnx.helper.make_tensor_value_info(name, 1, list(constants[traced].dims)))
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    for node in model.graph.node:
        node.doc_string = ""
        del node.metadata_props[:]  # source lines of this machine
        for place, name in enumerate(node.input):
            node.input[place] = trainable.get(name, name)
    model.doc_string = model.graph.doc_string = ""
    del model.metadata_props[:]
    model.producer_name, model.producer_version = "scalarfed", ""
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString(deterministic=True))


def _verify(
    graph: bytes,
    module: nn.Module,
    jittered: nn.Module,
    names: list[str],
    sample_shape: tuple[int, ...],
    classes: int,
) -> float:
    session = open_session(graph)
    found = [node.name for node in session.get_inputs()]
    if found != [*_INPUTS, *names]:
        raise ModelError(f"the graph's inputs are {', '.join(found)}, expected x, y and {', '.join(names)}")

    def run(net: nn.Module, x: Tensor, y: Tensor, **changed: NDArray[np.float32]) -> list[NDArray[Any]]:
        feeds = {name: p.detach().numpy() for name, p in net.named_parameters() if name in names}
        outputs = session.run(list(_OUTPUTS), {**feeds, **changed, "x": x.numpy(), "y": y.numpy()})
        return [np.asarray(value) for value in outputs]

    worst = 0.0
    training = module.training
    for net, n in ((module.eval(), 3), (jittered, 1), (jittered, 8)):
        x, y = _example(sample_shape, classes, n)
        with torch.no_grad():
            expected = [value.numpy() for value in _WithLoss(net)(x, y)]
        loss, correct, logits = run(net, x, y)
        scale = max(1.0, float(np.abs(expected[2]).max()))
        error = max(float(np.abs(logits - expected[2]).max()), abs(float(loss - expected[0]))) / scale
        if not error <= TOLERANCE or logits.shape != (n, classes) or correct.dtype != np.int64:
            raise ModelError(
                f"ONNX Runtime and torch differ by {error:.1e} on a batch of {n} (allowed: {TOLERANCE:.0e})",
                hint="The net may depend on the batch size or on state outside its parameters.",
            )
        if int(correct) != int((logits.argmax(1) == y.numpy()).sum()):
            raise ModelError(
                f"the graph counts {int(correct)} correct answers of {n}, its logits say otherwise"
            )
        worst = max(worst, error)
    module.train(training)
    x, y = _example(sample_shape, classes, 8)
    base = run(jittered, x, y)[0]
    dead = []
    for name, parameter in jittered.named_parameters():
        if name in names:
            shift = np.random.default_rng(0).standard_normal(parameter.shape).astype(np.float32)
            moved = run(jittered, x, y, **{name: parameter.detach().numpy() + shift})[0]
            if moved == base:
                dead.append(name)
    if dead:
        raise ModelError(
            f"the loss does not depend on {', '.join(dead)}",
            hint="Remove these parameters, or turn their requires_grad off.",
        )
    return worst
