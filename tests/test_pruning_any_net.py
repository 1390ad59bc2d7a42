"""Tests of pruning.modules and pruning.prune_module on nets of many kinds: traced, narrowed, exported."""

import copy
import importlib.util

import numpy as np
import pytest
import torch
from odd_nets import IMAGE, NETS, Inverted, Split, Twice
from torch import nn
from torch.nn import functional

from edge_agent.forward import Forward
from profiles.cost import graph_cost
from profiles.errors import ModelError
from pruning.export import export_graph
from pruning.gates import choose_units
from pruning.masked import mask_module, write_masked
from pruning.models import moments as moments_of
from pruning.modules import Coupling, declare_structure, trace_structure
from pruning.plan import Allowance
from pruning.prune import write_pruned
from pruning.prune_module import prune_module
from pruning.saliency import make_probe, ntk_sap
from pruning.shrink import masked_module, narrow_module

needs_tracing = pytest.mark.skipif(
    importlib.util.find_spec("torch_pruning") is None, reason="the extra `prune` is not installed"
)


def shaken(net, size=0.2):
    """Give all parameters and running statistics values of their own."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)
        for name, buffer in net.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(generator=generator)
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2, generator=generator)
    return net.eval()


def half(structure):
    """Choose about half of the units of each group, at random."""
    rng = np.random.default_rng(1)
    widths = {g.name: max(g.minimum, g.width // 2 // g.multiple * g.multiple) for g in structure.groups}
    return choose_units(structure, {g.name: rng.random(g.width) for g in structure.groups}, widths)


def gap(one, two, shape):
    """Return the largest difference of two nets' outputs, relative to the largest output."""
    x = torch.randn(5, *shape, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        a, b = one(x), two(x)
    return float((a - b).abs().max()) / max(1.0, float(b.abs().max()))


@needs_tracing
@pytest.mark.parametrize("name", NETS)
def test_every_width_is_followed_and_cut_exactly(name):
    """All layers but the last are followed; half of the units leave what the masked net computes."""
    make, shape = NETS[name]
    torch.manual_seed(0)
    net = shaken(make())
    traced = trace_structure(net, sample_shape=shape)
    structure = traced.structure
    assert traced.left_whole == {}
    keep = half(structure)
    assert all(len(units) < structure.dense[group] for group, units in keep.items())
    narrow = narrow_module(net, structure, keep, sample_shape=shape)
    widths = {group: len(units) for group, units in keep.items()}

    assert gap(narrow, masked_module(net, structure, keep), shape) < 1e-5
    assert gap(narrow, net, shape) > 1e-3  # the cut is not without effect
    assert sum(p.numel() for p in narrow.parameters()) == structure.params(widths)
    graph = export_graph(narrow, sample_shape=shape, classes=7).graph
    assert graph_cost(graph).forward_flops == 2 * structure.macs(widths)


class ChannelsLast(nn.Module):
    """Flattens with the channels last, so that a channel's places do not lie side by side."""

    def __init__(self, gain=1.0):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 10, 3, padding=1), nn.BatchNorm2d(10)
        self.inner, self.head = nn.Linear(640, 20), nn.Linear(20, 7)
        nn.init.constant_(self.norm.weight, gain)

    def forward(self, x):
        """Classify images."""
        x = self.norm(self.conv(x)).permute(0, 2, 3, 1).flatten(1)
        return self.head(functional.relu(self.inner(x)))


@needs_tracing
@pytest.mark.parametrize("gain", [1.0, 0.0])
def test_what_shrinks_wrongly_is_left_whole_by_name(gain):
    """A group that cannot shrink keeps its width and the rest shrinks; a norm that is zero hides nothing."""
    net = ChannelsLast(gain).eval()
    traced = trace_structure(net, sample_shape=IMAGE)
    assert set(traced.left_whole) == {"conv"}
    assert "differs from its masked net" in traced.left_whole["conv"]
    assert traced.structure.dense == {"inner": 20}


class Tied(nn.Module):
    """Two layers that share a weight, before one that does not."""

    def __init__(self):
        super().__init__()
        self.stem, self.one, self.two = nn.Linear(9, 24), nn.Linear(24, 24), nn.Linear(24, 24)
        self.two.weight = self.one.weight
        self.inner, self.head = nn.Linear(24, 16), nn.Linear(16, 7)

    def forward(self, x):
        """Classify rows."""
        x = functional.relu(self.two(functional.relu(self.one(functional.relu(self.stem(x))))))
        return self.head(functional.relu(self.inner(x)))


