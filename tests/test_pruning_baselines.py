"""Tests of pruning.baselines: published scores against their definitions."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from profiles.errors import ModelError
from pruning.baselines import ALL_SCORES, grasp, magnitude, snip, synflow
from pruning.masks import densities_of
from pruning.models import build_model
from pruning.plan import METHODS, find_masks
from pruning.prune import prune_model
from pruning.saliency import make_probe

SHAPE = (1, 10, 10)


def labelled_probe(**options):
    """Return a probe of a LeNet with 20 labelled samples."""
    generator = torch.Generator().manual_seed(1)
    samples = torch.randn(20, *SHAPE, generator=generator), torch.arange(20) % 5
    net = build_model("lenet", sample_shape=SHAPE, classes=5, seed=3)
    return make_probe(net, sample_shape=SHAPE, labelled=samples, **options)


def loss_at(probe, name, place, value, *, temperature=1.0):
    """Return the loss with one weight set to a value."""
    net = copy.deepcopy(probe.module).double()
    with torch.no_grad():
        dict(net.named_parameters())[name].view(-1)[place] = value
    inputs, labels = probe.labelled
    return functional.cross_entropy(net(inputs.double()) / temperature, labels).item()


def test_synaptic_flow_is_conserved():
    """Every layer's SynFlow scores add up to the l1 path norm, norms and Hardswish in the net or not."""
    probe = labelled_probe(keep_output=False)
    sums = [float(score.sum()) for score in synflow(probe, probe.masks(), 0).values()]
    assert len(sums) == 4
    assert sums == pytest.approx([sums[0]] * 4, rel=1e-9)


def test_synflow_of_a_linear_net_by_hand():
    """Two linear layers: the score of a weight is |w| times the flow into it and out of it."""
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, -2.0], [3.0, 4.0]]))
        net[1].weight.copy_(torch.tensor([[-5.0, 6.0]]))
    probe = make_probe(net, sample_shape=(2,), keep_output=False)
    scores = synflow(probe, probe.masks(), 0)
    assert scores["0.weight"].tolist() == [[5.0, 10.0], [18.0, 24.0]]
    assert scores["1.weight"].tolist() == [[15.0, 42.0]]


def test_snip_is_the_slope_in_the_mask():
    """|dL/dm| of the most sensitive weight agrees with a central difference of the loss."""
    probe = labelled_probe()
    scores = snip(probe, probe.masks(), 0)["conv2.weight"].reshape(-1)
    place = int(scores.argmax())
    weight = float(dict(probe.module.named_parameters())["conv2.weight"].detach().view(-1)[place])
    up, down = (loss_at(probe, "conv2.weight", place, weight * f) for f in (1.001, 0.999))
    assert abs(up - down) / 0.002 == pytest.approx(float(scores[place]), rel=1e-2)


def test_grasp_is_weight_times_hessian_times_gradient():
    """Theta * (H g) agrees with the change of |g|^2 / 2 when one weight is scaled."""
    probe = labelled_probe()
    scores = grasp(probe, probe.masks(), 0)["conv2.weight"].reshape(-1)
    place = int(scores.abs().argmax())

    def half_norm(factor):
        net = copy.deepcopy(probe.module).double()
        weights = dict(net.named_parameters())
        with torch.no_grad():
            weights["conv2.weight"].view(-1)[place] *= factor
        inputs, labels = probe.labelled
        loss = functional.cross_entropy(net(inputs.double()) / 200.0, labels)
        found = torch.autograd.grad(loss, [weights[name] for name in probe.prunable])
        return float(sum(g.square().sum() for g in found)) / 2

    slope = (half_norm(1.01) - half_norm(0.99)) / 0.02
    assert slope == pytest.approx(float(scores[place]), rel=0.02)


def test_erdos_renyi_densities():
    """Layers end with min(1, c r), r = (sum of the sides) / (their product), one c for all, within 3 %."""
    net = build_model("resnet20", sample_shape=(3, 8, 8), classes=10)
    probe = make_probe(net, sample_shape=(3, 8, 8))
    densities = densities_of(find_masks(probe, method="erk", density=0.3))
    shapes = {name: mask.shape for name, mask in probe.masks().items()}
    rates = {name: sum(s) / math.prod(s) for name, s in shapes.items()}
    free = [densities[k] / rates[k] for k in rates if densities[k] < 0.99 and math.prod(shapes[k]) > 4000]
    assert len(free) > 8
    assert max(free) / min(free) < 1.06
    assert any(densities[k] == 1 for k in rates)


def test_random_keeps_the_same_of_every_layer():
    """A random mask keeps about the same fraction of every layer."""
    net = build_model("mlp", sample_shape=(50,), classes=5, hidden=(80, 60))
    probe = make_probe(net, sample_shape=(50,))
    densities = densities_of(find_masks(probe, method="random", density=0.4))
    assert all(d == pytest.approx(0.4, abs=0.04) for d in densities.values())


def test_magnitude_keeps_the_largest():
    """The smallest kept weight is not smaller than the largest that fell."""
    probe = labelled_probe()
    masks = find_masks(probe, method="magnitude", density=0.3)
    values = magnitude(probe, masks, 0)
    kept = torch.cat([values[k][m > 0] for k, m in masks.items()])
    fell = torch.cat([values[k][m == 0] for k, m in masks.items()])
    assert kept.min() >= fell.max()


@pytest.mark.parametrize("method", ALL_SCORES)
def test_every_score_leaves_the_net_alone_and_repeats(method):
    """Scores are finite, repeat bit for bit, and touch neither the module nor its mode."""
    probe = labelled_probe(draws=1, batch=4)
    before = {k: v.clone() for k, v in probe.module.state_dict().items()}
    one, two = (ALL_SCORES[method](probe, probe.masks(), 0) for _ in range(2))
    assert one.keys() == set(probe.prunable)
    assert all(torch.isfinite(one[k]).all() and torch.equal(one[k], two[k]) for k in one)
    assert all(torch.equal(before[k], v) for k, v in probe.module.state_dict().items())
    assert all(p.grad is None for p in probe.module.parameters())


@pytest.mark.parametrize("method", [m for m in METHODS if m != "none"])
def test_every_method_meets_the_budget(method):
    """Each method gives a narrow net within 2 % under a density of 0.4."""
    generator = torch.Generator().manual_seed(1)
    samples = torch.randn(20, *SHAPE, generator=generator).numpy(), (torch.arange(20) % 5).numpy()
    pruned = prune_model(
        "lenet",
        sample_shape=SHAPE,
        classes=5,
        method=method,
        density=0.4,
        draws=1,
        schedule_steps=3,
        labelled=samples,
    )
    assert 0.98 * 0.4 <= pruned.params / pruned.params_dense <= 0.4


@pytest.mark.parametrize("method", ["snip", "grasp"])
def test_methods_that_need_data_say_so(method):
    """Without labelled samples the message offers the data-free methods."""
    with pytest.raises(ModelError, match="labelled samples") as caught:
        prune_model("lenet", sample_shape=SHAPE, classes=5, method=method, density=0.4)
    assert "ntk" in caught.value.hint


def test_labels_out_of_range_are_refused():
    """A label that is no class is refused before any work."""
    samples = torch.zeros(4, *SHAPE).numpy(), torch.tensor([0, 1, 2, 9]).numpy()
    with pytest.raises(ModelError, match="do not make samples of 5 classes"):
        prune_model("lenet", sample_shape=SHAPE, classes=5, method="snip", density=0.4, labelled=samples)
