"""What the project's step is measured against: four nets, ONNX Runtime's constant graph, torch's own step.

The nets are shapes with random weights: what is measured does not depend on the values. Knows no clock.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from edge_agent.bundle import Bundle, read_bundle
from profiles.cost import graph_cost
from pruning.export import export_graph, write_exported
from pruning.models import build_model
from pruning.shapes import SHAPES, Transformer
from pruning.threads import one_thread

__all__ = ["PEERS", "Peer", "build_peer", "constant_graph", "torch_estimate", "write_peer"]

_TOKENS = 64


@dataclass(frozen=True)
class Peer:
    """A net at the batch size at which it is measured.

    Attributes:
        model: Name of the net.
        sample_shape: Shape of one input.
        classes: Logits.
        batch_size: Samples of a forward pass.
    """

    model: str
    sample_shape: tuple[int, ...]
    classes: int
    batch_size: int


PEERS = {
    "lenet": Peer("lenet", (1, 28, 28), 10, 32),
    "resnet20": Peer("resnet20", (3, 32, 32), 10, 8),
    **{name: Peer(name, (_TOKENS,), SHAPES[name].classes, 8) for name in SHAPES},
}
"""The nets by name."""


def build_peer(name: str) -> nn.Module:
    """Return the net with random weights."""
    peer = PEERS[name]
    if name in SHAPES:
        torch.manual_seed(0)
        return Transformer(SHAPES[name], length=_TOKENS).eval()
    return build_model(name, sample_shape=peer.sample_shape, classes=peer.classes)


def write_peer(net: nn.Module, name: str, folder: Path) -> Bundle:
    """Export a net from :func:`build_peer` and write its bundle."""
    peer = PEERS[name]
    exported = export_graph(net, sample_shape=peer.sample_shape, classes=peer.classes, verify=False)
    return write_exported(
        exported,
        folder,
        model=name,
        sample_shape=peer.sample_shape,
        classes=peer.classes,
        pruning={"method": "none"},
        cost=lambda graph: graph_cost(graph).as_dict(),
    )


def constant_graph(folder: Path) -> bytes:
    """Return a bundle's graph with its weights as constants, which ONNX Runtime may reorder and fold."""
    import onnx

    bundle = read_bundle(folder)
    weights = bundle.mapped_weights()
    model = onnx.load(str(bundle.graph_path))
    kept = [value for value in model.graph.input if value.name in ("x", "y")]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    for tensor in bundle.tensors:
        values = np.asarray(weights[tensor.offset : tensor.offset + tensor.size]).reshape(tensor.shape)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, tensor.name))
    return bytes(model.SerializeToString())


def torch_estimate(
    net: nn.Module, x: NDArray[np.float32], y: NDArray[np.int64], *, epsilon: float, rate: float
) -> Callable[[int], None]:
    """Return a function of a seed that makes one step as MeZO does it in torch, on one thread.

    Two eager forwards at w +- epsilon z, z = torch.randn drawn anew from the seed for each of the four
    passes over the weights, in place.

    Source: Malladi et al., arXiv 2305.17333, algorithm 1.
    """
    inputs, labels = torch.from_numpy(x), torch.from_numpy(y)
    parameters = [p.detach() for p in net.parameters()]

    def displace(seed: int, scale: float) -> None:
        torch.manual_seed(seed)
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape), alpha=scale)

    def loss() -> float:
        return float(functional.cross_entropy(net(inputs), labels))

    def step(seed: int) -> None:
        with torch.no_grad(), one_thread():
            displace(seed, epsilon)
            plus = loss()
            displace(seed, -2 * epsilon)
            minus = loss()
            displace(seed, epsilon)
            displace(seed, -rate * (plus - minus) / (2 * epsilon))

    return step
