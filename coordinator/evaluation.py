"""How good a replica is, by samples that no agent has.

Knows bundles and samples. Does not know when it is asked.
"""

from collections.abc import Sequence
from typing import Any

from edge_agent.bundle import Bundle
from edge_agent.data import Samples, to_inputs
from edge_agent.forward import Forward
from edge_agent.replay import Replica

__all__ = ["Evaluator", "evaluate", "judge_widths"]

_BATCH = 256


class Evaluator:
    """Judges a replica by samples that no agent has.

    Args:
        bundle: Whose graph it is.
        replica: Only read; where the method keeps a running mean of the weights, that is judged.
        samples: The test samples.
    """

    def __init__(self, bundle: Bundle, replica: Replica, samples: Samples) -> None:
        self._bundle = bundle
        self._replica = replica
        self._samples = samples
        self._weights = replica.evaluated()
        self._forward = Forward(bundle, self._weights)

    def __call__(self) -> tuple[float, float]:
        """Return mean loss and accuracy at the replica's present round."""
        weights = self._replica.evaluated()
        if weights.ctypes.data != self._weights.ctypes.data:  # a running mean begins with the first record
            self._weights = weights
            self._forward = Forward(self._bundle, weights)
        return evaluate(self._forward, self._samples)


def evaluate(forward: Forward, samples: Samples) -> tuple[float, float]:
    """Return mean loss and accuracy over all samples."""
    losses = 0.0
    right = 0
    for start in range(0, len(samples), _BATCH):
        batch = samples.pick(slice(start, start + _BATCH))
        loss, correct = forward.evaluate(to_inputs(batch.x), batch.y)
        losses += loss * len(batch)
        right += correct
    return losses / len(samples), right / len(samples)


def judge_widths(
    bundles: Sequence[Bundle], replica: Replica, levels: Sequence[int], test: Samples
) -> list[dict[str, Any]]:
    """Return what each width of a family is and can: parameters, FLOPs, agents that hold it, accuracy.

    Args:
        bundles: The narrowest first.
        replica: The widest one's.
        levels: By agent number, the index of its bundle.
        test: Samples that no agent has.
    """
    judged = []
    for level, bundle in enumerate(bundles):
        loss, accuracy = evaluate(Forward(bundle, replica.at_level(level).weights), test)
        judged.append(
            {
                "params": bundle.params,
                "forward_flops": bundle.cost["forward_flops"],
                "agents": list(levels).count(level),
                "test_loss": loss,
                "test_accuracy": accuracy,
            }
        )
    return judged
