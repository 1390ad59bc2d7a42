"""Gates: inputs of the ONNX graph that switch channels, neurons and heads off, for pretrained nets.

Knows where a gate acts and how units are chosen by their scores. The board's half, which measures the
scores by forward passes, is :mod:`edge_agent.gates`. Does not know fleets or links.

A gate of group g multiplies the weights of every layer that *reads* the group, along the axis that reads
it: at 0 all readers see zero, as if the unit were gone (but for the statistics of a GroupNorm that spans
it). Activations are not touched, so that a gate costs one product per weight and no memory per sample.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call

from edge_agent.bundle import Bundle
from edge_agent.gates import GATE_PREFIX
from profiles.errors import ModelError
from pruning.export import export_graph, write_exported
from pruning.structure import Axis, Structure, TensorShape

if TYPE_CHECKING:
    import onnx

__all__ = [
    "choose_units",
    "export_gated_bundle",
    "gate_derivatives",
    "gated_graph",
    "gated_weights",
    "split_scores",
]


def gated_graph(graph: bytes, structure: Structure) -> bytes:
    """Return a graph with one more input ``gate.<group>`` (units,) float32 for every group.

    Args:
        graph: Written by :func:`pruning.export.export_graph`.
        structure: Of the exported net.

    Raises:
        ModelError: No layer reads a group, so that its gate could do nothing.
    """
    import onnx

    model = onnx.load_model_from_string(graph)
    nodes: list[onnx.NodeProto] = []
    for group in structure.groups:
        if not any(axis.group == group.name for layer in structure.layers for _, axis in _reading(layer)):
            raise ModelError(
                f"no layer reads the group {group.name}", hint="Leave the group out of the structure."
            )
        model.graph.input.append(
            onnx.helper.make_tensor_value_info(GATE_PREFIX + group.name, 1, [group.width])
        )
    for layer in structure.layers:
        name = layer.name
        for place, axis in _reading(layer):
            gated = f"{layer.name}.gated{place}"
            nodes += _multiply(model, structure, layer, place, axis, name, gated)
            name = gated
        if name != layer.name:
            for node in model.graph.node:
                for i, read in enumerate(node.input):
                    if read == layer.name:
                        node.input[i] = name
    rest = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *rest])
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString(deterministic=True))


def export_gated_bundle(
    module: nn.Module,
    folder: Path,
    structure: Structure,
    *,
    model: str,
    sample_shape: tuple[int, ...],
    classes: int,
    cost: Callable[[bytes], Mapping[str, int]],
    draws: int = 5,
    seed: int = 0,
) -> Bundle:
    """Write a bundle whose graph takes a gate per group beside the weights.

    Args:
        module: A net with the weights that are to be scored.
        folder: Where the bundle goes.
        structure: Of the module, at its present widths.
        model: The net's name in the manifest.
        sample_shape: Shape of one input.
        classes: Number of classes.
        cost: Reads an ONNX file and returns what its forward takes.
        draws: Perturbations by which every board scores.
        seed: Names these perturbations.
    """
    exported = export_graph(module, sample_shape=sample_shape, classes=classes)
    gated = dataclasses.replace(exported, graph=gated_graph(exported.graph, structure))
    return write_exported(
        gated,
        folder,
        model=model,
        sample_shape=sample_shape,
        classes=classes,
        pruning={
            "method": "gates",
            "gates": [[g.name, g.width] for g in structure.groups],
            "draws": draws,
            "seed": seed,
        },
        cost=cost,
    )


def gated_weights(
    structure: Structure, weights: Mapping[str, Tensor], gates: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the weights with every reader multiplied by the gates, as the gated graph does it."""
    result = dict(weights)
    for layer in structure.layers:
        for place, axis in _reading(layer):
            factor = gates[axis.group].repeat_interleave(axis.block)
            trailing = len(layer.axes) - place - 1
            result[layer.name] = result[layer.name] * factor.reshape(-1, *(1,) * trailing)
    return result


