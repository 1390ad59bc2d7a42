"""Keeps a broker shut to strangers: mutual TLS, rights by name, and revocation that counts at once.

Joins an authority to mosquitto. Knows mosquitto's configuration, which topics are whose, and how to end a
connection: a revoked device loses its rights when mosquitto reads its lists again, and its connection when
somebody else, with a certificate made for that, connects under its name.
"""

import ipaddress
import itertools
import os
import signal
import ssl
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

from coordinator.authority import COORDINATOR, OPERATOR, Authority, Identity
from coordinator.broker import Broker, Protection, find_mosquitto, greet, start_mosquitto
from coordinator.child import end_orphan
from coordinator.experiment import BrokerChoice
from edge_agent.bundle import sign_bundle
from edge_agent.credentials import client_context
from edge_agent.link import Link, MqttLink
from edge_agent.seal import SayingLink
from edge_agent.topics import Topics
from profiles.errors import BrokerError

__all__ = ["Guard", "access_rules", "connect", "guard_of", "is_beyond_loopback", "needs_guard"]

_KICK_S = 3.0
_NUMBERS = 1_000_000


def access_rules(namespace: str, *, shut_out: Iterable[str] = ()) -> str:
    """Return mosquitto's access list: a device (%u) writes under its own name and reads what is meant for it.

    Args:
        namespace: First level of all topics.
        shut_out: Names that may do nothing, whatever certificate they still show.
    """
    runs = f"{namespace}/+"
    lines = [
        "# Written by scalarfed. Whoever is not named here, and all that is not allowed here, is refused.",
        *(f"pattern read {runs}/{topic}" for topic in ("ctl", "r/+", "a/%u", "c/%u")),
        *(f"pattern write {runs}/{topic}" for topic in ("u/+/%u", "st/%u", "q/%u")),
        "",
        f"user {COORDINATOR}",
        f"topic readwrite {namespace}/#",
        "",
        f"user {OPERATOR}",
        f"topic read {namespace}/#",
        f"topic write {runs}/c/+",
    ]
    for name in sorted(shut_out):
        lines += ["", f"user {name}", "topic deny #"]
    return "\n".join(lines) + "\n"


def is_beyond_loopback(host: str) -> bool:
    """Return whether somebody else than this machine can reach what listens on ``host``."""
    if host == "localhost":
        return False
    try:
        return not ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return True


def needs_guard(choice: BrokerChoice) -> bool:
    """Return whether a run's broker is to be guarded; asked before any work is begun.

    Raises:
        BrokerError: The broker runs already, elsewhere, and would carry everything in the clear; or it cannot
            be protected from here.
    """
    host = urlsplit(choice.url).hostname or "" if choice.url else choice.listen
    if choice.security == "insecure" or (choice.security == "auto" and not is_beyond_loopback(host)):
        return False
    if choice.url:
        raise BrokerError(
            f"{choice.url} would carry this run unprotected: anybody on it could answer in an agent's name.",
            hint="Leave --broker out and set broker.listen, so that a protected one is started; or say "
            "--insecure in a network of your own.",
        )
    _mosquitto()
    return True


def guard_of(choice: BrokerChoice, folder: Path) -> "Guard | None":
    """Return the guard that a run's broker needs, with an authority of its own in the run folder, or None.

    Raises:
        BrokerError: As :func:`needs_guard`.
    """
    return Guard(Authority.create(folder / "authority"), folder) if needs_guard(choice) else None


def connect(broker: Broker, topics: Topics, guard: "Guard | None") -> tuple[MqttLink, Link]:
    """Return the coordinator's connection, and the link over it that it speaks through."""
    if guard is not None:
        return guard.link(topics)
    link = MqttLink(broker.url, client_id=f"{topics.run}-coordinator")
    return link, link


