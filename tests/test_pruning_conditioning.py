"""Tests of pruning.conditioning: the evenness of a kernel, and widths that are sought by it."""

import math

import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from pruning.conditioning import evenness, kernel_spectrum, seek_widths
from pruning.models import build_model, model_structure
from pruning.modules import Coupling, declare_structure
from pruning.plan import Allowance
from pruning.prune import prune_model
from pruning.prune_module import prune_module

LENET = {"sample_shape": (1, 28, 28), "classes": 10}
# Widths of LeNet (conv1, conv2, fc1) at a quarter of its parameters, and their accuracy on validation samples
# after zeroth-order training, the mean of three seeds: docs/log.md, 2026-11-21.
TRAINED = (
    *(((4, 4, 31), 80.8), ((6, 4, 30), 79.8), ((8, 4, 29), 79.4), ((6, 6, 20), 78.6), ((8, 6, 19), 78.5)),
    *(((4, 10, 12), 77.2), ((4, 6, 20), 77.1), ((4, 8, 15), 76.3), ((6, 12, 9), 75.4), ((6, 10, 11), 75.2)),
    *(((4, 12, 10), 75.1), ((8, 10, 11), 75.1), ((6, 8, 15), 74.3), ((8, 8, 14), 74.2), ((4, 16, 7), 72.7)),
    *(((8, 12, 9), 71.9), ((6, 16, 7), 70.0)),
)


def lenet_evenness(widths):
    """Return the evenness of a LeNet."""
    return evenness(
        lambda w: build_model("lenet", widths=w, **LENET), widths, sample_shape=(1, 28, 28), draws=3
    )


def test_the_spectrum_of_a_linear_net():
    """Without a bias it is that of the inputs' Gram matrix, once for each difference of classes."""
    torch.manual_seed(0)
    x = torch.randn(5, 8)
    gram = torch.linalg.eigvalsh((x @ x.T).double())
    wanted = (gram / gram.mean()).repeat_interleave(3)
    found = kernel_spectrum(nn.Linear(8, 4, bias=False), x)
    assert torch.allclose(found, wanted, atol=1e-5)


def test_an_even_kernel_has_the_highest_merit():
    """Orthogonal inputs of one length make all eigenvalues of a linear net 1, whatever its outputs' scale."""
    net = nn.Sequential(nn.Linear(6, 3, bias=False))
    assert torch.allclose(
        kernel_spectrum(net, 7 * torch.eye(6)), torch.ones(12, dtype=torch.float64), atol=1e-5
    )


def test_a_net_of_one_output_is_refused():
    """It has no difference of classes."""
    with pytest.raises(ValueError, match="one output"):
        kernel_spectrum(nn.Linear(3, 1), torch.randn(2, 3))


def test_evenness_ranks_widths_as_training_does():
    """Over 17 LeNets of equal size its Spearman with the accuracies that training reached is above 0.7."""
    merits = [lenet_evenness(dict(zip(("conv1", "conv2", "fc1"), w, strict=True))) for w, _ in TRAINED]
    assert spearmanr(merits, [accuracy for _, accuracy in TRAINED]).statistic > 0.7


@pytest.mark.parametrize("unit", ["params", "macs"])
def test_widths_of_an_even_kernel(unit):
    """Under either budget the kernel is evener than that of one factor for all widths, at the same cost."""
    structure = model_structure("mlp", sample_shape=(64,), classes=10)
    options = {"sample_shape": (64,), "classes": 10, "draws": 3}
    allowance = Allowance(unit, 0.25 * getattr(structure, unit)(structure.dense), tolerance=0.02)
    found = {
        method: prune_model("mlp", method=method, allowance=allowance, **options)
        for method in ("uniform", "ntk-widths")
    }
    merits = {
        method: evenness(
            lambda w: build_model("mlp", sample_shape=(64,), classes=10, widths=w),
            net.widths,
            sample_shape=(64,),
            draws=3,
        )
        for method, net in found.items()
    }
    assert merits["ntk-widths"] > merits["uniform"] + 0.1
    assert all(0.97 * allowance.amount <= getattr(net, unit) <= allowance.amount for net in found.values())


def test_a_user_is_told_how_far_the_search_is():
    """Progress never falls and ends at the end; no more nets are looked at than asked."""
    structure = model_structure("lenet", **LENET)
    seen, looked = [], []

    def allocate(fractions):
        return {name: max(1, round(100 * fraction)) for name, fraction in fractions.items()}

    def merit(widths):
        looked.append(dict(widths))
        return -math.dist([math.log(w) for w in widths.values()], [math.log(w) for w in (100, 6, 25)])

    widths = seek_widths(structure, allocate, merit, most=40, progress=lambda *step: seen.append(step))
    assert widths == {"conv1": 100, "conv2": 6, "fc1": 25}
    assert len(looked) <= 40
    assert seen == sorted(seen)
    assert seen[-1] == (40, 40)


def test_a_module_of_ones_own():
    """With its couplings declared, any module is narrowed to half of its parameters by the same search."""
    net = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 5))
    couplings = [
        Coupling("first", 24, writes=("0",), reads=("2",)),
        Coupling("second", 16, writes=("2",), reads=("4",)),
    ]
    structure = declare_structure(net, couplings, sample_shape=(12,))
    options = {"sample_shape": (12,), "classes": 5, "name": "net", "method": "ntk-widths", "density": 0.5}
    found = prune_module(net, structure=structure, draws=2, **options)
    assert 0.95 * 0.5 <= found.params / found.params_dense <= 0.5
    assert sum(p.numel() for p in found.module.parameters()) == found.params
    assert found.widths["second"] / 16 > found.widths["first"] / 24  # no bottleneck before the classes
