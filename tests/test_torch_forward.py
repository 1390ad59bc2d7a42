"""Forward gradients, Spry and hybrid: derivatives on the board, against those of the net itself."""

import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from edge_agent.bundle import read_bundle
from edge_agent.cohort import Cohort
from edge_agent.data import Samples, batch_indices, to_inputs
from edge_agent.forward import Forward
from edge_agent.measure import forward_for, measure, refuse_without_torch
from edge_agent.noise import values
from edge_agent.optimizer import METHODS
from edge_agent.plan import RoundPlan
from edge_agent.replay import apply_record
from edge_agent.torch_forward import TorchForward
from edge_agent.wire import RoundOpen, RoundRecord
from profiles.budget import predict_peak_mib
from profiles.cost import graph_cost
from profiles.errors import ConfigError
from pruning.export import export_bundle
from pruning.models import build_model

NETS = {
    "mlp": (12,),
    "lenet": (1, 28, 28),
    "resnet20": (3, 16, 16),
    "wrn10_2": (3, 16, 16),
    "dscnn": (1, 49, 10),
}
CLASSES = 5


def make(model: str, folder: Path):
    shape = NETS[model]
    net = build_model(
        model, sample_shape=shape, classes=CLASSES, hidden=(9, 8) if model == "mlp" else None, seed=3
    )
    bundle = export_bundle(
        net, folder, model=model, sample_shape=shape, classes=CLASSES, pruning={}, cost=lambda graph: {}
    )
    return net, bundle


@pytest.fixture(scope="module")
def mlp(tmp_path_factory):
    """A small net of the project's and its bundle."""
    return make("mlp", tmp_path_factory.mktemp("mlp"))


@pytest.fixture(scope="module")
def samples() -> Samples:
    rng = np.random.default_rng(1)
    return Samples(rng.normal(size=(200, 12)).astype(np.float32), rng.integers(0, CLASSES, 200))


def plan(method: str, round_: int = 0, *, perturbations: int = 4, exact: int = 0, **constants) -> RoundPlan:
    rule = METHODS[method]
    return RoundPlan(round_, 7, rule.code, 1, perturbations, 1e-3, 0.01, rule.values(constants), exact)


def opened(asked: RoundPlan) -> RoundOpen:
    return RoundOpen(asked, 1, 0, 16, True, False, 60_000, Cohort())


def gradient(net, bundle, weights: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The whole gradient by torch's reverse mode through the net itself, in float64, laid out flat."""
    net = build_twin(net).double()
    named = dict(net.named_parameters())
    with torch.no_grad():
        for tensor in bundle.tensors:
            piece = weights[tensor.offset : tensor.offset + tensor.size].reshape(tensor.shape)
            named[tensor.name].copy_(torch.from_numpy(piece.astype(np.float64)))
    loss = functional.cross_entropy(net(torch.from_numpy(x).double()), torch.from_numpy(y))
    found = torch.autograd.grad(loss, [named[tensor.name] for tensor in bundle.tensors])
    flat = np.zeros(bundle.size)
    for tensor, piece in zip(bundle.tensors, found, strict=True):
        flat[tensor.offset : tensor.offset + tensor.size] = piece.numpy().ravel()
    return flat


def build_twin(net):
    import copy

    return copy.deepcopy(net)


@pytest.mark.parametrize("model", NETS)
def test_torch_runs_the_graph_of_every_reference_net(model, tmp_path):
    """Its loss is ONNX Runtime's, its slope z . grad L of the net itself, its last gradient autograd's."""
    net, bundle = make(model, tmp_path)
    here = bundle.replica()
    rng = np.random.default_rng(2)
    x = rng.normal(size=(3, *NETS[model])).astype(np.float32)
    y = rng.integers(0, CLASSES, 3)
    forward = TorchForward(bundle, here.weights, last=here.layers[-2][:1])
    z = values(plan("spry").keys(0)[0], 0, bundle.size).astype(np.float32)
    expected = gradient(net, bundle, here.weights, x, y)

    assert forward.loss(x, y) == pytest.approx(Forward(bundle, here.weights).loss(x, y), rel=2e-5)
    loss, slope = forward.slope(x, y, z)
    assert loss == pytest.approx(forward.loss(x, y), rel=1e-6)
    assert slope == pytest.approx(z.astype(np.float64) @ expected, rel=1e-3, abs=1e-4)
    forward.loss(x, y, head=True)
    ((start, stop),) = here.layers[-2][:1]
    assert np.abs(forward.head_gradient() - expected[start:stop]).max() < 1e-4 * np.abs(expected).max()


def test_a_slope_is_the_limit_of_the_central_difference(mlp):
    """The difference's error falls with epsilon squared towards the slope: four times the step, sixteen."""
    net, bundle = mlp
    here = bundle.replica()
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(20, 12)).astype(np.float32), rng.integers(0, CLASSES, 20)
    z = values(plan("spry").keys(0)[0], 0, bundle.size).astype(np.float64)
    _, slope = TorchForward(bundle, here.weights).slope(x, y, z.astype(np.float32))

    def loss(step: float) -> float:
        twin = build_twin(net).double()
        moved = here.weights.astype(np.float64) + step * z
        with torch.no_grad():
            for tensor in bundle.tensors:
                piece = moved[tensor.offset : tensor.offset + tensor.size].reshape(tensor.shape)
                dict(twin.named_parameters())[tensor.name].copy_(torch.from_numpy(piece))
            return float(functional.cross_entropy(twin(torch.from_numpy(x).double()), torch.from_numpy(y)))

    errors = [abs((loss(e) - loss(-e)) / (2 * e) - slope) for e in (0.08, 0.02)]
    assert errors[0] / errors[1] == pytest.approx(16, rel=0.1)
    assert abs((loss(1e-4) - loss(-1e-4)) / 2e-4 - slope) < 1e-5


