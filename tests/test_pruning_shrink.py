"""Tests of pruning.shrink and pruning.modules: a shrunk net computes what the masked net computes."""

import numpy as np
import pytest
import torch
from torch import nn

from profiles.errors import ModelError
from pruning.gates import choose_units
from pruning.models import build_model, model_structure
from pruning.modules import Coupling, declare_structure, trace_structure
from pruning.shrink import masked_module, narrow_module, slice_weights

SHAPES = {"mlp": (9,), "lenet": (1, 12, 12), "resnet20": (3, 8, 8), "wrn10_2": (3, 8, 8), "dscnn": (1, 12, 8)}


def shaken(net):
    """Give every parameter, norms' included, values of its own."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return net.eval()


def some_units(structure, fraction=0.5):
    """Choose units at random, about this fraction of each group, legal for its norms."""
    rng = np.random.default_rng(0)
    widths = {
        g.name: max(g.minimum, int(g.width * fraction) // g.multiple * g.multiple) for g in structure.groups
    }
    return choose_units(structure, {g.name: rng.random(g.width) for g in structure.groups}, widths)


def largest_gap(one, two, shape):
    """Return the largest difference of two nets' outputs, relative to the largest output."""
    x = torch.randn(5, *shape, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        a, b = one(x), two(x)
    return float((a - b).abs().max()) / max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("name", SHAPES)
def test_shrunk_reference_net_equals_the_masked_one(name):
    """Rebuilt at narrow widths from sliced weights, each reference net computes what the masked one does."""
    shape = SHAPES[name]
    net = shaken(build_model(name, sample_shape=shape, classes=4))
    structure = model_structure(name, sample_shape=shape, classes=4)
    keep = some_units(structure)
    widths = {group: len(units) for group, units in keep.items()}
    narrow = build_model(name, sample_shape=shape, classes=4, widths=widths)
    narrow.load_state_dict(slice_weights(structure, dict(net.named_parameters()), keep), strict=False)

    assert largest_gap(narrow, masked_module(net, structure, keep), shape) < 1e-5
    assert largest_gap(narrow, net, shape) > 1e-3  # the cut is not without effect


class Ffn(nn.Module):
    """A transformer block with heads and an FFN, over tokens of 24 features."""

    def __init__(self, heads=6, size=4, hidden=40):
        super().__init__()
        self.heads, self.size = heads, size
        self.norm1, self.norm2 = nn.LayerNorm(24), nn.LayerNorm(24)
        self.query, self.key, self.value = (nn.Linear(24, heads * size) for _ in range(3))
        self.out = nn.Linear(heads * size, 24)
        self.up, self.down = nn.Linear(24, hidden), nn.Linear(hidden, 24)
        self.head = nn.Linear(24, 3)

    def forward(self, x):
        """Attend, transform, and classify the mean token; x is (n, tokens, 24)."""
        n, tokens, _ = x.shape
        y = self.norm1(x)
        q, k, v = (p(y).reshape(n, tokens, self.heads, self.size) for p in (self.query, self.key, self.value))
        weights = torch.einsum("nihc,njhc->nhij", q, k).div(self.size**0.5).softmax(-1)
        x = x + self.out(torch.einsum("nhij,njhc->nihc", weights, v).reshape(n, tokens, -1))
        x = x + self.down(torch.nn.functional.gelu(self.up(self.norm2(x))))
        return self.head(x.mean(1))


HEADS = Coupling("heads", 6, writes=("query", "key", "value"), reads=("out",))
NEURONS = Coupling("neurons", 40, writes=("up",), reads=("down",))


def test_heads_and_neurons_of_a_transformer():
    """Shrinking heads to 4 of 6 and neurons to 11 of 40 keeps the outputs of the masked block."""
    net = shaken(Ffn())
    structure = declare_structure(net, [HEADS, NEURONS], sample_shape=(7, 24))
    keep = {"heads": [0, 2, 3, 5], "neurons": list(range(1, 34, 3))}
    narrow = narrow_module(net, structure, keep, sample_shape=(7, 24), sizes={"heads": 4})

    assert narrow.query.weight.shape == (16, 24)
    assert narrow.out.in_features == 16
    assert narrow.down.weight.shape == (24, 11)
    assert largest_gap(narrow, masked_module(net, structure, keep), (7, 24)) < 1e-5
    assert sum(p.numel() for p in narrow.parameters()) == structure.params({"heads": 4, "neurons": 11})


def test_forgotten_head_count_is_an_error():
    """A module that still counts six heads of four is refused, not returned."""
    net = shaken(Ffn())
    structure = declare_structure(net, [HEADS], sample_shape=(7, 24))
    with pytest.raises(ModelError, match="does not run after shrinking"):
        narrow_module(net, structure, {"heads": [0, 1]}, sample_shape=(7, 24))


def test_forgotten_reader_is_an_error():
    """A coupling that leaves one reader out is refused with the layer's failure."""
    net = shaken(Ffn())
    structure = declare_structure(net, [Coupling("neurons", 40, ("up",), ())], sample_shape=(7, 24))
    with pytest.raises(ModelError, match="does not run after shrinking"):
        narrow_module(net, structure, {"neurons": [0, 1]}, sample_shape=(7, 24))


def test_wrong_coupling_is_an_error():
    """Units that do not divide the axis, or a path that is no layer, are refused by name."""
    with pytest.raises(ModelError, match=r"axis 0 of up.weight has 40 elements and cannot follow 7 units"):
        declare_structure(Ffn(), [Coupling("n", 7, ("up",), ("down",))], sample_shape=(7, 24))
    with pytest.raises(ModelError, match="'mlp' is no module"):
        declare_structure(Ffn(), [Coupling("n", 7, ("mlp",), ())], sample_shape=(7, 24))


class Branches(nn.Module):
    """BatchNorm, a residual sum, a depthwise convolution, a concatenation and a flattened head."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.inner, self.back = nn.Conv2d(8, 12, 1), nn.Conv2d(12, 8, 1)
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.left, self.right = nn.Conv2d(8, 6, 1), nn.Conv2d(8, 10, 1)
        self.join, self.norm = nn.Conv2d(16, 8, 1), nn.GroupNorm(4, 8)
        self.fc, self.head = nn.Linear(8 * 16, 20), nn.Linear(20, 5)

    def forward(self, x):
        """Classify images of 4 x 4."""
        x = torch.relu(self.bn(self.stem(x)))
        x = x + self.back(torch.relu(self.inner(x)))
        x = torch.relu(self.depth(x))
        x = torch.cat([self.left(x), self.right(x)], 1)
        x = torch.relu(self.norm(self.join(torch.relu(x))))
        return self.head(torch.relu(self.fc(x.flatten(1))))


def test_any_module_by_torch_pruning():
    """A user's net is traced, what meets a concatenation is left whole by name, the rest shrinks exactly."""
    pytest.importorskip("torch_pruning", reason="the extra `prune` is not installed")
    net = shaken(Branches())
    net.bn.running_mean.normal_()
    traced = trace_structure(net, sample_shape=(3, 4, 4))
    groups = {g.name: g for g in traced.structure.groups}

    assert set(traced.left_whole) == {"left", "right"}
    assert {g.width for g in groups.values()} == {8, 12, 20}
    assert sorted(g.multiple for g in groups.values()) == [1, 1, 1, 4]
    keep = some_units(traced.structure)
    narrow = narrow_module(net, traced.structure, keep, sample_shape=(3, 4, 4))
    assert largest_gap(narrow, masked_module(net, traced.structure, keep), (3, 4, 4)) < 1e-5
    assert narrow.depth.groups == len(narrow.bn.running_mean) < 8
    assert narrow.join.in_channels == 16


def test_tracing_agrees_with_the_reference_nets():
    """Tracing a ResNet-20 finds the same couplings as widening its groups one by one."""
    pytest.importorskip("torch_pruning", reason="the extra `prune` is not installed")
    net = build_model("resnet20", sample_shape=(3, 8, 8), classes=4)
    known = model_structure("resnet20", sample_shape=(3, 8, 8), classes=4)
    traced = trace_structure(net, sample_shape=(3, 8, 8))

    def follows(structure):
        return {
            frozenset(
                (t.name, i)
                for t in structure.tensors
                for i, a in enumerate(t.axes)
                if getattr(a, "group", None) == g.name
            )
            for g in structure.groups
        }

    assert not traced.left_whole
    assert follows(traced.structure) == follows(known)
    assert traced.structure.macs(traced.structure.dense) == known.macs(known.dense)


def test_illegal_widths_are_refused():
    """Five channels cannot be divided into two norm groups."""
    net = build_model("lenet", sample_shape=(1, 8, 8), classes=3)
    structure = model_structure("lenet", sample_shape=(1, 8, 8), classes=3)
    with pytest.raises(ModelError, match="conv1 = 5 cannot be divided into 2 norm groups"):
        narrow_module(net, structure, {"conv1": range(5)}, sample_shape=(1, 8, 8))
