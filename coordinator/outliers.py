"""Who answers unlike the others: statistics of every agent's scalars over the rounds.

Two numbers an agent and round: the length of its vector of scalars over the median length of all, and the
cosine with the median vector of the others' directions. Both are averaged over about twenty rounds, and an
agent far beyond its fellows is suspected until it is like them again. Knows nothing of what follows.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from edge_agent.wire import Reply

__all__ = ["Outliers", "Standing"]

_MEMORY = 0.05
_FEWEST_ROUNDS = 10
_FEWEST_AGENTS = 4
_LONGER = 8.0
_TOO_UNLIKE = 4.0
_SMALLEST_SPREAD = 0.08
_LIKE_AGAIN = 0.5


@dataclass
class Standing:
    """What is known of one agent.

    Attributes:
        rounds: How many of its replies were looked at.
        length: Geometric mean of its length over the median length.
        cosine: Mean cosine with the others.
        suspected: What was said of it; empty for nothing.
    """

    rounds: int = 0
    length: float = 1.0
    cosine: float = 0.0
    suspected: str = ""


class Outliers:
    """The standings of a fleet."""

    def __init__(self) -> None:
        self.standings: dict[int, Standing] = {}

    def observe(self, replies: Mapping[int, Reply]) -> list[tuple[int, str]]:
        """Take in the counted replies of a round; return whose standing changed.

        Fewer than four replies say nothing of each other.

        Returns:
            Agents with what is said of them; an empty text for one that is like the others again.
        """
        if len(replies) < _FEWEST_AGENTS:
            return []
        order = sorted(replies)
        rows = np.stack([replies[number].scalars for number in order]).astype(np.float64)
        lengths = np.sqrt((rows**2).sum(axis=1))
        typical = float(np.median(lengths))
        if typical <= 0:
            return []
        directions = rows / np.maximum(lengths, 1e-300)[:, None]
        centre = np.median(directions, axis=0)
        centre_length = float(np.sqrt((centre**2).sum()))
        cosines = directions @ centre / centre_length if centre_length > 0 else np.zeros(len(order))
        for number, length, cosine in zip(order, lengths, cosines, strict=True):
            self._update(number, math.log(max(float(length) / typical, 1e-30)), float(cosine))
        return self._changes(order)

    def _update(self, number: int, log_length: float, cosine: float) -> None:
        standing = self.standings.setdefault(number, Standing())
        standing.rounds += 1
        share = max(_MEMORY, 1.0 / standing.rounds)
        standing.length = math.exp((1 - share) * math.log(standing.length) + share * log_length)
        standing.cosine += share * (cosine - standing.cosine)

    def _changes(self, order: list[int]) -> list[tuple[int, str]]:
        known = [
            self.standings[number] for number in order if self.standings[number].rounds >= _FEWEST_ROUNDS
        ]
        if len(known) < _FEWEST_AGENTS:
            return []
        cosines = np.array([standing.cosine for standing in known])
        middle = float(np.median(cosines))
        # 1.4826 makes the median distance a standard deviation for normal values.
        spread = max(_SMALLEST_SPREAD, 1.4826 * float(np.median(np.abs(cosines - middle))))
        found = []
        for number in order:
            standing = self.standings[number]
            if standing.rounds < _FEWEST_ROUNDS:
                continue
            before, patience = standing.suspected, _LIKE_AGAIN if standing.suspected else 1.0
            longest = _LONGER**patience
            standing.suspected = ""
            if not 1 / longest <= standing.length <= longest:
                standing.suspected = f"its scalars are {standing.length:.3g} times as large as the others'"
            elif standing.cosine < middle - patience * _TOO_UNLIKE * spread:
                standing.suspected = (
                    f"its scalars point elsewhere: mean cosine {standing.cosine:.2f}, typical {middle:.2f}"
                )
            if bool(before) != bool(standing.suspected):
                found.append((number, standing.suspected))
        return found

    def suspects(self) -> list[int]:
        """Return the numbers of the agents that are suspected, in their order."""
        return sorted(number for number, standing in self.standings.items() if standing.suspected)
