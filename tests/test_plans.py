"""What each round asks, and changes of it under way."""

from pathlib import Path

import pytest

from coordinator.config import load_experiment
from coordinator.plans import Plans
from coordinator.scalar_log import ScalarLog
from edge_agent.bundle import flat_layout, write_bundle
from profiles.errors import ConfigError

DIGITS = Path(__file__).parent.parent / "examples" / "digits.toml"


@pytest.fixture
def plans(tmp_path):
    """The plans of a run of HiSo, for a net of one tensor."""
    import numpy as np

    tensors, size = flat_layout([("weight", (4, 4))])
    bundle = write_bundle(
        tmp_path / "bundle", graph=b"", weights=np.ones(size, np.float32), tensors=tensors, model="mlp",
        classes=4, sample_shape=(4,), cost={}, pruning={},
    )  # fmt: skip
    settings = ["method.name=hiso", "method.learning_rate=0.02", "method.nu=0.05"]
    return lambda changes=(): Plans(load_experiment(DIGITS, settings), bundle, changes)


def test_a_change_takes_effect_from_its_round_on(plans):
    """Rounds before it ask what they asked, so that a repeated announcement is the same."""
    asked = plans()
    asked.change(7, ["method.learning_rate=0.01", "method.nu=0.1"])

    assert [round(asked(n).learning_rate, 6) for n in (0, 6, 7, 8)] == [0.02, 0.02, 0.01, 0.01]
    assert [round(asked(n).constants[0], 6) for n in (6, 7)] == [0.05, 0.1]


def test_a_coordinator_that_starts_again_goes_on_with_the_changes(plans, tmp_path):
    """What the log keeps of two changes leads to the same plans."""
    asked = plans()
    with ScalarLog.create(tmp_path / "log.sqlite", {"bundle": "b"}) as log:
        log.add_event("changed", "", asked.change(3, ["method.perturbations=9"]))
        log.add_event("another", "", "not a change")
        log.add_event("changed", "", asked.change(5, ["method.learning_rate=0.005"]))
        again = plans(log.texts_of("changed"))

    assert [again(n) for n in range(8)] == [asked(n) for n in range(8)]
    assert again(5).perturbations == 9


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("method.name=decomfl", "`method.name` cannot change"),
        ("seed=5", "`seed` cannot change"),
        ("method.nu=1.5", "less than 1"),
        ("method.epsilon=0", "epsilon"),
    ],
)
def test_a_change_that_cannot_be_is_refused(plans, setting, words):
    """Keys that a round in flight rests on, and values against their rule; nothing is changed then."""
    asked = plans()
    with pytest.raises(ConfigError, match=words):
        asked.change(3, ["method.learning_rate=0.01", setting])
    assert asked(3).learning_rate == pytest.approx(0.02)
