"""The links over which messages travel: MQTT, and one in memory with the same behaviour.

A link knows topics and bytes, not what they mean. Events come out of :meth:`Link.receive` in the
order in which they happened; sending never blocks on the network. Both links pass the same contract
tests.
"""

import queue
import secrets
import socket
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion

from edge_agent.mqtt_client import BufferedClient
from profiles.errors import BrokerError

if TYPE_CHECKING:
    import ssl

__all__ = [
    "Connected",
    "Disconnected",
    "Link",
    "MemoryBroker",
    "MemoryLink",
    "Message",
    "MqttLink",
    "Traffic",
]

_KEEPALIVE_S = 30
_SLOWEST_RECONNECT_S = 15.0
_MOST_WAITING = 20_000
_MOST_WAITING_BYTES = 64 << 20


@dataclass(frozen=True)
class Message:
    """A message that arrived."""

    topic: str
    payload: bytes


@dataclass(frozen=True)
class Connected:
    """The link is up and subscribed; what was published meanwhile may be lost."""


@dataclass(frozen=True)
class Disconnected:
    """The link is down; it tries again by itself."""

    reason: str


@dataclass
class Traffic:
    """Bytes of application messages that passed, counted one by one.

    Attributes:
        payload_up, payload_down: Payload bytes sent and received.
        packet_up, packet_down: The same with MQTT headers, topics and acknowledgements.
        messages_up, messages_down: Messages.
    """

    payload_up: int = 0
    payload_down: int = 0
    packet_up: int = 0
    packet_down: int = 0
    messages_up: int = 0
    messages_down: int = 0

    def sent(self, topic: str, payload: bytes, qos: int) -> None:
        """Count a message that was handed to the network, and the acknowledgement that comes back."""
        self.messages_up += 1
        self.payload_up += len(payload)
        self.packet_up += _publish_size(topic, payload, qos)
        self.packet_down += 4 if qos else 0

    def received(self, topic: str, payload: bytes, qos: int) -> None:
        """Count a message that arrived, and the acknowledgement that goes out."""
        self.messages_down += 1
        self.payload_down += len(payload)
        self.packet_down += _publish_size(topic, payload, qos)
        self.packet_up += 4 if qos else 0


def _publish_size(topic: str, payload: bytes, qos: int) -> int:
    """Return the bytes of an MQTT 3.1.1 PUBLISH packet (OASIS standard, section 3.3)."""
    remaining = 2 + len(topic.encode()) + (2 if qos else 0) + len(payload)
    length_bytes = 1
    while remaining >> (7 * length_bytes):
        length_bytes += 1
    return 1 + length_bytes + remaining


