"""Tests of experiments whose net is a torch module of one's own, ``FILE.py:FUNCTION``."""

import numpy as np
import pytest

from coordinator.config import dump, load_experiment, with_settings
from coordinator.progress import Silence
from coordinator.rebuild import rebuild_run
from coordinator.simulate import simulate
from coordinator.testbed import run_testbed
from edge_agent.bundle import read_bundle
from profiles.errors import ConfigError

NET = """
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 16, 3, padding=1), nn.GroupNorm(4, 16)
        self.split, self.act = nn.Conv2d(16, 16, 3, 2, 1, groups=4), nn.PReLU(16)
        self.inner, self.head = nn.Linear(16 * 16, 24), nn.Linear(24, 3)
    def forward(self, x):
        n = x.shape[0]
        x = self.act(self.split(torch.relu(self.norm(self.stem(x)))))
        return self.head(nn.functional.silu(self.inner(x.reshape(n, -1))))
def one_layer():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
"""
TOML = """
rounds = 40
[model]
name = "own.py:Net"
[data]
path = "data.npz"
split = "iid"
[pruning]
density = 0.3
[method]
name = "headstep"
learning_rate = 0.02
perturbations = 10
[[devices]]
profile = "pi-zero-2w"
count = 3
"""


@pytest.fixture
def file(tmp_path):
    """Return an experiment file beside a net and images of three classes, which are told by their means."""
    rng = np.random.default_rng(0)
    y = np.arange(240) % 3
    x = (rng.standard_normal((240, 8, 8)) + (y - 1)[:, None, None]).astype(np.float32)
    np.savez(tmp_path / "data.npz", x_train=x[:180], y_train=y[:180], x_test=x[180:], y_test=y[180:])
    (tmp_path / "own.py").write_text(NET, encoding="utf-8")
    path = tmp_path / "own.toml"
    path.write_text(TOML, encoding="utf-8")
    return path


def test_the_file_is_named_as_the_data_is(file, tmp_path, monkeypatch):
    """In the experiment the file of the net is beside it, in an override in the working folder."""
    here = f"{tmp_path.resolve() / 'own.py'}:Net"
    assert load_experiment(file).model.name == here
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    asked = load_experiment(file, ["model.name=../own.py:one_layer"])
    assert asked.model.name == f"{tmp_path.resolve() / 'own.py'}:one_layer"
    assert with_settings(asked, ["rounds=3"]).model.name == asked.model.name
    assert load_experiment(file, ["model.name=lenet"]).model.name == "lenet"
    assert asked.model.name in dump(asked)


def test_what_is_no_net_is_refused(file):
    """The message says what a name may be."""
    with pytest.raises(ConfigError, match=r"or FILE\.py:FUNCTION for a module of your own"):
        load_experiment(file, ["model.name=own.txt:Net"])


def test_it_is_pruned_trained_and_replayed(file, tmp_path):
    """A net of one's own with split convolutions learns, and its log leads to its final weights."""
    pytest.importorskip("torch_pruning", reason="the extra `prune` is not installed")
    summary = simulate(load_experiment(file), out=tmp_path / "run", observer=Silence())
    bundle, replica = rebuild_run(tmp_path / "run")
    assert bundle.model == "Net"
    assert 0.27 < bundle.params / bundle.pruning["params_dense"] <= 0.3
    assert f"{replica.digest():016x}" == summary["final_digest"]
    assert summary["test_accuracy"] > 0.6  # a third by chance


def test_a_net_that_is_not_pruned_needs_no_tracing(file, tmp_path):
    """With the method ``none`` any module is trained as it is, here one without a width to change."""
    own = f"model.name={tmp_path / 'own.py'}:one_layer"
    asked = load_experiment(file, [own, "pruning.method=none", "rounds=2"])
    simulate(asked, out=tmp_path / "run", observer=Silence())
    assert read_bundle(tmp_path / "run" / "bundle").params == 64 * 3 + 3


def test_a_family_takes_reference_nets(file, tmp_path):
    """Nested widths of a net of one's own are refused before any work."""
    asked = load_experiment(
        file, ["pruning.widths=[0.5]", "method.name=nested", "pruning.method=none", "rounds=2"]
    )
    with pytest.raises(ConfigError, match=r"pruning\.widths and the model .* do not go together"):
        simulate(asked, out=tmp_path / "run", observer=Silence())


@pytest.mark.slow
def test_a_real_fleet_agrees_with_the_simulation(file, tmp_path):
    """Processes over a broker end with the simulation's digest on a net of one's own."""
    pytest.importorskip("torch_pruning", reason="the extra `prune` is not installed")
    asked = load_experiment(file, ["rounds=4"])
    told = simulate(asked, out=tmp_path / "simulated", observer=Silence())
    real = run_testbed(asked, out=tmp_path / "real", resume=False, observer=Silence())
    assert real["digests_agree"]
    assert real["final_digest"] == told["final_digest"]
