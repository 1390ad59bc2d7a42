"""Rounds as a state machine: replies and ticks in, announcements and records out.

It knows who is asked, when a round is over and what its record says; it does no input or output, and
the clock is passed in. The order of its actions is the protocol's promise: a :class:`Commit` stands
before the announcement that lets the world see the record.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from coordinator.aggregation import mean_loss, mean_scalars
from edge_agent.noise import NoiseKey, hash_words
from edge_agent.replay import Replica, apply_record
from edge_agent.wire import Cohort, Reply, RoundOpen, RoundPlan, RoundRecord

__all__ = ["Action", "Announce", "Commit", "Late", "Note", "Rounds"]

_RECENT = 4
_SILENT_ROUNDS = 3
_SLOWEST_RESEND_S = 15.0


@dataclass(frozen=True)
class Announce:
    """Publish the open round, retained."""

    message: RoundOpen


@dataclass(frozen=True)
class Commit:
    """Write a record to the log, to the disk, before anything that follows.

    Attributes:
        record: What to write; the coordinator's replica has it applied already.
        loss: Mean loss, None when skipped.
        opened_s: Monotonic time of the first announcement.
        replies: By agent number: the reply and whether it counted.
    """

    record: RoundRecord
    loss: float | None
    opened_s: float
    replies: dict[int, tuple[Reply, bool]]


@dataclass(frozen=True)
class Late:
    """Note a reply to a round that is closed."""

    agent: int
    reply: Reply


@dataclass(frozen=True)
class Note:
    """Something happened that people may want to know."""

    kind: str
    agent: int | None
    text: str


Action = Announce | Commit | Late | Note


@dataclass
class _Member:
    """What is known of an agent."""

    online: bool = True
    silent: int = 0
    missed: int = 0
    counted: int = 0

    @property
    def excluded(self) -> bool:
        return self.silent >= _SILENT_ROUNDS


@dataclass
class _Open:
    """The round under way."""

    message: RoundOpen
    opened_s: float
    announced_s: float
    resend_s: float
    members: list[int]
    extended: bool = False
    answered: dict[int, Reply] = field(default_factory=dict)


class Rounds:
    """Runs the rounds of one run.

    Args:
        fleet: Number of agents; they are numbered from 0.
        rounds: Where the run ends.
        plan_of: What round r asks.
        epoch: Incarnation of the coordinator, above all earlier ones.
        replica: The coordinator's replica, at the round to go on with; records are applied to it.
        recent: The records just before that round, as many as there are of the last four.
        batch_size: Samples of a local step.
        central: Central differences.
        cohort: How many agents are asked; None asks all.
        quorum: How many answers a record needs; None needs all that are asked.
        deadline_s: After this a round is closed with what came, if that is a quorum; else it is
            extended once by the same time, and then skipped.
        resend_s: A round without all its answers is announced again after this, then less and less often.
        seed: Decides who is asked.
    """

    def __init__(
        self,
        *,
        fleet: int,
        rounds: int,
        plan_of: Callable[[int], RoundPlan],
        epoch: int,
        replica: Replica,
        recent: Sequence[RoundRecord] = (),
        batch_size: int,
        central: bool,
        cohort: int | None,
        quorum: int | None,
        deadline_s: float,
        resend_s: float,
        seed: int,
    ) -> None:
        self.dropped: Counter[str] = Counter()
        self.members = [_Member() for _ in range(fleet)]
        self.replica = replica
        self._rounds = rounds
        self._plan_of = plan_of
        self._epoch = epoch
        self._recent = list(recent)[-_RECENT:]
        self._batch_size = batch_size
        self._central = central
        self._cohort = cohort
        self._quorum = quorum
        self._deadline_s = deadline_s
        self._resend_s = resend_s
        self._seed = seed
        self._open: _Open | None = None

    @property
    def epoch(self) -> int:
        """Incarnation of the coordinator."""
        return self._epoch

    @property
    def finished(self) -> bool:
        """Whether the last round is closed."""
        return self.replica.round >= self._rounds

    def start(self, now: float) -> list[Action]:
        """Open the first round, or announce the end if there is nothing left to do."""
        return self._open_next(now)

    def announce_again(self, now: float) -> list[Action]:
        """Announce the open round once more, after the broker may have forgotten it."""
        if self._open is None:
            return []
        message = self._open.message
        self._open.message = replace(message, attempt=min(message.attempt + 1, 0xFFFF))
        self._open.announced_s = now
        return [Announce(self._open.message)]

    def on_presence(self, agent: int, *, online: bool, now: float) -> list[Action]:
        """Take in that an agent came or went."""
        member = self.members[agent]
        member.online = online
        if not online:
            return self._close_if_over(now)
        if member.excluded:
            member.silent = 0
            return [Note("readmitted", agent, "the agent spoke again")]
        return []

    def on_reply(self, agent: int, reply: Reply, now: float) -> list[Action]:
        """Take in a reply; whatever does not belong to the open round is counted and dropped."""
        opened = self._open
        if opened is None or opened.message.closing:
            self.dropped["no round is open"] += 1
            return []
        plan = opened.message.plan
        if reply.epoch != self._epoch:
            self.dropped["another epoch"] += 1
            return []
        if reply.round < plan.round:
            self.dropped["late"] += 1
            return [Late(agent, reply)]
        reason = self._refusal(opened, agent, reply)
        if reason is not None:
            self.dropped[reason] += 1
            return [Note("refused", agent, f"round {plan.round}: {reason}")] if reason != "duplicate" else []
        opened.answered[agent] = reply
        self.members[agent].silent = 0
        self.members[agent].online = True
        actions: list[Action] = []
        if reply.failed:
            actions.append(Note("estimate failed", agent, f"round {plan.round}"))
        return actions + self._close_if_over(now)

    def on_tick(self, now: float) -> list[Action]:
        """Close, extend, skip or announce again, as the time says."""
        opened = self._open
        if opened is None or opened.message.closing:
            return []
        if now - opened.opened_s >= self._deadline_s * (2 if opened.extended else 1):
            if len(self._counted(opened)) >= self._needed(opened):
                return self._close(opened, now)
            if opened.extended:
                return self._close(opened, now)
            opened.extended = True
            answers = f"{len(opened.answered)} of {len(opened.members)} answered"
            return [Note("extended", None, f"round {opened.message.plan.round}: {answers}")]
        if now - opened.announced_s >= opened.resend_s:
            opened.resend_s = min(1.5 * opened.resend_s, _SLOWEST_RESEND_S)
            return self.announce_again(now)
        return []

    def _refusal(self, opened: _Open, agent: int, reply: Reply) -> str | None:
        plan = opened.message.plan
        if reply.round > plan.round:
            return "a round that is not open"
        if agent not in opened.members:
            return "not asked"
        if agent in opened.answered:
            return "duplicate"
        if not reply.failed and reply.scalars.size != plan.steps * plan.perturbations:
            return "wrong number of scalars"
        if reply.samples != opened.message.batch_size:
            return "wrong number of samples"
        if reply.digest != self._digest():
            return "digest disagrees"
        return None

    def _digest(self) -> int:
        return self._recent[-1].digest if self._recent else self.replica.digest()

    def _counted(self, opened: _Open) -> dict[int, Reply]:
        return {agent: reply for agent, reply in opened.answered.items() if not reply.failed}

    def _needed(self, opened: _Open) -> int:
        return len(opened.members) if self._quorum is None else min(self._quorum, len(opened.members))

    def _close_if_over(self, now: float) -> list[Action]:
        """Close when nobody is left to wait for: all answered, or all but the absent and that suffices."""
        opened = self._open
        if opened is None or opened.message.closing:
            return []
        waiting = [agent for agent in opened.members if agent not in opened.answered]
        enough = len(self._counted(opened)) >= self._needed(opened)
        if not waiting or (enough and not any(self.members[agent].online for agent in waiting)):
            return self._close(opened, now)
        return []

    def _close(self, opened: _Open, now: float) -> list[Action]:
        counted = self._counted(opened)
        plan = opened.message.plan
        skipped = len(counted) < max(1, self._needed(opened))
        shape = (plan.steps, plan.perturbations)
        scalars = np.zeros(shape, np.float32) if skipped else mean_scalars(counted).reshape(shape)
        record = RoundRecord(plan, self._epoch, skipped, scalars, digest=0)
        apply_record(self.replica, record, check=False)
        record = replace(record, digest=self.replica.digest())
        self._recent = [*self._recent, record][-_RECENT:]
        self._open = None
        actions: list[Action] = []
        for agent in opened.members:
            member = self.members[agent]
            if agent in counted and not skipped:
                member.counted += 1
                continue
            member.missed += 1
            actions.append(Note("missed", agent, f"round {plan.round}"))
            if agent not in opened.answered:
                member.silent += 1
                if member.silent == _SILENT_ROUNDS:
                    actions.append(Note("excluded", agent, f"silent for {_SILENT_ROUNDS} rounds"))
        if skipped:
            actions.append(
                Note("skipped", None, f"round {plan.round}: {len(counted)} of {self._needed(opened)} needed")
            )
        replies = {a: (reply, a in counted and not skipped) for a, reply in opened.answered.items()}
        loss = None if skipped else mean_loss(counted)
        actions.append(Commit(record, loss, opened.opened_s, replies))
        return actions + self._open_next(now)

    def _open_next(self, now: float) -> list[Action]:
        round_ = self.replica.round
        members = [] if self.finished else self._choose(round_)
        everybody = len(members) == len(self.members)
        message = RoundOpen(
            plan=self._plan_of(round_),
            epoch=self._epoch,
            attempt=0,
            batch_size=self._batch_size,
            central=self._central,
            closing=self.finished,
            deadline_ms=min(int(self._deadline_s * 1000), 0xFFFFFFFF),
            cohort=Cohort(None if everybody else frozenset(members)),
            records=tuple(self._recent),
        )
        self._open = _Open(message, now, now, self._resend_s, members)
        return [Announce(message)]

    def _choose(self, round_: int) -> list[int]:
        """Return who is asked: the smallest hashes among those who are not excluded."""
        able = [number for number, member in enumerate(self.members) if not member.excluded]
        if not able:  # nobody has spoken for long: ask all, so that whoever comes back is heard
            able = list(range(len(self.members)))
        if self._cohort is None or self._cohort >= len(able):
            return able
        words = hash_words(NoiseKey(self._seed, round_, 0, 0xC040127), 0, len(self.members))
        return sorted(sorted(able, key=lambda number: (int(words[number]), number))[: self._cohort])
