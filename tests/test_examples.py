"""Tests of the examples that travel with the project."""

import runpy
from pathlib import Path

import numpy as np
import pytest

from coordinator.config import load_experiment
from edge_agent.data import load_samples

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize(("name", "agents"), [("digits", 6), ("mnist", 8)])
def test_example_is_an_experiment(name, agents):
    """Every example file loads without a fault, with the fleet that its text promises."""
    experiment = load_experiment(EXAMPLES / f"{name}.toml")

    assert (experiment.name, len(experiment.agents)) == (name, agents)
    assert experiment.data.path == (EXAMPLES / f"{name}.npz").resolve()


def test_digits_are_what_the_readme_says():
    """1437 and 360 rows of 64 values from 0 to 16, every digit in both parts in the same share."""
    train, test = (load_samples(EXAMPLES / "digits.npz", part) for part in ("train", "test"))

    assert (train.x.shape, test.x.shape) == ((1437, 64), (360, 64))
    assert (train.x.dtype, int(train.x.min()), int(train.x.max())) == (np.uint8, 0, 16)
    shares = np.bincount(train.y) / 1437 - np.bincount(test.y) / 360
    assert len(shares) == 10
    assert np.abs(shares).max() < 0.003


def test_digits_are_made_by_the_script(tmp_path):
    """The script that travels along makes the same arrays again."""
    pytest.importorskip("sklearn")
    runpy.run_path(str(EXAMPLES / "make_digits.py"))["make_digits"](tmp_path / "again.npz")

    with np.load(tmp_path / "again.npz") as again, np.load(EXAMPLES / "digits.npz") as kept:
        assert sorted(again) == ["x_test", "x_train", "y_test", "y_train"]
        assert all(np.array_equal(again[name], kept[name]) for name in kept)
