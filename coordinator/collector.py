"""A process that reads the replies of some shards and hands them up in packs.

Most of what a reply costs the coordinator is its message: reading, acknowledging and handing it over. With
collectors that work lies elsewhere, on other cores or machines, and the coordinator gets one message for
many replies, summed already. A collector looks at form alone; whether a reply belongs to the open round is
for the rounds to say, so that a fleet with collectors does to the bit what one without does. It keeps
nothing: what a killed one held is asked for again. Knows topics and replies. Knows no round and no log.
"""

import contextlib
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from coordinator.packing import MOST_REFUSED, Refused, most_replies, pack
from coordinator.supervisor import Supervisor
from edge_agent.link import Connected, Link, Message, MqttLink
from edge_agent.topics import Topics, shard_of
from edge_agent.wire import Reply, decode
from profiles.errors import WireError

__all__ = ["Collector", "Duty", "collecting", "run_collector"]

_PATIENCE_S = 0.01
_TICK_S = 1.0
_LONGEST_PUMP_S = 0.25
_LONGEST_TEXT = 160


class Collector:
    """Packs the replies of some shards.

    Args:
        link: Connected or about to be.
        topics: Of the run.
        number: Of this collector.
        agents: Names of the whole fleet, in the order of their numbers.
        shards: Over how many topics the fleet is spread.
        mine: Those that this collector reads.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        *,
        link: Link,
        topics: Topics,
        number: int,
        agents: Sequence[str],
        shards: int,
        mine: Sequence[int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._link = link
        self._topics = topics
        self._number = number
        self._numbers = {
            topics.reply(shard_of(name, shards), name): agent for agent, name in enumerate(agents)
        }
        self._names = frozenset(agents)
        self._mine = mine
        self._clock = clock
        self._held: dict[tuple[int, int, int], list[tuple[int, Reply]]] = {}  # by epoch, round, scalars
        self._refused: Counter[tuple[str, str]] = Counter()
        self._first: dict[tuple[str, str], str] = {}
        self._held_since: float | None = None

    def start(self) -> None:
        """Subscribe to the replies of the shards."""
        for shard in self._mine:
            self._link.subscribe(self._topics.reply(shard, "+"))

    def pump(self, timeout_s: float = 0.0) -> None:
        """Take in what has arrived, and hand up what has waited long enough; wait ``timeout_s`` at most."""
        begun = self._clock()
        event = self._link.receive(min(timeout_s, self._due_in(begun)))
        while event is not None:
            if isinstance(event, Message):
                self._take(event)
            elif isinstance(event, Connected):  # what was said meanwhile is lost: let it be asked for again
                self._link.publish(self._topics.pack(self._number), pack(self._number, ()))
            if self._held_since is None and (self._held or self._refused):
                self._held_since = self._clock()
            now = self._clock()
            if self._due_in(now) <= 0 or now - begun >= timeout_s + _LONGEST_PUMP_S:
                break
            event = self._link.receive(0.0)
        if self._due_in(self._clock()) <= 0:
            self.hand_up()

    def hand_up(self) -> None:
        """Send all that is held."""
        told = [
            Refused(reason, name, self._first[reason, name], min(times, 0xFFFF))
            for (reason, name), times in self._refused.items()
        ]
        packs = [pack(self._number, replies) for replies in self._held.values()]
        packs += [
            pack(self._number, (), told[at : at + MOST_REFUSED]) for at in range(0, len(told), MOST_REFUSED)
        ]
        for payload in packs:
            self._link.publish(self._topics.pack(self._number), payload)
        self._held.clear()
        self._refused.clear()
        self._first.clear()
        self._held_since = None

    def _due_in(self, now: float) -> float:
        return _TICK_S if self._held_since is None else self._held_since + _PATIENCE_S - now

    def _take(self, message: Message) -> None:
        agent = self._numbers.get(message.topic)
        name = message.topic.rpartition("/")[2]
        if agent is None:
            known = name in self._names
            self._refuse("unknown topic" if known else "u: not in the fleet", name if known else "", name)
            return
        try:
            reply = decode(message.payload)
        except WireError as error:
            self._refuse("undecodable reply", name, str(error))
            return
        if not isinstance(reply, Reply):
            self._refuse("not a reply", name, "")
            return
        held = self._held.setdefault((reply.epoch, reply.round, reply.scalars.size), [])
        held.append((agent, reply))
        if len(held) >= most_replies(reply.scalars.size):
            self.hand_up()

    def _refuse(self, reason: str, name: str, text: str) -> None:
        self._refused[reason, name] += 1
        self._first.setdefault((reason, name), text[:_LONGEST_TEXT])
        if len(self._refused) >= MOST_REFUSED:
            self.hand_up()


@dataclass(frozen=True)
class Duty:
    """What a collector process is to do, as it stands in its file; there is no secret in it.

    Attributes:
        broker: ``mqtt://HOST:PORT``, or ``mqtts://`` with ``tls``.
        namespace, run: Of the topics.
        number: Of the collector.
        agents: Names of the fleet.
        shards: Over how many topics the fleet is spread.
        mine: Those that this collector reads.
        tls: Files of the authority's certificate, the coordinator's certificate and its key; or none.
    """

    broker: str
    namespace: str
    run: str
    number: int
    agents: list[str]
    shards: int
    mine: list[int]
    tls: list[str]


def run_collector(duty: Duty, *, stop: Callable[[], bool] = lambda: False) -> None:
    """Collect until told to stop.

    Raises:
        BrokerError: The broker's address will not do.
        SecurityError: A certificate will not do.
    """
    topics = Topics(duty.namespace, duty.run)
    context = None
    if duty.tls:
        from edge_agent.credentials import client_context

        context = client_context(*map(Path, duty.tls))
    # A colon is in no device's name, so that no device has such a client id.
    link = MqttLink(duty.broker, client_id=f"collector:{duty.run}:{duty.number}", tls=context)
    collector = Collector(
        link=link,
        topics=topics,
        number=duty.number,
        agents=duty.agents,
        shards=duty.shards,
        mine=duty.mine,
    )
    collector.start()
    while not stop():
        collector.pump(_TICK_S)
    link.close()


@contextlib.contextmanager
def collecting(
    count: int,
    *,
    folder: Path,
    broker: str,
    topics: Topics,
    agents: Sequence[str],
    shards: int,
    tls: Sequence[Path] = (),
    on_event: Callable[[str, str, str], None] = lambda kind, name, text: None,
) -> Iterator[Callable[[], None]]:
    """Run collectors for as long as the context lasts; yield what starts again those that ended.

    Args:
        count: How many, each for every so-manieth shard; none for 0.
        folder: Gets a folder ``collectors`` with what each has to do, its log and its pid file.
        broker: Where they connect.
        topics: Of the run.
        agents: Names of the fleet.
        shards: Over how many topics the fleet is spread; at least ``count``.
        tls: Files of the authority's certificate, the coordinator's certificate and its key; or none.
        on_event: Told of every restart: kind, name, text.
    """
    if not count:
        yield lambda: None
        return
    home = folder / "collectors"
    home.mkdir(exist_ok=True)
    commands = {}
    for number in range(count):
        duty = Duty(
            broker=broker,
            namespace=topics.namespace,
            run=topics.run,
            number=number,
            agents=list(agents),
            shards=shards,
            mine=list(range(number, shards, count)),
            tls=[str(path) for path in tls],
        )
        path = home / f"collector-{number}.json"
        path.write_text(json.dumps(asdict(duty)), encoding="utf-8")
        commands[f"collector-{number}"] = [sys.executable, "-m", "coordinator.collector", str(path)]
    supervisor = Supervisor(commands, folder=home, on_event=on_event, what="collector")
    try:
        supervisor.start()
        yield supervisor.watch
    finally:
        supervisor.stop()


if __name__ == "__main__":
    run_collector(Duty(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
