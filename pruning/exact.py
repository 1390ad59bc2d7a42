"""The gradients that a forward pass gives away: a net with its loss and those of its last linear layers.

Under cross-entropy the gradient at the logits is the softmax less the labels, so the last linear layer's
gradient follows from its input, and that of the linear layer before it, through one elementwise
activation, from its own. Knows torch modules; does not know ONNX.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["ACTIVATIONS", "LinearLayer", "WithLoss", "find_last_layers"]

_Function = Callable[[Tensor], Tensor]


def _hardswish_slope(a: Tensor) -> Tensor:
    return torch.where(a <= -3, torch.zeros_like(a), torch.where(a < 3, a / 3 + 0.5, torch.ones_like(a)))


def _gelu_slope(a: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(a / math.sqrt(2))) + a * torch.exp(-a * a / 2) / math.sqrt(2 * math.pi)


ACTIVATIONS: Mapping[str, tuple[_Function, _Function]] = {
    "hardswish": (functional.hardswish, _hardswish_slope),
    "relu": (functional.relu, lambda a: (a > 0).to(a.dtype)),
    "gelu": (functional.gelu, _gelu_slope),
    "silu": (functional.silu, lambda a: a.sigmoid() * (1 + a * (1 - a.sigmoid()))),
    "tanh": (torch.tanh, lambda a: 1 - a.tanh() * a.tanh()),
}
"""Elementwise functions by name, each with its derivative."""


@dataclass(frozen=True)
class LinearLayer:
    """A linear layer whose gradient is told.

    Attributes:
        name: Of the module.
        tensors: Names of its trained tensors: weight, and bias if it has one.
        activation: What its output goes through before the next layer; empty for the logits.
    """

    name: str
    tensors: tuple[str, ...]
    activation: str = ""


class WithLoss(nn.Module):
    """A net with its mean cross-entropy, the count of correct answers, and gradients of last layers.

    The last layer's is [(p - y)' f / n ; mean(p - y)] for its input f and the softmax p; the layer's before
    has ((p - y) W * slope) in the place of p - y. No backward pass, and no torch on the board.

    Args:
        net: Takes a batch, gives logits.
        classes: How many.
        last: From :func:`find_last_layers`, or nothing.
    """

    def __init__(self, net: nn.Module, classes: int, last: Sequence[LinearLayer]) -> None:
        super().__init__()
        self.net = net
        self._classes = classes
        self._last = list(last)
        self._inputs: dict[str, Tensor] = {}
        self._outputs: dict[str, Tensor] = {}
        for layer in last:
            net.get_submodule(layer.name).register_forward_hook(
                lambda _, inputs, output, name=layer.name: self._keep(name, inputs[0], output)
            )

    def _keep(self, name: str, given: Tensor, made: Tensor) -> None:
        self._inputs[name], self._outputs[name] = given, made

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        """Return loss, correct answers, logits, and a flat gradient for each of the last layers."""
        logits = self.net(x)
        correct = (logits.argmax(1) == y).sum()
        outputs = [functional.cross_entropy(logits, y), correct, logits]
        if self._last:
            excess = (logits.softmax(1) - functional.one_hot(y, self._classes)) / y.shape[0]
        above: nn.Module | None = None
        for layer in self._last:
            if above is not None and isinstance(above.weight, Tensor):
                slope = ACTIVATIONS[layer.activation][1]
                excess = (excess @ above.weight) * slope(self._outputs[layer.name])
            parts = [(excess.T @ self._inputs[layer.name]).reshape(-1)]
            if len(layer.tensors) > 1:
                parts.append(excess.sum(0))
            outputs.append(torch.cat(parts))
            above = self.net.get_submodule(layer.name)
        return tuple(outputs)


def find_last_layers(net: nn.Module, x: Tensor) -> list[LinearLayer]:
    """Return the linear layer that makes the logits of a batch, and the one before it if it can be told.

    A layer counts if it runs once, and its tensors are its own, trained and stand in the order weight, bias;
    the one before the last, if its output goes through nothing but a known activation, and other layers are
    left to be perturbed. The activation is told by what becomes of outputs from -8 to 8.

    Args:
        net: In evaluation mode.
        x: A batch.
    """
    made: dict[str, Tensor] = {}
    given: dict[str, Tensor] = {}
    calls: Counter[str] = Counter()

    def keep(name: str, inputs: Tensor, output: Tensor) -> None:
        given[name], made[name] = inputs, output
        calls[name] += 1

    handles = [
        layer.register_forward_hook(lambda _, inputs, output, name=name: keep(name, inputs[0], output))
        for name, layer in net.named_modules()
        if isinstance(layer, nn.Linear)
    ]
    with torch.no_grad():
        logits = net(x)
    for handle in handles:
        handle.remove()
    trained = [name for name, parameter in net.named_parameters() if parameter.requires_grad]
    layers = {name: own for name in made if calls[name] == 1 and (own := _tensors(net, name, trained))}
    last = next((name for name in layers if made[name] is logits and logits.dim() == 2), None)
    if last is None:
        return []
    found = [LinearLayer(last, layers[last])]
    for name, tensors in layers.items():
        if name == last or len(tensors) + len(layers[last]) == len(trained):
            continue
        if made[name].shape == given[last].shape and (activation := _activation(net, name, last, x)):
            return [*found, LinearLayer(name, tensors, activation)]
    return found


def _activation(net: nn.Module, name: str, last: str, x: Tensor) -> str:
    """Return the activation between a layer's output and the last layer's input; empty if none is known."""
    many = x.repeat(8, *(1,) * (x.dim() - 1))
    units = net.get_submodule(name).out_features
    outputs = torch.linspace(-8.0, 8.0, len(many) * int(units)).reshape(len(many), -1)  # type: ignore[arg-type]
    seen: list[Tensor] = []
    handles = [
        net.get_submodule(name).register_forward_hook(lambda *_: outputs),
        net.get_submodule(last).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])),
    ]
    try:
        with torch.no_grad():
            net(many)
    finally:
        for handle in handles:
            handle.remove()
    for activation, (function, _) in ACTIVATIONS.items():
        if torch.allclose(function(outputs), seen[0], atol=1e-6):
            return activation
    return ""


def _tensors(net: nn.Module, name: str, trained: Sequence[str]) -> tuple[str, ...]:
    """Return the names of a layer's tensors, if all are trained, its own, and stand in its order."""
    held = [id(p) for layer in net.modules() for p in layer.parameters(recurse=False)]
    if any(held.count(id(p)) > 1 for p in net.get_submodule(name).parameters()):
        return ()
    tensors = [f"{name}.{part}".lstrip(".") for part, _ in net.get_submodule(name).named_parameters()]
    return tuple(tensors) if [tensor for tensor in trained if tensor in tensors] == tensors else ()
