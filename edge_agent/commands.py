"""What an operator asks of a board: take a new release, show where you are.

Works beside the run, in safe mode too, and never in the loop's way: fetching has a thread of its own. What
only root may do is asked for by a file in ``asks``, which ``care.sh`` looks at; see ``update`` for why root
believes nothing of what the agent says. Knows files and threads, not MQTT.
"""

import contextlib
import json
import logging
import os
import platform
import threading
from collections.abc import Callable
from pathlib import Path

from edge_agent.update import Offer, fetch_offer, is_genuine, last_number, read_offer
from profiles.errors import ScalarfedError

__all__ = ["Commands", "find_led"]

_LEDS = ("ACT", "led0", "mmc0::", "mmc0", "PWR", "led1")
_LONGEST_BLINK_S = 60
_LOG = logging.getLogger("scalarfed-agent")


class Commands:
    """Obeys commands.

    Args:
        state: The agent's folder.
        opt: Where releases lie; where there are none, the agent was not installed by us and takes no offer.
        key: The coordinator's public key, hexadecimal; without one no offer is taken.
        leds: Where Linux shows a board's lights.
        fetch: Brings an offer's files.
    """

    def __init__(
        self,
        state: Path,
        *,
        opt: Path,
        key: str,
        leds: Path = Path("/sys/class/leds"),
        fetch: Callable[..., None] = fetch_offer,
    ) -> None:
        self._state, self._opt, self._key = state, opt, key
        self._leds, self._fetch = leds, fetch
        self._thread: threading.Thread | None = None
        self._waiting: Offer | None = None
        self._said = self._outcome_before = self._outcome()

    @property
    def release(self) -> str:
        """The installed release; empty where there is none."""
        try:
            return os.readlink(self._opt / "current").removeprefix("releases/")
        except OSError:
            return ""

    @property
    def number(self) -> int:
        """The number of the last offer that root has dealt with; 0 before the first."""
        return last_number(self._opt)

    @property
    def said(self) -> str:
        """How the last command fares, for the status; printable."""
        outcome = self._outcome()
        if outcome != self._outcome_before:  # root has written down what became of it
            self._said = self._outcome_before = outcome
        return "".join(letter if letter.isprintable() else " " for letter in self._said)[:200]

    def obey(self, payload: bytes) -> None:
        """Take in a command; one that is malformed or unknown is named and changes nothing."""
        try:
            told = json.loads(payload) if payload else {}
            what = told.get("do")
        except (ValueError, AttributeError, RecursionError):
            what = None
        if what == "update":
            self._take(payload)
        elif what == "locate":
            self._locate(told.get("seconds"))
        elif payload:
            self._said = "a command that this release does not know"

    def tick(self) -> None:
        """Begin what had to wait for a trial to end."""
        if self._waiting is not None and not self._busy() and not (self._opt / "trial").exists():
            offer, self._waiting = self._waiting, None
            self._start(offer)

    def _take(self, payload: bytes) -> None:
        try:
            offer = read_offer(payload)
            refusal = self._refusal(offer)
        except ScalarfedError as error:
            offer, refusal = None, str(error)
        if refusal:
            _LOG.warning("update refused: %s", refusal)
            self._said = f"refused: {refusal}"
        elif offer is not None and offer.number > last_number(self._opt):
            self._waiting = offer
            if (self._opt / "trial").exists():
                self._said = f"{offer.release} waits: {self.release} is still on trial"
            self.tick()

    def _refusal(self, offer: Offer) -> str:
        """Return why an offer is not for this board; empty if it is."""
        if not self.release:
            return "this agent was not installed by `scalarfed flash`; update it as it was installed"
        if not self._key:
            return "this board was flashed without its coordinator's key; flash it again"
        here = (platform.machine(), ".".join(platform.python_version_tuple()[:2]))
        if (offer.machine, offer.python) != here:
            wanted = f"{offer.machine} with Python {offer.python}"
            return f"{offer.release} is for {wanted}, this is {' with Python '.join(here)}"
        if not is_genuine(offer, self._key):
            return "the offer is not signed by this board's coordinator"
        return ""

    def _busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _start(self, offer: Offer) -> None:
        def work() -> None:
            def tell(there: int) -> None:
                self._said = f"fetching {offer.release}: {there >> 20} of {offer.size >> 20} MiB"

            try:
                sources = [Path(place) / "scalarfed" for place in ("/boot/firmware", "/boot")]
                self._fetch(
                    offer, self._state / "update", sources=[self._opt / "payload", *sources], on_bytes=tell
                )
                self._ask("update", "")
                self._said = f"{offer.release} is fetched; root installs it"
                _LOG.info("%s", self._said)
            except (ScalarfedError, OSError) as error:
                self._said = f"not fetched: {error}"
                _LOG.warning("update %s", self._said)

        self._said = f"fetching {offer.release}"
        _LOG.info("%s from %s", self._said, offer.url)
        self._thread = threading.Thread(target=work, name="update", daemon=True)
        self._thread.start()

    def _locate(self, seconds: object) -> None:
        led = find_led(self._leds)
        if led is None:
            self._said = "locate: this board has no light that software can blink"
        elif isinstance(seconds, int) and 1 <= seconds <= _LONGEST_BLINK_S:
            self._ask("locate", f"{seconds}\n")
            self._said = f"locate: {led} blinks for {seconds} s"
        else:
            self._said = f"locate: 1 to {_LONGEST_BLINK_S} seconds"
        _LOG.info("%s", self._said)

    def _ask(self, what: str, text: str) -> None:
        folder = self._state / "asks"
        folder.mkdir(exist_ok=True)
        beside = self._state / f"{what}.ask"
        beside.write_text(text, encoding="ascii")
        beside.replace(folder / what)

    def _outcome(self) -> str:
        """Return what became of the last update, as root wrote it down."""
        with contextlib.suppress(OSError):
            return (self._opt / "update.outcome").read_text(encoding="utf-8", errors="replace").strip()
        return ""


def find_led(leds: Path = Path("/sys/class/leds")) -> str | None:
    """Return the name of the light that a person would look at, or None where there is none.

    On Raspberry Pi the activity light is ``ACT`` (``led0`` before Linux 5.x); other boards have one for the
    card or a plain one.
    """
    try:
        names = {path.name for path in leds.iterdir()}
    except OSError:
        return None
    for wanted in _LEDS:
        if wanted in names:
            return wanted
    states = sorted(name for name in names if "::" not in name or name.startswith("mmc"))
    return states[0] if states else None
