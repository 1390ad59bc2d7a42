"""Thousands of agents in one process: each with its own connection, all with one replica.

Every agent of a fleet has the same weights at the start of a round, so that one state machine stands for all:
what it answers, each of them publishes on its own connection and topic. Speaks MQTT 3.1.1 at QoS 1 as far as
an agent does (CONNECT with a last will, SUBSCRIBE, PUBLISH, PUBACK), since a client library with a thread and
buffers for each connection would be the load that is measured. A connection that breaks stays broken and is
counted.
"""

import json
import os
import selectors
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from edge_agent.agent import Agent, Report
from edge_agent.cohort import Cohort
from edge_agent.topics import Topics, shard_of
from edge_agent.wire import Reply, RoundOpen, SliceRequest, decode, encode
from profiles.errors import BrokerError

__all__ = ["Swarm", "packet", "split"]

_CONNECT, _CONNACK, _PUBLISH, _PUBACK, _SUBSCRIBE, _SUBACK, _DISCONNECT = 1, 2, 3, 4, 8, 9, 14
_OUTSTANDING = 60  # five thousand connections with 200 under way took twenty times as long
_KEEPALIVE_S = 60
_STATUS_EVERY_S = 10.0
_READ = 65536


def packet(kind: int, body: bytes, flags: int = 0) -> bytes:
    """Return an MQTT control packet; section 2.2 of the standard."""
    size = len(body)
    head = bytearray([kind << 4 | flags])
    while True:
        size, digit = size >> 7, size & 0x7F
        head.append(digit | 0x80 if size else digit)
        if not size:
            return bytes(head) + body


def split(data: bytes) -> tuple[list[tuple[int, int, bytes]], bytes]:
    """Return the whole packets at the beginning of ``data`` as kind, flags and body, and what is left."""
    found = []
    at = 0
    while len(data) - at >= 2:
        size = shift = 0
        start = at + 1
        whole = False
        while start < len(data) and shift < 28:
            digit = data[start]
            size |= (digit & 0x7F) << shift
            shift += 7
            start += 1
            if digit < 0x80:
                whole = True
                break
        if not whole or len(data) - start < size:
            break
        found.append((data[at] >> 4, data[at] & 15, data[start : start + size]))
        at = start + size
    return found, data[at:]


