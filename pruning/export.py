"""Export: a torch net becomes an ONNX graph with its weights as inputs, and a bundle.

Knows the contract of the graph (inputs ``x``, ``y`` and every trainable tensor; outputs ``loss``,
``correct``, ``logits``) and checks it in ONNX Runtime against torch. Does not know pruning.
"""

import copy
import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from edge_agent.bundle import Bundle, flat_layout, write_bundle
from edge_agent.session import open_session
from profiles.cost import graph_pass
from profiles.errors import ModelError
from pruning.exact import LinearLayer, WithLoss, find_last_layers
from pruning.fold import fold_shapes
from pruning.fuse import BLOCKS, block, fuse, has_pools
from pruning.weights import derive_seed

__all__ = [
    "TOLERANCE",
    "Exported",
    "export_bundle",
    "export_graph",
    "graph_passes",
    "graph_variants",
    "write_exported",
]

TOLERANCE = 1e-5
"""Largest difference allowed between torch and ONNX Runtime, relative to the largest logit."""

_OPSET = 18
_INPUTS = ("x", "y")
_OUTPUTS = ("loss", "correct", "logits")
_ATTEMPTS = 6
_GRADIENTS = ("head_gradient", "hidden_gradient")


@dataclass(frozen=True)
class Exported:
    """A graph and the weights that belong to it.

    Attributes:
        graph: The ONNX file. Its bytes depend on the net's layers, shapes and constants only.
        weights: The net's trainable tensors by name, in the order of ``named_parameters``, float32.
        head: Names of the last linear layer's tensors, whose gradient is the output ``head_gradient``; empty
            where the logits come from elsewhere.
        hidden: The same of the linear layer before it and ``hidden_gradient``; empty where there is none.
        error: Largest difference found between torch and ONNX Runtime, relative to the largest logit.
    """

    graph: bytes
    weights: dict[str, NDArray[np.float32]]
    head: tuple[str, ...]
    hidden: tuple[str, ...]
    error: float


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
    if clash := set(names) & {*_INPUTS, *_OUTPUTS, *_GRADIENTS}:
        raise ModelError(
            f"{', '.join(sorted(clash))}: a parameter may not have the name of an input or output"
        )
    twin = copy.deepcopy(module).eval()
    _jitter(twin)
    x, y = _example(sample_shape, classes, 2)
    last = find_last_layers(twin, x)
    traced = _trace(copy.deepcopy(twin), x, y, classes, last)
    graph = fold_shapes(_weights_as_inputs(traced, names), sample_shape=sample_shape)
    weights = {
        name: p.detach().to(torch.float32).contiguous().numpy().copy()
        for name, p in module.named_parameters()
        if p.requires_grad
    }
    error = 0.0
    if verify:
        error = _verify(graph, module, twin, names, sample_shape, classes)
        for layer, output in zip(last, _GRADIENTS, strict=False):
            error = max(error, _verify_gradient(graph, twin, output, layer.tensors, sample_shape, classes))
    head, hidden = ([*(layer.tensors for layer in last), (), ()])[:2]
    return Exported(graph, weights, head, hidden, error)


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
    variants = graph_variants(exported.graph)
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
        head=exported.head,
        hidden=exported.hidden,
        variants=variants,
        passes=graph_passes(exported.graph, variants),
    )


def graph_variants(graph: bytes) -> dict[str, bytes]:
    """Return the graph's variants by the names under which :mod:`edge_agent.forward` looks for them."""
    fused = fuse(graph)
    if fused is None:
        return {}
    blocked = {f"blocked{size}": block(fused, size) for size in BLOCKS}
    return {"fused": fused} | {name: variant for name, variant in blocked.items() if variant is not None}


def graph_passes(graph: bytes, variants: Mapping[str, bytes]) -> dict[str, list[list[int]]]:
    """Return what the forwards of a graph and its variants ask of the allocator, as a manifest keeps it.

    Args:
        graph: The plain graph.
        variants: Of :func:`graph_variants`.
    """
    found: dict[str, list[list[int]]] = {}
    for name, data in ("", graph), *variants.items():
        blocks = [size for size in BLOCKS if name in ("", "fused", f"blocked{size}")]
        if name in ("", "fused") or not has_pools(data):
            found[name] = graph_pass(data).as_list()
        for size in blocks if has_pools(data) else ():
            requests = graph_pass(data, block=size).as_list()
            if requests != found.get(name):
                found[f"{name}@{size}"] = requests
    return found


def _jitter(module: nn.Module) -> None:
    """Make trained parameters differ: the exporter merges equal tensors, such as two norms' ones."""
    generator = torch.Generator().manual_seed(derive_seed("export"))
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.requires_grad:
                parameter.add_(noise, alpha=0.05)


def _example(sample_shape: tuple[int, ...], classes: int, n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(derive_seed("example", n))
    x = torch.randn(n, *sample_shape, generator=generator)
    return x, torch.randint(0, classes, (n,), generator=generator)


def _trace(module: nn.Module, x: Tensor, y: Tensor, classes: int, last: Sequence[LinearLayer]) -> bytes:
    buffer = io.BytesIO()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's own deprecation and tracer notes
            # The legacy exporter keeps parameter names; constant folding would bake transposed weights in.
            torch.onnx.export(
                WithLoss(module, classes, last).eval(),
                (x, y),
                buffer,  # type: ignore[arg-type]  # the legacy exporter takes a file, its stub does not say so
                dynamo=False,
                do_constant_folding=False,
                input_names=list(_INPUTS),
                output_names=[*_OUTPUTS, *_GRADIENTS[: len(last)]],
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
            expected = [value.numpy() for value in WithLoss(net, classes, ())(x, y)]
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
    dead = names
    for attempt in range(_ATTEMPTS):  # a narrow layer's ReLU may be shut by one set of weights
        rng = np.random.default_rng(attempt)
        point = {
            name: (p.detach().numpy() + 0.5 * attempt * rng.standard_normal(p.shape)).astype(np.float32)
            for name, p in jittered.named_parameters()
            if name in names
        }
        base = run(jittered, x, y, **point)[0]
        shifts = {name: rng.standard_normal(point[name].shape).astype(np.float32) for name in dead}
        dead = [n for n in dead if run(jittered, x, y, **{**point, n: point[n] + shifts[n]})[0] == base]
        if not dead:
            break
    if dead:
        raise ModelError(
            f"the loss does not depend on {', '.join(dead)}",
            hint="Remove these parameters, or turn their requires_grad off.",
        )
    return worst


def _verify_gradient(
    graph: bytes,
    module: nn.Module,
    output: str,
    tensors: tuple[str, ...],
    sample_shape: tuple[int, ...],
    classes: int,
) -> float:
    """Compare the graph's gradient of a layer with automatic differentiation."""
    session = open_session(graph)
    x, y = _example(sample_shape, classes, 5)
    named = dict(module.named_parameters())
    gradients = torch.autograd.grad(functional.cross_entropy(module(x), y), [named[name] for name in tensors])
    expected = torch.cat([gradient.flatten() for gradient in gradients]).numpy()
    feeds = {name: parameter.detach().numpy() for name, parameter in named.items() if parameter.requires_grad}
    found = np.asarray(session.run([output], {**feeds, "x": x.numpy(), "y": y.numpy()})[0])
    error = float(np.abs(found - expected).max() / max(1.0, np.abs(expected).max()))
    if not error <= TOLERANCE:
        raise ModelError(
            f"the graph's {output} differs by {error:.1e} from automatic differentiation "
            f"(allowed: {TOLERANCE:.0e})",
            hint="The last linear layers may be used twice; give the net last layers of its own.",
        )
    return error