class Guard:
    """A broker's rules, kept in step with an authority.

    Args:
        authority: Knows whom to let in.
        folder: For the rules, beside the broker's configuration; must exist.
        namespace: First level of all topics.

    Attributes:
        shut_out: Names that were revoked, as of the last look.
    """

    def __init__(self, authority: Authority, folder: Path, *, namespace: str = "scalarfed") -> None:
        self.authority = authority
        self._rules = folder / "mosquitto.acl"
        self._namespace = namespace
        self._coordinator = authority.role_identity(COORDINATOR)
        self._broker: Broker | None = None
        self._seen = self._list_version()
        self._revoked = self._revoked_serials()
        self.shut_out = authority.shut_out()
        self._write_rules()

    def start(
        self, folder: Path, *, host: str = "127.0.0.1", port: int = 0, names: Iterable[str] = ()
    ) -> Broker:
        """Start mosquitto; the broker's ``url`` is the coordinator's way in, ``agents_url`` the agents'.

        Args:
            folder: For configuration, log and pid file.
            host: Address for the agents.
            port: Likewise; 0 for any free one.
            names: Further names or addresses of this machine, as the agents know it.

        Raises:
            BrokerError: mosquitto is not installed (amqtt can neither check certificates against a revocation
                list nor rights by certificate), or does not start.
        """
        end_orphan(folder / "broker.pid")
        program = _mosquitto()
        server = self.authority.server_identity([*names, *([] if host in ("0.0.0.0", "::") else [host])])
        self._broker = start_mosquitto(
            program,
            folder,
            host=host,
            port=port,
            protection=Protection(
                listener=tuple(self._listener(server)),
                rules=self._rules,
                tls=self._context(self._coordinator),
            ),
        )
        return self._broker

    def sign_bundles(self, run: Path) -> None:
        """Sign what the agents of a run are given: its bundle, and the narrower ones of a family."""
        sign = self.authority.signer()
        for manifest in sorted(run.glob("bundle*/manifest.json")):
            sign_bundle(manifest.parent, sign)

    def link(self, topics: Topics) -> "tuple[MqttLink, SayingLink]":
        """Return the coordinator's connection, and the link over it that signs what it says."""
        if self._broker is None:
            raise ValueError("start the broker first")
        client_id = f"{COORDINATOR}:{topics.run}"  # a colon is in no device's name, which is its client id
        carrier = MqttLink(self._broker.url, client_id=client_id, tls=self._context(self._coordinator))
        return carrier, SayingLink(
            carrier,
            topics,
            sign=self.authority.signer(),
            key=bytes.fromhex(self.authority.signing_key),
            numbers=self._numbers(),
        )

    def files(self) -> tuple[Path, Path, Path]:
        """Return the files by which a process of the coordinator's gets in: authority, certificate, key."""
        return self.authority.ca, self._coordinator.certificate, self._coordinator.key

    def watch(self) -> frozenset[str]:
        """Look whether certificates were revoked, and if so end their connections; return who is shut out.

        To be called a few times a second; it costs a look at a file's date.
        """
        version = self._list_version()
        if version == self._seen:
            return self.shut_out
        self._seen = version
        number = self.authority.list_number()  # before the list is looked at: what comes later is not applied
        revoked = self._revoked_serials()
        gone = sorted({revoked[serial] for serial in revoked.keys() - self._revoked.keys()})
        self._revoked = revoked
        self.shut_out = self.authority.shut_out()
        self._write_rules()
        if self._broker is not None and self._broker.pid is not None:
            if hasattr(signal, "SIGHUP"):
                os.kill(self._broker.pid, signal.SIGHUP)
                for name in gone:
                    self._end_connection(name)
            else:  # Windows: mosquitto reads its lists only when it starts, and everybody connects anew
                self._broker.restart()
        self.authority.note_applied(number)
        return self.shut_out

    def _end_connection(self, name: str) -> None:
        """Connect as the device, whereupon mosquitto closes its other connection, and leave."""
        if self._broker is None:
            return
        parts = urlsplit(self._broker.agents_url)
        identity = self.authority.stand_in(name)
        context = self._context(identity)
        identity.key.unlink()
        identity.certificate.unlink()
        greet((str(parts.hostname), int(parts.port or 8883)), timeout_s=_KICK_S, tls=context)

    def _listener(self, server: Identity) -> list[str]:
        return [
            "allow_anonymous false",
            f"cafile {self.authority.ca}",
            f"certfile {server.certificate}",
            f"keyfile {server.key}",
            f"crlfile {self.authority.revocation_list}",
            "require_certificate true",
            "use_identity_as_username true",
            "tls_version tlsv1.2",  # at least
        ]

    def _numbers(self) -> Iterator[int]:
        """Yield rising numbers, taken from the authority by the million."""
        return itertools.chain.from_iterable(self.authority.take_numbers(_NUMBERS) for _ in itertools.count())

    def _context(self, identity: Identity) -> ssl.SSLContext:
        return client_context(self.authority.ca, identity.certificate, identity.key)

    def _revoked_serials(self) -> dict[int, str]:
        return {one.serial: one.name for one in self.authority.certificates() if one.revoked is not None}

    def _list_version(self) -> tuple[int, int]:
        told = self.authority.revocation_list.stat()
        return told.st_mtime_ns, told.st_ino

    def _write_rules(self) -> None:
        beside = self._rules.with_suffix(".new")
        beside.write_text(access_rules(self._namespace, shut_out=self.shut_out), encoding="utf-8")
        beside.replace(self._rules)


def _mosquitto() -> Path:
    program = find_mosquitto()
    if program is None:
        raise BrokerError(
            "A protected broker needs mosquitto, which is not installed: amqtt knows neither revocation "
            "lists nor rights by certificate.",
            hint="Install mosquitto 2, stay on the loopback, or say --insecure in a network of your own.",
        )
    return program
