"""Sees to it that a device is admitted: has it enrolled when it starts, and its certificate renewed in time.

What needs keys made runs in a child (``enrol``), so that the agent stays small. Knows the folder of
credentials and the clock; does not know MQTT.
"""

import contextlib
import json
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from edge_agent.credentials import UNREACHED, Credentials, read_credentials
from profiles.errors import SecurityError

__all__ = ["Renewal", "admit"]

_FIRST_WAIT_S, _LONGEST_WAIT_S = 2.0, 60.0
_CHILD_S = 120.0
_LOOK_EVERY_S = 3600.0
_LOG = logging.getLogger("scalarfed-agent")


def admit(
    folder: Path, *, stopping: threading.Event, on_wait: Callable[[], None] = lambda: None
) -> Credentials:
    """Return a device's credentials; where there is only a ticket, enrol first, for as long as it takes.

    Args:
        folder: Holds ``ticket.json``, or what came of it.
        stopping: Ends the waiting.
        on_wait: Called once a second while nobody answers.

    Raises:
        SecurityError: The ticket is refused, or there are neither ticket nor credentials.
    """
    wait_s = _FIRST_WAIT_S
    while (folder / "ticket.json").is_file() and not stopping.is_set():
        done = subprocess.run(_command(folder), capture_output=True, text=True, timeout=_CHILD_S, check=False)
        said = done.stderr.strip()
        if done.returncode == 0:
            _LOG.info("enrolled: %s", folder)
            break
        if done.returncode != UNREACHED:
            if (folder / "device.crt").is_file():  # a new ticket that is no good does not undo the old one
                _LOG.warning("%s; going on with the certificate at hand", said)
                break
            message, _, hint = said.partition("\nhint: ")
            raise SecurityError(message or "The device could not be enrolled.", hint=hint or None)
        _LOG.warning("%s; trying again in %.0f s", said, wait_s)
        until = time.monotonic() + wait_s
        while time.monotonic() < until and not stopping.wait(1.0):
            on_wait()
        wait_s = min(_LONGEST_WAIT_S, 2 * wait_s)
    return read_credentials(folder)


class Renewal:
    """Renews a certificate in the last third of its life, in a child, while the agent works.

    Args:
        folder: Of the credentials.
        clock: Unix seconds.
    """

    def __init__(self, folder: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._folder = folder
        self._clock = clock
        self._looked_at = float("-inf")
        self._child: subprocess.Popen[bytes] | None = None

    def tick(self) -> bool:
        """Start what is due; return True once when there is a new certificate, for the next connection."""
        if self._child is not None:
            if self._child.poll() is None:
                return False
            code, self._child = self._child.returncode, None
            _LOG.info("renewing the certificate: %s", "done" if code == 0 else f"failed with code {code}")
            return code == 0
        if self._clock() - self._looked_at >= _LOOK_EVERY_S:
            self._looked_at = self._clock()
            if self._is_due():
                with contextlib.suppress(OSError):
                    self._child = subprocess.Popen(
                        [*_command(self._folder), "--renew"],
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.DEVNULL,
                        stderr=subprocess.DEVNULL,
                    )
        return False

    def _is_due(self) -> bool:
        try:
            told = json.loads((self._folder / "enrolled.json").read_text(encoding="utf-8"))
            issued, expires = float(told["issued"]), float(told["expires"])
        except (OSError, ValueError, KeyError, TypeError):
            return False
        return self._clock() > issued + (expires - issued) * 2 / 3


def _command(folder: Path) -> list[str]:
    return [sys.executable, "-m", "edge_agent.enrol", str(folder)]