class Link(Protocol):
    """What agent and coordinator need of a transport."""

    traffic: Traffic

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Send at least once if the link is up or comes up; never blocks."""

    def subscribe(self, pattern: str) -> None:
        """Receive what matches, now and after every reconnection; retained messages come first."""

    def receive(self, timeout_s: float) -> Message | Connected | Disconnected | None:
        """Return the next event, or None when none came within the time."""

    def close(self) -> None:
        """Say goodbye; a last will is not sent."""


class MqttLink:
    """A link over MQTT 3.1.1, QoS 1, clean sessions, reconnecting by itself with full jitter.

    Args:
        url: ``mqtt://HOST[:PORT]``, or ``mqtts://HOST[:PORT]`` with ``tls``.
        client_id: Unique at the broker.
        will: Topic and payload that the broker publishes, retained, when the link is lost.
        tls: Whom to believe and what to show; with it nothing is ever sent in the clear.

    Raises:
        BrokerError: The URL is not of that form, or does not go with ``tls``.
    """

    def __init__(
        self,
        url: str,
        *,
        client_id: str,
        will: tuple[str, bytes] | None = None,
        tls: "ssl.SSLContext | None" = None,
    ) -> None:
        self.traffic = Traffic()
        self._events: queue.SimpleQueue[Message | Connected | Disconnected] = queue.SimpleQueue()
        self._patterns: list[str] = []
        self._failures = 0
        self._closing = False
        self._arrived_bytes = 0  # each of these has one writer: the network's thread, and the receiver's
        self._taken_bytes = 0
        self._sent: deque[mqtt.MQTTMessageInfo] = deque()
        host, port = _address(url, secured=tls is not None)
        self._client = BufferedClient(
            CallbackAPIVersion.VERSION2, client_id=client_id, clean_session=True, protocol=mqtt.MQTTv311
        )
        self._client.max_queued_messages_set(1000)
        self._client.max_inflight_messages_set(100)
        if will is not None:
            self._client.will_set(will[0], will[1], qos=1, retain=True)
        if tls is not None:
            self._client.tls_set_context(tls)
        self._client.on_connect = self._on_connect
        self._client.on_disconnect = self._on_disconnect
        self._client.on_connect_fail = self._on_connect_fail
        self._client.on_message = self._on_message
        self._client.on_socket_open = self._on_socket_open
        self._client.connect_async(host, port, keepalive=_KEEPALIVE_S)
        self._client.loop_start()

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Send at least once if the link is up or comes up; never blocks."""
        self.traffic.sent(topic, payload, 1)
        info = self._client.publish(topic, payload, qos=1, retain=retain)
        if info.rc != mqtt.MQTT_ERR_QUEUE_SIZE:
            self._sent.append(info)
        while self._sent and _is_over(self._sent[0]):
            self._sent.popleft()

    def subscribe(self, pattern: str) -> None:
        """Receive what matches, now and after every reconnection."""
        if pattern not in self._patterns:
            self._patterns.append(pattern)
        if self._client.is_connected():
            self._client.subscribe(pattern, qos=1)

    def receive(self, timeout_s: float) -> Message | Connected | Disconnected | None:
        """Return the next event, or None when none came within the time."""
        try:
            event = self._events.get(timeout=timeout_s) if timeout_s > 0 else self._events.get_nowait()
        except queue.Empty:
            return None
        if isinstance(event, Message):
            self._taken_bytes += len(event.payload)
        return event

    def flush(self, timeout_s: float) -> bool:
        """Wait until all that was published is acknowledged; return whether it was in time."""
        deadline = time.monotonic() + timeout_s
        while self._sent:
            if not _is_over(self._sent[0], max(0.0, deadline - time.monotonic())):
                return False
            self._sent.popleft()
        return True

    def close(self) -> None:
        """Say goodbye; the last will is not sent."""
        self._closing = True
        self._client.disconnect()
        self._client.loop_stop()

    def _on_connect(
        self, client: mqtt.Client, _data: Any, _flags: Any, reason: Any, _properties: Any
    ) -> None:
        if reason.is_failure:
            self._events.put(Disconnected(str(reason)))
            return
        self._failures = 0
        if self._patterns:
            client.subscribe([(pattern, 1) for pattern in self._patterns])
        self._events.put(Connected())

    def _on_disconnect(
        self, _client: mqtt.Client, _data: Any, _flags: Any, reason: Any, _properties: Any
    ) -> None:
        self._back_off()
        self._events.put(Disconnected(str(reason)))

    def _on_connect_fail(self, _client: mqtt.Client, _data: Any) -> None:
        self._back_off()
        if self._failures == 1:
            self._events.put(Disconnected("the broker does not answer"))

    def _back_off(self) -> None:
        """Draw the next delay uniformly below a ceiling that doubles (full jitter)."""
        self._failures += 1
        ceiling = min(_SLOWEST_RECONNECT_S, 0.25 * 2.0**self._failures)
        delay = ceiling * secrets.randbelow(1000) / 1000
        self._client.reconnect_delay_set(min_delay=delay, max_delay=delay)  # type: ignore[arg-type]

    def _on_socket_open(self, _client: mqtt.Client, _data: Any, sock: Any) -> None:
        # Nagle's algorithm makes a round of ten agents 44 ms instead of 1.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _on_message(self, _client: mqtt.Client, _data: Any, message: mqtt.MQTTMessage) -> None:
        try:
            topic = message.topic
        except UnicodeDecodeError:
            return
        payload = bytes(message.payload)
        self.traffic.received(topic, payload, message.qos)
        self._arrived_bytes += len(payload)
        self._events.put(Message(topic, payload))
        # A flood waits at the broker, not in our memory: read no more until the receiver has caught up.
        while (
            self._events.qsize() > _MOST_WAITING
            or self._arrived_bytes - self._taken_bytes > _MOST_WAITING_BYTES
        ) and not self._closing:
            time.sleep(0.002)


