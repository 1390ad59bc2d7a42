"""Tests of pruning.masked: weights under a mask, as vectors of what is kept."""

import numpy as np
import onnx
import pytest
import torch

from edge_agent.forward import Forward
from profiles.cost import graph_cost
from profiles.errors import ModelError
from pruning.export import export_graph
from pruning.masked import mask_graph, mask_model, write_masked

SHAPES = {"mlp": (30,), "lenet": (1, 14, 14), "resnet20": (1, 8, 8)}


def cost(graph):
    """Return what the manifest keeps."""
    return graph_cost(graph).as_dict()


@pytest.mark.parametrize("name", SHAPES)
def test_bundle_holds_only_the_kept_weights(name, tmp_path):
    """The vector holds at most density of the dense parameters, and the graph computes the masked net."""
    shape = SHAPES[name]
    masked = mask_model(name, sample_shape=shape, classes=10, density=0.3, draws=1, schedule_steps=3)
    bundle = write_masked(masked, tmp_path, cost=cost)
    assert bundle.params == masked.params
    assert 0.29 < masked.params / masked.params_dense <= 0.3

    replica = bundle.replica()
    x = np.random.default_rng(0).standard_normal((6, *shape)).astype(np.float32)
    expected = masked.module(torch.from_numpy(x)).detach().numpy()
    found = Forward(bundle, replica.weights).logits(x)
    assert np.abs(found - expected).max() < 1e-5 * max(1, np.abs(expected).max())


def test_every_kept_weight_reaches_its_place(tmp_path):
    """Overwriting the vectors with new values gives the net with these values at the places of the mask."""
    masked = mask_model("lenet", sample_shape=(1, 14, 14), classes=10, method="random", density=0.4)
    bundle = write_masked(masked, tmp_path, cost=cost)
    rng, weights = np.random.default_rng(1), bundle.replica().weights
    parameters = dict(masked.module.named_parameters())
    for tensor in bundle.tensors:
        values = rng.normal(0, 0.2, tensor.shape).astype(np.float32)
        weights[tensor.offset : tensor.offset + tensor.size] = values.reshape(-1)
        with torch.no_grad():
            if tensor.name in masked.masks:
                parameters[tensor.name][masked.masks[tensor.name] > 0] = torch.from_numpy(values)
            else:
                parameters[tensor.name].copy_(torch.from_numpy(values))
    x = rng.standard_normal((6, 1, 14, 14)).astype(np.float32)
    expected = masked.module(torch.from_numpy(x)).detach().numpy()
    assert np.abs(Forward(bundle, weights).logits(x) - expected).max() < 1e-5 * np.abs(expected).max()


def test_mask_is_stored_as_bits():
    """A mask takes one bit per dense weight in the graph."""
    masked = mask_model("mlp", sample_shape=(30,), classes=10, density=0.5, draws=1, schedule_steps=2)
    graph = mask_graph(export_graph(masked.module, sample_shape=(30,), classes=10), masked.masks).graph
    held = {i.name: i for i in onnx.load_model_from_string(graph).graph.initializer}
    bits = onnx.numpy_helper.to_array(held["hidden.0.weight.mask"])
    assert bits.nbytes == 30 * 64 // 8
    unpacked = np.unpackbits(bits.reshape(-1), bitorder="little")
    assert np.array_equal(unpacked, masked.masks["hidden.0.weight"].numpy().reshape(-1))


def test_no_flops_are_saved(tmp_path):
    """A mask claims nothing: FLOPs equal the dense net's, and activations are not less."""
    masked = mask_model("lenet", sample_shape=(1, 14, 14), classes=10, method="random", density=0.2)
    bundle = write_masked(masked, tmp_path, cost=cost)
    assert bundle.cost["forward_flops"] == bundle.pruning["forward_flops_dense"]
    fixed = bundle.cost["activation_bytes_fixed"] + bundle.cost["weight_bytes"]
    assert fixed >= 0.9 * bundle.pruning["weight_bytes_dense"]


def test_kept_weights_keep_the_variance():
    """Rescaled by the root of the density, a layer's mean square is that of the dense layer within 10 %."""
    options = {
        "sample_shape": (300,),
        "classes": 10,
        "method": "random",
        "density": 0.3,
        "hidden": (200, 100),
    }
    nets = [
        mask_model("mlp", **options | {"density": 1.0}),
        mask_model("mlp", **options),
        mask_model("mlp", **options, rescale=False),
    ]
    dense, kept, plain = (net.module.hidden[0].weight.detach() for net in nets)
    assert float(kept.square().mean() / dense.square().mean()) == pytest.approx(1, abs=0.1)
    assert float(plain.square().mean() / dense.square().mean()) < 0.35


def test_density_below_the_rest_is_refused():
    """Biases, norms and the output layer cannot be masked; the hint has the least density."""
    with pytest.raises(ModelError, match="output layer alone are 250") as caught:
        mask_model("mlp", sample_shape=(30,), classes=10, density=0.05, hidden=(20, 20))
    assert "at least" in caught.value.hint


def test_layer_cut_in_two_is_refused():
    """A mask that keeps nothing of a layer is refused by name."""
    masked = mask_model("mlp", sample_shape=(30,), classes=10, method="random", density=0.5)
    masks = {**masked.masks, "hidden.1.weight": torch.zeros(32, 64)}
    with pytest.raises(ModelError, match=r"nothing of hidden\.1\.weight stays"):
        mask_graph(export_graph(masked.module, sample_shape=(30,), classes=10), masks)