def gate_derivatives(
    module: nn.Module, structure: Structure, inputs: Tensor, shifts: Sequence[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Return dJ/dc at c = 1 by automatic differentiation, mean over shifts and inputs.

    This is what the board's forward passes approximate; for coordinators that hold data of their own.

    Args:
        module: The net, with its weights.
        structure: Its groups.
        inputs: (n, *sample_shape), as the net takes them.
        shifts: The perturbations epsilon z of all trainable tensors, by name.
    """
    plain = {name: p.detach() for name, p in module.named_parameters()}
    gates = {g.name: torch.ones(g.width, requires_grad=True) for g in structure.groups}
    total = {name: torch.zeros_like(gate) for name, gate in gates.items()}
    for shift in shifts:
        moved = {name: value + shift.get(name, 0.0) for name, value in plain.items()}
        here, there = (
            functional_call(module, gated_weights(structure, weights, gates), (inputs,))
            for weights in (plain, moved)
        )
        gradients = torch.autograd.grad((here - there).square().sum(), list(gates.values()))
        for name, gradient in zip(gates, gradients, strict=True):
            total[name] += gradient / (len(shifts) * len(inputs))
    return total


def split_scores(structure: Structure, scores: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
    """Cut a flat vector of gate scores into one array per group, in the order of the structure."""
    ends = np.cumsum([group.width for group in structure.groups])
    if scores.shape != (ends[-1],):
        raise ValueError(f"expected {ends[-1]} scores, got an array of shape {scores.shape}")
    return {g.name: piece for g, piece in zip(structure.groups, np.split(scores, ends[:-1]), strict=True)}


def choose_units(
    structure: Structure, scores: Mapping[str, NDArray[np.float32]], widths: Mapping[str, int]
) -> dict[str, list[int]]:
    """Return for each group the units to keep: those with the highest scores.

    Where a GroupNorm splits the channels, the same number stays in each part, so that every kept channel
    is normalised together with the same companions as before.

    Raises:
        ModelError: A width is illegal, or above the present one.
    """
    structure.check(widths)
    keep = {}
    for group in structure.groups:
        if widths[group.name] > group.width:
            raise ModelError(f"{group.name} has {group.width} units, {widths[group.name]} cannot stay")
        parts = np.split(np.arange(group.width), group.multiple)
        each = widths[group.name] // group.multiple
        chosen: list[int] = []
        for part in parts:
            best = part[np.argsort(-np.asarray(scores[group.name])[part], kind="stable")[:each]]
            chosen += sorted(int(unit) for unit in best)
        keep[group.name] = chosen
    return keep


def _reading(layer: TensorShape) -> Iterator[tuple[int, Axis]]:
    """Yield the axes by which a layer reads groups: all but the one that it writes."""
    for place, axis in enumerate(layer.axes):
        if place != layer.writes and isinstance(axis, Axis):
            yield place, axis


def _multiply(
    model: "onnx.ModelProto",
    structure: Structure,
    layer: TensorShape,
    place: int,
    axis: Axis,
    source: str,
    target: str,
) -> list["onnx.NodeProto"]:
    """Return nodes that compute ``target`` = ``source`` times the gate along the axis ``place``."""
    from onnx import helper, numpy_helper

    def constant(suffix: str, values: list[int]) -> str:
        name = f"{target}.{suffix}"
        model.graph.initializer.append(numpy_helper.from_array(np.array(values, np.int64), name))
        return name

    units = structure.dense[axis.group]
    column, wide, shaped = (f"{target}.{part}" for part in ("column", "wide", "factor"))
    shape = [1] * len(layer.axes)
    shape[place] = units * axis.block
    return [
        helper.make_node(
            "Reshape", [GATE_PREFIX + axis.group, constant("columns", [units, 1])], [column], name=column
        ),
        helper.make_node("Expand", [column, constant("block", [units, axis.block])], [wide], name=wide),
        helper.make_node("Reshape", [wide, constant("shape", shape)], [shaped], name=shaped),
        helper.make_node("Mul", [source, shaped], [target], name=target),
    ]
