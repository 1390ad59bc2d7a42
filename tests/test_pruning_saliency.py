"""Tests of pruning.saliency and pruning.masks."""

import copy
import math

import pytest
import torch
from torch import nn

from profiles.errors import ModelError
from pruning.masks import densities_of, keep_top, schedule
from pruning.models import build_model, model_structure
from pruning.saliency import group_scores, make_probe, ntk_draw, ntk_sap, output_layer
from pruning.weights import derive_seed, fresh_weights


def relu_net():
    """Return a bias-free, positively homogeneous net."""
    layers = [nn.Conv2d(1, 6, 3, bias=False), nn.ReLU(), nn.Conv2d(6, 5, 3, 2, bias=False), nn.ReLU()]
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(20, 12, bias=False), nn.ReLU(), nn.Linear(12, 4, bias=False)
    )


def lenet_probe(**options):
    """Return a probe of a LeNet for images of 14 x 14."""
    net = build_model("lenet", sample_shape=(1, 14, 14), classes=10)
    return make_probe(net, sample_shape=(1, 14, 14), **options)


@pytest.mark.parametrize("draw", range(3))
def test_conservation_law(draw):
    """On a bias-free ReLU net each layer's sum of m dJ/dm is 2J within 1e-3, at random masks too."""
    probe = make_probe(relu_net(), sample_shape=(1, 8, 8), keep_output=False)
    generator = torch.Generator().manual_seed(draw)
    masks = {k: (torch.rand(m.shape, generator=generator) > 0.4).float() for k, m in probe.masks().items()}
    deviation, gradients = ntk_draw(probe, masks, 0, draw)

    assert len(gradients) == 4
    for name, gradient in gradients.items():
        assert float((gradient * masks[name]).sum()) == pytest.approx(2 * deviation, rel=1e-3)


def test_deviation_is_the_trace_of_the_kernel():
    """The mean of J over draws of D is epsilon^2 times the nuclear norm of the NTK, by explicit Jacobians."""
    net = nn.Sequential(nn.Linear(5, 7), nn.Hardswish(), nn.Linear(7, 3))
    probe = make_probe(net, sample_shape=(5,), keep_output=False, batch=4, epsilon=1e-3)
    ratios = []
    for draw in range(60):
        deviation, _ = ntk_draw(probe, probe.masks(), 0, draw)
        seed = derive_seed("ntk", probe.seed, 0, draw)
        inputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed))
        theta = fresh_weights(net, seed=derive_seed(seed, "weights"))
        twin = copy.deepcopy(net)
        twin.load_state_dict(theta)
        trace = 0.0
        for output in twin(inputs).reshape(-1):
            twin.zero_grad()
            output.backward(retain_graph=True)
            trace += sum(
                float(twin[i].weight.grad.square().sum()) for i in (0, 2) if twin[i].weight.grad is not None
            )
        ratios.append(deviation / (1e-6 * trace))
    mean = torch.tensor(ratios).mean()
    error = torch.tensor(ratios).std() / math.sqrt(60)
    assert abs(mean - 1) < 4 * error
    assert error < 0.1


def test_scores_are_the_derivative_by_the_mask():
    """The signed score of a weight agrees with a central difference of J in its mask."""
    probe = lenet_probe(batch=8)
    masks = probe.masks()
    _, gradients = ntk_draw(probe, masks, 0, 0)
    name = "conv2.weight"
    place = int(gradients[name].abs().argmax())

    def at(value):
        moved = {k: m.clone() for k, m in masks.items()}
        moved[name].view(-1)[place] = value
        return ntk_draw(probe, moved, 0, 0)[0]

    difference = (at(1.05) - at(0.95)) / 0.1
    assert difference == pytest.approx(float(gradients[name].view(-1)[place]), rel=0.02)


def test_output_layer_stays():
    """The layer that runs last gets no mask unless asked for, though it is defined first."""

    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.first = nn.Linear(6, 3), nn.Linear(4, 6)

        def forward(self, x):
            return self.last(torch.relu(self.first(x)))

    net = Backwards()
    assert output_layer(net, sample_shape=(4,)) == "last.weight"
    assert make_probe(net, sample_shape=(4,)).prunable == ("first.weight",)
    assert make_probe(net, sample_shape=(4,), keep_output=False).prunable == ("last.weight", "first.weight")


def test_densities_of_two_runs_agree():
    """Layer densities at 25 % from two independent seeds agree within 15 %."""
    found = []
    for seed in (1, 2):
        probe = lenet_probe(seed=seed)
        masks = schedule(lambda m, step, probe=probe: ntk_sap(probe, m, step), probe.masks(), 0.25)
        found.append(densities_of(masks))
    assert found[0].keys() == found[1].keys()
    assert len(found[0]) == 3
    for name, density in found[0].items():
        assert density == pytest.approx(found[1][name], rel=0.15)


