"""Tells a service manager how the process is: ready, making progress, stopping.

Speaks systemd's notification protocol, a datagram to ``$NOTIFY_SOCKET``; where there is no such socket
nothing is sent. Knows nothing of what progress is: the loop says so.

Source: systemd, sd_notify(3).
"""

import contextlib
import os
import socket
import time
from collections.abc import Callable

__all__ = ["Heartbeat"]

_LEAST_PAUSE_S = 1.0


class Heartbeat:
    """Passes on what the loop says. Safe to call as often as one likes.

    Args:
        address: Of the manager's socket; a leading ``@`` stands for the abstract namespace. Empty for none.
        on_joined: Called once, when the agent is in its run.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        on_joined: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._address = os.environ.get("NOTIFY_SOCKET", "") if address is None else address
        self._on_joined = on_joined
        self._clock = clock
        self._sent_at = float("-inf")
        self._joined = False
        self._trouble = "the broker was not reached"

    @property
    def trouble(self) -> str:
        """Why there has been no connection since the start; empty once there was one."""
        return self._trouble

    @property
    def joined(self) -> bool:
        """Whether the agent has been in its run since it started."""
        return self._joined

    def ready(self, status: str) -> None:
        """Say that the start is over: the bundle is loaded and the loop turns."""
        self._send(f"READY=1\nSTATUS={status}\nWATCHDOG=1")

    def progress(self) -> None:
        """Say that work goes on; feeds the watchdog, at most once a second."""
        now = self._clock()
        if now - self._sent_at >= _LEAST_PAUSE_S:
            self._sent_at = now
            self._send("WATCHDOG=1")

    def connected(self) -> None:
        """Say that the broker was reached."""
        self._trouble = ""

    def disconnected(self, reason: str) -> None:
        """Say why there is no connection."""
        if self._trouble:
            self._trouble = reason

    def join(self, status: str) -> None:
        """Say that the agent is in its run."""
        if not self._joined:
            self._joined = True
            self._send(f"STATUS={status}")
            self._on_joined()

    def stopping(self) -> None:
        """Say that the process ends on purpose."""
        self._send("STOPPING=1")

    def _send(self, text: str) -> None:
        if not self._address or not hasattr(socket, "AF_UNIX"):
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
            out.setblocking(False)
            out.sendto(text.encode(), address)