def test_a_forward_gradient_sends_slopes_and_changes_no_bit(mlp, samples):
    """Each scalar is z . grad L of the step's batch, and the replica is only read."""
    net, bundle = mlp
    here = bundle.replica()
    before = here.digest()
    asked = plan("forward-gradient", 3)
    made = measure(forward_for(bundle, here, asked), samples, here, opened(asked), 2)
    rows = batch_indices(7, 2, 3, 16, 200)
    whole = gradient(net, bundle, here.weights, to_inputs(samples.x[rows]), samples.y[rows])

    expected = [values(key, 0, bundle.size) @ whole for key in asked.keys(0)]
    assert np.allclose(made.scalars[0], expected, rtol=1e-4, atol=1e-5)
    assert (made.forwards, here.digest()) == (12, before)


def test_spry_measures_and_moves_the_share_alone(mlp, samples):
    """With two shares, an agent's scalars are slopes along its layers; all layers have their turn."""
    net, bundle = mlp
    here = bundle.replica()
    parts = [[(0,), (2,)], [(1,)]]
    for number, round_ in ((0, 0), (1, 0), (0, 1)):
        asked = plan("spry", round_)
        share = (number + round_) % 2
        made = measure(forward_for(bundle, here, asked), samples, here, opened(asked), number)
        rows = batch_indices(7, number, round_, 16, 200)
        whole = gradient(net, bundle, here.weights, to_inputs(samples.x[rows]), samples.y[rows])
        inside = np.zeros(bundle.size)
        for (layer,) in parts[share]:
            for start, stop in here.layers[layer]:
                inside[start:stop] = 1
        expected = [(values(key, 0, bundle.size) * inside) @ whole for key in asked.keys(0)[4 * share :][:4]]
        assert np.allclose(made.scalars[0], expected, rtol=1e-4, atol=1e-5)


def test_spry_replays_as_a_float64_reference(mlp):
    """Each share's layers move by their own scalars; a share that nobody answered stays where it is."""
    _, bundle = mlp
    here = bundle.replica()
    weights = here.weights.astype(np.float64)
    rng = np.random.default_rng(5)
    for round_ in range(6):
        asked = plan("spry", round_)
        scalars = rng.normal(0, 2, (1, 8)).astype(np.float32)
        if round_ == 4:
            scalars[:, 4:] = 0
        apply_record(here, RoundRecord(asked, 1, False, scalars, 0), check=False)
        for share, layers in enumerate(([0, 2], [1])):
            z = np.stack([values(key, 0, bundle.size) for key in asked.keys(0)[4 * share :][:4]])
            step = 0.01 * scalars[0, 4 * share :][:4].astype(np.float64) @ z / 4
            for layer in layers:
                for start, stop in here.layers[layer]:
                    weights[start:stop] -= step[start:stop]
    assert np.abs(weights - bundle.replica().weights).max() > 0.02
    assert np.abs(here.weights - weights).max() < 1e-5


