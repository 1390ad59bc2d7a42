"""Tests of pruning.gates and edge_agent.gates: units scored by forward passes."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch.func import functional_call

from edge_agent.bundle import read_bundle
from edge_agent.forward import Forward
from edge_agent.gates import gate_scores, open_gates
from edge_agent.grid import Term, perturb
from edge_agent.noise import NoiseKey
from profiles.cost import graph_cost
from profiles.errors import BundleError, ModelError
from pruning.export import export_bundle
from pruning.gates import choose_units, export_gated_bundle, gate_derivatives, split_scores
from pruning.models import build_model, model_structure
from pruning.modules import Coupling, declare_structure

SHAPES = {"mlp": (20,), "lenet": (1, 12, 12), "resnet20": (1, 8, 8), "dscnn": (1, 12, 8)}
KEYS = [NoiseKey(7, draw, 0, 0) for draw in range(2)]


def cost(graph):
    """Return what the manifest keeps."""
    return graph_cost(graph).as_dict()


def trained(name, *, steps=60):
    """Return a net that separates blobs, its structure and 48 inputs."""
    shape = SHAPES[name]
    rng = torch.Generator().manual_seed(1)
    centres = torch.randn(4, *shape, generator=rng)
    labels = torch.arange(256) % 4
    inputs = centres[labels] + 0.8 * torch.randn(256, *shape, generator=rng)
    net = build_model(name, sample_shape=shape, classes=4, seed=2)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(inputs), labels).backward()
        optimizer.step()
    structure = model_structure(name, sample_shape=shape, classes=4)
    return net.requires_grad_(True), structure, inputs[:48]


def gated(name, folder, **options):
    """Return the trained net, its structure, inputs, a replica, its gates and a forward of both."""
    net, structure, inputs = trained(name, **options)
    bundle = export_gated_bundle(
        net, folder, structure, model=name, sample_shape=SHAPES[name], classes=4, cost=cost
    )
    replica, gates = bundle.replica(), open_gates(bundle)
    return net, structure, inputs, replica, gates, Forward(bundle, replica.weights, others=gates.inputs)


@pytest.mark.parametrize("name", SHAPES)
def test_open_gates_change_nothing_and_closed_ones_cut(name, tmp_path):
    """All gates at 1 give the net's logits; a closed gate gives those of a net whose readers see zero."""
    net, structure, inputs, _, gates, forward = gated(name, tmp_path, steps=3)
    expected = net(inputs).detach().numpy()
    assert np.abs(forward.logits(inputs.numpy()) - expected).max() < 1e-5 * max(1, np.abs(expected).max())

    for group in structure.groups:
        unit = group.width // 2
        weights = {k: p.detach().clone() for k, p in net.named_parameters()}
        for layer in structure.layers:
            for place, axis in enumerate(layer.axes):
                if place and not isinstance(axis, int) and axis.group == group.name:
                    block = slice(unit * axis.block, (unit + 1) * axis.block)
                    weights[layer.name].movedim(place, 0)[block] = 0
        gates.inputs[f"gate.{group.name}"][unit] = 0
        cut = functional_call(net, weights, (inputs,)).detach().numpy()
        assert np.abs(forward.logits(inputs.numpy()) - cut).max() < 1e-5 * max(1, np.abs(cut).max())
        assert np.abs(cut - expected).max() > 1e-4
        gates.inputs[f"gate.{group.name}"][unit] = 1


@pytest.mark.parametrize("name", ["lenet", "dscnn", "mlp"])
def test_scores_rank_units_as_autograd_does(name, tmp_path):
    """Over all units of the net, forward-only scores have a Spearman above 0.98 with autograd's."""
    net, structure, inputs, replica, gates, forward = gated(name, tmp_path)
    x = inputs.numpy()
    found = gate_scores(replica, gates, lambda: forward.logits(x), keys=KEYS, epsilon=0.01)
    shifts = []
    tensors = read_bundle(tmp_path).tensors
    for key in KEYS:
        moved = read_bundle(tmp_path).replica()
        perturb(moved.weights, moved.segments, [Term(key, 1)], epsilon=0.01)
        z = moved.weights - replica.weights
        shifts.append(
            {t.name: torch.from_numpy(z[t.offset : t.offset + t.size].reshape(t.shape)) for t in tensors}
        )
    exact = gate_derivatives(net, structure, inputs, shifts)
    ranked = split_scores(structure, found.scores)
    pooled = spearmanr(found.scores, torch.cat(list(exact.values())).numpy()).statistic
    assert pooled > 0.98
    assert ranked.keys() == exact.keys()


def test_replica_comes_back_bit_for_bit(tmp_path):
    """After scoring the replica has the bits it had, and the forwards are counted as they happened."""
    _, structure, inputs, replica, gates, forward = gated("mlp", tmp_path, steps=3)
    before, calls = replica.weights.copy(), []

    def logits():
        calls.append(1)
        return forward.logits(inputs.numpy())

    found = gate_scores(replica, gates, logits, keys=KEYS, epsilon=0.01)
    assert np.array_equal(before.view(np.uint32), replica.weights.view(np.uint32))
    units = sum(g.width for g in structure.groups)
    assert found.scores.shape == (units,)
    assert found.forwards == len(calls) == 3 * (1 + units)


