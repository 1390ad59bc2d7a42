"""The loop that joins rounds, log and link: the coordinator's rim.

Actions of the state machine are carried out in their order, hence a record is on the disk before it
is published. Whatever arrives and does not belong is counted and dropped.
"""

import json
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from coordinator.actions import Action, Announce, Commit, Late, Uncover
from coordinator.catch_up import CatchUp
from coordinator.packing import unpack
from coordinator.rounds import Rounds
from coordinator.scalar_log import ScalarLog
from coordinator.status import read_status
from coordinator.unveil import Veils
from edge_agent.link import Connected, Link, Message
from edge_agent.masked_wire import is_masked
from edge_agent.replay import Replica
from edge_agent.roster import pack_names
from edge_agent.topics import Topics, shard_of
from edge_agent.wire import Reply, RoundRecord, SliceRequest, decode, encode
from profiles.errors import StateError, WireError

__all__ = ["Service"]

_TICK_S = 0.25
_LONGEST_PUMP_S = 0.25
_REPEAT_S = 1.0
_OWN = 64
_MOST_PROCESSES = 64
_TOLD_AT = {*range(1, 21), *(10**n for n in range(2, 10))}
_STRANGERS_TOLD_AT = {10**n for n in range(10)}


class Service:
    """Runs a run over a link until its last round is closed.

    Args:
        link: Connected or about to be.
        topics: Of the run.
        log: Every record goes there first.
        rounds: The state machine, not yet started.
        agents: Names of the fleet in the order of their numbers.
        bundle_identity: What the agents must have.
        web: Port of the web server that hands out the checkpoint, and whether it wants certificates; None for
            none.
        masked: Whether only the sum of the replies is to be read.
        narrower: Identities of the narrower bundles of a family, the narrowest first.
        privacy: What every agent does to its scalars: ``clip`` and ``noise``; None for nothing.
        shards: Topics over which the agents are spread.
        collected: Whether collectors read the replies and hand them up in packs.
        checkpoint: File for the replica as it is every few hundred rounds; it bounds what a late joiner, or
            the next coordinator, has to replay. None keeps it in memory alone.
        checkpoint_every: Rounds between two of them.
        on_commit: Called after every record that is on the disk.
        on_idle: Called a few times a second, for whoever watches processes.
        clock: Monotonic seconds.

    Attributes:
        late: What late agents get.
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
        web: tuple[int, bool] | None = None,
        masked: bool = False,
        narrower: Sequence[str] = (),
        privacy: Mapping[str, float] | None = None,
        shards: int = 1,
        collected: bool = False,
        checkpoint: Path | None = None,
        checkpoint_every: int = 500,
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
        self._roster = pack_names(agents)
        self._bundle_identity = bundle_identity
        self._privacy = privacy
        self._veils = Veils(topics.run, len(agents)) if masked else None
        if masked:
            rounds.unready = set(range(len(agents)))
        self._shards = shards
        self._replies = "p" if collected else "u"
        self.late = CatchUp(
            log,
            run=topics.run,
            epoch=rounds.epoch,
            identities=[*narrower, bundle_identity],
            checkpoint=checkpoint,
            web=web,
        )
        self._checkpoint_every = checkpoint_every
        self._on_commit = on_commit
        self._on_idle = on_idle
        self._clock = clock
        self._state = "running"
        self._shut_out: frozenset[str] = frozenset()
        self._closing_since: float | None = None
        self._processes: dict[str, set[int]] = {}
        self._told: Counter[tuple[str, str]] = Counter()
        self._events: list[tuple[float, str, str, str]] = []
        self._late: list[tuple[str, Reply, float]] = []
        self._notes_at = 0.0
        self._published: dict[str, bytes] = {}
        self._own: deque[bytes] = deque(maxlen=_OWN)  # what we said lately, which may still come back to us
        self._say_again = False
        self._repeated_at = 0.0

    def run(self, *, stop: Callable[[], bool], farewell_s: float = 20.0) -> None:
        """Serve until all rounds are closed and every agent that is there has caught up, or told to stop.

        Args:
            stop: Asked a few times a second; True ends the loop between two messages.
            farewell_s: How long to wait for the last agents' last status.
        """
        self.start()
        idle_at = 0.0
        try:
            while not stop():
                self.pump(_TICK_S)
                now = self._clock()
                if now - idle_at >= _TICK_S:
                    idle_at = now
                    self._on_idle()
                if self._rounds.finished and self._farewell(now, farewell_s):
                    return
        finally:
            self._write_notes()

    def start(self) -> None:
        """Subscribe, publish the configuration and open the first round."""
        for pattern in (f"{self._replies}/#", "st/#", "q/#", "r/#", "ctl"):
            self._link.subscribe(self._topics.base + pattern)
        if self._rounds.replica.round:
            self._take_snapshot()
        self._publish_control()
        self._act(self._rounds.start(self._clock()))

    def pump(self, timeout_s: float = 0.0) -> None:
        """Handle what has arrived, for at most a quarter of a second; wait for the first ``timeout_s``."""
        until = self._clock() + timeout_s + _LONGEST_PUMP_S
        event = self._link.receive(timeout_s)
        while event is not None:
            now = self._clock()
            if isinstance(event, Message):
                self._on_message(event, now)
            elif isinstance(event, Connected):
                self._rounds.on_link(up=True)
                self._repeat(now)
            else:
                self._rounds.on_link(up=False)
            if now >= until:  # a flood must not keep the clock from being looked at
                break
            event = self._link.receive(0.0)
        now = self._clock()
        if self._say_again and now - self._repeated_at >= _REPEAT_S:
            self._repeat(now)
        self._act(self._rounds.on_tick(now))
        if (self._events or self._late) and now - self._notes_at >= _REPEAT_S:
            self._write_notes()

    def shut_out(self, names: Collection[str]) -> None:
        """Hear nothing more of these agents, and count nothing that they said in the open round.

        Args:
            names: All whose certificates were revoked; who is no longer among them is heard again.
        """
        for name in sorted(set(names) & self._numbers.keys() - self._shut_out):
            self._tell("revoked", name, "its certificate counts no more", stranger=False)
            self.statuses[name] = {**self.statuses.get(name, {}), "state": "offline"}
            self._act(self._rounds.shut_out(self._numbers[name], self._clock()))
        self._shut_out = frozenset(names)

    def announce_state(self, state: str) -> None:
        """Publish the run's configuration with another state, such as "stopped"."""
        self._state = state
        self._publish_control()

    def pause(self) -> None:
        """Open no new round; the open one may still be answered, and no deadline comes nearer."""
        self._rounds.pause()
        self.announce_state("paused")

    def resume(self) -> None:
        """Go on after a pause."""
        self.announce_state("running")
        self._act(self._rounds.resume(self._clock()))

    def next_round(self) -> int:
        """Return the round that will be opened next."""
        return self._rounds.next_round

    def status(self) -> dict[str, Any]:
        """Return how the run is: state, round, epoch, digest, who is there, who is left out."""
        members = self._rounds.attendance.members
        return {
            "state": "finished" if self._rounds.finished else self._state,
            "round": self._rounds.replica.round,
            "epoch": self._rounds.epoch,
            "digest": f"{self.final_digest:016x}",
            "online": self.online(),
            "agents": len(self._agents),
            "excluded": [self._agents[n] for n, member in enumerate(members) if member.excluded],
            "suspects": [self._agents[n] for n in self._rounds.outliers.suspects()],
            "dropped": dict(self.counts()),
        }

    @property
    def replica(self) -> Replica:
        """The coordinator's replica."""
        return self._rounds.replica

    @property
    def final_digest(self) -> int:
        """Digest of the coordinator's replica."""
        return self._rounds.replica.digest()

    @property
    def levels(self) -> tuple[int, ...]:
        """Which width of the family each agent holds, by number; all 0 without a family."""
        return self._rounds.levels

    def bytes_seen(self) -> tuple[int, int]:
        """Return the bytes that came from and went to the broker so far."""
        return self._link.traffic.packet_down, self._link.traffic.packet_up

    def online(self) -> int:
        """Return how many agents are there."""
        return sum(status.get("state") != "offline" for status in self.statuses.values())

    def _publish_control(self) -> None:
        control = {
            "state": self._state,
            "bundle": self._bundle_identity,
            "epoch": self._rounds.epoch,
            "agents": self._roster,
            "shards": self._shards,
            **({} if self._privacy is None else {"privacy": dict(self._privacy)}),
            **({} if self._veils is None else {"keys": self._veils.keys()}),
        }
        self._say(self._topics.control, json.dumps(control).encode())

    def _say(self, topic: str, payload: bytes) -> None:
        """Publish what all shall hear, retained, and remember it, so that another's word is noticed."""
        self._published[topic] = payload
        if payload not in self._own:
            self._own.append(payload)
        self._link.publish(topic, payload, retain=True)

    def _repeat(self, now: float) -> None:
        """Say again what is true, after the broker may have forgotten it, or somebody else spoke."""
        self._say_again = False
        self._repeated_at = now
        self._publish_control()
        self._act(self._rounds.announce_again(now))

    def _farewell(self, now: float, farewell_s: float) -> bool:
        """Return whether every agent has reported the last digest, or waiting longer is no use."""
        if self._closing_since is None:
            self._closing_since = now
        last = self._rounds.replica.round
        behind = [
            name for name in self._agents if self._status_round(name) != last and name not in self._shut_out
        ]
        return not behind or now - self._closing_since >= farewell_s

    def _status_round(self, name: str) -> int | None:
        return self.statuses.get(name, {}).get("round")

    def _act(self, actions: Sequence[Action]) -> None:
        for action in actions:
            if isinstance(action, Commit):
                self._commit(action)
            elif isinstance(action, Announce):
                if self._veils is not None:
                    self._veils.open(action.message)
                payload = encode(action.message)
                for shard in range(self._shards):
                    self._say(self._topics.round(shard), payload)
            elif isinstance(action, Late):
                self._late.append((self._agents[action.agent], action.reply, time.time()))
            elif isinstance(action, Uncover):
                if self._veils is not None:
                    for number, request in self._veils.requests(action.survivors).items():
                        self._link.publish(self._topics.answer(self._agents[number]), request)
            else:
                name = "" if action.agent is None else self._agents[action.agent]
                self._tell(action.kind, name, action.text, stranger=action.kind == "refused")

    def _commit(self, action: Commit) -> None:
        closed_at = time.time()
        replies = {
            self._agents[number]: (reply, counted, closed_at)
            for number, (reply, counted) in action.replies.items()
        }
        opened_at = closed_at - (self._clock() - action.opened_s)
        self._log.append(
            action.record,
            loss=action.loss,
            opened_at=opened_at,
            closed_at=closed_at,
            replies=replies,
            events=self._events,
            accounts=[] if self._rounds.ledger is None else self._rounds.ledger.unsaved(),
        )
        self._events.clear()
        if (action.record.plan.round + 1) % self._checkpoint_every == 0:
            self._take_snapshot()
        self._on_commit(action.record, action.loss)

    def _take_snapshot(self) -> None:
        try:
            self.late.take_snapshot(self._rounds.replica)
        except StateError as error:
            self._tell("checkpoint failed", "", str(error), stranger=False)

    def _tell(self, kind: str, name: str, text: str, *, stranger: bool) -> None:
        """Note an event for people: all of them at first, then ever fewer of what anybody can cause."""
        always = kind in ("missed", "excluded", "skipped", "extended", "suspect", "trusted again", "left out")
        self._told[kind, name] += 1
        count = self._told[kind, name]
        if always or count in (_STRANGERS_TOLD_AT if stranger else _TOLD_AT):
            self._events.append((time.time(), kind, name, f"{text} (number {count})" if count > 20 else text))

    def _write_notes(self) -> None:
        """Write what no record has carried into the log."""
        self._notes_at = self._clock()
        self._log.add_notes(self._events, self._late)
        self._events.clear()
        self._late.clear()

    def _on_message(self, message: Message, now: float) -> None:
        kind, *rest = message.topic[len(self._topics.base) :].split("/")
        if kind in ("r", "ctl"):
            self._on_own(message)
            return
        if kind == self._replies == "p":
            self._on_pack(message.payload, now)
            return
        name = rest[-1] if rest else ""
        number = self._numbers.get(name)
        if number is None:
            self._drop(f"{kind}: not in the fleet", "", name[:64])
        elif name in self._shut_out:
            self._drop("revoked", name)
        elif kind == "st" and len(rest) == 1:
            self._on_status(number, message.payload, now)
        elif kind == self._replies and rest == [str(shard_of(name, self._shards)), name]:
            self._on_reply(number, message.payload, now)
        elif kind == "q" and len(rest) == 1:
            self._on_request(name, message.payload, now)
        else:
            self._drop("unknown topic", name)

    def _on_own(self, message: Message) -> None:
        """Notice when somebody else speaks where only we do; what is true is then said again."""
        if message.topic not in self._published or message.payload == self._published[message.topic]:
            return
        if message.payload not in self._own:
            self._drop("foreign announcement", "", message.topic[-64:])
            self._say_again = True

    def _on_status(self, number: int, payload: bytes, now: float) -> None:
        name = self._agents[number]
        try:
            status = read_status(payload)
        except WireError as error:
            self._drop("malformed status", name, str(error))
            return
        if status.get("name", name) != name:
            self._drop("status in another's name", name, status["name"])
            return
        before = self.statuses.get(name, {})
        state = status["state"]
        hello = before.get("state", "offline") == "offline" or before.get("pid") != status.get("pid")
        if before.get("state") != state:
            self._tell(f"agent {state}", name, status.get("text", ""), stranger=False)
        # A last will says only that the agent is gone: keep what it said before.
        self.statuses[name] = {**before, **status}
        self._count_traffic(name, status)
        if self._rounds.ledger is not None:
            self._rounds.ledger.note_status(number, status, now=now)
        if self._veils is not None and self._veils.learn(number, status.get("key", "")):
            self._rounds.unready.discard(number)
            self._publish_control()
            self._act(self._rounds.ask_anew(number, now))
        online = state != "offline"
        self._act(self._rounds.on_presence(number, online=online, hello=hello, now=now))

    def _count_traffic(self, name: str, status: dict[str, Any]) -> None:
        pid = status.get("pid", 0)
        processes = self._processes.setdefault(name, set())
        if "traffic" in status and (pid in processes or len(processes) < _MOST_PROCESSES):
            processes.add(pid)
            self.traffic[name, pid] = {**status["traffic"], "rounds": status.get("estimates", 0)}

    def _on_masked(self, veils: Veils, number: int, payload: bytes, now: float) -> None:
        """Take in a masked reply, or what undoes the masks of a round."""
        try:
            reply = veils.take(number, payload)
        except WireError as error:
            self._drop("undecodable reply", self._agents[number], str(error))
            return
        if reply is not None:
            self._act(self._rounds.on_reply(number, reply, now))
            return
        try:
            found = veils.total()
        except ValueError as error:
            self._tell("masks", "", str(error), stranger=False)
            self._act(self._rounds.on_sum(veils.round, None, now))
            return
        if found is not None:
            self._act(self._rounds.on_sum(veils.round, found, now))

    def _on_pack(self, payload: bytes, now: float) -> None:
        """Take in what a collector handed up, reply by reply as if they had come one by one."""
        try:
            pack = unpack(payload, fleet=len(self._agents))
        except WireError as error:
            self._drop("malformed pack", "", str(error))
            return
        self._say_again = self._say_again or pack.is_hello  # it may have missed replies
        for refused in pack.refused:
            for _ in range(refused.times):
                self._drop(refused.reason, refused.name, refused.text)
        self._rounds.note_pack(pack)
        for number, reply in pack.replies:
            if self._agents[number] in self._shut_out:
                self._drop("revoked", self._agents[number])
            else:
                self._act(self._rounds.on_reply(number, reply, now))

    def _on_reply(self, number: int, payload: bytes, now: float) -> None:
        if self._veils is not None and is_masked(payload):
            self._on_masked(self._veils, number, payload, now)
            return
        try:
            message = decode(payload)
        except WireError as error:
            self._drop("undecodable reply", self._agents[number], str(error))
            return
        if not isinstance(message, Reply):
            self._drop("not a reply", self._agents[number])
            return
        if self._veils is not None and not message.failed:
            self._drop("not masked", self._agents[number])
            return
        self._act(self._rounds.on_reply(number, message, now))

    def _on_request(self, name: str, payload: bytes, now: float) -> None:
        try:
            message = decode(payload)
        except WireError as error:
            self._drop("undecodable request", name, str(error))
            return
        if not isinstance(message, SliceRequest) or message.first > len(self._log):
            self._drop("not a request", name)
            return
        if not self.late.may_ask(name, now):
            self._drop("requests too often", name)
            return
        level = self._rounds.levels[self._numbers[name]]
        self._link.publish(self._topics.answer(name), self.late.answer(name, message.first, level=level))

    def _drop(self, reason: str, name: str, text: str = "") -> None:
        self.dropped[reason] += 1
        self._tell("dropped", name, f"{reason}: {text}"[:200], stranger=True)
        if reason == "undecodable reply" and name in self._numbers:
            self._rounds.on_nonsense(self._numbers[name])

    def counts(self) -> Mapping[str, int]:
        """Return how many messages were dropped so far, by reason."""
        return dict(self.dropped + self._rounds.dropped)
