"""The MQTT broker: one that runs already, or mosquitto or amqtt as a process of ours.

Knows how to find, configure, start, watch and end a broker on this machine. Does not know topics or messages.
"""

import os
import shutil
import socket
import ssl
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from subprocess import DEVNULL, PIPE, STDOUT, run
from urllib.parse import urlsplit

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.reasoncodes import ReasonCode

from coordinator.child import Child, end_orphan
from edge_agent.wire import MAX_MESSAGE
from profiles.errors import BrokerError

__all__ = [
    "Broker",
    "Protection",
    "find_mosquitto",
    "greet",
    "open_broker",
    "start_amqtt",
    "start_mosquitto",
    "use_broker",
]

_REACH_S = 5.0
_START_S = 20.0


@dataclass(frozen=True)
class Protection:
    """What makes a mosquitto of ours let in the fleet alone.

    The coordinator has a listener of its own on the loopback.

    Attributes:
        listener: Lines for each listener.
        rules: The access list.
        tls: What the coordinator shows to the broker.
    """

    listener: tuple[str, ...]
    rules: Path
    tls: ssl.SSLContext


class Broker:
    """A broker that answers.

    Attributes:
        url: Where to connect: ``mqtt://HOST:PORT``, or ``mqtts://`` if it is protected.
        kind: For people: ``mosquitto 2.0.11``, ``amqtt 0.12.1`` or ``external``.
        agents_url: Where the agents of this machine connect; the same unless it is protected.
    """

    def __init__(
        self,
        url: str,
        kind: str,
        *,
        spawn: Callable[[], Child] | None = None,
        tls: ssl.SSLContext | None = None,
        agents_url: str = "",
    ) -> None:
        self.url = url
        self.kind = kind
        self.agents_url = agents_url or url
        self._address = _address(url)
        self._tls = tls
        self._spawn = spawn
        self._child = self._start(spawn) if spawn else None

    @property
    def pid(self) -> int | None:
        """The number of our broker process; None for an external broker."""
        return self._child.pid if self._child else None

    def alive(self) -> bool:
        """Say whether our process runs, or whether the external broker takes connections (at most 1 s)."""
        return self._child.alive() if self._child else _listens(self._address, timeout_s=1.0)

    def restart(self) -> None:
        """Start our process again on the same port; ends the old one first if it still runs.

        Raises:
            BrokerError: It does not come up, or the broker is not ours.
        """
        if self._spawn is None or self._child is None:
            raise BrokerError(
                f"The broker {self.url} is gone, and it is not ours to start.", hint="Start it again."
            )
        self._child.stop()
        self._child = self._start(self._spawn)

    def stop(self) -> None:
        """End our process; an external broker is left alone."""
        if self._child is not None:
            self._child.stop()

    def __enter__(self) -> "Broker":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _start(self, spawn: Callable[[], Child]) -> Child:
        child = spawn()
        deadline = time.monotonic() + _START_S
        while (
            trouble := greet(self._address, timeout_s=2.0, tls=self._tls)
        ) is not None or not child.alive():
            if child.wait(0.05) is not None or time.monotonic() > deadline:
                child.stop()
                lines = child.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
                raise BrokerError(
                    f"{self.kind} does not start at {self.url}: {lines[-1] if lines else trouble}.",
                    hint=f"{child.log} tells more. Or name a running broker with --broker mqtt://HOST:PORT.",
                )
        return child


def open_broker(folder: Path, *, url: str = "", host: str = "127.0.0.1", port: int = 0) -> Broker:
    """Return a broker that answers: the named one, else a new mosquitto, else a new amqtt.

    A broker that a dead run left behind in the same folder is ended first.

    Args:
        folder: For the configuration, log and pid file of a broker of ours; must exist.
        url: A running broker; empty to start one.
        host: Address of a broker of ours; beyond the loopback everybody who reaches it may do everything.
        port: Likewise; 0 for any free one.

    Raises:
        BrokerError: The named broker does not answer, or none can be started there.
        StateError: The folder is in use by a living run.
    """
    end_orphan(folder / "broker.pid")
    if url:
        return use_broker(url)
    program = find_mosquitto()
    if program is None and host != "127.0.0.1":
        raise BrokerError(f"A broker on {host} needs mosquitto, which is not installed.")
    if program is None:
        return start_amqtt(folder, port=port)
    return start_mosquitto(program, folder, host=host, port=port)


def use_broker(url: str) -> Broker:
    """Return the broker at ``url`` after a greeting of at most 5 s.

    Raises:
        BrokerError: The URL is not ``mqtt://HOST[:PORT]``, or nobody answers as a broker does.
    """
    host, port = _address(url)
    trouble = greet((host, port), timeout_s=_REACH_S)
    if trouble:
        raise BrokerError(
            f"The broker {url} cannot be reached: {trouble}.",
            hint="Start it, correct --broker mqtt://HOST:PORT, or leave --broker out to have one started.",
        )
    return Broker(f"mqtt://{host}:{port}", "external")


