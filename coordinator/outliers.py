"""Who answers unlike the others: statistics of every agent's scalars over the rounds.

Two numbers an agent and round: the length of its vector of scalars over the median length of all, and the
cosine with the median vector of the others' directions. Both are averaged over about twenty rounds, and an
agent far beyond its fellows is suspected until it is like them again. Where the classes' own scalars are
known, ``plausibility`` decides in place of the cosine. Knows nothing of what follows.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coordinator.plausibility import Plausibility
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
        ratio: Log-likelihood ratio that it measures rather than turns its signs; 0 where it is not known.
        suspected: What was said of it; empty for nothing.
    """

    rounds: int = 0
    length: float = 1.0
    cosine: float = 0.0
    ratio: float = 0.0
    suspected: str = ""


class Outliers:
    """The standings of a fleet."""

    def __init__(self) -> None:
        self.standings: dict[int, Standing] = {}
        self._plausibility: list[Plausibility] = []
        self._outsized: dict[int, float] = {}

    def observe(
        self, replies: Mapping[int, Reply], classes: Sequence[NDArray[np.float64]] = ()
    ) -> list[tuple[int, str]]:
        """Take in the counted replies of a round; return whose standing changed.

        Fewer than four replies say nothing of each other.

        Args:
            replies: By agent number.
            classes: What the classes' scalars are in the first step, where known: the projected gradients,
                (P, classes), then the exact scalars, (Q, classes).

        Returns:
            Agents with what is said of them; an empty text for one that is like the others again.
        """
        if len(replies) < _FEWEST_AGENTS:
            return []
        order = sorted(replies)
        rows = np.stack([replies[number].scalars for number in order]).astype(np.float64)
        lengths = np.sqrt((rows**2).sum(axis=1))
        typical = float(np.median(lengths))
        self._outsized = {}
        if typical <= 0:
            return []
        relative = zip(order, (lengths / typical).tolist(), strict=True)
        self._outsized = {number: length for number, length in relative if length > _LONGER}
        directions = rows / np.maximum(lengths, 1e-300)[:, None]
        centre = np.median(directions, axis=0)
        centre_length = float(np.sqrt((centre**2).sum()))
        cosines = directions @ centre / centre_length if centre_length > 0 else np.zeros(len(order))
        for number, length, cosine in zip(order, lengths, cosines, strict=True):
            self._update(number, math.log(max(float(length) / typical, 1e-30)), float(cosine))
        while len(self._plausibility) < len(classes):
            self._plausibility.append(Plausibility())
        start = 0
        for block, judge in zip(classes, self._plausibility, strict=False):
            judge.observe(
                dict(zip(order, rows[:, start : start + len(block)], strict=True)), np.asarray(block)
            )
            start += len(block)
        for number in order:
            ratios = [judge.ratio(number) for judge in self._plausibility]
            self.standings[number].ratio = min(ratios, default=0.0)
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
        cosines = np.array([standing.cosine for standing in known]) if known else np.zeros(1)
        middle = float(np.median(cosines))
        # 1.4826 makes the median distance a standard deviation for normal values.
        spread = max(_SMALLEST_SPREAD, 1.4826 * float(np.median(np.abs(cosines - middle))))
        found = []
        for number in order:
            standing = self.standings[number]
            before, standing.suspected = standing.suspected, ""
            patience = _LIKE_AGAIN if before else 1.0
            longest = _LONGER**patience
            enough = standing.rounds >= _FEWEST_ROUNDS and len(known) >= _FEWEST_AGENTS
            if enough and not 1 / longest <= standing.length <= longest:
                standing.suspected = f"its scalars are {standing.length:.3g} times as large as the others'"
            elif self._plausibility:
                verdicts = [judge.verdict(number, suspected=bool(before)) for judge in self._plausibility]
                standing.suspected = next(filter(None, verdicts), "")
            elif enough and standing.cosine < middle - patience * _TOO_UNLIKE * spread:
                standing.suspected = (
                    f"its scalars point elsewhere: mean cosine {standing.cosine:.2f}, typical {middle:.2f}"
                )
            if bool(before) != bool(standing.suspected):
                found.append((number, standing.suspected))
        return found

    def suspects(self) -> list[int]:
        """Return the numbers of the agents that are suspected, in their order."""
        return sorted(number for number, standing in self.standings.items() if standing.suspected)

    def least_trusted(self) -> list[int]:
        """Return who should be left out of the round just observed, the most harmful first.

        These are the suspects, and whoever's scalars are far too large in this very round.
        """

        def harm(number: int) -> tuple[float, float, int]:
            standing = self.standings[number]
            return -self._outsized.get(number, 0.0), standing.ratio, number

        return sorted({*self.suspects(), *self._outsized}, key=harm)