def test_scores_of_agents_add_up(tmp_path):
    """The score over the union of two agents' inputs is the mean of theirs, weighted by their inputs."""
    _, _, inputs, replica, gates, forward = gated("mlp", tmp_path, steps=3)

    def score(x):
        return gate_scores(replica, gates, lambda: forward.logits(x), keys=KEYS, epsilon=0.01)

    x = inputs.numpy()
    union, one, two = score(x), score(x[:12]), score(x[12:])
    assert (one.samples, two.samples) == (12, 36)
    assert np.allclose(union.scores, (12 * one.scores + 36 * two.scores) / 48, rtol=1e-4, atol=1e-9)


def test_every_norm_part_keeps_the_same_number():
    """Of channels that a GroupNorm splits in two, half of the kept ones come from each part."""
    structure = model_structure("lenet", sample_shape=(1, 12, 12), classes=4)
    scores = {"conv1": np.arange(8.0), "conv2": -np.arange(16.0), "fc1": np.arange(32.0)}
    keep = choose_units(structure, scores, {"conv1": 4, "conv2": 6, "fc1": 3})
    assert keep == {"conv1": [2, 3, 6, 7], "conv2": [0, 1, 2, 8, 9, 10], "fc1": [29, 30, 31]}


def test_more_units_than_there_are_is_refused():
    """A width above the present one cannot be kept."""
    structure = model_structure("mlp", sample_shape=(5,), classes=4)
    scores = {g.name: np.zeros(g.width) for g in structure.groups}
    with pytest.raises(ModelError, match="65 cannot stay"):
        choose_units(structure, scores, {"hidden1": 65, "hidden2": 4})


def test_bundle_without_gates_is_refused(tmp_path):
    """The message says what is missing."""
    net = build_model("mlp", sample_shape=(5,), classes=4)
    bundle = export_bundle(
        net, tmp_path, model="mlp", sample_shape=(5,), classes=4, pruning={"method": "none"}, cost=cost
    )
    with pytest.raises(BundleError, match="no gates"):
        open_gates(bundle)


class Mixed(torch.nn.Module):
    """A transposed convolution, and a head per unit of eight features over four tokens."""

    def __init__(self):
        super().__init__()
        self.down = torch.nn.Conv1d(3, 10, 3, 2, 1)
        self.up = torch.nn.ConvTranspose1d(10, 12, 2, 2)
        self.query, self.value = torch.nn.Linear(12, 24), torch.nn.Linear(12, 24)
        self.key = torch.nn.Linear(12, 24, bias=False)  # softmax would not see it
        self.mix, self.head = torch.nn.Linear(24, 12), torch.nn.Linear(12, 4)

    def forward(self, x):
        """Classify sequences (n, 3, 4)."""
        x = self.up(torch.relu(self.down(x))).transpose(1, 2)
        q, k, v = (p(x).reshape(-1, 4, 3, 8).transpose(1, 2) for p in (self.query, self.key, self.value))
        mixed = (q @ k.transpose(2, 3)).div(8**0.5).softmax(-1) @ v
        return self.head((x + self.mix(mixed.transpose(1, 2).reshape(-1, 4, 24))).mean(1))


def test_gates_of_heads_and_of_transposed_layers(tmp_path):
    """Also there a closed gate is a unit whose readers see zero, and scores rank units as autograd does."""
    torch.manual_seed(3)
    net, shape = Mixed(), (3, 4)
    structure = declare_structure(
        net,
        [
            Coupling("low", 10, writes=("down",), reads=("up",)),
            Coupling("heads", 3, writes=("query", "key", "value"), reads=("mix",)),
        ],
        sample_shape=shape,
    )
    bundle = export_gated_bundle(
        net, tmp_path, structure, model="mixed", sample_shape=shape, classes=4, cost=cost
    )
    replica, gates = bundle.replica(), open_gates(bundle)
    forward = Forward(bundle, replica.weights, others=gates.inputs)
    x = torch.randn(40, *shape)
    for group, reader, part in (("low", net.up, (slice(4, 5),)), ("heads", net.mix, (..., slice(8, 16)))):
        unit = 4 if group == "low" else 1
        gates.inputs[f"gate.{group}"][unit] = 0
        weight = reader.weight.detach().clone()
        weight[part] = 0
        name = "up.weight" if group == "low" else "mix.weight"
        cut = functional_call(net, {name: weight}, (x,)).detach().numpy()
        assert np.abs(forward.logits(x.numpy()) - cut).max() < 1e-5
        gates.inputs[f"gate.{group}"][unit] = 1

    found = gate_scores(replica, gates, lambda: forward.logits(x.numpy()), keys=KEYS, epsilon=0.01)
    shifts = []
    for key in KEYS:
        moved = bundle.replica()
        perturb(moved.weights, moved.segments, [Term(key, 1)], epsilon=0.01)
        z = torch.from_numpy(moved.weights - replica.weights)
        shifts.append({t.name: z[t.offset : t.offset + t.size].reshape(t.shape) for t in bundle.tensors})
    exact = torch.cat(list(gate_derivatives(net, structure, x, shifts).values()))
    assert spearmanr(found.scores, exact.numpy()).statistic > 0.9
