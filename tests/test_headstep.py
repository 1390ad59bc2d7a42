"""The project's own method: exact scalars of the last layer, and what replay does with them."""

from dataclasses import replace

import numpy as np
import pytest

from edge_agent.bundle import read_bundle
from edge_agent.cohort import Cohort
from edge_agent.data import Samples
from edge_agent.estimator import estimate
from edge_agent.forward import Forward
from edge_agent.grid import Segment, plan_segments, snap
from edge_agent.head import chosen, flat_indices, head_size, outside, taking_part
from edge_agent.measure import measure
from edge_agent.noise import values
from edge_agent.optimizer import METHODS
from edge_agent.plan import RoundPlan
from edge_agent.replay import Replica, apply_record
from edge_agent.wire import RoundOpen, RoundRecord
from profiles.errors import EstimateError

SIZE = 800
HEAD = ((608, 668), (672, 678))  # a weight of 60 and a bias of 6, with a gap between


def replica() -> Replica:
    weights = np.random.default_rng(5).normal(0, 0.1, SIZE).astype(np.float32)
    segments = plan_segments(weights, [(0, 608), (608, SIZE)])
    snap(weights, segments)
    return Replica(weights, segments, tensors=((0, 600), *HEAD), head=HEAD)


def plan(round_: int = 0, *, exact: int = 20, steps: int = 1, **constants) -> RoundPlan:
    rule = METHODS["headstep"]
    return RoundPlan(round_, 7, rule.code, steps, 4, 1e-3, 0.01, rule.values(constants), exact)


def opened(asked: RoundPlan, *, batch_size: int = 8, central: bool = True) -> RoundOpen:
    return RoundOpen(asked, 1, 0, batch_size, central, False, 60_000, Cohort())


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """A small net of the project's, exported as a run exports it."""
    from pruning.export import export_bundle
    from pruning.models import build_model

    net = build_model("mlp", sample_shape=(12,), classes=5, hidden=(9,), seed=3)
    folder = tmp_path_factory.mktemp("bundle")
    return export_bundle(
        net, folder, model="mlp", sample_shape=(12,), classes=5, pruning={}, cost=lambda graph: {}
    )


@pytest.fixture(scope="module")
def samples() -> Samples:
    rng = np.random.default_rng(1)
    return Samples(rng.normal(size=(200, 12)).astype(np.float32), rng.integers(0, 5, 200))


