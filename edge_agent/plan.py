"""What a round asks for: the plan that an announcement carries, and every record after it.

Knows the numbers of a plan and what follows from them: how many scalars, which noise, whose share. Does not
know bytes (``wire``), nor what a method does with the scalars (``replay``).
"""

from dataclasses import dataclass
from itertools import repeat

import numpy as np

from edge_agent.noise import NOISE_VERSION, NoiseKey
from edge_agent.optimizer import method_by_code

__all__ = ["RoundPlan"]


@dataclass(frozen=True)
class RoundPlan:
    """What a round asks for, and all that its replay needs beside the scalars.

    Attributes:
        round: Number of the round, from 0.
        seed: Noise seed, 64 bits.
        method: Code of the method; see :data:`edge_agent.optimizer.METHODS`.
        steps: Local steps K, 1 to 255.
        perturbations: Perturbations a step P, 1 to 65535.
        epsilon: Step of the finite difference, > 0.
        learning_rate: Learning rate of this round, >= 0.
        constants: The method's constants in its order.
        exact: Exact scalars a step Q: coordinates of the last layer's gradient; 0 for none.
        noise_version: Which bits the noise has.
    """

    round: int
    seed: int
    method: int
    steps: int
    perturbations: int
    epsilon: float
    learning_rate: float
    constants: tuple[float, ...] = ()
    exact: int = 0
    noise_version: int = NOISE_VERSION

    def __post_init__(self) -> None:
        object.__setattr__(self, "epsilon", _single(self.epsilon))
        object.__setattr__(self, "learning_rate", _single(self.learning_rate))
        object.__setattr__(self, "constants", tuple(_single(value) for value in self.constants))

    @property
    def scalars(self) -> int:
        """Scalars of a local step in a record: projected gradients, then what else the plan asks.

        In a family of widths there are as many for each of its levels, those of the narrowest first.
        """
        return self.levels * (self.projected + self.exact + method_by_code(self.method).losses)

    @property
    def levels(self) -> int:
        """Widths of the family that is trained; 1 where all boards hold the same net."""
        return method_by_code(self.method).levels(self.constants)

    @property
    def reply_scalars(self) -> int:
        """Scalars that an agent sends for a local step: the projected gradients of its own share alone."""
        return self.perturbations + self.exact + method_by_code(self.method).losses

    @property
    def shares(self) -> int:
        """Into how many shares the agents are dealt, each with perturbations of its own; mostly 1."""
        method = method_by_code(self.method)
        return int(method.named(self.constants)["shares"]) if "shares" in method.constants else 1

    @property
    def projected(self) -> int:
        """Projected gradients of a local step in a record: P for each share."""
        return self.perturbations * self.shares

    def share_of(self, agent: int) -> int:
        """Return the share of an agent: each has its turn in all of them, round by round."""
        return (agent + self.round) % self.shares

    def numbers(self, share: int | None = None) -> range:
        """Return the numbers of a local step's perturbations: those of one share, or all."""
        if share is None:
            return range(self.projected)
        return range(share * self.perturbations, (share + 1) * self.perturbations)

    def keys(self, step: int, share: int | None = None) -> list[NoiseKey]:
        """Return the noise keys of a local step's perturbations: those of one share, or all."""
        fields = zip(repeat(self.seed), repeat(self.round), repeat(step), self.numbers(share))
        return list(map(NoiseKey._make, fields))


def _single(value: float) -> float:
    """Return the float32 nearest to ``value`` as a Python float."""
    return float(np.float32(value))