@needs_tracing
def test_tied_weights_stay_tied():
    """Layers that share a weight keep their width and go on sharing it in the narrow net."""
    net = shaken(Tied())
    traced = trace_structure(net, sample_shape=(9,))
    assert traced.left_whole["one"] == "one and two share a weight"
    assert traced.structure.dense == {"inner": 16}
    keep = half(traced.structure)
    narrow = narrow_module(net, traced.structure, keep, sample_shape=(9,))
    assert narrow.two.weight is narrow.one.weight
    assert sum(p.numel() for p in narrow.parameters()) == traced.structure.params({"inner": 8})


class Attention(nn.Module):
    """One head over eight tokens of twelve features."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = nn.Linear(12, 6), nn.Linear(12, 6, bias=False), nn.Linear(12, 12)
        self.up, self.down, self.head = nn.Linear(12, 40), nn.Linear(40, 12), nn.Linear(12, 7)

    def forward(self, x):
        """Classify sequences."""
        scores = self.query(x) @ self.key(x).transpose(1, 2)
        x = x + scores.softmax(-1) @ self.value(x)
        return self.head((x + self.down(functional.relu(self.up(x)))).mean(1))


def test_products_of_activations_count():
    """A budget of MACs includes those of attention scores, which no weight takes part in."""
    net, shape = Attention(), (8, 12)
    neurons = Coupling("neurons", 40, writes=("up",), reads=("down",))
    structure = declare_structure(net, [neurons], sample_shape=shape)
    graph = export_graph(net, sample_shape=shape, classes=7).graph
    assert structure.fixed_macs == 8 * 8 * (6 + 12)
    assert graph_cost(graph).forward_flops == 2 * structure.macs({"neurons": 40})


class Positions(nn.Module):
    """A transformer block by torch's own attention, with bare parameters for the places."""

    def __init__(self):
        super().__init__()
        self.places, self.enter = nn.Parameter(0.02 * torch.randn(1, 8, 16)), nn.Linear(12, 16)
        self.block = nn.TransformerEncoderLayer(16, 4, 40, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 7)

    def forward(self, x):
        """Classify sequences."""
        return self.head(self.block(self.enter(x) + self.places).mean(1))


class Heads(nn.Module):
    """Attention of six heads of four, which it declares together with the FFN's neurons."""

    couplings = (
        Coupling("heads", 6, writes=("query", "key", "value"), reads=("mix",)),
        Coupling("neurons", 40, writes=("up",), reads=("down",)),
    )

    def __init__(self):
        super().__init__()
        self.heads = 6
        self.query, self.value = nn.Linear(12, 24), nn.Linear(12, 24)
        self.key, self.mix = nn.Linear(12, 24, bias=False), nn.Linear(24, 12)
        self.up, self.down, self.head = nn.Linear(12, 40), nn.Linear(40, 12), nn.Linear(12, 7)

    def sizes_at(self, widths):
        """Return what the code remembers."""
        return {"heads": widths["heads"]}

    def forward(self, x):
        """Classify sequences of eight."""
        q, k, v = (
            p(x).reshape(-1, 8, self.heads, 4).transpose(1, 2) for p in (self.query, self.key, self.value)
        )
        mixed = (q @ k.transpose(2, 3) / 2).softmax(-1) @ v
        x = x + self.mix(mixed.transpose(1, 2).reshape(-1, 8, 4 * self.heads))
        return self.head((x + self.down(functional.gelu(self.up(x)))).mean(1))


@pytest.mark.parametrize("method", ["uniform", "ntk"])
def test_a_module_declares_its_heads(method, tmp_path):
    """Couplings of the module are narrowed, heads among them, and the bundle computes the narrow net."""
    pruned = prune_module(
        Heads(), sample_shape=(8, 12), classes=7, method=method, density=0.5, draws=1, schedule_steps=3
    )
    assert pruned.widths_dense == {"heads": 6, "neurons": 40}
    assert pruned.module.heads == pruned.widths["heads"] < 6
    bundle = write_pruned(pruned, tmp_path, cost=lambda graph: graph_cost(graph).as_dict())
    x = torch.randn(3, 8, 12)
    with torch.no_grad():
        expected = pruned.module(x).numpy()
    assert np.abs(Forward(bundle, bundle.replica().weights).logits(x.numpy()) - expected).max() < 1e-4


