"""Who of a fleet is there, who is left out, and who is asked: kept per agent, by rounds.

Knows presence, silence and exclusion. Does not know what was asked nor what an answer said.
"""

from collections.abc import Collection
from dataclasses import dataclass

from edge_agent.noise import NoiseKey, hash_words

__all__ = ["SILENT_ROUNDS", "Attendance", "Member"]

SILENT_ROUNDS = 3
"""Rounds without an answer, in a row, after which an agent is not asked any more."""

_LONGEST_EXCLUSION = 64


@dataclass
class Member:
    """What is known of an agent.

    Attributes:
        online: Whether it is waited for; true until its absence is known.
        heard: Whether it has ever been heard of.
        silent: Rounds without an answer, in a row.
        missed: Rounds in which it was asked and not counted.
        counted: Rounds in which it was counted.
        exclusions: How often it was left out.
        back_at: The round from which on a mere status brings it back.
    """

    online: bool = True
    heard: bool = False
    silent: int = 0
    missed: int = 0
    counted: int = 0
    exclusions: int = 0
    back_at: int = 0

    @property
    def excluded(self) -> bool:
        """Whether it is not asked for being silent."""
        return self.silent >= SILENT_ROUNDS


class Attendance:
    """The agents of a run.

    Args:
        fleet: How many; they are numbered from 0.

    Attributes:
        members: By number.
    """

    def __init__(self, fleet: int) -> None:
        self.members = [Member() for _ in range(fleet)]
        self._heard_online = 0

    @property
    def anybody(self) -> bool:
        """Whether at least one agent was heard of and is there."""
        return self._heard_online > 0

    def note_presence(self, agent: int, *, online: bool) -> None:
        """Take in that an agent is there or not."""
        member = self.members[agent]
        self._heard_online += int(online) - int(member.heard and member.online)
        member.heard, member.online = True, online

    def readmit(self, agent: int, *, hello: bool, round_: int) -> bool:
        """Let an excluded agent take part again, if it has just come or has waited long enough.

        It is on trial: one more silent round and it is out again.
        """
        member = self.members[agent]
        if not member.excluded or not (hello or round_ >= member.back_at):
            return False
        member.silent = SILENT_ROUNDS - 1
        return True

    def answered(self, agent: int) -> None:
        """Take in that an agent answered what it was asked."""
        self.note_presence(agent, online=True)
        self.members[agent].silent = 0

    def account(self, agent: int, round_: int, *, counted: bool, silent: bool) -> list[tuple[str, str]]:
        """Note how a closed round went for a member; return what is worth telling, as kind and text."""
        member = self.members[agent]
        if counted:
            member.counted += 1
            return []
        member.missed += 1
        told = [("missed", f"round {round_}")]
        if silent:
            member.silent += 1
            if member.silent == SILENT_ROUNDS:
                member.exclusions += 1
                member.back_at = round_ + min(_LONGEST_EXCLUSION, 2**member.exclusions)
                told.append(("excluded", f"silent for {SILENT_ROUNDS} rounds"))
        return told

    def choose(
        self, round_: int, *, cohort: int | None, seed: int, without: Collection[int] = ()
    ) -> list[int]:
        """Return who is asked: the smallest hashes among those who are not excluded.

        Args:
            round_: Its number.
            cohort: How many; None for all.
            seed: Decides with the round.
            without: Agents that cannot take part in this round.
        """
        fit = [number for number in range(len(self.members)) if number not in without]
        able = [number for number in fit if not self.members[number].excluded]
        if not able:  # nobody has spoken for long: ask all, so that whoever comes back is heard
            able = fit
        if cohort is None or cohort >= len(able):
            return able
        words = hash_words(NoiseKey(seed, round_, 0, 0xC040127), 0, len(self.members))
        return sorted(sorted(able, key=lambda number: (int(words[number]), number))[:cohort])
