"""What an operator asks of a board: take a new release, show where you are.

Works beside the run, in safe mode too, and never in the loop's way: fetching has a thread of its own. What
only root may do is asked for by a file in ``asks``, which ``care.sh`` looks at; see ``update`` for why root
believes nothing of what the agent says. Knows files and threads, not MQTT.
"""

import json
import logging
import os
import platform
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from edge_agent.credentials import client_context, read_credentials
from edge_agent.update import Offer, fetch_offer, is_genuine, last_number, read_offer
from profiles.errors import ScalarfedError

if TYPE_CHECKING:
    import ssl

__all__ = ["Commands", "find_led"]

_LEDS = ("ACT", "led0", "mmc0::", "mmc0", "PWR", "led1")
_BOOTS = ("/boot/firmware", "/boot")
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
        self._measured = _measured(state)
        self._outcome_before = self._outcome()
        self._fares: tuple[str, int, str] = self._outcome_before

    @property
    def release(self) -> str:
        """The installed release; empty where there is none."""
        try:
            return os.readlink(self._opt / "current").removeprefix("releases/")
        except OSError:
            return ""

    def status(self) -> dict[str, object]:
        """Return what belongs into a status: what the board is, its release, how the last command fares."""
        outcome = self._outcome()
        if outcome != self._outcome_before:  # root has written down what became of it
            self._fares = self._outcome_before = outcome
        word, number, said = self._fares
        if word == "trial" and self._healthy():
            word, said = "well", f"{self.release} has joined its run"
        machine, python = _here()
        return {
            "machine": machine,
            "python": python,
            "measured": self._measured,
            "release": self.release,
            "update": "".join(letter if letter.isprintable() else " " for letter in said)[:200],
            "update_state": word,
            "update_number": number,
        }

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
            self._locate(told.get("seconds"), told.get("number"))
        elif payload:
            self._tell("refused", 0, "a command that this release does not know")

    def tick(self) -> None:
        """Begin what had to wait: for a trial to end, or for another fetch."""
        if self._waiting is not None and not self._busy() and not self._on_trial():
            offer, self._waiting = self._waiting, None
            self._start(offer)

    def _take(self, payload: bytes) -> None:
        try:
            offer = read_offer(payload)
        except ScalarfedError as error:
            self._tell("refused", 0, str(error))
            return
        try:
            refusal = self._refusal(offer)
        except ScalarfedError as error:
            refusal = str(error)
        if refusal:
            self._tell("refused", offer.number, refusal)
        elif offer.number > last_number(self._opt):
            self._waiting = offer
            if self._on_trial():
                self._tell("waiting", offer.number, f"{self.release} is still on trial")
            self.tick()

    def _refusal(self, offer: Offer) -> str:
        """Return why an offer is not for this board; empty if it is."""
        if not self.release:
            return "this agent was not installed by `scalarfed flash`; update it as it was installed"
        if not self._key:
            return "this board was flashed without its coordinator's key; flash it again"
        if (offer.machine, offer.python) != _here():
            wanted = f"{offer.machine} with Python {offer.python}"
            return f"{offer.release} is for {wanted}, this is {' with Python '.join(_here())}"
        if not is_genuine(offer, self._key):
            return "the offer is not signed by this board's coordinator"
        return ""

    def _busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _start(self, offer: Offer) -> None:
        def work() -> None:
            def tell(there: int) -> None:
                said = f"{offer.release}: {there >> 20} of {offer.size >> 20} MiB are here"
                self._fares = ("fetching", offer.number, said)

            try:
                places = [self._opt / "payload", *(Path(boot) / "scalarfed" for boot in _BOOTS)]
                self._fetch(
                    offer, self._state / "update", sources=places, on_bytes=tell, tls=self._tls(offer.url)
                )
                self._ask("update", "")
                self._tell("fetched", offer.number, f"{offer.release} is here; root installs it")
            except (ScalarfedError, OSError) as error:
                self._tell("failed", offer.number, f"{offer.release} was not fetched: {error}")

        self._tell("fetching", offer.number, f"{offer.release} from {offer.url}")
        self._thread = threading.Thread(target=work, name="update", daemon=True)
        self._thread.start()

    def _tls(self, url: str) -> "ssl.SSLContext | None":
        folder = self._state / "security"
        if not url.startswith("https://") or not (folder / "device.crt").is_file():
            return None
        mine = read_credentials(folder)
        return client_context(mine.ca, mine.certificate, mine.key)

    def _locate(self, seconds: object, number: object) -> None:
        led = find_led(self._leds)
        asked = number if isinstance(number, int) and 0 <= number < 2**63 else 0
        if led is None:
            self._tell("locate", asked, "this board has no light that software can blink")
        elif isinstance(seconds, int) and 1 <= seconds <= _LONGEST_BLINK_S:
            self._ask("locate", f"{seconds}\n")
            self._tell("locate", asked, f"{led} blinks for {seconds} s")
        else:
            self._tell("locate", asked, f"1 to {_LONGEST_BLINK_S} seconds are possible")

    def _ask(self, what: str, text: str) -> None:
        folder = self._state / "asks"
        folder.mkdir(exist_ok=True)
        beside = self._state / f"{what}.ask"
        beside.write_text(text, encoding="ascii")
        beside.replace(folder / what)

    def _tell(self, word: str, number: int, said: str) -> None:
        self._fares = (word, number, said)
        _LOG.info("command: %s: %s", word, said)

    def _on_trial(self) -> bool:
        return (self._opt / "trial").exists() and not self._healthy()

    def _healthy(self) -> bool:
        try:
            return (self._state / "healthy").read_text(encoding="utf-8").strip() == self.release != ""
        except OSError:
            return False

    def _outcome(self) -> tuple[str, int, str]:
        """Return what became of the last update, as root wrote it down: state, the offer's number, words."""
        try:
            text = (self._opt / "update.outcome").read_text(encoding="utf-8", errors="replace")
            word, number, said = text.strip().split(" ", 2)
            return word, int(number), said
        except (OSError, ValueError):
            return "", 0, ""


def _measured(state: Path) -> dict[str, float]:
    """Return what the installer has measured of this board; empty where it has not."""
    try:
        told = json.loads((state / "measured.json").read_text(encoding="ascii"))
        return {str(key): float(value) for key, value in told.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def _here() -> tuple[str, str]:
    return platform.machine(), ".".join(platform.python_version_tuple()[:2])


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