def test_bits_do_not_depend_on_the_threads():
    """Scores are the same with one and with four threads, and the number of threads is left as it was."""
    probe = lenet_probe(seed=4)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            found.append(ntk_sap(probe, probe.masks(), 0))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0][k], found[1][k]) for k in found[0])


def test_same_seed_same_bits():
    """Scores of equal seeds are bitwise equal, and the net is left as it was."""
    probe = lenet_probe(seed=4)
    before = {k: v.clone() for k, v in probe.module.state_dict().items()}
    one, two = (ntk_sap(probe, probe.masks(), 0) for _ in range(2))
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert all(torch.equal(before[k], v) for k, v in probe.module.state_dict().items())


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(6), nn.GroupNorm(2, 6), nn.GroupNorm(1, 6)])
def test_norms_are_handled(norm):
    """Nets with BatchNorm and GroupNorm give finite scores, and the module is not touched."""
    net = nn.Sequential(nn.Conv2d(1, 6, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(216, 3))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    probe = make_probe(net, sample_shape=(1, 8, 8))
    scores = ntk_sap(probe, probe.masks(), 0)["0.weight"]
    assert torch.isfinite(scores).all()
    assert scores.max() > 0
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


def test_batchnorm_statistics_belong_to_the_draw():
    """With BatchNorm the scale of the redrawn weights does not matter; with stale statistics it would."""

    class Loud(nn.Conv2d):
        factor = 1.0

        def forward(self, x):
            return super().forward(x) * self.factor

    net = nn.Sequential(
        Loud(1, 6, 3, bias=False), nn.BatchNorm2d(6, eps=1e-12), nn.Flatten(), nn.Linear(216, 3)
    )
    probe = make_probe(net, sample_shape=(1, 8, 8))
    quiet, _ = ntk_draw(probe, probe.masks(), 0, 0)
    Loud.factor = 100.0
    loud, _ = ntk_draw(probe, probe.masks(), 0, 0)
    assert loud == pytest.approx(quiet, rel=1e-3)


def test_group_scores_add_up_to_the_layers():
    """A group's scores sum to the scores of all tensors that follow it, each counted once per axis."""
    structure = model_structure("lenet", sample_shape=(1, 14, 14), classes=10)
    probe = lenet_probe()
    masks = probe.masks()
    _, gradients = ntk_draw(probe, masks, 0, 0)
    groups = group_scores(structure, gradients, masks)
    total = {k: float(g.double().sum()) for k, g in gradients.items()}

    assert float(groups["conv1"].sum()) == pytest.approx(total["conv1.weight"] + total["conv2.weight"])
    assert float(groups["conv2"][3]) == pytest.approx(
        float(gradients["conv2.weight"][3].sum() + gradients["fc1.weight"][:, 3 * 16 : 4 * 16].sum()),
        rel=1e-5,
    )


def test_schedule_is_exponential():
    """After step t of T the fraction density ** (t / T) stands, and what fell never rises."""
    counts, masks = [], {"w": torch.ones(10_000)}

    def score(masks, step):
        counts.append(int(masks["w"].sum()))
        return {"w": torch.rand(10_000, generator=torch.Generator().manual_seed(step))}

    final = schedule(score, masks, 0.1, steps=4)
    assert counts == [10_000, 5623, 3162, 1778]
    assert int(final["w"].sum()) == 1000


def test_fallen_weights_stay_fallen():
    """A weight without mask is not kept, however high its score."""
    kept = keep_top({"w": torch.tensor([9.0, 1.0, 2.0])}, {"w": torch.tensor([0.0, 1.0, 1.0])}, 1 / 3)
    assert kept["w"].tolist() == [0, 0, 1]


def test_net_without_layers_is_refused():
    """A net of one linear layer has nothing to prune before its output."""
    with pytest.raises(ModelError, match="no layer that can be pruned"):
        make_probe(nn.Linear(3, 2), sample_shape=(3,))


def test_outputs_that_are_not_finite_are_refused():
    """The message says that redrawn weights made the outputs overflow."""

    class Explode(nn.Module):
        def forward(self, x):
            return torch.exp(x * 1e4)

    net = nn.Sequential(nn.Linear(4, 8), Explode(), nn.Linear(8, 2))
    probe = make_probe(net, sample_shape=(4,))
    with pytest.raises(ModelError, match="not finite under redrawn weights"):
        ntk_sap(probe, probe.masks(), 0)