def start_mosquitto(
    program: Path,
    folder: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    protection: Protection | None = None,
) -> Broker:
    """Start mosquitto, by default for this machine alone.

    Args:
        program: From :func:`find_mosquitto`.
        folder: For configuration, log and pid file.
        host: Address to listen on.
        port: 0 for any free one.
        protection: Lets in whoever has a certificate, as far as the rules go; None lets everybody in.

    Raises:
        BrokerError: The port is in use, or mosquitto does not start.
    """
    port = _free_port(port, host)
    said = run([program, "-h"], stdin=DEVNULL, stdout=PIPE, stderr=STDOUT, timeout=10, check=False).stdout
    words = said.decode(errors="replace").split()
    kind = f"mosquitto {words[2]}" if words[:2] == ["mosquitto", "version"] else "mosquitto"
    config = folder / "mosquitto.conf"
    command = [str(program), "-c", str(config)]
    if protection is None:
        listeners = [f"listener {port} {host}", "allow_anonymous true"]
        config.write_text(_mosquitto_config(listeners), encoding="utf-8")
        return _ours(port, kind, command, folder, host=_reached_at(host))
    own = _free_port(0)
    listeners = [
        f"listener {port} {host}",
        *protection.listener,
        "use_username_as_clientid true",  # a device has one connection, and nobody can take its place
        f"listener {own} 127.0.0.1",
        *protection.listener,
        f"acl_file {protection.rules}",
    ]
    config.write_text(_mosquitto_config(listeners), encoding="utf-8")
    log, pid_file = folder / "broker.log", folder / "broker.pid"
    return Broker(
        f"mqtts://127.0.0.1:{own}",
        kind,
        spawn=lambda: Child(command, log=log, pid_file=pid_file),
        tls=protection.tls,
        agents_url=f"mqtts://{_reached_at(host)}:{port}",
    )


def start_amqtt(folder: Path, *, port: int = 0) -> Broker:
    """Start amqtt for this machine alone, in a process of its own.

    Raises:
        BrokerError: The port is in use, amqtt is not installed, or it does not start.
    """
    port = _free_port(port)
    command = [sys.executable, "-m", "coordinator.broker_amqtt", str(port)]
    return _ours(port, f"amqtt {version('amqtt')}", command, folder)


def find_mosquitto() -> Path | None:
    """Return the mosquitto program of this machine: on the PATH, or where installers put it."""
    beyond = [
        "/usr/sbin",
        "/usr/local/sbin",
        "/opt/homebrew/sbin",
        "/opt/homebrew/bin",
        "/usr/local/opt/mosquitto/sbin",
    ]
    if sys.platform == "win32":
        roots = (os.environ.get(name) for name in ("ProgramFiles", "ProgramFiles(x86)"))
        beyond = [str(Path(root) / "mosquitto") for root in roots if root]
    found = shutil.which("mosquitto") or shutil.which("mosquitto", path=os.pathsep.join(beyond))
    return Path(found) if found else None


def _reached_at(host: str) -> str:
    """Return how this machine itself reaches what listens on ``host``, as it stands in an address."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host


def _ours(port: int, kind: str, command: Sequence[str], folder: Path, *, host: str = "127.0.0.1") -> Broker:
    log, pid_file = folder / "broker.log", folder / "broker.pid"
    return Broker(f"mqtt://{host}:{port}", kind, spawn=lambda: Child(command, log=log, pid_file=pid_file))


def _mosquitto_config(listeners: Sequence[str]) -> str:
    # Started by root, mosquitto would change its user; the kernel then forgets to end it with its parent.
    user = ["user root"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    lines = [
        "# Written by scalarfed at every start of the broker.",
        *listeners,
        "persistence false",
        "set_tcp_nodelay true",
        # The defaults, 1000 queued and 20 in flight, lose most of a burst of 3000 replies.
        "max_queued_messages 100000",
        "max_inflight_messages 1000",
        f"message_size_limit {MAX_MESSAGE}",
        "log_dest stderr",
        "log_timestamp_format %Y-%m-%dT%H:%M:%S",
        *user,
    ]
    return "\n".join(lines) + "\n"


def _address(url: str) -> tuple[str, int]:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port or (8883 if parts.scheme == "mqtts" else 1883)
    except ValueError:
        host = port = None
    if parts.scheme not in ("mqtt", "mqtts") or not host or not port or parts.path not in ("", "/"):
        raise BrokerError(
            f"`{url}` is no broker address.", hint="Write --broker mqtt://HOST or mqtt://HOST:PORT."
        )
    return host, port


def _free_port(port: int, host: str = "127.0.0.1") -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        if sys.platform == "win32":
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        else:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise BrokerError(
                f"Port {port} of {host} cannot be had: {error.strerror or error}.",
                hint=f"Take any free one with --set broker.port=0, or use what runs there: "
                f"--broker mqtt://127.0.0.1:{port}.",
            ) from error
        return int(probe.getsockname()[1])


def _listens(address: tuple[str, int], *, timeout_s: float) -> bool:
    try:
        with socket.create_connection(address, timeout_s):
            return True
    except OSError:
        return False


def greet(address: tuple[str, int], *, timeout_s: float, tls: ssl.SSLContext | None = None) -> str | None:
    """Connect as an MQTT client and say goodbye; return what went wrong, or None.

    Args:
        address: Host and port.
        timeout_s: Longest wait for the connection, and again for the answer.
        tls: What to show; None for a connection in the clear.
    """
    answers: list[ReasonCode] = []
    client = mqtt.Client(CallbackAPIVersion.VERSION2, protocol=mqtt.MQTTv311)
    client.connect_timeout = timeout_s
    if tls is not None:
        client.tls_set_context(tls)
    client.on_connect = lambda _client, _data, _flags, code, _properties: answers.append(code)
    deadline = time.monotonic() + timeout_s
    try:
        client.connect(*address)
        while not answers:
            left = deadline - time.monotonic()
            if left <= 0:
                return f"no answer within {timeout_s:g} s"
            if client.loop(min(left, 0.5)) != mqtt.MQTT_ERR_SUCCESS and not answers:
                return "it answers, but not as an MQTT broker does"
    except OSError as error:
        return error.strerror or str(error) or type(error).__name__
    finally:
        client.disconnect()
    return f"it refuses: {answers[0]}" if answers[0].is_failure else None