def test_hybrid_sends_the_exact_gradient_of_its_last_layers(mlp, samples):
    """Exact scalars of two layers are autograd's, and no perturbation moves these layers."""
    net, bundle = mlp
    here = bundle.replica()
    size = sum(stop - start for layer in here.layers[-2:] for start, stop in layer)
    asked = plan("hybrid", exact=size)
    forward = forward_for(bundle, here, asked)
    made = measure(forward, samples, here, opened(asked), 0)
    rows = batch_indices(7, 0, 0, 16, 200)
    whole = gradient(net, bundle, here.weights, to_inputs(samples.x[rows]), samples.y[rows])
    before = here.weights.copy()
    apply_record(here, RoundRecord(asked, 1, False, made.scalars, 0), check=False)

    moved = (before - here.weights).astype(np.float64)
    for layer in here.layers[-2:]:
        for start, stop in layer:
            assert np.allclose(moved[start:stop], 0.1 * whole[start:stop], rtol=1e-3, atol=2e-6)
    inside = np.ones(bundle.size)
    for layer in here.layers[-2:]:
        for start, stop in layer:
            inside[start:stop] = 0
    expected = [(values(key, 0, bundle.size) * inside) @ whole for key in asked.keys(0)]
    assert np.allclose(made.scalars[0, :4], expected, rtol=0.02, atol=0.02)  # epsilon**2 and float32


def test_layers_are_neighbours_of_one_name(mlp):
    """Weight and bias of a layer belong together, and every tensor has its layer."""
    _, bundle = mlp
    assert [[tensor.name for tensor in layer] for layer in read_bundle(bundle.folder).layers] == [
        ["hidden.0.weight", "hidden.0.bias"],
        ["hidden.1.weight", "hidden.1.bias"],
        ["head.weight", "head.bias"],
    ]


def test_a_board_without_torch_says_what_to_do(monkeypatch, mlp):
    """The refusal names the method, what is missing, and the extra to install."""
    _, bundle = mlp
    real = importlib.util.find_spec
    monkeypatch.setattr("edge_agent.measure.find_spec", lambda name: None if name == "torch" else real(name))
    with pytest.raises(ConfigError, match="`spry` needs torch") as caught:
        forward_for(bundle, bundle.replica(), plan("spry"))
    assert "torch-agent" in caught.value.hint
    assert isinstance(forward_for(bundle, bundle.replica(), plan("hiso")), Forward)
    refuse = replace(plan("hybrid"), exact=3)
    with pytest.raises(ConfigError, match="hybrid"):
        forward_for(bundle, bundle.replica(), refuse)
    monkeypatch.undo()
    refuse_without_torch("spry")


@pytest.mark.parametrize(("method", "batch"), [("spry", 8), ("hybrid", 32)])
def test_the_budget_says_what_torch_costs(method, batch, tmp_path):
    """A fresh process that measures a round stays within the predicted peak, and uses most of it."""
    _, bundle = make("lenet", tmp_path)
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "d.npz", x_train=rng.normal(size=(64, 28, 28)), y_train=rng.integers(0, CLASSES, 64))
    script = (
        "import sys; from pathlib import Path; import edge_agent.__main__\n"
        "from edge_agent.bundle import read_bundle\n"
        "from edge_agent.data import load_samples\n"
        "from edge_agent.measure import forward_for, measure\n"
        "from edge_agent.optimizer import METHODS\n"
        "from edge_agent.plan import RoundPlan\n"
        "from edge_agent.cohort import Cohort\nfrom edge_agent.wire import RoundOpen\n"
        "from profiles.memory import peak_rss_mib\n"
        "home, name, batch = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])\n"
        "bundle, rule = read_bundle(home), METHODS[name]\n"
        "exact = 100 if rule.head else 0\n"
        "plan = RoundPlan(0, 7, rule.code, 1, 4, 1e-3, 0.01, rule.values({}), exact)\n"
        "here = bundle.replica()\n"
        "samples = load_samples(home / 'd.npz', 'train', classes=5)\n"
        "asked = RoundOpen(plan, 1, 0, batch, True, False, 60000, Cohort())\n"
        "measure(forward_for(bundle, here, plan), samples, here, asked, 0)\n"
        "print(peak_rss_mib())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), method, str(batch)],
        cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=True,
    )  # fmt: skip
    cost = graph_cost(bundle.graph_path)
    predicted = predict_peak_mib(cost, batch_size=batch, autodiff=METHODS[method].autodiff).total_mib
    assert 0.75 * predicted < float(done.stdout) < 1.1 * predicted
