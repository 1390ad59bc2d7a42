"""What rounds want done, and on what terms they are run: plain values between the middle and the rim.

Knows messages. Does nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass

from edge_agent.plan import RoundPlan
from edge_agent.wire import Reply, RoundOpen, RoundRecord

__all__ = ["Action", "Announce", "Commit", "Late", "Note", "Terms", "Uncover"]


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


@dataclass(frozen=True)
class Uncover:
    """Ask those who answered a masked round for what undoes its masks."""

    round: int
    survivors: frozenset[int]


Action = Announce | Commit | Late | Note | Uncover


@dataclass(frozen=True)
class Terms:
    """How rounds are run; a change takes effect when the next one is opened.

    Attributes:
        plan_of: What round r asks.
        rounds: Where the run ends.
        batch_size: Samples of a local step.
        central: Central differences.
        cohort: How many agents are asked; None asks all.
        quorum: How many answers a record needs; None needs all that are asked.
        deadline_s: After this a round is closed with what came, if that is a quorum; else it is
            extended once by the same time, and then skipped.
        resend_s: A round without all its answers is announced again after this, then less and less often.
        rule: How the replies become one; see :data:`coordinator.aggregation.RULES`.
        liars: The share of the agents that may lie; the mean trusts all.
        private: Replies tell no loss.
        masked: Only the sum of the replies can be read, and only after it was asked for.
    """

    plan_of: Callable[[int], RoundPlan]
    rounds: int
    batch_size: int
    central: bool
    cohort: int | None
    quorum: int | None
    deadline_s: float
    resend_s: float
    rule: str = "mean"
    liars: float = 0.2
    private: bool = False
    masked: bool = False