def _is_over(info: mqtt.MQTTMessageInfo, timeout_s: float = 0.0) -> bool:
    """Return whether a message was acknowledged, or is one that paho cannot tell about."""
    try:
        if timeout_s > 0:
            info.wait_for_publish(timeout_s)
        return info.is_published()
    except (ValueError, RuntimeError):  # the queue was full, or there was no connection when it was queued
        return True


def _address(url: str, *, secured: bool) -> tuple[str, int]:
    parts = urlsplit(url)
    schemes = ("mqtts",) if secured else ("mqtt", "tcp")
    try:
        port = parts.port or (8883 if secured else 1883)
    except ValueError:
        port = 0
    if parts.scheme == "mqtts" and not secured:
        raise BrokerError(
            f"{url} wants certificates, and this link has none",
            hint="Enrol the device (scalarfed enrol), and name its folder of certificates with --security.",
        )
    if parts.scheme in ("mqtt", "tcp") and secured:
        raise BrokerError(
            f"{url} is not encrypted, and this device is enrolled: it speaks over mqtts:// alone",
            hint="Name the broker as mqtts://HOST:PORT.",
        )
    if parts.scheme not in schemes or not parts.hostname or not port:
        raise BrokerError(f"{url!r} is not a broker's address; the form is {schemes[0]}://HOST:PORT")
    return parts.hostname, port


@dataclass
class MemoryBroker:
    """Delivers between the :class:`MemoryLink` objects that were made with it.

    It forgets everything, retained messages too, when :meth:`restart` is called.
    """

    links: list["MemoryLink"] = field(default_factory=list)
    retained: dict[str, bytes] = field(default_factory=dict)

    def route(self, topic: str, payload: bytes, *, retain: bool) -> None:
        """Deliver to every connected link with a matching subscription."""
        if retain:
            self.retained[topic] = payload
            if not payload:
                del self.retained[topic]
        for link in self.links:
            link.deliver(topic, payload)

    def restart(self) -> None:
        """Lose all retained messages and every connection; the links come back at once."""
        self.retained.clear()
        for link in self.links:
            link.reconnect()


class MemoryLink:
    """A link without a network, for tests and simulation: same order, same retained messages, wills."""

    def __init__(self, broker: MemoryBroker, *, will: tuple[str, bytes] | None = None) -> None:
        self.traffic = Traffic()
        self._broker = broker
        self._will = will
        self._patterns: list[str] = []
        self._events: queue.SimpleQueue[Message | Connected | Disconnected] = queue.SimpleQueue()
        broker.links.append(self)
        self._events.put(Connected())

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Deliver at once to all who subscribed."""
        self.traffic.sent(topic, payload, 1)
        self._broker.route(topic, payload, retain=retain)

    def subscribe(self, pattern: str) -> None:
        """Receive what matches; retained messages come first."""
        if pattern not in self._patterns:
            self._patterns.append(pattern)
        self._replay_retained([pattern])

    def receive(self, timeout_s: float) -> Message | Connected | Disconnected | None:
        """Return the next event, or None when none came within the time."""
        try:
            return self._events.get(timeout=max(0.0, timeout_s))
        except queue.Empty:
            return None

    def close(self) -> None:
        """Leave without a last will."""
        self._broker.links.remove(self)

    def sever(self) -> None:
        """Leave as a process that was killed does: the broker publishes the last will."""
        self.close()
        if self._will is not None:
            self._broker.route(*self._will, retain=True)

    def reconnect(self) -> None:
        """Lose the connection and find it again."""
        self._events.put(Disconnected("the broker restarted"))
        self._events.put(Connected())
        self._replay_retained(self._patterns)

    def deliver(self, topic: str, payload: bytes) -> None:
        """Take in a message that the broker routes."""
        if any(mqtt.topic_matches_sub(pattern, topic) for pattern in self._patterns):
            self.traffic.received(topic, payload, 1)
            self._events.put(Message(topic, payload))

    def _replay_retained(self, patterns: Iterable[str]) -> None:
        for topic, payload in list(self._broker.retained.items()):
            if any(mqtt.topic_matches_sub(pattern, topic) for pattern in patterns):
                self.traffic.received(topic, payload, 1)
                self._events.put(Message(topic, payload))
