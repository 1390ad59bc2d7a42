"""Tests of pruning.federated: a fleet finds what the coordinator alone would find."""

import concurrent.futures
import multiprocessing

import numpy as np
import pytest
import torch

from edge_agent.gates import GateScores
from profiles.errors import EstimateError
from pruning.federated import federated_masks, local_draws, pack_scores, sum_gate_scores, unpack_scores
from pruning.models import build_model
from pruning.plan import find_masks
from pruning.saliency import make_probe

SHAPE = (1, 10, 10)


def probe_of(draws=8):
    """Return the probe that every worker builds for itself."""
    net = build_model("lenet", sample_shape=SHAPE, classes=5, seed=0)
    return make_probe(net, sample_shape=SHAPE, draws=draws, batch=8, seed=6)


def elsewhere(masks, step, draws):
    """Compute draws in a process of one's own, from seeds and masks alone."""
    torch.set_num_threads(1)
    return local_draws(probe_of(), {k: torch.from_numpy(v) for k, v in masks.items()}, step, draws)


def test_eight_workers_find_the_coordinators_masks():
    """With 8 workers in other processes the masks equal those of the coordinator alone, bit for bit."""
    torch.set_num_threads(1)
    alone = find_masks(probe_of(), method="ntk", density=0.2, steps=4)
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=spawn) as pool:

        def worker(masks, step, draws):
            arrays = {k: m.numpy() for k, m in masks.items()}
            return pool.submit(elsewhere, arrays, step, list(draws)).result(timeout=120)

        together = federated_masks(probe_of(), [worker] * 8, density=0.2, steps=4)
    assert together.keys() == alone.keys()
    assert all(torch.equal(together[k], alone[k]) for k in alone)


@pytest.mark.parametrize("workers", [1, 3, 8, 11])
def test_dealing_does_not_matter(workers):
    """However many share the draws, and in whatever order replies come, the masks are the same."""
    probe = probe_of(draws=5)
    alone = find_masks(probe, method="ntk", density=0.3, steps=2)

    def worker(masks, step, draws):
        return dict(reversed(local_draws(probe, masks, step, draws).items()))

    together = federated_masks(probe, [worker] * workers, density=0.3, steps=2)
    assert all(torch.equal(together[k], alone[k]) for k in alone)


def test_lost_worker_is_replaced():
    """A worker that returns nothing changes nothing: the coordinator computes its draws."""
    probe = probe_of(draws=4)
    alone = find_masks(probe, method="ntk", density=0.3, steps=2)
    workers = [lambda *work: {}, lambda *work: local_draws(probe, *work)]
    together = federated_masks(probe, workers, density=0.3, steps=2)
    assert all(torch.equal(together[k], alone[k]) for k in alone)


def test_packed_scores_come_back():
    """Four bytes per weight that stands; what fell comes back as zero."""
    masks = {"a": torch.tensor([[1.0, 0.0], [1.0, 1.0]]), "b": torch.tensor([0.0, 1.0])}
    scores = {"a": torch.tensor([[1.5, 9.0], [-2.0, 3.0]]), "b": torch.tensor([9.0, 4.0])}
    packed = pack_scores(scores, masks)
    assert len(packed) == 16
    found = unpack_scores(packed, masks)
    assert found["a"].tolist() == [[1.5, 0.0], [-2.0, 3.0]]
    assert found["b"].tolist() == [0.0, 4.0]


@pytest.mark.parametrize("packed", [b"", b"123", b"\0" * 20, np.full(4, np.nan, "<f4").tobytes()])
def test_bad_scores_are_refused(packed):
    """Scores of another length or with NaN are refused."""
    masks = {"a": torch.ones(4)}
    with pytest.raises(EstimateError, match="expected 16 finite ones"):
        unpack_scores(packed, masks)


def test_gate_scores_are_weighted_by_inputs():
    """The sum over agents weighs each by its inputs and does not depend on who answers first."""
    one = GateScores(np.array([1.0, 2.0], np.float32), samples=30, forwards=9)
    two = GateScores(np.array([5.0, 6.0], np.float32), samples=10, forwards=9)
    found = sum_gate_scores([("b", two), ("a", one)])
    assert found.tolist() == [2.0, 3.0]
    assert np.array_equal(found, sum_gate_scores([("a", one), ("b", two)]))


def test_gate_scores_of_another_net_are_refused():
    """An agent whose scores have another length is named."""
    good = GateScores(np.zeros(3, np.float32), samples=3, forwards=9)
    bad = GateScores(np.zeros(2, np.float32), samples=3, forwards=9)
    with pytest.raises(EstimateError, match=r"pi-7 sent \(2,\) scores"):
        sum_gate_scores([("pi-1", good), ("pi-7", bad)])


def test_draws_are_summed_in_their_order():
    """Draws 0, 1, 2 are summed in this order even if 0 and 2 come first."""
    net = torch.nn.Sequential(torch.nn.Linear(1, 2, bias=False), torch.nn.Linear(2, 1))
    probe = make_probe(net, sample_shape=(1,), draws=3)
    # In order the first weight's scores cancel to 0 in float64; with draw 1 last they leave 1.
    scores = {0: [1e16, 0.5], 1: [1.0, 0.0], 2: [-1e16, 0.0]}

    def worker(masks, step, draws):
        return {draw: np.array(scores[draw], "<f4").tobytes() for draw in draws}

    masks = federated_masks(probe, [worker, worker], density=0.5, steps=1)
    assert masks["0.weight"].reshape(-1).tolist() == [0.0, 1.0]