def softmax_gradient(bundle, weights: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The last layer's gradient in float64, written out by hand."""
    named = {t.name: weights[t.offset : t.offset + t.size].reshape(t.shape) for t in bundle.tensors}
    named = {name: value.astype(np.float64) for name, value in named.items()}
    hidden = x @ named["hidden.0.weight"].T + named["hidden.0.bias"]
    features = hidden * np.clip(hidden / 6 + 0.5, 0, 1)
    logits = features @ named["head.weight"].T + named["head.bias"]
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    p[np.arange(len(y)), y] -= 1
    p /= len(y)
    return np.concatenate([(p.T @ features).ravel(), p.sum(0)])


def test_the_graph_tells_the_gradient_of_the_last_layer(bundle, samples):
    """The output of the graph agrees with a float64 gradient written out by hand."""
    weights = bundle.replica().weights
    forward = Forward(bundle, weights)
    plain = forward.loss(samples.x[:31], samples.y[:31])
    assert forward.loss(samples.x[:31], samples.y[:31], head=True) == plain

    expected = softmax_gradient(bundle, weights, samples.x[:31].astype(np.float64), samples.y[:31])
    assert bundle.head == ("head.weight", "head.bias")
    assert np.abs(forward.head_gradient() - expected).max() < 1e-6


def test_exact_scalars_are_exact_and_cost_no_forward(bundle, samples):
    """What an agent sends is the mean gradient over its P batches at the unperturbed weights."""
    from edge_agent.data import batch_indices

    here = bundle.replica()
    asked = plan(3, exact=50)
    made = measure(Forward(bundle, here.weights), samples, here, opened(asked), 2)
    gradients = []
    for batch in range(3 * 4, 4 * 4):
        rows = batch_indices(7, 2, batch, 8, 200)
        gradients.append(
            softmax_gradient(bundle, here.weights, samples.x[rows].astype(np.float64), samples.y[rows])
        )
    expected = np.mean(gradients, 0)[chosen(asked, 0, [50])]

    assert made.forwards == 8
    assert np.abs(made.scalars[0, 4:] - expected).max() < 2e-5  # epsilon**2 and float32


def test_the_error_of_exact_scalars_falls_with_epsilon_squared(bundle, samples):
    """Ten times the step of the difference means a hundred times the error, not ten."""
    here = bundle.replica()
    errors = []
    for epsilon in (3e-2, 3e-1):
        asked = replace(plan(exact=50), epsilon=epsilon)
        made = measure(Forward(bundle, here.weights), samples, here, opened(asked), 0)
        tiny = measure(Forward(bundle, here.weights), samples, here, opened(plan(exact=50)), 0)
        errors.append(np.abs(made.scalars[0, 4:] - tiny.scalars[0, 4:]).max())
    assert 30 < errors[1] / errors[0] < 300


def test_no_perturbation_moves_the_last_layer():
    """The head holds still while the body is measured, and the body's scalars are its own slopes."""
    here = replica()
    before = here.weights.copy()
    slope = np.random.default_rng(2).normal(size=SIZE)
    moved = []

    def loss() -> float:
        moved.append(here.weights - before)
        return float(slope @ (here.weights.astype(np.float64) - before))

    gradient = lambda: np.zeros(66, np.float32)
    made = estimate(here, plan(), lambda batch: loss, central=True, head_gradient=gradient)
    inside = np.concatenate([np.arange(*span) for span in HEAD])

    assert not np.any([step[inside] for step in moved])
    assert np.any([step[:600] for step in moved])
    body = np.ones(SIZE)
    body[inside] = 0
    expected = [(slope * body) @ values(key, 0, SIZE) for key in plan().keys(0)]
    assert np.allclose(made.scalars[0, :4], expected, atol=0.05)


def test_replay_agrees_with_a_float64_reference():
    """Body by the normalised mean of G z, head coordinates by head_rate times their exact scalars."""
    here = replica()
    weights, mean, weight = here.weights.astype(np.float64), 0.0, 0.0
    rng = np.random.default_rng(9)
    inside = np.concatenate([np.arange(*span) for span in HEAD])
    for round_ in range(10):
        asked = plan(round_, exact=30, steps=2, smoothing=0.8, head_rate=0.3)
        scalars = (rng.normal(0, 3, (2, 34)) * np.r_[np.ones(4), np.full(30, 0.05)]).astype(np.float32)
        apply_record(here, RoundRecord(asked, 1, False, scalars, 0), check=False)
        mean = 0.8 * mean + 0.2 * float(np.mean(scalars[:, :4].astype(np.float64) ** 2))
        weight = 0.8 * weight + 0.2
        for step in range(2):
            z = np.stack([values(key, 0, SIZE) for key in asked.keys(step)]).astype(np.float64)
            z[:, inside] = 0
            weights -= asked.learning_rate / np.sqrt(mean / weight) * scalars[step, :4] @ z / 4
            taken = inside[chosen(asked, step, [66])]
            weights[taken] -= np.float32(0.3) * scalars[step, 4:].astype(np.float64)
    weights = np.clip(weights, -3, 3)
    assert np.abs(here.weights - weights).max() < 1e-5


def test_an_estimate_with_private_head_moves_leaves_every_bit():
    """Three local steps move the head privately, by less and by far more than its grid holds."""
    for size in (1e-3, 1e6):
        here = replica()
        before = here.digest()
        gradient = lambda size=size: np.full(66, size, np.float32)
        made = estimate(here, plan(steps=3), lambda batch: lambda: 1.0, central=True, head_gradient=gradient)
        assert made.scalars.shape == (3, 24)
        assert here.digest() == before


def test_every_coordinate_has_its_turn():
    """In ten rounds of thirteen out of sixty-five, each coordinate is taken twice, in an unlike order."""
    rounds = [chosen(plan(round_, exact=13), 0, [65]) for round_ in range(10)]

    assert sorted(np.concatenate(rounds).tolist()) == sorted(2 * list(range(65)))
    assert not np.array_equal(np.concatenate(rounds[:5]), np.concatenate(rounds[5:]))


def test_coordinates_are_golden():
    """Which coordinates a key means never changes: a log is replayed by it."""
    assert chosen(plan(2, exact=6), 0, [66]).tolist() == GOLDEN
    assert chosen(plan(exact=66), 0, [66]).tolist() != list(range(66))
    with pytest.raises(ValueError, match="67"):
        chosen(plan(exact=67), 0, [66])


GOLDEN = [57, 27, 3, 58, 4, 64]


def test_indices_skip_the_gap_between_tensors():
    """Coordinate 60 of the layer is the first of its bias."""
    assert head_size(HEAD) == 66
    assert flat_indices(np.array([0, 59, 60, 65]), HEAD).tolist() == [608, 667, 672, 677]


def test_the_body_is_what_the_head_is_not():
    """Segments without the head cover the rest, each element once."""
    left = outside([Segment(0, 640, 2), Segment(640, SIZE, 4)], HEAD)

    assert left == [Segment(0, 608, 2), Segment(668, 672, 4), Segment(678, SIZE, 4)]
    assert outside([Segment(0, 10, 2)], []) == [Segment(0, 10, 2)]


def test_a_graph_without_that_gradient_is_refused():
    """An agent whose bundle tells no gradient reports that it failed, and stays as it is."""
    here = replace(replica(), head=())
    before = here.digest()
    with pytest.raises(EstimateError, match="last layer"):
        estimate(here, plan(), lambda batch: lambda: 0.0, central=True)
    assert here.digest() == before


def test_a_gradient_that_is_not_finite_is_refused():
    """Not a number among the exact scalars is an error of the estimate, and is undone."""
    here = replica()
    before = here.digest()
    gradient = lambda: np.full(66, np.nan, np.float32)
    with pytest.raises(EstimateError, match="exact scalar"):
        estimate(here, plan(), lambda batch: lambda: 0.0, central=True, head_gradient=gradient)
    assert here.digest() == before


def test_a_read_bundle_knows_its_head(bundle):
    """The manifest keeps which tensors the graph's gradient is of, and the replica knows where they lie."""
    again = read_bundle(bundle.folder).replica()
    tensors = {tensor.name: tensor for tensor in bundle.tensors}

    assert [stop - start for start, stop in again.head] == [45, 5]
    assert again.head[0][0] == tensors["head.weight"].offset


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A net with a layer before its last two, and the net itself."""
    from pruning.export import export_bundle
    from pruning.models import build_model

    net = build_model("mlp", sample_shape=(12,), classes=5, hidden=(10, 9), seed=3)
    folder = tmp_path_factory.mktemp("deep")
    return net, export_bundle(
        net, folder, model="mlp", sample_shape=(12,), classes=5, pruning={}, cost=lambda graph: {}
    )


def deep_plan(round_: int = 0, *, exact: int) -> RoundPlan:
    rule = METHODS["deepstep"]
    return RoundPlan(round_, 7, rule.code, 1, 4, 1e-3, 0.01, rule.values({"head_rate": 0.5}), exact)


def test_the_graph_tells_the_gradients_of_two_layers(deep, samples):
    """Both agree with torch's reverse mode through the net, in float64."""
    import copy

    import torch

    net, bundle = deep
    weights = bundle.replica().weights
    forward = Forward(bundle, weights)
    x, y = samples.x[:31], samples.y[:31]
    assert forward.loss(x, y, head=2) == forward.loss(x, y)
    twin = copy.deepcopy(net).double()
    named = dict(twin.named_parameters())
    with torch.no_grad():
        for tensor in bundle.tensors:
            piece = weights[tensor.offset :][: tensor.size].reshape(tensor.shape)
            named[tensor.name].copy_(torch.from_numpy(piece.astype(np.float64)))
    loss = torch.nn.functional.cross_entropy(twin(torch.from_numpy(x).double()), torch.from_numpy(y))
    wanted = [named[name] for name in (*bundle.head, *bundle.hidden)]
    expected = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, wanted)]).numpy()

    assert bundle.hidden == ("hidden.1.weight", "hidden.1.bias")
    assert forward.loss(x, y, head=2) == pytest.approx(loss.item(), rel=1e-5)
    assert np.abs(forward.head_gradient() - expected).max() < 1e-6
    forward.loss(x, y, head=1)
    assert np.abs(forward.head_gradient() - expected[:50]).max() < 1e-6


