"""Tests of pruning.models, pruning.structure and pruning.weights."""

import numpy as np
import pytest
import torch

from profiles.errors import ModelError
from pruning.models import build_model, choose_model, model_structure, standardisation
from pruning.weights import derive_seed, fresh_weights

NETS = [
    ("mlp", (64,), 10),
    ("mlp", (1, 8, 8), 3),
    ("lenet", (1, 28, 28), 10),
    ("lenet", (3, 9, 7), 4),
    ("resnet20", (3, 16, 16), 10),
    ("wrn10_2", (3, 16, 16), 10),
    ("dscnn", (1, 49, 10), 12),
]
IDS = [f"{name}-{'x'.join(map(str, shape))}" for name, shape, _ in NETS]


@pytest.mark.parametrize(("name", "shape", "classes"), NETS, ids=IDS)
@pytest.mark.parametrize("widths", ["dense", "narrowest"])
def test_structure_counts_what_torch_holds(name, shape, classes, widths):
    """At dense and at narrowest widths, the structure names each tensor with the shape that torch has."""
    structure = model_structure(name, sample_shape=shape, classes=classes)
    chosen = getattr(structure, widths)
    net = build_model(name, sample_shape=shape, classes=classes, widths=chosen)

    found = {k: tuple(p.shape) for k, p in net.named_parameters()}
    assert {t.name: t.shape(chosen) for t in structure.tensors} == found
    assert structure.params(chosen) == sum(p.numel() for p in net.parameters())
    assert net(torch.zeros(2, *shape)).shape == (2, classes)


@pytest.mark.parametrize(
    ("name", "shape", "params"),
    [("lenet", (1, 28, 28), 26_874), ("resnet20", (3, 32, 32), 272_282), ("dscnn", (1, 49, 10), 23_180)],
)
def test_nets_have_their_known_sizes(name, shape, params):
    """LeNet holds 27 k, ResNet-20 272 k and DS-CNN 23 k parameters."""
    structure = model_structure(name, sample_shape=shape, classes=12 if name == "dscnn" else 10)
    assert structure.params(structure.dense) == params


def test_macs_of_resnet20_agree_with_the_literature():
    """ResNet-20 at 32 x 32 takes 40.8 M multiply-accumulates (He et al. count 41 M with their shortcuts)."""
    structure = model_structure("resnet20", sample_shape=(3, 32, 32), classes=10)
    assert structure.macs(structure.dense) == 40_813_184


def test_residual_stream_is_one_group():
    """Every tensor that touches a residual stream follows the group of its stage."""
    structure = model_structure("resnet20", sample_shape=(3, 16, 16), classes=10)
    touching = {t.name for t in structure.tensors if "stage2" in t.groups}

    assert {f"blocks.{i}.conv2.weight" for i in (3, 4, 5)} <= touching
    assert {f"blocks.{i}.conv1.weight" for i in (4, 5, 6)} <= touching
    assert {"blocks.3.shortcut.weight", "blocks.6.shortcut.weight"} <= touching


def test_flattened_channels_are_blocks():
    """One channel of LeNet's second convolution is 49 neighbouring inputs of the linear layer behind."""
    structure = model_structure("lenet", sample_shape=(1, 28, 28), classes=10)
    entry = next(t for t in structure.tensors if t.name == "fc1.weight").axes[1]
    assert (entry.group, entry.block) == ("conv2", 49)


def test_auto_follows_the_data():
    """`auto` is an MLP for rows and a LeNet for images."""
    assert choose_model("auto", sample_shape=(64,)) == "mlp"
    assert choose_model("auto", sample_shape=(1, 28, 28)) == "lenet"


def test_weights_are_named_by_the_seed():
    """Equal seeds give equal bits, other seeds other weights, and torch's own generator is not touched."""
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    nets = [build_model("lenet", sample_shape=(1, 8, 8), classes=3, seed=s) for s in (1, 1, 2)]
    flat = [torch.cat([p.detach().reshape(-1) for p in net.parameters()]) for net in nets]

    assert torch.equal(flat[0], flat[1])
    assert not torch.equal(flat[0], flat[2])
    assert torch.equal(before, torch.random.get_rng_state())


def test_seeds_do_not_meet():
    """Names that read alike when joined give different seeds."""
    assert derive_seed(1, 23) != derive_seed(12, 3) != derive_seed("ntk", 12, 3)


def test_fresh_weights_have_their_variance():
    """The weights of a layer have variance 1 / (3 fan_in), within four standard errors."""
    net = torch.nn.Linear(300, 400)
    values = fresh_weights(net, seed=3)["weight"]
    assert abs(float(values.var()) * 900 - 1) < 4 * (2 / values.numel()) ** 0.5


def test_layers_of_other_kinds_redraw_themselves():
    """A layer that we do not know is drawn by its own reset_parameters, named by the seed."""
    net = torch.nn.Bilinear(3, 4, 5)
    one, two, other = (fresh_weights(net, seed=s)["weight"] for s in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("shape", [(5,), (2, 4, 4)])
def test_standardised_data_has_mean_0_and_deviation_1(shape):
    """The first layer turns raw values into values of mean 0 and deviation 1, per feature or channel."""
    rng = np.random.default_rng(0)
    raw = rng.normal(100, 30, (500, *shape)).astype(np.float32)
    net = build_model("mlp", sample_shape=shape, classes=2, standardise=standardisation(raw))
    x = net.standardise(torch.from_numpy(raw)).numpy()
    axes = (0, *range(2, x.ndim))

    assert np.allclose(x.mean(axis=axes), 0, atol=1e-4)
    assert np.allclose(x.std(axis=axes), 1, atol=1e-4)
    assert not any(name.startswith("standardise") for name, _ in net.named_parameters())


def test_rare_and_constant_features_stay_small():
    """A feature that is almost always zero stays within 10, and a constant one becomes 0."""
    raw = np.zeros((10_000, 2), np.float32)
    raw[7, 0] = 16
    raw[:, 1] = 3
    offset, scale = standardisation(raw)
    assert np.abs((raw - offset) * scale).max() <= 10
    assert scale[1] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "vgg"}, "unknown"),
        ({"name": "lenet", "sample_shape": (64,)}, "takes images"),
        ({"classes": 1}, "at least 2 classes"),
        ({"hidden": (8,), "name": "lenet"}, "option of `mlp`"),
        ({"name": "dscnn", "sample_shape": (1, 28, 1)}, "cannot take samples"),
        ({"name": "lenet", "widths": {"conv1": 7, "conv2": 16, "fc1": 32}}, "2 norm groups"),
        ({"name": "lenet", "widths": {"conv1": 2, "conv2": 16, "fc1": 32}}, "minimum of 4"),
        ({"name": "lenet", "widths": {"conv1": 8, "conv2": 16, "fc": 32}}, "'fc' is unknown"),
    ],
)
def test_impossible_nets_are_refused(arguments, message):
    """The message names the value and the rule."""
    with pytest.raises(ModelError, match=message):
        build_model(**{"name": "auto", "sample_shape": (1, 28, 28), "classes": 10} | arguments)
