"""Signs what the coordinator says, message by message, and lets an agent hear nothing else.

A sealed message is the payload, a number (u64, little-endian) and an Ed25519 signature over context, topic,
number and payload: 72 bytes more. Numbers rise, also from one process of the coordinator to the next, so that
an old message cannot be played again on its topic; equal ones are repeats of the broker. Agents' messages are
not sealed: the broker knows who sends them. Knows links and topics, not what a message means.
"""

import json
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from edge_agent.credentials import write_secret
from edge_agent.link import Connected, Disconnected, Link, Message
from edge_agent.signature import is_signed
from edge_agent.topics import Topics

__all__ = ["SEAL_BYTES", "HearingLink", "SayingLink", "open_sealed", "seal"]

SEAL_BYTES = 72
"""What a seal adds to a message."""

_CONTEXT = b"scalarfed message 1\0"
_NUMBER = struct.Struct("<Q")


def seal(topic: str, payload: bytes, *, number: int, sign: Callable[[bytes], bytes]) -> bytes:
    """Return a payload with its number and signature."""
    counted = _NUMBER.pack(number)
    return payload + counted + sign(_signed(topic, counted, payload))


def open_sealed(topic: str, sealed: bytes, *, key: bytes) -> tuple[bytes, int] | None:
    """Return the payload and number of a sealed message, or None if it is not signed for this topic."""
    if len(sealed) < SEAL_BYTES:
        return None
    payload, counted, signature = sealed[:-SEAL_BYTES], sealed[-SEAL_BYTES:-64], sealed[-64:]
    if not is_signed(_signed(topic, counted, payload), signature, key=key):
        return None
    return payload, _NUMBER.unpack(counted)[0]


class SayingLink:
    """The coordinator's side: seals whatever it publishes, and opens what comes back to it.

    Args:
        link: Carries the messages.
        topics: Of the run.
        sign: Ed25519.
        key: The public half, to know one's own words again.
        numbers: Rising, and never used before.
    """

    def __init__(
        self,
        link: Link,
        topics: Topics,
        *,
        sign: Callable[[bytes], bytes],
        key: bytes,
        numbers: Iterator[int],
    ) -> None:
        self.traffic = link.traffic
        self._link = link
        self._topics = topics
        self._sign = sign
        self._key = key
        self._numbers = numbers

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Send sealed; an empty payload, which makes the broker forget, goes as it is."""
        if payload:
            payload = seal(topic, payload, number=next(self._numbers), sign=self._sign)
        self._link.publish(topic, payload, retain=retain)

    def subscribe(self, pattern: str) -> None:
        """Receive what matches."""
        self._link.subscribe(pattern)

    def receive(self, timeout_s: float) -> Message | Connected | Disconnected | None:
        """Return the next event; what only a coordinator may say is opened, a forgery stays as it came."""
        event = self._link.receive(timeout_s)
        if isinstance(event, Message) and self._topics.is_coordinators(event.topic):
            opened = open_sealed(event.topic, event.payload, key=self._key)
            return event if opened is None else Message(event.topic, opened[0])
        return event

    def close(self) -> None:
        """Say goodbye."""
        self._link.close()


class HearingLink:
    """An agent's side: delivers what the coordinator has signed, once it is not older than what was heard.

    Other topics than those of the run on which only the coordinator speaks pass as they are.

    Args:
        link: Carries the messages.
        topics: Of the run.
        key: The coordinator's public key.
        memory: File that keeps the number of the newest control message over a restart; None forgets.
        dropped: Counts the messages that were not delivered, by reason.
    """

    def __init__(
        self,
        link: Link,
        topics: Topics,
        *,
        key: bytes,
        memory: Path | None = None,
        dropped: Counter[str] | None = None,
    ) -> None:
        self.traffic = link.traffic
        self.dropped: Counter[str] = Counter() if dropped is None else dropped
        self._link = link
        self._topics = topics
        self._key = key
        self._memory = memory
        self._newest = _recall(memory, topics.control)

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Send as it is: the certificate says who speaks."""
        self._link.publish(topic, payload, retain=retain)

    def subscribe(self, pattern: str) -> None:
        """Receive what matches."""
        self._link.subscribe(pattern)

    def receive(self, timeout_s: float) -> Message | Connected | Disconnected | None:
        """Return the next event that may be believed, or None when none came within the time."""
        deadline = time.monotonic() + timeout_s
        event = self._link.receive(timeout_s)
        while isinstance(event, Message) and self._topics.is_coordinators(event.topic):
            payload = self._believe(event)
            if payload is not None:
                return Message(event.topic, payload)
            left = deadline - time.monotonic()
            event = self._link.receive(left) if left > 0 else None
        return event

    def close(self) -> None:
        """Say goodbye."""
        self._link.close()

    def _believe(self, message: Message) -> bytes | None:
        opened = open_sealed(message.topic, message.payload, key=self._key)
        if opened is None:
            self.dropped["not signed"] += 1
            return None
        payload, number = opened
        newest = self._newest.get(message.topic, -1)
        if number < newest:
            self.dropped["signed, but older than what was heard"] += 1
            return None
        if number > newest:
            self._newest[message.topic] = number
            if message.topic == self._topics.control:
                self._remember(number)
        return payload

    def _remember(self, number: int) -> None:
        if self._memory is not None:
            try:
                write_secret(self._memory, json.dumps({self._topics.control: number}).encode())
            except OSError:  # a full disk must not keep the agent from hearing
                self.dropped["number not kept"] += 1


def _recall(memory: Path | None, topic: str) -> dict[str, int]:
    try:
        found = json.loads(memory.read_text(encoding="ascii")) if memory is not None else {}
        return {topic: int(found[topic])} if topic in found else {}
    except (OSError, ValueError, TypeError):
        return {}


def _signed(topic: str, counted: bytes, payload: bytes) -> bytes:
    return _CONTEXT + topic.encode() + b"\0" + counted + payload