@needs_tracing
def test_bare_parameters_and_attention_are_no_obstacle():
    """The FFN's neurons of a block with bare parameters shrink; the parameters keep their values."""
    net = Positions()
    pruned = prune_module(net, sample_shape=(8, 12), classes=7, method="uniform", density=0.7)
    assert pruned.widths_dense == {"block.linear1": 40}
    assert pruned.widths["block.linear1"] < 20
    assert "places" in pruned.left_whole["block.linear2"]
    assert torch.equal(pruned.module.places, net.places)
    assert not torch.equal(pruned.module.block.self_attn.in_proj_weight, net.block.self_attn.in_proj_weight)


class Explosive(nn.Module):
    """Its outputs are not finite."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(9, 24), nn.Linear(24, 7)

    def forward(self, x):
        """Classify rows, badly."""
        return self.head((100 * self.inner(x)).exp().exp())


class Idle(nn.Module):
    """It has a layer that it does not use."""

    def __init__(self):
        super().__init__()
        self.inner, self.idle, self.head = nn.Linear(9, 24), nn.Linear(24, 24), nn.Linear(24, 7)

    def forward(self, x):
        """Classify rows."""
        return self.head(functional.relu(self.inner(x)))


class Cast(nn.Module):
    """Turns its input into float64."""

    def forward(self, x):
        """Return the same numbers."""
        return x.double()


class Moody(nn.Module):
    """It draws at random when it is evaluated."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(9, 24), nn.Linear(24, 7)

    def forward(self, x):
        """Classify rows."""
        return self.head(functional.dropout(functional.relu(self.inner(x)), 0.5))


class InPlace(nn.Module):
    """It changes what a derivative would need."""

    def __init__(self):
        super().__init__()
        self.inner, self.more, self.head = nn.Linear(9, 24), nn.Linear(24, 24), nn.Linear(24, 7)

    def forward(self, x):
        """Classify rows."""
        x = functional.relu(self.inner(x), inplace=True)
        x += self.more(x)
        return self.head(x)


@needs_tracing
def test_lazy_layers_and_operations_in_place():
    """Lazy layers get their shapes; a net that cannot be differentiated is narrowed without derivatives."""
    lazy = nn.Sequential(nn.LazyLinear(24), nn.ReLU(), nn.LazyLinear(7))
    pruned = prune_module(lazy, sample_shape=(9,), classes=7, method="ntk", draws=1, schedule_steps=2)
    assert pruned.widths_dense == {"0": 24}
    options = {"sample_shape": (9,), "classes": 7, "name": "own"}
    assert prune_module(InPlace(), **options, method="uniform").params
    with pytest.raises(ModelError, match=r"own cannot be looked at by ntk: .*inplace") as refused:
        prune_module(InPlace(), **options, method="ntk")
    assert "uniform" in refused.value.hint


@pytest.mark.parametrize("method", ["uniform", "ntk", "ntk-widths"])
@pytest.mark.parametrize(
    ("net", "message"),
    [
        (Explosive(), "bad gives outputs that are not finite under redrawn weights"),
        (Idle(), r"the output of bad does not depend on idle\.weight, idle\.bias"),
        (nn.Flatten(), "bad gives an output of the shape"),
        (Moody(), "bad gives other outputs for the same inputs"),
        (
            nn.Sequential(Cast(), nn.Linear(9, 20).double(), nn.Linear(20, 7).double()),
            r"not float32: 1\.weight",
        ),
        pytest.param(nn.Linear(9, 7), "no layer whose width could change", marks=needs_tracing),
        (nn.Sequential(nn.Linear(8, 20), nn.Linear(20, 7)), r"cannot take samples of the shape \(9,\)"),
        (
            nn.Sequential(nn.Linear(9, 20), nn.Linear(20, 6)),
            r"shape \(2, 6\) for 2 samples, expected \(2, 7\)",
        ),
    ],
    ids=["explosive", "idle", "flatten", "moody", "double", "one layer", "shape", "classes"],
)
def test_bad_nets_are_refused_before_work(net, message, method):
    """Each gets a message with what is wrong and a hint, whatever the method."""
    with pytest.raises(ModelError, match=message) as refused:
        prune_module(net, sample_shape=(9,), classes=7, method=method, name="bad")
    assert refused.value.hint


@needs_tracing
def test_a_budget_that_is_too_small_names_what_kept_its_width():
    """The message has the minimum, and the layers because of which it is not smaller."""
    allowance = Allowance("macs", 100)
    with pytest.raises(ModelError, match=r"needs 17,927\. These keep their width: conv: ") as refused:
        prune_module(
            ChannelsLast(), sample_shape=IMAGE, classes=7, method="uniform", allowance=allowance, name="own"
        )
    assert "17,927" in refused.value.hint