@pytest.mark.parametrize("activation", ["hardswish", "relu", "gelu", "silu", "tanh"])
def test_the_slope_of_every_known_activation_is_its_derivative(activation):
    """To 1e-6 of automatic differentiation, between the kinks."""
    import torch

    from pruning.exact import ACTIVATIONS

    function, slope = ACTIVATIONS[activation]
    a = torch.linspace(-4.03, 4.02, 301, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(function(a).sum(), a)
    assert (slope(a) - expected).abs().max() < 1e-6


def test_a_net_of_two_layers_keeps_one_to_be_perturbed(bundle):
    """Where the layer before the last is the first, its gradient is not told: nothing would be left."""
    assert bundle.hidden == ()
    assert deep_plan(exact=7).exact == 7
    assert bundle.replica().exact_layers(deep_plan(exact=7)) == [bundle.replica().head]


def test_the_layer_before_takes_part_where_it_has_its_turn_often_enough(deep):
    """With a hundred rounds for a turn at most; else it is perturbed, and all is as with one layer."""
    _, bundle = deep
    here = bundle.replica()
    assert [taking_part(n, [330, 25120]) for n in (64, 330, 581, 582, 25450)] == [1, 1, 1, 2, 2]
    assert here.exact_layers(deep_plan(exact=50)) == [here.head]
    assert here.exact_layers(deep_plan(exact=51)) == [here.head, here.hidden]
    one = replace(deep_plan(exact=50), method=METHODS["headstep"].code)
    assert here.reach(deep_plan(exact=50)) == here.reach(one)


def test_the_last_layer_moves_whole_and_the_one_before_by_turns():
    """Of 70 scalars the last layer's 50 coordinates have one each; the others each have their turn."""
    taken = chosen(deep_plan(exact=70), 0, [50, 100])

    assert sorted(taken[:50].tolist()) == list(range(50))
    turns = np.concatenate([chosen(deep_plan(r, exact=70), 0, [50, 100])[50:] for r in range(5)])
    assert sorted(turns.tolist()) == list(range(50, 150))


def test_two_layers_are_replayed_as_a_float64_reference(deep):
    """Their coordinates by head_rate times their exact scalars; the body, which is the rest, by its own."""
    _, bundle = deep
    here = bundle.replica()
    weights, mean, weight = here.weights.astype(np.float64), 0.0, 0.0
    inside = np.concatenate([np.arange(*span) for span in (*here.head, *here.hidden)])
    rng = np.random.default_rng(9)
    for round_ in range(10):
        asked = deep_plan(round_, exact=60)
        scalars = (rng.normal(0, 3, (1, 64)) * np.r_[np.ones(4), np.full(60, 0.05)]).astype(np.float32)
        apply_record(here, RoundRecord(asked, 1, False, scalars, 0), check=False)
        mean = 0.9 * mean + 0.1 * float(np.mean(scalars[0, :4].astype(np.float64) ** 2))
        weight = 0.9 * weight + 0.1
        z = np.stack([values(key, 0, bundle.size) for key in asked.keys(0)]).astype(np.float64)
        z[:, inside] = 0
        weights -= asked.learning_rate / np.sqrt(mean / weight) * scalars[0, :4] @ z / 4
        taken = inside[chosen(asked, 0, [50, 99])]
        weights[taken] -= np.float32(0.5) * scalars[0, 4:].astype(np.float64)
    assert np.abs(weights - bundle.replica().weights).max() > 0.02
    assert np.abs(here.weights - weights).max() < 1e-5


def test_deep_scalars_are_exact(deep, samples):
    """What an agent sends of two layers is the mean gradient over its batches, and changes no bit."""
    _, bundle = deep
    here = bundle.replica()
    before = here.digest()
    asked = deep_plan(3, exact=149)
    forward = Forward(bundle, here.weights)
    made = measure(forward, samples, here, opened(asked), 2)
    from edge_agent.data import batch_indices

    gradients = []
    for batch in range(3 * 4, 4 * 4):
        rows = batch_indices(7, 2, batch, 8, 200)
        forward.loss(samples.x[rows], samples.y[rows], head=2)
        gradients.append(forward.head_gradient().copy())
    expected = np.mean(gradients, 0)[chosen(asked, 0, [50, 99])]

    assert np.abs(made.scalars[0, 4:] - expected).max() < 2e-5
    assert here.digest() == before
