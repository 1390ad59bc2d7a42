"""The agent as a state machine: a message or a tick in, messages out.

It does no input or output and looks at no clock: the time is passed in, and what needs a graph or
samples comes as a function. Right with a transport that loses, repeats and delays: a duplicate
announcement is answered from memory, a gap is filled from the coordinator's log, and whatever a
message says, weights change only by a record that leads to the digest it names.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from edge_agent.estimator import Estimate
from edge_agent.plan import RoundPlan
from edge_agent.privacy import Privacy, privatise, read_privacy
from edge_agent.replay import Replica, apply_record
from edge_agent.roster import number_in
from edge_agent.wire import Reply, RoundOpen, RoundRecord, SliceRequest, Snapshot, decode
from profiles.errors import DigestError, EstimateError, LogError, StateError, WireError

__all__ = ["Agent", "Report"]

_ASK_AGAIN_S = 2.0
_MOST_SHARDS = 4096
_DOUBTS = 3


@dataclass(frozen=True)
class Report:
    """The agent wants its status published.

    Attributes:
        state: "ready", "closed" (the run is over and the replica is at its last round) or "refused".
        text: What happened, for people.
    """

    state: str
    text: str = ""


class Agent:
    """One board's part in a run.

    Args:
        name: The agent's name in the fleet.
        bundle_identity: Of the bundle at hand; a run with another is refused.
        replica: Where to start: fresh from the bundle, or what a power cut left.
        fresh_replica: Makes the replica of round 0.
        estimate: Measures what a round asks with the agent's samples, given its number in the fleet.
        peak_kib: Largest resident size of the process so far.
        secret: Returns so many random bytes that nobody can guess, for the noise of private replies.
        restore: Makes a replica of a snapshot's bytes, or None if they are not this run's; raises StateError.

    Attributes:
        dropped: Count of messages that changed nothing, by reason.
        replica: The agent's replica.
        counted: How many of its replies the coordinator has said to have counted.
        uncounted: And how many not.
        shards: Shards of the run, once the control message told; 0 before.
    """

    def __init__(
        self,
        *,
        name: str,
        bundle_identity: str,
        replica: Replica,
        fresh_replica: Callable[[], Replica],
        estimate: Callable[[Replica, RoundOpen, int], Estimate],
        peak_kib: Callable[[], int],
        secret: Callable[[int], bytes] | None = None,
        restore: Callable[[bytes], Replica | None] = lambda state: None,
    ) -> None:
        self.name = name
        self.replica = replica
        self.shards = 0
        self.dropped: Counter[str] = Counter()
        self.estimates = 0
        self.forwards = 0
        self.counted = 0
        self.uncounted = 0
        self._bundle_identity = bundle_identity
        self._fresh_replica = fresh_replica
        self._estimate = estimate
        self._peak_kib = peak_kib
        self._restore = restore
        self._secret = secret
        self._privacy: Privacy | None = None
        self._number: int | None = None
        self._epoch = 0
        self._open: RoundOpen | None = None
        self._reply: Reply | None = None
        self._reply_to: tuple[RoundPlan, int, bool] | None = None  # what the reply in memory answers
        self._answered: int | None = None  # the round that we answered, until we heard whether that counted
        self._asked_at: float | None = None
        self._largest_batch: int | None = None  # that this board's memory has held, once one was too large
        self._disagreed = 0  # how often in a row a log that began with the bundle led elsewhere
        self._closed = False
        self._followed_epoch = 0  # the epoch whose log took the replica to where it is

    @property
    def opened(self) -> RoundOpen | None:
        """The round that was announced last."""
        return self._open

    @property
    def number(self) -> int | None:
        """The agent's number in the fleet, once the control message told."""
        return self._number

    @property
    def wants_records(self) -> bool:
        """Whether it asked for records and waits for them."""
        return self._asked_at is not None

    def adopt(self, found: Replica | None, now: float) -> list[Reply | SliceRequest | Report]:
        """Put a replica that was fetched in this one's place, if it was asked for and leads further.

        Args:
            found: Of this bundle and run, its digest checked; None where there is none.
            now: Seconds on a monotonic clock.
        """
        if found is None or self._asked_at is None or found.round <= self.replica.round:
            self.dropped["snapshot refused"] += 1
            return []
        self.replica = found
        self._reply = None
        self._asked_at = None
        self._followed_epoch = self._epoch
        return self._advance(now)

    @property
    def epoch(self) -> int:
        """The highest epoch heard of."""
        return self._epoch

    def on_control(self, control: dict[str, Any], now: float) -> list[Reply | SliceRequest | Report]:
        """Take in the run's configuration: who is in the fleet, with which bundle, and who may speak.

        Whoever can write the control message decides the epoch, downwards too: an announcement that was
        forged with a high epoch shuts nobody out for longer than until the coordinator speaks again.
        """
        try:
            bundle, shards, epoch = control["bundle"], control["shards"], control["epoch"]
            number = number_in(control["agents"], self.name)
            if type(shards) is not int or not 1 <= shards <= _MOST_SHARDS:
                raise ValueError("shards")
            if type(epoch) is not int or not 0 <= epoch <= 0xFFFF:
                raise ValueError("epoch")
            privacy = read_privacy(control)
        except (KeyError, TypeError, ValueError):
            self.dropped["malformed control"] += 1
            return []
        if bundle != self._bundle_identity:
            return [Report("refused", f"the run has bundle {bundle!r:.16}, not {self._bundle_identity[:12]}")]
        if number is None:
            return [Report("refused", f"{self.name} is not in the fleet of this run")]
        if privacy is not None and self._secret is None:
            return [Report("refused", "the run wants private replies, and this agent has no secret noise")]
        if number != self._number or privacy != self._privacy:
            self._reply = None  # it was measured with the samples of another number, or told too much
        self._privacy = privacy
        self.shards = shards
        self._number = number
        self._epoch = epoch
        if self._open is not None and self._open.epoch > epoch:
            self._open = None
        return [Report("ready"), *self._advance(now)]

    def on_message(self, payload: bytes, now: float) -> list[Reply | SliceRequest | Report]:
        """Take in a round announcement or a slice of the log.

        Args:
            payload: As it came; anything that does not decode is counted and dropped.
            now: Seconds on a monotonic clock.
        """
        try:
            message = decode(payload)
        except WireError:
            self.dropped["undecodable"] += 1
            return []
        if isinstance(message, (Reply, SliceRequest)):
            self.dropped["unexpected kind"] += 1
            return []
        if message.epoch < self._epoch:
            self.dropped["older epoch"] += 1
            return []
        if (
            isinstance(message, RoundOpen)
            and message.epoch == self._followed_epoch
            and message.plan.round < self.replica.round
        ):
            self.dropped["late"] += 1
            return []
        self._epoch = message.epoch
        if isinstance(message, RoundOpen):
            self._open = message
            self._acknowledge(message)
            return self._advance(now)
        if isinstance(message, Snapshot):
            self._take_over(message)
            return self._advance(now)
        self._asked_at = None
        doubts = self._disagreed
        self._apply(message.records)
        if self._disagreed > doubts:
            self._asked_at = now  # the same question has the same answer: ask again later
            if self._disagreed == _DOUBTS:
                return [Report("refused", "the log does not follow from this bundle")]
            return []
        return self._advance(now)

    def on_tick(self, now: float) -> list[Reply | SliceRequest | Report]:
        """Ask again for records that did not come."""
        patience_s = _ASK_AGAIN_S * 2 ** min(self._disagreed, 5)
        if self._asked_at is not None and now - self._asked_at >= patience_s:
            self._asked_at = None
            return self._advance(now)
        return []

    def on_connected(self, now: float) -> list[Reply | SliceRequest | Report]:
        """Say what may have been lost with the connection: a request for records is made again."""
        self._asked_at = None
        return self._advance(now)

    def _advance(self, now: float) -> list[Reply | SliceRequest | Report]:
        """Do what the open round asks, or ask for what stands between it and the replica."""
        opened = self._open
        if opened is None or self._number is None:
            return []
        target = opened.plan.round
        if self.replica.round > target:
            # The log ends before our round: what we hold was never committed. Start again.
            self._start_again("ahead of the log")
        self._apply(opened.records)
        if self.replica.round < target:
            if self._asked_at is not None:
                return []
            self._asked_at = now
            return [SliceRequest(self._epoch, self.replica.round)]
        if self.replica.round > target:
            return []
        self._asked_at = None
        self._followed_epoch = opened.epoch
        if opened.closing:
            already, self._closed = self._closed, True
            return [] if already else [Report("closed")]
        if self._number not in opened.cohort:
            return []
        if opened.records and self.replica.digest() != opened.records[-1].digest_at(self.replica.level):
            self._start_again("digest disagreed")
            return self._advance(now)
        return [self._answer(opened, self._number)]

    def _acknowledge(self, opened: RoundOpen) -> None:
        """Take in whether our last reply counted: the next round's message says whose did not."""
        if self._answered is None or self._number is None or opened.plan.round <= self._answered:
            return
        if opened.plan.round == self._answered + 1:
            if self._number in opened.uncounted:
                self.uncounted += 1
            else:
                self.counted += 1
        self._answered = None

    def _take_over(self, message: Snapshot) -> None:
        """Put the snapshot in the replica's place, if it was asked for and leads further."""
        if self._asked_at is None:
            self.dropped["snapshot that was not asked for"] += 1
            return
        try:
            found = self._restore(message.state)
        except StateError:
            found = None
        if found is None or found.round <= self.replica.round:
            self.dropped["snapshot refused"] += 1
            return
        self.replica = found
        self._reply = None
        self._asked_at = None
        self._followed_epoch = self._epoch

    def _start_again(self, reason: str) -> None:
        self.dropped[reason] += 1
        self.replica = self._fresh_replica()
        self._reply = None

    def _answer(self, opened: RoundOpen, number: int) -> Reply:
        """Return the reply to a round, from memory if it was measured before."""
        asked = (opened.plan, opened.batch_of(number), opened.central)
        self._answered = opened.plan.round
        if self._reply is None or self._reply_to != asked:
            self._reply, self._reply_to = self._measured(opened, number), asked
        return replace(self._reply, epoch=opened.epoch, attempt=opened.attempt)

    def _measured(self, opened: RoundOpen, number: int) -> Reply:
        reply = Reply(
            epoch=opened.epoch,
            round=opened.plan.round,
            attempt=opened.attempt,
            samples=opened.batch_of(number),
            loss=float("nan"),
            peak_kib=self._peak_kib(),
            digest=self.replica.digest(),
        )
        batch = min(opened.batch_of(number), self._largest_batch or opened.batch_size)
        while True:
            try:
                made = self._estimate(self.replica, replace(opened, batch_size=batch), number)
            except MemoryError:
                self.dropped["batch too large for this board's memory"] += 1
                if batch == 1:
                    return reply
                batch //= 2  # fewer samples are better than none, and their weight is theirs
                self._largest_batch = batch
            except EstimateError:
                self.dropped["estimate failed"] += 1
                return reply
            else:
                break
        self.estimates += 1
        self.forwards += made.forwards
        scalars, loss = made.scalars.reshape(-1), made.loss
        if self._privacy is not None and self._secret is not None:
            scalars = privatise(scalars, self._privacy, self._secret)
            loss = 0.0  # it would tell on the samples too
        return replace(reply, samples=batch, loss=loss, scalars=scalars, peak_kib=self._peak_kib())

    def _apply(self, records: tuple[RoundRecord, ...]) -> None:
        """Apply those of the consecutive records that come next; only the last one's digest is checked."""
        following = [record for record in records if record.plan.round >= self.replica.round]
        if not following or following[0].plan.round != self.replica.round:
            return
        from_bundle = self.replica.round == 0
        self._followed_epoch = self._epoch
        try:
            for record in following:
                apply_record(self.replica, record, check=record is following[-1])
        except DigestError:
            self._start_again("digest disagreed")
            self._disagreed += from_bundle
        except LogError:
            self._start_again("record refused")
            self._disagreed += from_bundle
        else:
            self._disagreed = 0