def _text(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return len(data).to_bytes(2, "big") + data


@dataclass
class _Client:
    """One agent's connection."""

    name: str
    number: int
    sock: socket.socket
    reply_topic: bytes
    status_topic: bytes
    left: bytes = b""
    unsent: bytearray = field(default_factory=bytearray)
    ready: bool = False
    subscriptions: int = 0
    packet_id: int = 0
    status_at: float = 0.0
    alive: bool = True


class Swarm:
    """The agents of a fleet.

    Args:
        names: Of the agents, in the order of their numbers.
        topics: Of the run.
        agent: The state machine that stands for all; it must be in the fleet under the first name.
        host: The broker's.
        port: The broker's.
        shards: Over how many topics the replies are spread.
        clock: Monotonic seconds.

    Attributes:
        replies: How many were sent.
        broken: How many connections ended.
    """

    def __init__(
        self,
        names: list[str],
        *,
        topics: Topics,
        agent: Agent,
        host: str,
        port: int,
        shards: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.replies = 0
        self.broken = 0
        self._topics = topics
        self._agent = agent
        self._address = (host, port)
        self._shards = shards
        self._clock = clock
        self._selector = selectors.DefaultSelector()
        self._clients: list[_Client] = []
        self._names = names
        self._connected = 0
        self._payload: bytes | None = None
        self._answer: bytes | None = None
        self._cohort = Cohort()
        self._digest = (-1, "")  # of the replica, at which round
        self._state = "starting"

    def connect(self, *, deadline_s: float) -> None:
        """Open all connections, a few at a time, and subscribe to what an agent hears at first.

        Raises:
            BrokerError: The broker does not take them all in time.
        """
        until = self._clock() + deadline_s
        for number, name in enumerate(self._names):
            self._open(number, name)
            while len(self._clients) - self._connected - self.broken >= _OUTSTANDING:
                self._turn(0.01, until)
        while self._connected + self.broken < len(self._names):
            self._turn(0.05, until)
        if self.broken:
            raise BrokerError(
                f"{self.broken} of {len(self._names)} connections were refused or broken",
                hint="Raise the broker's and this shell's limit of open files (ulimit -n), or take fewer.",
            )

    def serve(self, *, until: Callable[[], bool]) -> None:
        """Answer until told to stop; every agent says how it is every ten seconds."""
        status_at = 0.0
        while not until():
            self.pump(0.05)
            now = self._clock()
            if now - status_at >= 0.25:
                status_at = now
                self._say_statuses(now)

    def pump(self, timeout_s: float) -> None:
        """Handle what has arrived."""
        for key, events in self._selector.select(timeout_s):
            client: _Client = key.data
            if events & selectors.EVENT_READ:
                self._read(client)
            if events & selectors.EVENT_WRITE and client.alive:
                self._send(client, b"")

    def close(self) -> None:
        """Say goodbye on every connection."""
        for client in self._clients:
            if client.alive:
                self._send(client, packet(_DISCONNECT, b""))
                client.sock.close()
        self._selector.close()

    def _turn(self, timeout_s: float, until: float) -> None:
        self.pump(timeout_s)
        if self._clock() > until:
            missing = len(self._names) - self._connected
            raise BrokerError(f"{missing} of {len(self._names)} agents could not connect in time")

    def _open(self, number: int, name: str) -> None:
        try:
            sock = socket.create_connection(self._address, 10.0)
        except OSError as error:
            raise BrokerError(f"connection {number} to the broker failed: {error}") from None
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setblocking(False)
        status = self._topics.status(name)
        client = _Client(
            name,
            number,
            sock,
            reply_topic=_text(self._topics.reply(shard_of(name, self._shards), name)),
            status_topic=_text(status),
        )
        self._clients.append(client)
        self._selector.register(sock, selectors.EVENT_READ, client)
        will = json.dumps({"name": name, "state": "offline"})
        flags = 0x02 | 0x04 | 0x08 | 0x20  # clean session, a will, at QoS 1, retained
        head = _text("MQTT") + bytes([4, flags]) + _KEEPALIVE_S.to_bytes(2, "big")
        body = head + _text(f"{self._topics.run}-{name}") + _text(status) + _text(will)
        self._send(client, packet(_CONNECT, body))

    def _read(self, client: _Client) -> None:
        try:
            data = client.sock.recv(_READ)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._lose(client)
            return
        packets, client.left = split(client.left + data if client.left else data)
        out = b""
        for kind, flags, body in packets:
            if kind == _PUBLISH:
                out += self._on_publish(client, flags, body)
            elif kind == _CONNACK:
                if body[1]:
                    self._lose(client)
                    return
                out += self._subscribe(client, self._topics.control, self._topics.answer(client.name))
            elif kind == _SUBACK and not client.ready:
                client.ready = True
                self._connected += 1
                out += self._status(client)
        if out:
            self._send(client, out)

    def _send(self, client: _Client, data: bytes) -> None:
        if client.unsent:
            client.unsent += data
            data = bytes(client.unsent)
        try:
            sent = client.sock.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._lose(client)
            return
        was_waiting = bool(client.unsent)
        client.unsent = bytearray(data[sent:])
        if bool(client.unsent) != was_waiting:
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if client.unsent else 0)
            self._selector.modify(client.sock, events, client)

    def _lose(self, client: _Client) -> None:
        if client.alive:
            client.alive = False
            self.broken += 1
            self._selector.unregister(client.sock)
            client.sock.close()

    def _subscribe(self, client: _Client, *patterns: str) -> bytes:
        client.packet_id = client.packet_id % 0xFFFF + 1
        body = client.packet_id.to_bytes(2, "big") + b"".join(_text(pattern) + b"\1" for pattern in patterns)
        return packet(_SUBSCRIBE, body, 2)

    def _publish(self, client: _Client, topic: bytes, payload: bytes, *, retain: bool = False) -> bytes:
        client.packet_id = client.packet_id % 0xFFFF + 1
        return packet(_PUBLISH, topic + client.packet_id.to_bytes(2, "big") + payload, 2 | retain)

    def _on_publish(self, client: _Client, flags: int, body: bytes) -> bytes:
        size = int.from_bytes(body[:2], "big")
        topic = body[2 : 2 + size]
        at = 2 + size
        out = b""
        if flags & 6:
            out = packet(_PUBACK, body[at : at + 2])
            at += 2
        payload = body[at:]
        if topic.endswith(b"/ctl"):
            return out + self._on_control(client, payload)
        if payload != self._payload:
            self._hear(payload)
        if self._answer is not None and client.number in self._cohort:
            self.replies += 1
            out += self._publish(client, client.reply_topic, self._answer)
        return out

    def _hear(self, payload: bytes) -> None:
        """Let the state machine take in an announcement that is new to the swarm."""
        self._payload, self._answer = payload, None
        opened = decode(payload)
        if isinstance(opened, RoundOpen):
            # The state machine answers for whoever is asked; who that is, each connection looks up itself.
            self._cohort = opened.cohort
            payload = encode(replace(opened, cohort=Cohort()))
        for message in self._agent.on_message(payload, self._clock()):
            if isinstance(message, Reply):
                self._answer = encode(message)
            elif isinstance(message, SliceRequest):
                self._send(
                    self._clients[0],
                    self._publish(
                        self._clients[0], _text(self._topics.request(self._names[0])), encode(message)
                    ),
                )
            else:
                self._on_report(message)

    def _on_control(self, client: _Client, payload: bytes) -> bytes:
        if client.number == 0 or not self._agent.shards:
            for message in self._agent.on_control(json.loads(payload), self._clock()):
                if isinstance(message, Report):
                    self._on_report(message)
        if client.subscriptions:
            return b""
        client.subscriptions += 1
        return self._subscribe(
            client, self._topics.round(shard_of(client.name, self._agent.shards))
        ) + self._status(client)

    def _on_report(self, report: Report) -> None:
        self._state = report.state
        for client in self._clients:
            client.status_at = min(client.status_at, self._clock() - _STATUS_EVERY_S)

    def _say_statuses(self, now: float) -> None:
        for client in self._clients:
            if client.alive and client.ready and now - client.status_at >= _STATUS_EVERY_S:
                self._send(client, self._status(client))

    def _status(self, client: _Client) -> bytes:
        client.status_at = self._clock()
        replica = self._agent.replica
        if self._digest[0] != replica.round:
            self._digest = (replica.round, f"{replica.digest():016x}")
        status = {
            "name": client.name,
            "state": self._state if self._state != "starting" else "ready",
            "pid": os.getpid(),
            "round": replica.round,
            "epoch": self._agent.epoch,
            "digest": self._digest[1],
            "estimates": self._agent.estimates,
        }
        return self._publish(client, client.status_topic, json.dumps(status).encode(), retain=True)
