"""What a run says of itself when it is not well, and its silence when it is."""

from dataclasses import replace

import numpy as np
import pytest

from coordinator.health import Health
from edge_agent.grid import Segment
from edge_agent.optimizer import METHODS
from edge_agent.plan import RoundPlan
from edge_agent.replay import Replica
from edge_agent.wire import RoundRecord

SIZE = 400


def replica() -> Replica:
    return Replica(np.zeros(SIZE, np.float32), [Segment(0, SIZE, 2)])


def record(round_: int, scalars=None) -> RoundRecord:
    plan = RoundPlan(round_, 7, METHODS["hiso"].code, 1, 6, 1e-3, 0.02, (0.05, 1e-4, 0.0))
    values = np.random.default_rng(round_).normal(size=6) if scalars is None else scalars
    return RoundRecord(plan, 1, False, np.asarray(values, np.float32).reshape(1, 6), 0)


def watch(losses, *, of: Replica | None = None, scalars=None) -> list[str]:
    health, here = Health(0.02), of or replica()
    return [text for n, loss in enumerate(losses) for text in health.observe(record(n, scalars), loss, here)]


def test_a_run_that_learns_is_left_in_peace():
    """A noisy loss that falls from 2.3 to 0.3 brings no word."""
    noise = np.random.default_rng(0).normal(1, 0.15, 300)
    assert watch(np.linspace(2.3, 0.3, 300) * noise) == []


def test_a_spike_is_named_with_its_numbers():
    """A loss of five times the usual is told once, with the rate to try."""
    (text,) = watch([1.0] * 30 + [5.0] + [1.0] * 30)
    assert "jumped from 1 to 5" in text
    assert "learning_rate to 0.01" in text


def test_divergence_is_told_again_only_after_a_while():
    """A loss that climbs to ten times its start is told, but not in each round."""
    said = [text for text in watch(np.linspace(1, 10, 120)) if "diverges" in text]
    assert 1 <= len(said) <= 3


def test_scalars_of_nothing_ask_for_a_larger_epsilon():
    """Six zeros mean that the difference is below what a loss can tell."""
    (text,) = watch([1.0], scalars=np.zeros(6))
    assert "epsilon to 0.01" in text


def test_a_cliff_is_named():
    """One scalar of a thousand times the others is told."""
    (text,) = watch([1.0], scalars=[1, -1, 1, 1, -1, 1000])
    assert "cliff" in text


def test_saturated_weights_are_counted():
    """Two in a hundred weights at the end of their grid are told, a single one is not."""
    for count, words in ((1, []), (8, ["2.0%"])):
        here = replica()
        here.weights[:count] = 3.0
        said = watch([1.0] * 30, of=here)
        assert [word for text, word in zip(said, words, strict=True) if word in text] == words


def test_a_wide_curvature_is_told():
    """Where a tenth of the weights has a curvature of 1 and the others 1e-6, the spread is told."""
    here = replica()
    here.prepare(METHODS["hiso"].code)
    here.curvature[40:] = 0x3586  # 1e-6 in bfloat16
    (text,) = watch([1.0] * 30, of=here)
    assert "spreads from 1e-06 to 1" in text


def test_a_wide_curvature_of_tensors_is_told():
    """The same of a curvature that tensors share."""
    here = replica()
    here.tensors = tuple((start, start + 16) for start in range(0, here.weights.size, 16))
    here.prepare(METHODS["hiso-tensor"].code)
    here.shared.values[2:] = 1e-6
    (text,) = watch([1.0] * 30, of=here)
    assert "spreads from 1e-06" in text


def test_a_skipped_round_says_nothing():
    """Without a quorum there is neither loss nor scalar to judge."""
    skipped = replace(record(0, np.zeros(6)), skipped=True)
    assert Health(0.02).observe(skipped, None, replica()) == []


@pytest.mark.parametrize("loss", [1.0, float("nan")])
def test_health_changes_nothing(loss):
    """Looking at a replica leaves its bits as they are."""
    here = replica()
    before = here.digest()
    watch([loss] * 60, of=here)
    assert here.digest() == before
