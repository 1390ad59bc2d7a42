"""Tests of pruning.export: the graph's contract, and its agreement with torch."""

import hashlib
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn

from edge_agent.bundle import read_bundle
from edge_agent.forward import Forward
from profiles.cost import graph_cost
from profiles.errors import ModelError
from pruning.export import TOLERANCE, export_graph
from pruning.fold import fold_shapes
from pruning.models import build_model, standardisation
from pruning.prune import prune_model, write_pruned

NETS = {
    "mlp": (64,),
    "lenet": (1, 28, 28),
    "resnet20": (3, 16, 16),
    "wrn10_2": (3, 16, 16),
    "dscnn": (1, 49, 10),
}


def free(graph):
    """Stand in for a reader of costs: the file's length."""
    return {"forward_flops": len(graph)}


@pytest.mark.parametrize("name", NETS)
def test_graph_keeps_the_contract(name):
    """Inputs: x, y and all parameters; outputs: loss, correct, logits, gradients; no weight is fixed."""
    net = build_model(name, sample_shape=NETS[name], classes=10)
    graph = onnx.load_model_from_string(export_graph(net, sample_shape=NETS[name], classes=10).graph).graph
    names = [k for k, _ in net.named_parameters()]
    outputs = ["loss", "correct", "logits", "head_gradient"]
    outputs += ["hidden_gradient"] * (name in ("mlp", "lenet"))  # the others pool before their last layer

    assert [i.name for i in graph.input] == ["x", "y", *names]
    assert [o.name for o in graph.output] == outputs
    constants = {i.name: int(np.prod(i.dims)) for i in graph.initializer}
    assert not set(constants) & set(names)
    assert max(constants.values()) <= max(64, 2 * NETS[name][0])  # standardisation and shapes only


@pytest.mark.parametrize("name", NETS)
def test_bundle_computes_what_torch_computes(name, tmp_path):
    """Loss, correct answers and logits of the written bundle equal torch's, at raw inputs, for any batch."""
    shape = NETS[name]
    raw = np.random.default_rng(1).normal(40, 9, (13, *shape)).astype(np.float32)
    pruned = prune_model(
        name, sample_shape=shape, classes=10, method="uniform", density=0.4, standardise=standardisation(raw)
    )
    bundle = write_pruned(pruned, tmp_path / "bundle", cost=free)
    weights = bundle.replica().weights
    with torch.no_grad():  # the bundle's weights lie on a grid
        for tensor, parameter in zip(bundle.tensors, pruned.module.parameters(), strict=True):
            piece = weights[tensor.offset : tensor.offset + tensor.size].reshape(tensor.shape)
            assert np.abs(parameter.numpy() - piece).max() < 1e-6
            parameter.copy_(torch.from_numpy(piece.copy()))
    y = np.arange(13) % 10
    for n in (1, 5, 13):
        logits = pruned.module(torch.from_numpy(raw[:n])).detach()
        loss, correct = Forward(bundle, weights).evaluate(raw[:n], y[:n])
        expected = float(nn.functional.cross_entropy(logits, torch.from_numpy(y[:n])))
        assert loss == pytest.approx(expected, abs=TOLERANCE * max(1, float(logits.abs().max())))
        assert correct == int((logits.argmax(1).numpy() == y[:n]).sum())


def test_manifest_tells_both_sizes(tmp_path):
    """The manifest names method, density and the cost of the dense net beside that of the narrow one."""
    pruned = prune_model("lenet", sample_shape=(1, 14, 14), classes=10, method="uniform", density=0.3)
    write_pruned(pruned, tmp_path, cost=free)
    bundle = read_bundle(tmp_path)

    assert bundle.model == "lenet"
    assert bundle.params == pruned.params == bundle.pruning["params"]
    assert bundle.pruning["method"] == "uniform"
    assert bundle.pruning["params_dense"] == pruned.params_dense > bundle.params
    assert bundle.pruning["forward_flops_dense"] > 0


def test_equal_tensors_are_not_merged():
    """Two norms whose weights are all ones stay two inputs, each with its own influence."""
    net = nn.Sequential(
        nn.Linear(4, 8), nn.LayerNorm(8), nn.Hardswish(), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3)
    )
    exported = export_graph(net, sample_shape=(4,), classes=3)
    assert list(exported.weights) == [name for name, _ in net.named_parameters()]
    session = ort.InferenceSession(exported.graph, providers=["CPUExecutionProvider"])
    feeds = {"x": np.ones((2, 4), np.float32), "y": np.zeros(2, np.int64)}
    base = session.run(["loss"], {**feeds, **exported.weights})[0]
    moved = {
        k: session.run(["loss"], {**feeds, **exported.weights, k: exported.weights[k] + 1})[0]
        for k in ("1.bias", "4.bias")
    }
    assert base != moved["1.bias"] != moved["4.bias"] != base


