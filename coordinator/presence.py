"""How the boards are now: their retained status messages, read from the broker.

Knows topics and status messages, not how a board was flashed (``boards``) nor what to make of what it
says (``doctor``).
"""

import contextlib
import time
from collections.abc import Callable, Mapping
from typing import Any

from coordinator.operator import operator_tls
from coordinator.status import read_status
from edge_agent.link import Connected, Disconnected, Message, MqttLink
from edge_agent.topics import Topics
from profiles.errors import BrokerError, WireError

__all__ = ["await_status", "statuses"]

_QUIET_S = 0.7


def statuses(
    broker: str, *, namespace: str = "scalarfed", run: str, within_s: float = 8.0
) -> dict[str, Mapping[str, Any]]:
    """Return the last status of each board of a run, by name.

    Args:
        broker: ``mqtt://HOST:PORT``.
        namespace: First level of all topics.
        run: The run.
        within_s: Longest wait for the broker; after the last message it is shorter.

    Raises:
        BrokerError: It does not answer.
    """
    found: dict[str, Mapping[str, Any]] = {}
    _listen(broker, namespace, run, lambda status: found.update({status["name"]: status}) or False, within_s)
    return found


def await_status(
    broker: str,
    *,
    namespace: str = "scalarfed",
    run: str,
    name: str,
    wanted: Callable[[Mapping[str, Any]], bool],
    within_s: float,
) -> Mapping[str, Any] | None:
    """Return the first status of a board that is as wanted, or None when none came in time.

    Raises:
        BrokerError: It does not answer.
    """
    got: list[Mapping[str, Any]] = []

    def take(status: Mapping[str, Any]) -> bool:
        if status["name"] == name and wanted(status):
            got.append(status)
        return bool(got)

    _listen(broker, namespace, run, take, within_s, quiet_s=within_s)
    return got[0] if got else None


def _listen(
    broker: str,
    namespace: str,
    run: str,
    take: Callable[[Mapping[str, Any]], bool],
    within_s: float,
    *,
    quiet_s: float = _QUIET_S,
) -> None:
    name = f"{run}-onlooker-{time.monotonic_ns() % 1_000_000_000}"
    link = MqttLink(broker, client_id=name, tls=operator_tls(broker))
    link.subscribe(Topics(namespace, run).status("+"))
    deadline, connected, heard_at = time.monotonic() + within_s, False, time.monotonic()
    try:
        while time.monotonic() < deadline:
            event = link.receive(0.1)
            if isinstance(event, Connected):
                connected, heard_at = True, time.monotonic()
            elif isinstance(event, Disconnected) and not connected:
                raise BrokerError(f"the broker {broker} cannot be reached: {event.reason}")
            elif isinstance(event, Message):
                heard_at = time.monotonic()
                with contextlib.suppress(
                    WireError
                ):  # anybody may write there; what is malformed tells nothing
                    if take({**read_status(event.payload), "name": event.topic.rpartition("/")[2]}):
                        return
            elif connected and time.monotonic() - heard_at > quiet_s:
                return
    finally:
        link.close()
    if not connected:
        raise BrokerError(f"the broker {broker} did not answer within {within_s:g} s")
