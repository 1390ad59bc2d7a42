"""Brings a new release or bundle to boards that run: canaries first, the others only when those are well.

Serves the files, publishes signed offers and listens to what the boards say. Knows nothing of what is in a
release (``flash.payload``) nor how a board takes it over (``edge_agent.update``).
"""

import contextlib
import json
import ssl
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from coordinator.operator import operator_tls
from coordinator.status import read_status
from coordinator.web import WebServer, folder_files
from edge_agent.link import Connected, Disconnected, Message, MqttLink
from edge_agent.topics import Topics
from edge_agent.update import Offer
from profiles.errors import BrokerError, WireError

__all__ = ["MqttRoom", "Outcome", "Room", "Updater", "served"]

_WELL = ("well",)
_BAD = ("refused", "failed", "returned")
_JOINED = ("ready", "closed")
_SETTLE_S = 0.7


@dataclass(frozen=True)
class Outcome:
    """What became of a board.

    Attributes:
        name: The board.
        state: ``well``, ``refused``, ``failed``, ``returned`` (to its former release), ``silent`` (no end
            in time) or ``held`` (never asked, since a canary was not well).
        said: The board's own words.
    """

    name: str
    state: str
    said: str = ""

    @property
    def well(self) -> bool:
        """Whether the board runs the new release in its run."""
        return self.state == "well"


class Room(Protocol):
    """A link to boards; opened and closed by whoever makes it."""

    def tell(self, name: str, payload: bytes) -> None:
        """Leave a command for a board; an empty one takes it back."""

    def hear(self, within_s: float) -> Mapping[str, Any] | None:
        """Return the next status of a board, or None when none came."""


class Updater:
    """Offers releases to boards and waits for what becomes of them.

    Args:
        room: Where the boards are, and where they will be.
        clock: Seconds, monotonic.
        tick: Told of each change.
    """

    def __init__(
        self,
        room: Room,
        *,
        clock: Callable[[], float] = time.monotonic,
        tick: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._room = room
        self._clock = clock
        self._tick = tick

    def roll_out(self, offers: Mapping[str, Offer], *, canaries: int, within_s: float) -> list[Outcome]:
        """Offer each board its release and return the outcomes, in the order of ``offers``.

        Args:
            offers: By the board's name.
            canaries: So many boards first; the others follow only when all of these are well. 0 for all
                at once.
            within_s: For each of the two parts.
        """
        names = list(offers)
        first = names[:canaries] if 0 < canaries < len(names) else names
        outcomes = self._offer({name: offers[name] for name in first}, within_s)
        rest = names[len(first) :]
        if all(outcome.well for outcome in outcomes):
            if rest:
                self._tick(f"{', '.join(first)} well: {len(rest)} more")
                outcomes += self._offer({name: offers[name] for name in rest}, within_s)
        else:
            outcomes += [Outcome(name, "held", "a canary is not well") for name in rest]
        return outcomes

    def _offer(self, offers: Mapping[str, Offer], within_s: float) -> list[Outcome]:
        ends: dict[str, Outcome] = {}
        last: dict[str, str] = {}
        for name, offer in offers.items():
            self._room.tell(name, offer.to_json())
        try:
            deadline = self._clock() + within_s
            while len(ends) < len(offers) and self._clock() < deadline:
                status = self._room.hear(0.2)
                name = str(status["name"]) if status else ""
                if status is None or name not in offers or name in ends:
                    continue
                state, said = str(status.get("update_state", "")), str(status.get("update", ""))
                if status.get("update_number") != offers[name].number:
                    continue
                if said and last.get(name) != said:
                    last[name] = said
                    self._tick(f"{name}: {state}: {said}")
                if state in _BAD or (state in _WELL and status["state"] in _JOINED):
                    ends[name] = Outcome(name, state, said)
        finally:
            for name in offers:
                self._room.tell(name, b"")
        return [ends.get(name) or Outcome(name, "silent", last.get(name, "")) for name in offers]


class MqttRoom:
    """Boards over a broker, by one connection: a broker with TLS gives the operator no second one.

    Args:
        broker: Its address.
        namespace: First level of all topics.
        run: The run in which commands reach the boards.
        also: Further runs in which they may be heard.
    """

    def __init__(self, broker: str, *, namespace: str, run: str, also: Sequence[str] = ()) -> None:
        self._topics = Topics(namespace, run)
        self._link = MqttLink(
            broker, client_id=f"{run}-updater-{time.monotonic_ns() % 1_000_000_000}", tls=operator_tls(broker)
        )
        for one in dict.fromkeys([run, *also]):
            self._link.subscribe(Topics(namespace, one).status("+"))
        deadline = time.monotonic() + 10
        while not isinstance(event := self._link.receive(0.2), Connected):
            if isinstance(event, Disconnected) or time.monotonic() > deadline:
                self._link.close()
                raise BrokerError(f"the broker {broker} cannot be reached")

    def tell(self, name: str, payload: bytes) -> None:
        """Leave a command for a board; an empty one takes it back."""
        self._link.publish(self._topics.command(name), payload, retain=True)

    def hear(self, within_s: float) -> Mapping[str, Any] | None:
        """Return the next status of a board, or None when none came."""
        event = self._link.receive(within_s)
        if not isinstance(event, Message):
            return None
        with contextlib.suppress(WireError):
            return {**read_status(event.payload), "name": event.topic.rpartition("/")[2]}
        return None

    def ask(self, name: str, command: Mapping[str, Any], *, within_s: float) -> str | None:
        """Return a board's words on a command that is not kept for later, or None if it says nothing."""
        number = time.time_ns() // 1_000_000
        told = {**command, "number": number}
        self._link.publish(self._topics.command(name), json.dumps(told).encode())
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            status = self.hear(0.2)
            if status and status["name"] == name and status.get("update_number") == number:
                return str(status.get("update", ""))
        return None

    def close(self) -> None:
        """Leave."""
        self._link.flush(2.0)
        self._link.close()


@contextlib.contextmanager
def served(
    releases: Sequence[Mapping[str, bytes]],
    *,
    host: str,
    address: str,
    port: int = 0,
    tls: Callable[[], ssl.SSLContext] | None = None,
) -> Iterator[list[str]]:
    """Serve payloads while the context lasts and yield where the boards find each.

    Args:
        releases: Bytes by path.
        host: Address to listen on.
        address: Of this machine, as the boards reach it.
        port: 0 for any free one.
        tls: Makes the context for a connection; None for plain HTTP.

    Raises:
        BrokerError: The port cannot be had.
    """
    with tempfile.TemporaryDirectory(prefix="scalarfed-update-") as folder:
        for number, files in enumerate(releases):
            for path, data in files.items():
                target = Path(folder) / str(number) / path
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(data)
        with WebServer(host=host, port=port, tls=tls) as server:
            server.add_get("/updates/", folder_files(Path(folder)))
            shown = f"[{address}]" if ":" in address else address
            scheme = "https" if tls else "http"
            yield [f"{scheme}://{shown}:{server.port}/updates/{number}" for number in range(len(releases))]
