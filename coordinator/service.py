"""The loop that joins rounds, log and link: the coordinator's rim.

Actions of the state machine are carried out in their order, hence a record is on the disk before it
is published. Whatever arrives and does not belong is counted and dropped.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from coordinator.rounds import Action, Announce, Commit, Late, Rounds
from coordinator.scalar_log import ScalarLog
from edge_agent.link import Connected, Link, Message
from edge_agent.topics import Topics, shard_of
from edge_agent.wire import Reply, RoundRecord, Slice, SliceRequest, decode, encode
from profiles.errors import WireError

__all__ = ["Service"]

_TICK_S = 0.25
_SLICE_BYTES = 200_000
_SLICE_RECORDS = 512
_LARGEST_STATUS = 16_384


class Service:
    """Runs a run over a link until its last round is closed.

    Args:
        link: Connected or about to be.
        topics: Of the run.
        log: Every record goes there first.
        rounds: The state machine, not yet started.
        agents: Names of the fleet in the order of their numbers.
        bundle_identity: What the agents must have.
        shards: Topics over which the agents are spread.
        on_commit: Called after every record that is on the disk.
        on_idle: Called a few times a second, for whoever watches processes.
        clock: Monotonic seconds.

    Attributes:
        statuses: Last status of each agent, by name.
        traffic: Bytes that each agent process counted, and its ``rounds``, by name and process id.
        dropped: Count of messages that changed nothing, by reason, beside those of ``rounds``.
    """

    def __init__(
        self,
        *,
        link: Link,
        topics: Topics,
        log: ScalarLog,
        rounds: Rounds,
        agents: Sequence[str],
        bundle_identity: str,
        shards: int = 1,
        on_commit: Callable[[RoundRecord, float | None], None] = lambda record, loss: None,
        on_idle: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.statuses: dict[str, dict[str, Any]] = {}
        self.traffic: dict[tuple[str, int], dict[str, int]] = {}
        self.dropped: Counter[str] = Counter()
        self._link = link
        self._topics = topics
        self._log = log
        self._rounds = rounds
        self._agents = list(agents)
        self._numbers = {name: number for number, name in enumerate(agents)}
        self._bundle_identity = bundle_identity
        self._shards = shards
        self._on_commit = on_commit
        self._on_idle = on_idle
        self._clock = clock
        self._closing_since: float | None = None

    def run(self, *, stop: Callable[[], bool], farewell_s: float = 20.0) -> None:
        """Serve until all rounds are closed and every agent that is there has caught up, or told to stop.

        Args:
            stop: Asked a few times a second; True ends the loop between two messages.
            farewell_s: How long to wait for the last agents' last status.
        """
        self.start()
        idle_at = 0.0
        while not stop():
            self.pump(_TICK_S)
            now = self._clock()
            if now - idle_at >= _TICK_S:
                idle_at = now
                self._on_idle()
            if self._rounds.finished and self._farewell(now, farewell_s):
                return

    def start(self) -> None:
        """Subscribe, publish the configuration and open the first round."""
        for pattern in ("u/#", "st/#", "q/#"):
            self._link.subscribe(self._topics.base + pattern)
        self._publish_control()
        self._act(self._rounds.start(self._clock()))

    def pump(self, timeout_s: float = 0.0) -> None:
        """Handle all that has arrived; wait for the first event as long as ``timeout_s``."""
        event = self._link.receive(timeout_s)
        while event is not None:
            if isinstance(event, Message):
                self._on_message(event, self._clock())
            elif isinstance(event, Connected):
                self._publish_control()
                self._act(self._rounds.announce_again(self._clock()))
            event = self._link.receive(0.0)
        self._act(self._rounds.on_tick(self._clock()))

    def announce_state(self, state: str) -> None:
        """Publish the run's configuration with another state, such as "stopped"."""
        self._publish_control(state)

    @property
    def final_digest(self) -> int:
        """Digest of the coordinator's replica."""
        return self._rounds.replica.digest()

    def bytes_seen(self) -> tuple[int, int]:
        """Return the bytes that came from and went to the broker so far."""
        return self._link.traffic.packet_down, self._link.traffic.packet_up

    def online(self) -> int:
        """Return how many agents are there."""
        return sum(status.get("state") != "offline" for status in self.statuses.values())

    def _publish_control(self, state: str = "running") -> None:
        control = {
            "state": state,
            "bundle": self._bundle_identity,
            "agents": self._agents,
            "shards": self._shards,
        }
        self._link.publish(self._topics.control, json.dumps(control).encode(), retain=True)

    def _farewell(self, now: float, farewell_s: float) -> bool:
        """Return whether every agent has reported the last digest, or waiting longer is no use."""
        if self._closing_since is None:
            self._closing_since = now
        last = self._rounds.replica.round
        behind = [name for name in self._agents if self._status_round(name) != last]
        return not behind or now - self._closing_since >= farewell_s

    def _status_round(self, name: str) -> int | None:
        return self.statuses.get(name, {}).get("round")

    def _act(self, actions: Sequence[Action]) -> None:
        for action in actions:
            if isinstance(action, Commit):
                self._commit(action)
            elif isinstance(action, Announce):
                payload = encode(action.message)
                for shard in range(self._shards):
                    self._link.publish(self._topics.round(shard), payload, retain=True)
            elif isinstance(action, Late):
                self._log.add_late_reply(self._agents[action.agent], action.reply, time.time())
            else:
                name = "" if action.agent is None else self._agents[action.agent]
                self._log.add_event(action.kind, name, action.text)

    def _commit(self, action: Commit) -> None:
        closed_at = time.time()
        replies = {
            self._agents[number]: (reply, counted, closed_at)
            for number, (reply, counted) in action.replies.items()
        }
        opened_at = closed_at - (self._clock() - action.opened_s)
        self._log.append(
            action.record, loss=action.loss, opened_at=opened_at, closed_at=closed_at, replies=replies
        )
        self._on_commit(action.record, action.loss)

    def _on_message(self, message: Message, now: float) -> None:
        kind, *rest = message.topic[len(self._topics.base) :].split("/")
        name = rest[-1] if rest else ""
        number = self._numbers.get(name)
        if number is None:
            self._drop(f"{kind}: not in the fleet", name)
        elif kind == "st" and len(rest) == 1:
            self._on_status(number, message.payload, now)
        elif kind == "u" and rest == [str(shard_of(name, self._shards)), name]:
            self._on_reply(number, message.payload, now)
        elif kind == "q" and len(rest) == 1:
            self._on_request(name, message.payload)
        else:
            self._drop("unknown topic", name)

    def _on_status(self, number: int, payload: bytes, now: float) -> None:
        name = self._agents[number]
        try:
            if len(payload) > _LARGEST_STATUS:
                raise ValueError("too long")
            status = json.loads(payload)
            state = status["state"]
        except (ValueError, KeyError, TypeError):
            self._drop("malformed status", name)
            return
        before = self.statuses.get(name, {})
        if before.get("state") != state:
            self._log.add_event(f"agent {state}", name)
        # A last will says only that the agent is gone: keep what it said before.
        self.statuses[name] = {**before, **status}
        self._count_traffic(name, status)
        self._act(self._rounds.on_presence(number, online=state != "offline", now=now))

    def _count_traffic(self, name: str, status: dict[str, Any]) -> None:
        try:
            counts = {key: int(value) for key, value in status["traffic"].items()}
            self.traffic[name, int(status["pid"])] = {**counts, "rounds": int(status["estimates"])}
        except (KeyError, TypeError, ValueError, AttributeError):
            if status["state"] != "offline":
                self._drop("malformed status", name)

    def _on_reply(self, number: int, payload: bytes, now: float) -> None:
        try:
            message = decode(payload)
        except WireError as error:
            self._drop("undecodable reply", self._agents[number], str(error))
            return
        if not isinstance(message, Reply):
            self._drop("not a reply", self._agents[number])
            return
        self._act(self._rounds.on_reply(number, message, now))

    def _on_request(self, name: str, payload: bytes) -> None:
        try:
            message = decode(payload)
        except WireError as error:
            self._drop("undecodable request", name, str(error))
            return
        if not isinstance(message, SliceRequest) or message.first > len(self._log):
            self._drop("not a request", name)
            return
        records: list[RoundRecord] = []
        size = 0
        for record in self._log.records(message.first, message.first + _SLICE_RECORDS):
            records.append(record)
            size += 64 + record.scalars.nbytes
            if size >= _SLICE_BYTES:
                break
        answer = Slice(self._rounds.epoch, message.first, tuple(records))
        self._link.publish(self._topics.answer(name), encode(answer))

    def _drop(self, reason: str, name: str, text: str = "") -> None:
        self.dropped[reason] += 1
        if self.dropped[reason] in (1, 10, 100, 1000):  # the log is not the flood's to fill
            self._log.add_event("dropped", name[:64], f"{reason}: {text}"[:200])

    def counts(self) -> Mapping[str, int]:
        """Return how many messages were dropped so far, by reason."""
        return dict(self.dropped + self._rounds.dropped)
