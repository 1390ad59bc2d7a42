"""Tests of pruning.autoflip: guidance rebuilt from scalars."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from edge_agent.estimator import estimate
from edge_agent.forward import Forward
from edge_agent.optimizer import METHODS
from edge_agent.plan import RoundPlan
from edge_agent.replay import apply_record
from edge_agent.wire import RoundRecord
from profiles.cost import graph_cost
from profiles.errors import EstimateError
from pruning.autoflip import explore, guidance, guided_masks
from pruning.prune import prune_model, write_pruned


@pytest.fixture
def bundle(tmp_path):
    """Return a bundle of an MLP with 6 features, one hidden layer and 3 classes."""
    net = prune_model("mlp", sample_shape=(6,), classes=3, hidden=(8,), method="none", seed=1)
    return write_pruned(net, tmp_path, cost=lambda graph: graph_cost(graph).as_dict())


def samples(seed):
    """Return an agent's samples, of which features 4 and 5 are always zero."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((64, 6)).astype(np.float32)
    x[:, 4:] = 0
    return x, (x[:, 0] > 0).astype(np.int64) + (x[:, 1] > 0.5)


def exploration(bundle, seed, *, rounds=3, perturbations=400):
    """Return an agent's rounds, and the replica that it had at their end."""
    replica = bundle.replica()
    forward, (x, y) = Forward(bundle, replica.weights), samples(seed)
    done = []
    for number in range(rounds):
        plan = RoundPlan(number, 9, METHODS["decomfl"].code, 1, perturbations, 1e-3, 0.05, (0.0,))
        found = estimate(replica, plan, lambda _: lambda: forward.loss(x, y), central=True).scalars
        done.append((plan, found))
        apply_record(replica, RoundRecord(plan, 0, False, found, 0), check=False)
    return done, replica


def test_an_agents_weights_are_rebuilt_bit_for_bit(bundle):
    """From its scalars alone the coordinator has the weights at which the agent itself arrived."""
    rounds, agent = exploration(bundle, 1)
    assert explore(bundle, rounds).digest() == agent.digest()


def test_guidance_is_the_mean_squared_deviation(bundle):
    """Guidance is mean_k (w_k - w_0)^2 over its largest value, whatever order the agents come in."""
    one, two = exploration(bundle, 1), exploration(bundle, 2)
    start = bundle.replica().weights.astype(np.float64)
    mean = sum((agent.weights - start) ** 2 for _, agent in (one, two)) / 2
    found = guidance(bundle, {"a": one[0], "b": two[0]})
    held = np.concatenate([np.arange(t.offset, t.offset + t.size) for t in bundle.tensors])
    assert np.allclose(found[held], mean[held] / mean[held].max(), rtol=1e-6)
    assert not np.delete(found, held).any()  # the gaps between tensors move too, and do not count
    assert np.array_equal(found, guidance(bundle, {"b": two[0], "a": one[0]}))


def test_guidance_sees_what_the_data_uses(bundle):
    """With more perturbations than weights, guidance ranks weights by the gradient they had."""
    rounds, _ = exploration(bundle, 1, rounds=1, perturbations=4000)
    found = guidance(bundle, {"a": rounds})
    net = prune_model("mlp", sample_shape=(6,), classes=3, hidden=(8,), method="none", seed=1).module
    x, y = (torch.from_numpy(v) for v in samples(1))
    torch.nn.functional.cross_entropy(net(x), y).backward()
    squared = {k: p.grad.square().reshape(-1).numpy() for k, p in net.named_parameters()}
    joined = np.concatenate([found[t.offset : t.offset + t.size] for t in bundle.tensors])
    assert spearmanr(joined, np.concatenate([squared[t.name] for t in bundle.tensors])).statistic > 0.8


def test_masks_keep_what_moved(bundle):
    """Of the first layer's weights, those of the two silent features fall first."""
    rounds, _ = exploration(bundle, 1, rounds=1, perturbations=2000)
    masks = guided_masks(bundle, {"a": rounds}, density=0.5)
    assert list(masks) == ["hidden.0.weight"]
    kept = masks["hidden.0.weight"].mean(0)
    assert float(masks["hidden.0.weight"].sum()) == 24
    assert kept[4:].max() < kept[:2].min()


def test_nobody_moved(bundle):
    """Scalars of zero leave a guidance of zero."""
    rounds = [(plan, np.zeros_like(scalars)) for plan, scalars in exploration(bundle, 1, rounds=1)[0]]
    assert not guidance(bundle, {"a": rounds}).any()


@pytest.mark.parametrize("scalars", [np.zeros((1, 3), np.float32), np.full((1, 4), np.nan, np.float32)])
def test_bad_scalars_are_refused(bundle, scalars):
    """Scalars of another shape, or that are not finite, are refused."""
    plan = RoundPlan(0, 9, METHODS["decomfl"].code, 1, 4, 1e-3, 0.05, (0.0,))
    with pytest.raises(EstimateError, match=r"asks \(1, 4\) finite ones"):
        explore(bundle, [(plan, scalars)])
