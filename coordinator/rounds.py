"""Rounds as a state machine: replies and ticks in, announcements and records out.

It knows who is asked, when a round is over and what its record says; it does no input or output, and
the clock is passed in. The order of its actions is the protocol's promise: a :class:`Commit` stands
before the announcement that lets the world see the record.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from coordinator.actions import Action, Announce, Commit, Late, Note, Terms, Uncover
from coordinator.aggregation import aggregate_levels, mean_loss, tolerated
from coordinator.attendance import SILENT_ROUNDS, Attendance
from coordinator.ledger import Ledger, Work
from coordinator.outliers import Outliers
from coordinator.packing import Pack
from edge_agent.cohort import Cohort
from edge_agent.plan import RoundPlan
from edge_agent.replay import Replica, apply_record
from edge_agent.wire import Reply, RoundOpen, RoundRecord
from profiles.errors import EstimateError

__all__ = ["Rounds"]

_RECENT = 4
_SLOWEST_RESEND_S = 15.0
_LONGEST_TICK_S = 1.0


@dataclass
class _Open:
    """The round under way.

    Attributes:
        terms: Those that it was opened with.
        waited_s: Time in which an answer could have come.
        waiting: Members that have not answered.
        present: Those of them who are online.
        answered: All replies that belong to the round.
        counted: Those of them that did not fail.
        packs: In which they came, if collectors handed them up.
        uncovering: Whether a masked round waits for what undoes its masks.
    """

    message: RoundOpen
    terms: Terms
    opened_s: float
    announced_s: float
    resend_s: float
    digests: tuple[int, ...]
    members: frozenset[int]
    waiting: set[int]
    present: set[int]
    waited_s: float = 0.0
    extended: bool = False
    answered: dict[int, Reply] = field(default_factory=dict)
    counted: dict[int, Reply] = field(default_factory=dict)
    packs: list[Pack] = field(default_factory=list)
    uncovering: bool = False


class Rounds:
    """Runs the rounds of one run.

    Args:
        fleet: Number of agents; they are numbered from 0.
        terms_of: The terms of round r; asked when it is opened.
        epoch: Incarnation of the coordinator, above all earlier ones.
        replica: The coordinator's replica, at the round to go on with; records are applied to it.
        recent: The records just before that round, as many as there are of the last four.
        seed: Decides who is asked.
        reference: What the classes' scalars are in the first step of a round; by them the other rules see who
            cannot have measured. None where the coordinator has no samples.
        ledger: What the agents may spend; None asks all of them for whole batches.
        levels: Which width of the family each agent holds, 0 for the narrowest; empty without a family.

    Attributes:
        dropped: Count of replies that changed nothing, by reason.
        attendance: What is known of each agent.
        replica: The coordinator's replica.
        ledger: As given.
        unready: Agents that cannot mask a reply yet; a masked round does without them.
        outliers: Statistics of who answers unlike the others.
    """

    def __init__(
        self,
        *,
        fleet: int,
        terms_of: Callable[[int], Terms],
        epoch: int,
        replica: Replica,
        recent: Sequence[RoundRecord] = (),
        seed: int,
        reference: Callable[[RoundOpen], Sequence[NDArray[np.float64]]] | None = None,
        ledger: Ledger | None = None,
        levels: Sequence[int] = (),
    ) -> None:
        self.dropped: Counter[str] = Counter()
        self.outliers = Outliers()
        self.attendance = Attendance(fleet)
        self.replica = replica
        self._terms_of = terms_of
        self._epoch = epoch
        self._recent = list(recent)[-_RECENT:]
        self._seed = seed
        self._reference = reference
        self.ledger = ledger
        self._left_out: dict[int, str] = {}
        self._uncounted: frozenset[int] = frozenset()
        self.unready: set[int] = set()
        self._discredited: set[int] = set()
        self._waited_for_keys_s = 0.0
        self.levels = tuple(levels) or (0,) * fleet
        self._paused = False
        self._open: _Open | None = None
        self._link_up = True
        self._ticked_s: float | None = None
        self._stragglers: dict[int, set[int]] = {}  # of the last rounds: who may still answer, for the log

    @property
    def epoch(self) -> int:
        """Incarnation of the coordinator."""
        return self._epoch

    @property
    def finished(self) -> bool:
        """Whether the last round is closed."""
        return self.replica.round >= self._terms_of(self.replica.round).rounds

    @property
    def paused(self) -> bool:
        """Whether no new round is opened."""
        return self._paused

    def start(self, now: float) -> list[Action]:
        """Open the first round, or announce the end if there is nothing left to do."""
        return self._open_next(now)

    @property
    def next_round(self) -> int:
        """The round that will be opened next."""
        return self.replica.round + (self._open is not None and not self._open.message.closing)

    def pause(self) -> None:
        """Open no new round; the one under way may still be closed by answers, but by no deadline."""
        self._paused = True

    def resume(self, now: float) -> list[Action]:
        """Go on after a pause."""
        if not self._paused:
            return []
        self._paused = False
        return self._open_next(now) if self._open is None else self.announce_again(now)

    def announce_again(self, now: float) -> list[Action]:
        """Announce the open round once more, to those who have not answered.

        After a broker forgot it, or a reply was lost on its way.
        """
        opened = self._open
        if opened is None:
            return []
        cohort = opened.message.cohort
        if opened.answered and not opened.terms.masked:  # masks are for one cohort
            cohort = Cohort(frozenset(opened.waiting))
        opened.message = replace(
            opened.message, attempt=min(opened.message.attempt + 1, 0xFFFF), cohort=cohort
        )
        opened.announced_s = now
        return [Announce(opened.message)]

    def on_link(self, *, up: bool) -> None:
        """Take in that the broker can be reached or not; while it cannot, no deadline comes nearer."""
        self._link_up = up

    def on_presence(self, agent: int, *, online: bool, hello: bool, now: float) -> list[Action]:
        """Take in that an agent came, is there, or went.

        Args:
            agent: Its number.
            online: Whether it is there.
            hello: Whether it has just come; that ends an exclusion at once.
            now: Monotonic seconds.
        """
        self._set_presence(agent, online=online)
        if not online:
            return self._close_if_over(now)
        if self.attendance.readmit(agent, hello=hello, round_=self.replica.round):
            return [Note("readmitted", agent, "the agent spoke again")]
        return []

    def shut_out(self, agent: int, now: float) -> list[Action]:
        """Take an agent out at once: what it said in the open round does not count, nobody waits for it."""
        self.attendance.members[agent].silent = SILENT_ROUNDS
        self._set_presence(agent, online=False)
        opened = self._open
        if opened is not None and agent in opened.members and len(opened.members) > 1:
            opened.members, opened.waiting = opened.members - {agent}, opened.waiting - {agent}
            opened.answered.pop(agent, None)
            opened.counted.pop(agent, None)
        return self._close_if_over(now)

    def on_reply(self, agent: int, reply: Reply, now: float) -> list[Action]:
        """Take in a reply; whatever does not belong to the open round is counted and dropped."""
        opened = self._open
        if opened is None or opened.message.closing:
            self.dropped["no round is open"] += 1
            return []
        round_ = opened.message.plan.round
        if reply.epoch != self._epoch:
            self.dropped["another epoch"] += 1
            return []
        if reply.round < round_:
            return self._on_late(agent, reply)
        reason = "masks are being undone" if opened.uncovering else self._refusal(opened, agent, reply)
        if reason is not None:
            self.dropped[reason] += 1
            return [Note("refused", agent, f"round {round_}: {reason}")] if reason != "duplicate" else []
        opened.answered[agent] = reply
        opened.waiting.discard(agent)
        opened.present.discard(agent)
        self.attendance.answered(agent)
        actions: list[Action] = []
        if reply.failed:
            actions.append(Note("estimate failed", agent, f"round {round_}"))
        else:
            opened.counted[agent] = reply
            self._discredited.discard(agent)
            if reply.samples < opened.message.batch_of(agent):
                fewer = f"round {round_}: {reply.samples} of {opened.message.batch_of(agent)} samples"
                actions.append(Note("smaller batch", agent, fewer))
        return actions + self._charge(opened.message, agent, reply) + self._close_if_over(now)

    def note_pack(self, pack: Pack) -> None:
        """Take in that the replies which come next are those of a pack: its sum may serve."""
        opened = self._open
        if opened is not None and pack.partial is not None and len(opened.packs) < len(opened.members):
            opened.packs.append(pack)

    def on_nonsense(self, agent: int) -> None:
        """Take in that an agent sent what no honest one sends: until it answers, it is a known liar."""
        self._discredited.add(agent)

    def on_tick(self, now: float) -> list[Action]:
        """Close, extend, skip or announce again, as the time says."""
        opened = self._open
        passed = now - (now if self._ticked_s is None else self._ticked_s)
        self._ticked_s = now
        if opened is None:  # a new day, a cooler board, a key
            self._waited_for_keys_s += min(passed, _LONGEST_TICK_S) if self.attendance.anybody else 0.0
            return self._open_next(now)
        if opened.message.closing:
            return []
        if self._link_up and self.attendance.anybody and not self._paused:
            # A long gap between two ticks is a laptop that slept: nobody could have answered.
            opened.waited_s += min(passed, _LONGEST_TICK_S)
        if opened.uncovering:
            if opened.waited_s >= opened.terms.deadline_s:
                return self.on_sum(opened.message.plan.round, None, now)
            if now - opened.announced_s >= opened.resend_s:
                opened.announced_s = now
                return [Uncover(opened.message.plan.round, frozenset(opened.counted))]
            return []
        if opened.waited_s >= opened.terms.deadline_s * (2 if opened.extended else 1):
            if len(opened.counted) >= self._needed(opened) or opened.extended:
                return self._close(opened, now)
            opened.extended = True
            answers = f"{len(opened.answered)} of {len(opened.members)} answered"
            return [Note("extended", None, f"round {opened.message.plan.round}: {answers}")]
        if now - opened.announced_s >= opened.resend_s:
            opened.resend_s = min(1.5 * opened.resend_s, _SLOWEST_RESEND_S)
            return self.announce_again(now)
        return []

    def _charge(self, message: RoundOpen, agent: int, reply: Reply) -> list[Action]:
        """Charge an agent for its work, whether or not it counts."""
        if self.ledger is None:
            return []
        work = Work(agent, message.plan, reply.samples, message.central)
        told = self.ledger.charge(work, peak_mib=reply.peak_kib / 1024)
        return [Note("over budget", agent, text) for text in told]

    def _set_presence(self, agent: int, *, online: bool) -> None:
        self.attendance.note_presence(agent, online=online)
        if self._open is not None and agent in self._open.waiting:
            (self._open.present.add if online else self._open.present.discard)(agent)

    def _on_late(self, agent: int, reply: Reply) -> list[Action]:
        self.dropped["late"] += 1
        stragglers = self._stragglers.get(reply.round, set())
        if agent not in stragglers:
            return []
        stragglers.discard(agent)
        return [Late(agent, reply)]

    def _refusal(self, opened: _Open, agent: int, reply: Reply) -> str | None:
        plan = opened.message.plan
        if reply.round > plan.round:
            return "a round that is not open"
        if agent not in opened.members:
            return "not asked"
        if agent in opened.answered:
            return "duplicate"
        if not reply.failed and reply.scalars.size != plan.steps * plan.reply_scalars:
            return "wrong number of scalars"
        if not 1 <= reply.samples <= opened.message.batch_of(agent):
            return "wrong number of samples"
        if reply.digest != opened.digests[self.levels[agent]]:
            return "digest disagrees"
        return None

    def _needed(self, opened: _Open) -> int:
        asked, quorum = len(opened.members), opened.terms.quorum
        return asked if quorum is None else min(quorum, asked)

    def _close_if_over(self, now: float) -> list[Action]:
        """Close when nobody is left to wait for: all answered, or all but the absent and that suffices."""
        opened = self._open
        if opened is None or opened.message.closing or opened.uncovering:
            return []
        enough = len(opened.counted) >= self._needed(opened)
        if not opened.waiting or (enough and not opened.present):
            return self._close(opened, now)
        return []

    def ask_anew(self, agent: int, now: float) -> list[Action]:
        """Open a masked round again after a member's key changed: its masks would not come off."""
        opened = self._open
        if opened is None or opened.uncovering or not opened.terms.masked or agent not in opened.members:
            return []
        return self._open_next(now)

    def on_sum(
        self, round_: int, found: tuple[NDArray[np.float32], float] | None, now: float
    ) -> list[Action]:
        """Take in the mean of a masked round, scalars and loss; None where it cannot be found."""
        opened = self._open
        if opened is None or not opened.uncovering or opened.message.plan.round != round_:
            return []
        opened.uncovering = False
        if found is None:
            opened.counted.clear()
        return self._close(opened, now, found)

    def _close(
        self, opened: _Open, now: float, found: tuple[NDArray[np.float32], float] | None = None
    ) -> list[Action]:
        counted = opened.counted
        plan = opened.message.plan
        skipped = len(counted) < max(3 if opened.terms.masked else 1, self._needed(opened))
        if opened.terms.masked and found is None and not skipped:
            opened.uncovering, opened.waited_s, opened.announced_s = True, 0.0, now
            opened.resend_s = opened.terms.resend_s
            return [Uncover(plan.round, frozenset(counted))]
        alike = plan.shares == 1 and found is None  # agents of unlike shares measure unlike things
        changes = self.outliers.observe(counted, self._classes(opened)) if alike and not skipped else []
        scalars = np.zeros((plan.steps, plan.scalars), np.float32)
        trusted, liars = self._trusted(counted, opened.terms)
        # Where as many are known as may lie, nobody is left to trim: the mean makes most of the others.
        known = len(trusted) < len(counted) or bool(self._discredited - counted.keys())
        rule = "trimmed" if known and liars == 0 else opened.terms.rule
        if found is not None:
            scalars = found[0].reshape(plan.steps, plan.scalars)
        elif not skipped:
            scalars = aggregate_levels(trusted, self.levels, plan, rule=rule, liars=liars, packs=opened.packs)
        record = RoundRecord(plan, self._epoch, skipped, scalars, digest=0)
        apply_record(self.replica, record, check=False)
        record = record.ending(self.replica.digests())
        self._recent = [*self._recent, record][-_RECENT:]
        self._open = None
        self._stragglers[plan.round] = opened.waiting
        self._stragglers.pop(plan.round - _RECENT, None)
        actions: list[Action] = []
        for agent in sorted(opened.members):
            done, silent = agent in counted and not skipped, agent in opened.waiting
            told = self.attendance.account(agent, plan.round, counted=done, silent=silent)
            actions += [Note(kind, agent, text) for kind, text in told]
        if skipped:
            missing = f"round {plan.round}: {len(counted)} of {self._needed(opened)} needed"
            actions.append(Note("skipped", None, missing))
        for agent, text in changes:
            actions.append(Note("suspect" if text else "trusted again", agent, text))
        self._uncounted = opened.members - (frozenset() if skipped else counted.keys())
        replies = {a: (reply, a in trusted and not skipped) for a, reply in opened.answered.items()}
        if opened.terms.masked:  # nobody knows what they sent
            nothing = np.empty(0, np.float32)
            replies = {a: (replace(reply, scalars=nothing), used) for a, (reply, used) in replies.items()}
        loss = None
        if not skipped and not opened.terms.private:
            loss = mean_loss(trusted) if found is None else found[1]
        actions.append(Commit(record, loss, opened.opened_s, replies))
        return actions + self._open_next(now)

    def _classes(self, opened: _Open) -> Sequence[NDArray[np.float64]]:
        """Return the classes' scalars, where somebody has to be judged by them."""
        if self._reference is None or opened.terms.rule == "mean":
            return ()
        try:
            return self._reference(opened.message)
        except EstimateError:  # then the agents are compared with each other alone
            return ()

    def _trusted(self, counted: dict[int, Reply], terms: Terms) -> tuple[dict[int, Reply], float]:
        """Return the replies without those of suspects, and what share of them may still lie.

        The mean trusts all. The other rules leave out no more than may lie; a suspect beyond these may lie.
        """
        if terms.rule == "mean" or not counted:
            return counted, terms.liars
        known = len(self._discredited - counted.keys())  # who answers well is none, whatever came in his name
        bearable = max(0, tolerated(len(counted) + known, terms.liars) - known)
        suspects = [agent for agent in self.outliers.least_trusted() if agent in counted]
        left_out = suspects[:bearable]
        trusted = {agent: reply for agent, reply in counted.items() if agent not in left_out}
        return trusted, min(0.49, (max(bearable, len(suspects)) - len(left_out)) / len(trusted))

    def _open_next(self, now: float) -> list[Action]:
        if self._paused:
            return []
        round_ = self.replica.round
        terms = self._terms_of(round_)
        fleet = len(self.attendance.members)
        plan, batches, actions = terms.plan_of(round_), dict[int, int](), list[Action]()
        members: list[int] = []
        if not self.finished:
            plan, batches, actions = self._fit(plan, terms)
            members = self.attendance.choose(
                round_,
                cohort=terms.cohort,
                seed=self._seed,
                without=self._left_out.keys() | (self.unready if terms.masked else set()),
            )
            if not members or (terms.masked and self._too_few(members, terms)):
                return actions
        if self.ledger is not None:
            for agent in members:
                self.ledger.ask(Work(agent, plan, batches.get(agent, terms.batch_size), terms.central))
        message = RoundOpen(
            plan=plan,
            epoch=self._epoch,
            attempt=0,
            batch_size=terms.batch_size,
            central=terms.central,
            closing=self.finished,
            deadline_ms=min(int(terms.deadline_s * 1000), 0xFFFFFFFF),
            cohort=Cohort(None if len(members) == fleet else frozenset(members)),
            records=tuple(self._recent),
            batches={agent: batches[agent] for agent in members if agent in batches},
            uncounted=self._uncounted,
        )
        self._open = _Open(
            message=message,
            terms=terms,
            opened_s=now,
            announced_s=now,
            resend_s=terms.resend_s,
            digests=self._recent[-1].digests if self._recent else self.replica.digests(),
            members=frozenset(members),
            waiting=set(members),
            present={agent for agent in members if self.attendance.members[agent].online},
        )
        return [*actions, Announce(message)]

    def _too_few(self, members: Sequence[int], terms: Terms) -> bool:
        """Return whether a masked round should wait: nobody hides among two, nor among the first to come."""
        late = any(not self.attendance.members[agent].excluded for agent in self.unready)
        return len(members) < 3 or (late and self._waited_for_keys_s < terms.deadline_s)

    def _fit(self, plan: RoundPlan, terms: Terms) -> tuple[RoundPlan, dict[int, int], list[Action]]:
        """Fit a round to the budgets; say who is left out that was not, and who no longer is."""
        if self.ledger is None:
            return plan, {}, []
        fitting = self.ledger.fit(
            plan,
            batch_size=terms.batch_size,
            central=terms.central,
            agents=range(len(self.attendance.members)),
            needed=terms.quorum or 1,
        )
        before, self._left_out = self._left_out, dict(fitting.left_out)
        actions: list[Action] = [
            Note("left out", agent, reason) for agent, reason in self._left_out.items() if agent not in before
        ]
        actions += [Note("fits again", agent, "") for agent in before if agent not in self._left_out]
        if plan.perturbations != fitting.plan.perturbations:
            fewer = f"{fitting.plan.perturbations} of {plan.perturbations}"
            actions.append(Note("fewer perturbations", None, f"round {plan.round}: {fewer}"))
        return fitting.plan, dict(fitting.batches), actions
