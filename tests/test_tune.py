"""The search for settings: fair, judged by samples of its own, and gone on with after an interruption."""

import json
import math
from pathlib import Path

import pytest

from coordinator import tune as tuning
from coordinator.config import load_experiment
from coordinator.progress import Silence
from coordinator.tune import Search, next_rate, tune
from profiles.errors import ConfigError

DIGITS = Path(__file__).parent.parent / "examples" / "digits.toml"
SHORT = ["rounds=4", "pruning.method=none", "model.hidden=[16]", "method.perturbations=2", "seed=3"]


def experiment(*overrides: str):
    return load_experiment(DIGITS, [*SHORT, *overrides])


def best_of(loss, start: float, trials: int) -> tuple[float, list[float]]:
    tried: dict[float, tuple[float, float]] = {}
    for _ in range(trials):
        rate = next_rate(tried, start)
        tried[rate] = (loss(rate), 0.0)
    return min(tried, key=lambda rate: tried[rate]), sorted(tried)


@pytest.mark.parametrize("start", [1e-4, 0.03, 5.0])
def test_the_best_rate_lies_between_two_others(start):
    """From far below and far above, eight trials bracket the optimum 0.05 and come within half of it."""
    best, tried = best_of(lambda rate: abs(math.log(rate / 0.05)), start, 8)

    assert min(tried) < best < max(tried)
    assert abs(math.log(best / 0.05)) < math.log(1.5)


def test_every_method_gets_the_same_trials_on_the_same_seeds(tmp_path):
    """Two methods, three trials each, two seeds: twelve runs; the best file loads as its method."""
    told = tune(
        experiment(), Search(("decomfl", "hiso"), {}, trials=3, seeds=2), out=tmp_path, observer=Silence()
    )
    runs = [json.loads(key) for key in json.loads((tmp_path / "runs.json").read_text())["runs"]]

    assert sorted((run[0], run[2]) for run in runs) == sorted(
        (method, seed) for method in ("decomfl", "hiso") for seed in (3, 4) for _ in range(3)
    )
    assert [len(trials) for trials in told["methods"].values()] == [3, 3]
    for method, trials in told["methods"].items():
        best = load_experiment(tmp_path / f"best-{method}.toml")
        assert best.method.name == method
        assert f"method.learning_rate={best.method.learning_rate:.6g}" == trials[0]["settings"][0]
        assert trials[0]["accuracy"] == max(trial["accuracy"] for trial in trials)
    assert load_experiment(tmp_path / "best.toml").method.name == told["best"]


def test_a_search_that_was_stopped_goes_on(tmp_path, monkeypatch):
    """Runs that are finished are not run again, and the outcome is that of an unbroken search."""
    search = Search(("decomfl",), {"method.learning_rate": ("0.01", "0.05")}, seeds=2)
    whole = tune(experiment(), search, out=tmp_path / "whole", observer=Silence())
    play, count = tuning.play, 0

    def broken(*args, **kwargs):
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        play(*args, **kwargs)

    monkeypatch.setattr(tuning, "play", broken)
    with pytest.raises(KeyboardInterrupt):
        tune(experiment(), search, out=tmp_path / "parts", observer=Silence())
    assert tune(experiment(), search, out=tmp_path / "parts", observer=Silence()) == whole
    assert count == 3 + 2


def test_a_target_asks_for_the_fewest_rounds(tmp_path):
    """Of two rates that get there, the one with fewer rounds wins; a run ends when it is there."""
    search = Search(("decomfl",), {"method.learning_rate": ("1e-6", "0.05")}, seeds=1, target=0.05)
    told = tune(experiment("rounds=40"), search, out=tmp_path, observer=Silence())
    lengths = [len(v) for v in json.loads((tmp_path / "runs.json").read_text())["runs"].values()]

    assert told["methods"]["decomfl"][0]["rounds"] is not None
    assert min(lengths) < 40


def test_no_test_sample_is_looked_at(tmp_path):
    """The samples that judge are of the training part: other test samples change nothing."""
    import numpy as np

    data = dict(np.load(Path(__file__).parent.parent / "examples" / "digits.npz"))
    data["x_test"] = np.zeros_like(data["x_test"])
    np.savez(tmp_path / "other.npz", **data)
    search = Search(("decomfl",), {"method.learning_rate": ("0.02",)}, seeds=1)
    one = tune(experiment(), search, out=tmp_path / "a", observer=Silence())
    other = tune(
        experiment(f"data.path={tmp_path / 'other.npz'}"), search, out=tmp_path / "b", observer=Silence()
    )
    assert one["methods"] == other["methods"]


@pytest.mark.parametrize(
    ("methods", "grid", "words"),
    [
        (("deep-step",), {}, "deepstep"),
        (("decomfl",), {"method.nu": ("0.1",)}, "nu"),
        (("hiso",), {"method.nu": ("2",)}, "less than 1"),
    ],
)
def test_what_cannot_be_tuned_is_named_before_anything_runs(tmp_path, methods, grid, words):
    """An unknown method names the nearest, a constant of another method and one out of range their rule."""
    with pytest.raises(ConfigError, match=words):
        tune(experiment(), Search(methods, grid), out=tmp_path / "out", observer=Silence())
    assert not (tmp_path / "out").exists()


def test_the_runs_of_another_experiment_are_left_alone(tmp_path):
    """A folder belongs to the experiment that was tuned there."""
    search = Search(("decomfl",), {"method.learning_rate": ("0.02",)}, seeds=1)
    tune(experiment(), search, out=tmp_path, observer=Silence())
    with pytest.raises(ConfigError, match="another experiment"):
        tune(experiment("rounds=5"), search, out=tmp_path, observer=Silence())