@needs_tracing
def test_frozen_layers_keep_their_weights(tmp_path):
    """What is not trained keeps its values, in the narrow net and in the masked one, and gets no mask."""
    net = nn.Sequential(nn.Linear(9, 16), nn.ReLU(), nn.Linear(16, 20), nn.ReLU(), nn.Linear(20, 7))
    net[0].requires_grad_(False)
    options = {"sample_shape": (9,), "classes": 7, "draws": 1, "schedule_steps": 2, "density": 0.6}
    narrow = prune_module(net, **options, method="ntk")
    rows = [tuple(row) for row in net[0].weight.tolist()]
    assert len(narrow.module[0].weight) < 16 or len(narrow.module[2].weight) < 20
    assert all(tuple(row) in rows for row in narrow.module[0].weight.tolist())

    masked = mask_module(net, **options)
    assert list(masked.masks) == ["2.weight"]
    assert torch.equal(masked.module[0].weight, net[0].weight)
    bundle = write_masked(masked, tmp_path, cost=lambda graph: graph_cost(graph).as_dict())
    assert [tensor.name for tensor in bundle.tensors] == ["2.weight", "2.bias", "4.weight", "4.bias"]


@pytest.mark.parametrize("make", [Split, Positions, Twice], ids=["convolutions", "attention", "twice"])
def test_masks_of_any_net(make, tmp_path):
    """A mask over a net of one's own keeps the asked weights, and the bundle computes the masked net."""
    shape = (8, 12) if make is Positions else IMAGE
    masked = mask_module(
        make(), sample_shape=shape, classes=7, density=0.6, draws=1, schedule_steps=2, name="own"
    )
    bundle = write_masked(masked, tmp_path, cost=lambda graph: graph_cost(graph).as_dict())
    assert 0.59 * masked.params_dense < bundle.params <= 0.6 * masked.params_dense
    x = torch.randn(3, *shape)
    with torch.no_grad():
        assert all(
            (p[masked.masks[n] == 0] == 0).all()
            for n, p in masked.module.named_parameters()
            if n in masked.masks
        )
        expected = masked.module(x).numpy()
    found = Forward(bundle, bundle.replica().weights).logits(x.numpy())
    assert np.abs(found - expected).max() < 1e-5 * max(1, np.abs(expected).max())
    assert bundle.cost["forward_flops"] == bundle.pruning["forward_flops_dense"]


class Pixels(nn.Module):
    """Standardises pixels of 0 to 255 itself."""

    def __init__(self, offset=120.0, scale=60.0):
        super().__init__()
        self.offset, self.scale = offset, scale
        self.inner, self.more, self.head = nn.Linear(9, 24), nn.Linear(24, 16), nn.Linear(16, 7)

    def forward(self, x):
        """Classify rows."""
        x = functional.relu(self.inner((x - self.offset) / self.scale))
        return self.head(functional.relu(self.more(x)))


def test_a_net_is_looked_at_with_inputs_like_its_data():
    """Scores of a net that standardises raw values equal those of the net behind it on standard inputs."""
    moments = (np.full(9, 120.0, np.float32), np.full(9, 60.0, np.float32))
    probes = [
        make_probe(Pixels(), sample_shape=(9,), moments=moments),
        make_probe(Pixels(0.0, 1.0), sample_shape=(9,)),
        make_probe(Pixels(), sample_shape=(9,)),
    ]
    raw, standard, blind = (ntk_sap(probe, probe.masks())["more.weight"] for probe in probes)
    assert torch.allclose(raw, standard, rtol=1e-3)
    assert not torch.allclose(blind, standard, rtol=0.1)
    mean, deviation = moments_of(np.random.default_rng(0).normal(50, 20, (4000, 3, 2, 2)).astype(np.float32))
    assert mean == pytest.approx([50] * 3, abs=1)
    assert deviation == pytest.approx([20] * 3, abs=1)


@needs_tracing
def test_the_module_is_left_as_it_is():
    """Pruning changes neither a weight nor the mode of the given module."""
    net = Inverted(nn.BatchNorm2d).train()
    before = copy.deepcopy(net.state_dict())
    prune_module(net, sample_shape=IMAGE, classes=7, method="ntk", draws=1, schedule_steps=2)
    assert net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
