"""A fleet in one process, for tests: real agents and rounds over the in-memory link, a quadratic loss."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from coordinator.actions import Terms
from coordinator.ledger import Ledger
from coordinator.rounds import Rounds
from coordinator.scalar_log import ScalarLog
from coordinator.service import Service
from edge_agent.agent import Agent, Report
from edge_agent.estimator import estimate
from edge_agent.grid import plan_segments, snap
from edge_agent.link import Connected, MemoryBroker, MemoryLink, Message
from edge_agent.optimizer import METHODS
from edge_agent.plan import RoundPlan
from edge_agent.replay import Replica
from edge_agent.topics import Topics, shard_of
from edge_agent.wire import Reply, SliceRequest, encode

SIZE = 256
BUNDLE = "b" * 64
TOPICS = Topics("scalarfed", "test")


def fresh_replica() -> Replica:
    weights = np.random.default_rng(1).normal(0, 0.1, SIZE).astype(np.float32)
    segments = plan_segments(weights, [(0, SIZE)])
    snap(weights, segments)
    return Replica(weights, segments)


def plan_of(round_: int, *, method: str = "hiso", perturbations: int = 4, steps: int = 1) -> RoundPlan:
    rule = METHODS[method]
    return RoundPlan(round_, 7, rule.code, steps, perturbations, 1e-3, 0.01, rule.values({}))


class BoardInMemory:
    """An agent with its link, pumped by hand; :meth:`kill` and :meth:`boot` as a power cut does."""

    def __init__(self, name: str, broker: MemoryBroker) -> None:
        self.name = name
        self.broker = broker
        self.target = np.random.default_rng(len(name) + ord(name[-1])).normal(0, 0.2, SIZE)
        self.link: MemoryLink | None = None
        self.boot()

    def boot(self, replica: Replica | None = None) -> None:
        will = json.dumps({"name": self.name, "state": "offline"}).encode()
        self.link = MemoryLink(self.broker, will=(TOPICS.status(self.name), will))
        self.agent = Agent(
            name=self.name,
            bundle_identity=BUNDLE,
            replica=replica or fresh_replica(),
            fresh_replica=fresh_replica,
            estimate=self._estimate,
            peak_kib=lambda: 1000,
        )
        self.link.subscribe(TOPICS.control)
        self.link.subscribe(TOPICS.answer(self.name))

    def kill(self) -> None:
        assert self.link is not None
        self.link.sever()
        self.link = None

    def pump(self, now: float) -> None:
        """Handle all that has arrived."""
        while self.link is not None and (event := self.link.receive(0)) is not None:
            if isinstance(event, Message) and event.topic == TOPICS.control:
                outgoing = self.agent.on_control(json.loads(event.payload), now)
                self.link.subscribe(TOPICS.round(shard_of(self.name, max(1, self.agent.shards))))
            elif isinstance(event, Message):
                outgoing = self.agent.on_message(event.payload, now)
            elif isinstance(event, Connected):
                outgoing = self.agent.on_connected(now)
            else:
                continue
            self._send(outgoing)
        if self.link is not None:
            self._send(self.agent.on_tick(now))

    def _send(self, outgoing: list[Reply | SliceRequest | Report]) -> None:
        assert self.link is not None
        for message in outgoing:
            if isinstance(message, Reply):
                shard = shard_of(self.name, self.agent.shards)
                self.link.publish(TOPICS.reply(shard, self.name), encode(message))
            elif isinstance(message, SliceRequest):
                self.link.publish(TOPICS.request(self.name), encode(message))
            else:
                status = {"state": message.state, "round": self.agent.replica.round}
                self.link.publish(TOPICS.status(self.name), json.dumps(status).encode(), retain=True)

    def _estimate(self, replica, opened, number):
        def loss() -> float:
            return float(((replica.weights - self.target) ** 2).mean())

        return estimate(replica, opened.plan, lambda step: loss, central=opened.central)


class FleetInMemory:
    """A coordinator and its boards; every turn handles all messages that are under way."""

    masked = False
    shards = 1
    collected = False
    board = BoardInMemory

    def __init__(self, folder: Path, *, boards: int = 3, rounds: int = 12, **options) -> None:
        self.folder = folder
        self.rounds_wanted = rounds
        self.options = options
        self.now = 1000.0
        self.broker = MemoryBroker()
        self.boards = [self.board(f"board-{n}", self.broker) for n in range(boards)]
        path = folder / "log.sqlite"
        self.log = ScalarLog.open(path) if path.exists() else ScalarLog.create(path, {"bundle": BUNDLE})
        self.log.set_agents([(n, board.name, "generic", None, None) for n, board in enumerate(self.boards)])
        self.start_coordinator()

    def start_coordinator(self) -> None:
        """Start a coordinator on the log, as after a crash of the last one."""
        from edge_agent.replay import apply_records

        replica = fresh_replica()
        apply_records(replica, self.log.records())
        settings = {"cohort": None, "quorum": None, "deadline_s": 60.0, "resend_s": 2.0, **self.options}
        self.terms = Terms(
            plan_of=plan_of, rounds=self.rounds_wanted, batch_size=16, central=True, **settings
        )
        self.coordinator_link = MemoryLink(self.broker)
        self.rounds = Rounds(
            fleet=len(self.boards),
            terms_of=self.terms_of,
            epoch=self.log.next_epoch(),
            replica=replica,
            recent=list(self.log.records(max(0, replica.round - 4))),
            seed=7,
            ledger=self.ledger(),
        )
        self.service = Service(
            link=self.coordinator_link,
            topics=TOPICS,
            log=self.log,
            rounds=self.rounds,
            agents=[board.name for board in self.boards],
            bundle_identity=BUNDLE,
            masked=self.masked,
            shards=self.shards,
            collected=self.collected,
            clock=lambda: self.now,
        )
        self.service.start()

    def ledger(self) -> Ledger | None:
        """Return the books of the fleet, for tests that have some."""
        return None

    def terms_of(self, round_: int) -> Terms:
        """Return the terms of a round, for tests that change them."""
        return self.terms

    def crash_coordinator(self) -> None:
        """End the coordinator without a word; whatever it had not committed is gone."""
        self.coordinator_link.close()

    def turn(self, seconds: float = 0.3) -> None:
        """Let the time pass, and everybody handle what has arrived."""
        self.now += seconds
        self.service.pump()
        for board in self.boards:
            board.pump(self.now)
        self.service.pump()

    def run(self, *, until: Callable[[], bool] | None = None, turns: int = 2000) -> None:
        """Take turns until the rounds are closed (or ``until``) and everybody has caught up."""
        for _ in range(turns):
            if until() if until is not None else self._done():
                return
            self.turn()
        raise AssertionError(f"stuck at round {self.rounds.replica.round} after {turns} turns")

    def _done(self) -> bool:
        last = self.rounds.replica.round
        awake = [board for board in self.boards if board.link is not None]
        return self.rounds.finished and all(board.agent.replica.round == last for board in awake)

    def digests(self) -> set[int]:
        """Return the different digests of the coordinator and of all boards that are awake."""
        boards = {board.agent.replica.digest() for board in self.boards if board.link is not None}
        return boards | {self.rounds.replica.digest()}
