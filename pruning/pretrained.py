"""A pretrained net for the coordinator: a module that carries its weights, or the end of a run.

Knows how a reference net is made again from its bundle and a weight vector, and that this is checked. Does
not know logs, nor what is done with the net.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from edge_agent.bundle import Bundle
from edge_agent.forward import Forward
from profiles.errors import ModelError
from pruning.fit import MemoryBudget
from pruning.models import MODELS, build_model, model_structure
from pruning.plan import Allowance
from pruning.prune import Pruned
from pruning.prune_module import Found, check_module, find_structure, load_module, prune_module

__all__ = ["Pretrained", "load_pretrained", "narrow_pretrained", "rebuild_pretrained"]

_TOLERANCE = 1e-5  # of the largest logit


@dataclass(frozen=True)
class Pretrained:
    """A net with the weights that are to be kept.

    Attributes:
        module: The net, in evaluation mode.
        found: Its groups.
        name: In manifests.
        sample_shape: Shape of one input.
        classes: Number of classes.
    """

    module: nn.Module
    found: Found
    name: str
    sample_shape: tuple[int, ...]
    classes: int


def load_pretrained(
    reference: str, *, sample_shape: tuple[int, ...], classes: int, seed: int = 0
) -> Pretrained:
    """Return the module that ``FILE.py:FUNCTION`` makes, with its groups.

    Args:
        reference: See :func:`pruning.prune_module.load_module`.
        sample_shape: Shape of one input.
        classes: Number of classes.
        seed: For what the function draws.

    Raises:
        ModelError: The module cannot be used, see :func:`pruning.prune_module.prune_module`.
    """
    module = load_module(reference, seed=seed).eval()
    name = reference.rpartition(":")[2]
    check_module(module, sample_shape=sample_shape, classes=classes, name=name, pretrained=True)
    return Pretrained(module, find_structure(module, sample_shape=sample_shape), name, sample_shape, classes)


def rebuild_pretrained(bundle: Bundle, weights: NDArray[np.float32]) -> Pretrained:
    """Return the reference net of a bundle with these weights, compared with the bundle's graph.

    Args:
        bundle: Of a reference net as narrower layers or whole; no mask, no family of widths.
        weights: As the bundle lays them out.

    Raises:
        ModelError: The bundle holds another net, or the net made again computes something else.
    """
    facts = bundle.pruning
    if bundle.model not in MODELS or "widths" not in facts or facts.get("mode") == "mask" or bundle.stops:
        raise ModelError(
            f"{bundle.folder} has the net {bundle.model}, which cannot be made again from its bundle: only "
            "reference nets without a mask and without a family of widths can",
            hint="Write a FILE.py with a function that returns your module with its weights.",
        )
    shape, classes = bundle.sample_shape, bundle.classes
    hidden = tuple(facts["widths_dense"].values()) if bundle.model == "mlp" else None
    module = build_model(
        bundle.model,
        sample_shape=shape,
        classes=classes,
        widths=facts["widths"],
        hidden=hidden,
        standardise=_standardisation(bundle),
    )
    with torch.no_grad():
        for tensor in bundle.tensors:
            values = np.array(weights[tensor.offset : tensor.offset + tensor.size]).reshape(tensor.shape)
            module.get_parameter(tensor.name).copy_(torch.from_numpy(values))
    x = np.random.default_rng(0).standard_normal((4, *bundle.sample_shape)).astype(np.float32)
    expected = Forward(bundle, weights).logits(x)
    with torch.no_grad():
        apart = float(np.abs(module(torch.from_numpy(x)).numpy() - expected).max())
    if not apart <= _TOLERANCE * max(1.0, float(np.abs(expected).max())):
        raise ModelError(
            f"the net made again from {bundle.folder} differs from its graph by {apart:.1e}",
            hint="Make the bundle again with this release.",
        )
    structure = model_structure(bundle.model, sample_shape=shape, classes=classes, hidden=hidden).at(
        facts["widths"]
    )
    return Pretrained(module.requires_grad_(True), Found(structure), bundle.model, shape, classes)


def narrow_pretrained(
    net: Pretrained,
    scores: NDArray[np.float32],
    *,
    density: float = 0.5,
    allowance: Allowance | None = None,
    memory: MemoryBudget | None = None,
    seed: int = 0,
) -> Pruned:
    """Return the net with the units that are worth most for what they cost, and with their weights.

    Args:
        net: The net whose units were scored.
        scores: One per unit, in the order of its groups.
        density: See :func:`pruning.prune_module.prune_module`, and so are the following.
        allowance: What the narrow net may cost.
        memory: In the place of ``allowance``, what training may hold on the board.
        seed: For the manifest.
    """
    pruned = prune_module(
        net.module,
        sample_shape=net.sample_shape,
        classes=net.classes,
        name=net.name,
        structure=net.found.structure,
        sizes=net.found.sizes,
        scores=scores,
        density=density,
        allowance=allowance,
        memory=memory,
        seed=seed,
    )
    return replace(pruned, left_whole=dict(net.found.left_whole))


def _standardisation(bundle: Bundle) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
    """Return offset and scale of the graph's first layer; None where it has none."""
    import onnx

    graph = onnx.load(bundle.graph_path).graph
    found = {tensor.name: onnx.numpy_helper.to_array(tensor).copy() for tensor in graph.initializer}
    names = ("net.standardise.offset", "net.standardise.scale")
    return (found[names[0]], found[names[1]]) if found.keys() >= set(names) else None
