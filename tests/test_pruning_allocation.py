"""Tests of pruning.allocation and pruning.prune."""

import pytest

from profiles.errors import ModelError
from pruning.allocation import allocate, fractions_from_densities
from pruning.models import model_structure
from pruning.prune import prune_model

NETS = {
    "mlp": (64,),
    "lenet": (1, 28, 28),
    "resnet20": (3, 32, 32),
    "wrn10_2": (3, 32, 32),
    "dscnn": (1, 49, 10),
}


def structure_of(name):
    """Return the structure of a net of ten classes."""
    return model_structure(name, sample_shape=NETS[name], classes=10)


@pytest.mark.parametrize("name", ["lenet", "resnet20", "dscnn"])
def test_densities_of_a_narrow_net_give_its_widths_back(name):
    """Least squares recovers the fractions that made the densities, exactly where a net has them."""
    structure = structure_of(name)
    wanted = {g.name: 0.9 - 0.05 * i for i, g in enumerate(structure.groups)}
    densities = {}
    for layer in structure.layers:
        densities[layer.name] = 1.0
        for group in layer.groups:
            densities[layer.name] *= wanted[group]
    found = fractions_from_densities(structure, densities)
    assert found == pytest.approx(wanted, rel=1e-3)


def test_no_group_grows():
    """A layer that wants to stay whole never makes a group wider than the dense net."""
    structure = structure_of("lenet")
    densities = {"conv1.weight": 0.05, "conv2.weight": 1.0, "fc1.weight": 0.2}
    assert all(f <= 1 for f in fractions_from_densities(structure, densities).values())


@pytest.mark.parametrize("name", ["resnet20", "wrn10_2", "dscnn"])
@pytest.mark.parametrize("density", [0.5, 0.25, 0.15])
@pytest.mark.parametrize("unit", ["params", "macs"])
def test_budget_is_met_within_one_percent(name, density, unit):
    """Parameters or multiply-accumulates lie at most 1 % under the budget, and never above."""
    structure = structure_of(name)
    spend = getattr(structure, unit)
    budget = density * spend(structure.dense)
    fractions = {g.name: 1 - 0.03 * i for i, g in enumerate(structure.groups)}
    found = allocate(structure, fractions, spend=spend, budget=budget)

    structure.check(found.widths)
    assert found.spent == spend(found.widths)
    assert 0.99 * budget <= found.spent <= budget


def test_widths_follow_the_fractions():
    """Twice the fraction means about twice the relative width, within one rounding step."""
    structure = structure_of("dscnn")
    fractions = {"stem": 0.8, "point1": 0.4, "point2": 0.4, "point3": 0.4, "point4": 0.4}
    widths = allocate(structure, fractions, spend=structure.params, budget=6000).widths
    assert abs(widths["stem"] - 2 * widths["point2"]) <= 8


def test_rounding_keeps_near_what_was_asked():
    """One factor for all widths is one for all: an MLP of 64 and 32 has no 2 neurons left at a quarter."""
    structure = model_structure("mlp", sample_shape=(64,), classes=10)
    found = allocate(
        structure,
        dict.fromkeys(structure.dense, 1.0),
        spend=structure.params,
        budget=6570 / 4,
        tolerance=0.02,
    )
    kept = [found.widths[name] / width for name, width in structure.dense.items()]
    assert max(kept) < 1.5 * min(kept)


def test_whole_budget_gives_the_dense_net():
    """A budget of everything changes nothing."""
    structure = structure_of("lenet")
    found = allocate(structure, dict.fromkeys(structure.dense, 1.0), spend=structure.params, budget=26_874)
    assert found.widths == structure.dense


def test_budget_below_the_narrowest_net_is_refused():
    """The message has the budget and the minimum."""
    structure = structure_of("lenet")
    with pytest.raises(ModelError, match="500 params is below the narrowest net, which needs 692"):
        allocate(
            structure, dict.fromkeys(structure.dense, 1.0), spend=structure.params, budget=500, unit="params"
        )


@pytest.mark.parametrize("method", ["ntk", "uniform"])
@pytest.mark.parametrize("density", [0.5, 0.2])
def test_pruned_net_holds_what_it_says(method, density):
    """prune_model's net has the promised parameters, within 2 % under the density."""
    pruned = prune_model("auto", sample_shape=(64,), classes=10, method=method, density=density)
    held = sum(p.numel() for p in pruned.module.parameters())
    assert pruned.params == held
    assert 0.98 * density <= held / pruned.params_dense <= density
    assert pruned.macs < pruned.macs_dense


def test_same_seed_same_net():
    """Two calls give the same widths and bitwise the same weights; another seed gives other weights."""
    options = {"sample_shape": (1, 8, 8), "classes": 5, "density": 0.4, "draws": 2}
    nets = [prune_model("lenet", **options, seed=s) for s in (3, 3, 4)]
    states = [net.module.state_dict() for net in nets]
    assert nets[0].widths == nets[1].widths
    assert all((states[0][k] == states[1][k]).all() for k in states[0])
    assert any(states[0][k].shape != v.shape or (states[0][k] != v).any() for k, v in states[2].items())


def test_progress_reaches_the_end():
    """Progress counts every cut of the schedule once."""
    seen = []
    prune_model(
        "mlp",
        sample_shape=(9,),
        classes=3,
        method="ntk",
        schedule_steps=6,
        progress=lambda *p: seen.append(p),
    )
    assert seen == [(i, 6) for i in range(1, 7)]


def test_no_pruning_gives_the_dense_net():
    """Method `none` keeps everything, whatever the density."""
    pruned = prune_model("mlp", sample_shape=(64,), classes=10, method="none", density=0.5)
    assert pruned.widths == pruned.widths_dense
    assert pruned.density == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.0}, r"outside \(0, 1\]"),
        ({"density": 1.5}, r"outside \(0, 1\]"),
        ({"density": float("nan")}, r"outside \(0, 1\]"),
        ({"density": 0.01}, "the narrowest `lenet` has 692"),
        ({"method": "magic"}, "'magic' is unknown"),
    ],
)
def test_impossible_pruning_is_refused(options, message):
    """The message names the value and the rule, and the hint the least density."""
    with pytest.raises(ModelError, match=message) as caught:
        prune_model("auto", sample_shape=(1, 28, 28), classes=10, **options)
    assert options.get("density") != 0.01 or "at least 0.0258" in caught.value.hint
