"""The agent as a board's service: settings from a file, starts counted, a safe mode, a release on trial.

Wraps the agent's process (``__main__``); knows files, not messages. After five starts in a row without
joining its run the agent goes into safe mode: it only reports, with the last words of the one that failed,
so that a board with a bad bundle or bad samples does not wear out its card and can still be seen.
"""

import contextlib
import json
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edge_agent.__main__ import main as run_agent
from edge_agent.commands import Commands
from edge_agent.credentials import client_context, read_credentials
from edge_agent.heartbeat import Heartbeat
from edge_agent.link import Message, MqttLink
from edge_agent.telemetry import read_telemetry
from edge_agent.topics import Topics
from profiles.errors import ConfigError, ScalarfedError, SecurityError

__all__ = ["SAFE_AFTER", "StartCounter", "agent_arguments", "main"]

SAFE_AFTER = 5
"""Starts in a row without joining after which the next one is in safe mode."""

_STATE = Path("/var/lib/scalarfed")
_OPT = Path("/opt/scalarfed")
_SECURITY = "security"
_TRIAL_S = 600.0
_SAFE_S = 900.0
_UNREACHED_S = 300.0
_GAVE_UP, _UNREACHED = 75, 69
_LOG = logging.getLogger("scalarfed-agent")


class StartCounter:
    """Counts starts that did not lead to joining, in a file that survives the process.

    Args:
        folder: The state folder; it exists.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "starts.json"

    def read(self) -> tuple[int, str]:
        """Return the starts since the last joining, and the last failure's words."""
        try:
            told = json.loads(self._path.read_text(encoding="utf-8"))
            return int(told["starts"]), str(told["last_words"])
        except (OSError, ValueError, KeyError, TypeError):
            return 0, ""

    def count(self) -> int:
        """Count this start and return the number."""
        starts, last_words = self.read()
        self._write(starts + 1, last_words)
        return starts + 1

    def joined(self) -> None:
        """Start counting anew: the agent is in its run."""
        self._write(0, "")

    def failed(self, last_words: str) -> None:
        """Keep why this start failed."""
        self._write(self.read()[0], last_words[-500:])

    def forgive(self, last_words: str) -> None:
        """Do not count this start: what failed was not the agent."""
        self._write(max(0, self.read()[0] - 1), last_words[-500:])

    def _write(self, starts: int, last_words: str) -> None:
        beside = self._path.with_suffix(".new")
        with contextlib.suppress(OSError):  # a full disk must not keep the agent from its work
            beside.write_text(json.dumps({"starts": starts, "last_words": last_words}), encoding="utf-8")
            beside.replace(self._path)


def agent_arguments(settings: Mapping[str, Any], *, state: Path = _STATE) -> list[str]:
    """Return the agent's options for a board's settings.

    Args:
        settings: What ``board.json`` holds.
        state: The state folder, with ``bundle`` and, if they travelled along, the samples.

    Raises:
        ConfigError: A setting is missing.
    """
    missing = [key for key in ("name", "broker", "run", "memory_mib") if not settings.get(key)]
    if missing:
        raise ConfigError(
            f"the board's settings lack {', '.join(missing)}", hint="Flash the board again with this release."
        )
    data = settings.get("data") or str(state / "data.npz")
    return [
        *("--broker", str(settings["broker"]), "--namespace", str(settings.get("namespace") or "scalarfed")),
        *("--run", str(settings["run"]), "--name", str(settings["name"])),
        *("--bundle", str(state / "bundle"), "--data", str(data), "--state", str(state)),
        *("--profile", str(settings.get("profile") or ""), "--memory-mib", str(settings["memory_mib"])),
        *(("--security", str(state / _SECURITY)) if settings.get("security") else ()),
    ]