def test_bytes_are_the_same_in_another_process():
    """The same net exported in two fresh processes is the same file."""
    code = (
        "import hashlib; from pruning.models import build_model; from pruning.export import export_graph;"
        "net = build_model('lenet', sample_shape=(1, 8, 8), classes=3, seed=1);"
        "print(hashlib.sha256(export_graph(net, sample_shape=(1, 8, 8), classes=3).graph).hexdigest())"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    net = build_model("lenet", sample_shape=(1, 8, 8), classes=3, seed=2)
    here = hashlib.sha256(export_graph(net, sample_shape=(1, 8, 8), classes=3).graph).hexdigest()
    assert {run.stdout.strip() for run in runs} == {here}  # and the seed is not in the graph


def test_export_leaves_the_net_alone():
    """Values and training mode of the exported module stay as they were."""
    net = build_model("mlp", sample_shape=(6,), classes=3)
    net.train()
    before = [p.clone() for p in net.parameters()]
    export_graph(net, sample_shape=(6,), classes=3)
    assert net.training
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


class Sloppy(nn.Module):
    """A net with one fault, by name."""

    def __init__(self, fault):
        super().__init__()
        self.fault = fault
        self.body = nn.Linear(4, 3)
        self.spare = nn.Parameter(torch.ones(5))

    def forward(self, x):
        """Run the body, with the fault."""
        out = self.body(x)
        if self.fault == "no influence":
            return out + 0.0 * self.spare.sum()
        if self.fault == "batch":
            return out + self.spare.sum() * x.detach().clone().numpy().shape[0]
        if self.fault == "state":
            return out + self.spare.sum() + torch.rand(1)
        return out


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("unused", "does not read spare"),
        ("no influence", "does not depend on spare"),
        ("batch", "differ by"),
        ("state", "differ by"),
    ],
)
def test_nets_that_the_graph_cannot_follow_are_refused(fault, message):
    """A dead parameter is named; a graph that disagrees with torch gives the difference."""
    with pytest.raises(ModelError, match=message):
        export_graph(Sloppy(fault), sample_shape=(4,), classes=3)


def test_frozen_parameters_become_constants():
    """A parameter that needs no gradient is no input."""
    net = Sloppy("frozen")
    net.spare.requires_grad_(False)
    assert list(export_graph(net, sample_shape=(4,), classes=3).weights) == ["body.weight", "body.bias"]


class Leaky(nn.Module):
    """Linear layers of which one, with large biases, hides that its activation is no ReLU."""

    def __init__(self):
        super().__init__()
        self.first, self.inner, self.head = nn.Linear(6, 5), nn.Linear(5, 2), nn.Linear(2, 3)
        nn.init.constant_(self.inner.bias, 30.0)

    def forward(self, x):
        """Classify rows."""
        return self.head(nn.functional.leaky_relu(self.inner(torch.relu(self.first(x)))))


class Rerun(nn.Module):
    """A net whose last layer ran before, on its own output."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(6, 3), nn.Linear(3, 3)

    def forward(self, x):
        """Classify rows."""
        return self.head(torch.relu(self.head(self.first(x))))


class Lent(nn.Module):
    """A net whose last layer lends its weight to the first."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 3)
        self.first, self.inner = nn.Linear(6, 3, bias=False), nn.Linear(3, 6)
        self.first.weight = self.head.weight

    def forward(self, x):
        """Classify rows."""
        return self.head(self.inner(torch.relu(self.first(x))))


class Shut(nn.Module):
    """A net whose middle is shut by a ReLU at the weights that it has."""

    def __init__(self):
        super().__init__()
        self.first, self.inner, self.head = nn.Linear(6, 2), nn.Linear(2, 2), nn.Linear(2, 3)
        nn.init.constant_(self.first.bias, -9.0)

    def forward(self, x):
        """Classify rows."""
        return self.head(torch.tanh(self.inner(torch.relu(self.first(x)))))


def test_a_shut_unit_is_no_unused_tensor():
    """A tensor that does not move the loss at one set of weights, but at others, is no error."""
    exported = export_graph(Shut(), sample_shape=(6,), classes=3)
    assert list(exported.weights)[:2] == ["first.weight", "first.bias"]


@pytest.mark.parametrize(
    ("net", "head", "hidden"),
    [(Leaky, ("head.weight", "head.bias"), ()), (Rerun, (), ()), (Lent, (), ())],
)
def test_only_sure_gradients_are_told(net, head, hidden):
    """An activation that only looks like a known one, and a last layer used twice, have no exact gradient."""
    exported = export_graph(net(), sample_shape=(6,), classes=3)
    assert (exported.head, exported.hidden) == (head, hidden)


class ReadsShapes(nn.Module):
    """An image in patches beside a class token, torch's attention, and reshapes by what ``x.shape`` says."""

    def __init__(self):
        super().__init__()
        self.patch, self.token = nn.Conv2d(3, 16, 4, 4), nn.Parameter(torch.randn(1, 1, 16))
        self.block = nn.TransformerEncoderLayer(16, 4, 40, dropout=0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        """Classify images."""
        x = self.patch(x)
        n, c, h, w = x.shape
        x = x.reshape(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h * w).transpose(1, 2)
        x = torch.cat([self.token.expand(n, -1, -1), x], 1)
        return self.head(self.block(x)[:, 0])


def test_shapes_that_a_net_reads_are_folded():
    """Only the batch is left to be read: the cost can be told, and outputs agree at every batch size."""
    exported = export_graph(ReadsShapes(), sample_shape=(3, 8, 8), classes=5)
    assert exported.error <= TOLERANCE  # at batches of 1, 3 and 8
    products = 4 * 16 * 48 + 5 * (4 * 16 * 16 + 2 * 16 * 40) + 2 * 5 * 5 * 16 + 16 * 5
    assert graph_cost(exported.graph).forward_flops == 2 * products
    nodes = onnx.load_model_from_string(exported.graph).graph.node
    assert sum(node.op_type == "Reshape" for node in nodes) > 5


def test_graphs_without_computed_shapes_keep_their_bytes():
    """A graph that computes no shape, as all reference nets', is returned as it is."""
    net = build_model("resnet20", sample_shape=(3, 8, 8), classes=4)
    graph = export_graph(net, sample_shape=(3, 8, 8), classes=4, verify=False).graph
    assert fold_shapes(graph, sample_shape=(3, 8, 8)) == graph