def main(arguments: Sequence[str] | None = None, *, state: Path = _STATE, opt: Path = _OPT) -> int:
    """Run the agent as its settings say; return the exit code.

    Args:
        arguments: The settings file; then the state folder where it is not ``/var/lib/scalarfed``, and where
            releases lie if not in ``/opt/scalarfed``.
        state: The state folder unless named in ``arguments``.
        opt: Where releases lie.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not 1 <= len(words) <= 3:
        print("usage: python -m edge_agent.service SETTINGS [STATE [RELEASES]]", file=sys.stderr)
        return 2
    state = Path(words[1]) if len(words) > 1 else state
    opt = Path(words[2]) if len(words) > 2 else opt
    counter = StartCounter(state)
    try:
        settings: dict[str, Any] = json.loads(Path(words[0]).read_text(encoding="utf-8"))
        commands = Commands(state, opt=opt, key=str(settings.get("signing_key") or ""))
        if counter.count() > SAFE_AFTER:
            return _stay_safe(settings, counter, state, commands)
        heart = Heartbeat(on_joined=lambda: _on_joined(counter, state, opt))
        trial = (opt / "trial").exists()
        watch = threading.Thread(
            target=_watch, args=(heart, counter, state, trial), name="start", daemon=True
        )
        watch.start()
        if (state / _SECURITY / "ticket.json").exists():
            heart.ready("waiting to be enrolled")  # for as long as it takes: that is no failed start
        code = run_agent(
            agent_arguments(settings, state=state),
            heart=heart,
            on_failure=counter.failed,
            commands=commands,
        )
    except ScalarfedError as error:
        counter.failed(str(error))
        print(f"{error}\nhint: {error.hint}", file=sys.stderr)
        return error.exit_code
    except (OSError, ValueError) as error:
        counter.failed(f"{words[0]}: {error}")
        print(f"{words[0]}: {error}", file=sys.stderr)
        return 3
    except Exception:
        counter.failed(traceback.format_exc())
        raise
    return code


def _on_joined(counter: StartCounter, state: Path, opt: Path) -> None:
    counter.joined()
    with contextlib.suppress(OSError):
        release = os.readlink(opt / "current").removeprefix("releases/")
        (state / "healthy").write_text(release, encoding="utf-8")


def _watch(heart: Heartbeat, counter: StartCounter, state: Path, trial: bool) -> None:
    """End a start that comes to nothing, so that the reason gets into the board's report.

    Without a connection for five minutes the process ends and is started again; a release on trial gives the
    board back to the former one when it has not joined in ten.
    """
    started = time.monotonic()
    while not heart.joined:
        time.sleep(1.0)
        if heart.trouble and not trial and time.monotonic() - started > _UNREACHED_S:
            counter.forgive(f"no connection: {heart.trouble}")
            print(f"scalarfed: no connection: {heart.trouble}", file=sys.stderr)
            os._exit(_UNREACHED)
        if trial and time.monotonic() - started > _TRIAL_S:
            with contextlib.suppress(OSError):
                (state / "give-back").write_text("did not join in time", encoding="utf-8")
            print("scalarfed: on trial and not joined in time; giving the board back", file=sys.stderr)
            os._exit(_GAVE_UP)


def _stay_safe(settings: Mapping[str, Any], counter: StartCounter, state: Path, commands: Commands) -> int:
    """Report, obey commands and do nothing else for a while; then end, so that the next start tries again."""
    logging.basicConfig(level="INFO", format="%(asctime)s %(levelname)s %(message)s", stream=sys.stdout)
    starts, last_words = counter.read()
    _LOG.warning("safe mode after %d starts without joining: %s", starts - 1, last_words or "no last words")
    name = str(settings["name"])
    topics = Topics(str(settings.get("namespace") or "scalarfed"), str(settings["run"]))
    told = {"name": name, "state": "safe mode", "starts": starts, "last_words": _printable(last_words)}
    will = json.dumps({"name": name, "state": "offline"}).encode()
    heart = Heartbeat()
    heart.ready("safe mode")
    deadline = time.monotonic() + _SAFE_S
    ordered = topics.command(name)
    tls = None
    if settings.get("security"):
        try:
            mine = read_credentials(state / _SECURITY)
            tls = client_context(mine.ca, mine.certificate, mine.key)
        except SecurityError as error:  # nobody would let it in: the card alone can tell
            _LOG.warning("%s", error)
            while time.monotonic() < deadline:
                heart.progress()
                time.sleep(1.0)
            counter.joined()
            return 0
    link = MqttLink(
        str(settings["broker"]),
        client_id=f"{settings['run']}-{name}",
        will=(topics.status(name), will),
        tls=tls,
    )
    link.subscribe(ordered)
    said_at = float("-inf")
    try:
        while time.monotonic() < deadline:
            event = link.receive(1.0)
            heart.progress()
            if isinstance(event, Message) and event.topic == ordered:
                commands.obey(event.payload)
            commands.tick()
            if event is not None or time.monotonic() - said_at >= 10:
                said_at = time.monotonic()
                status = told | commands.status() | {"telemetry": read_telemetry(disk=state)}
                link.publish(topics.status(name), json.dumps(status).encode(), retain=True)
    finally:
        link.close()
    counter.joined()  # what failed may be mended meanwhile: five more tries
    return 0


def _printable(text: str) -> str:
    """Return the end of a text as a status may carry it."""
    return "".join(letter if letter.isprintable() else " " for letter in text)[-200:]


if __name__ == "__main__":
    sys.exit(main())
