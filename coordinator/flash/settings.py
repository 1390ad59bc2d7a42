"""What a board is told: its name, its coordinator, its budget, its credentials, its Wi-Fi.

Checks each value where a person can still correct it. Does not know where the values are written.
"""

import hashlib
import ipaddress
import json
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from edge_agent.topics import is_name
from profiles.errors import FlashError

__all__ = ["Credentials", "Settings", "Wifi", "check_address", "check_names", "expand_names", "own_addresses"]

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_HOST_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_MOST_NAMES = 1000


@dataclass(frozen=True)
class Wifi:
    """A network for the board's first boot, where Imager was not told one.

    Args:
        ssid: The network's name, 1 to 32 bytes.
        password: 8 to 63 characters; it is not kept, only the key that WPA2 derives from it.
        country: Two letters: without it the radio stays off.

    Raises:
        FlashError: One of them cannot be right.
    """

    ssid: str
    country: str
    key: str = field(repr=False)

    @classmethod
    def of(cls, ssid: str, password: str, country: str) -> "Wifi":
        """Return the network with its key derived as IEEE 802.11i, annex H.4, says.

        Raises:
            FlashError: One of the three cannot be right.
        """
        if not 1 <= len(ssid.encode()) <= 32:
            raise FlashError(f"the Wi-Fi name {ssid!r} has {len(ssid.encode())} bytes; 1 to 32 are allowed")
        if not re.fullmatch(r"[A-Za-z]{2}", country):
            raise FlashError(
                f"the Wi-Fi country {country!r} is not two letters; without it the radio stays off",
                hint="Add --wifi-country with your country's code, such as DE, GB or US.",
            )
        if not 8 <= len(password) <= 63:
            raise FlashError(
                f"the Wi-Fi password has {len(password)} characters; WPA2 takes 8 to 63",
                hint="Set SCALARFED_WIFI_PASSWORD to the network's password, or leave --wifi-ssid out and "
                "let Raspberry Pi Imager set up the Wi-Fi.",
            )
        key = hashlib.pbkdf2_hmac("sha1", password.encode(), ssid.encode(), 4096, 32).hex()
        return cls(ssid, country.upper(), key)


@dataclass(frozen=True)
class Credentials:
    """What lets a board in, once.

    Attributes:
        token: Single use; empty where the broker asks for none.
        fingerprint: SHA-256 of the coordinator's authority, hexadecimal; empty likewise.
        enrol: Address at which the token is exchanged for a certificate; empty likewise.
        signing_key: Public key of what the coordinator signs, hexadecimal; without it no update is taken.
    """

    token: str = field(default="", repr=False)
    fingerprint: str = ""
    enrol: str = ""
    signing_key: str = ""


@dataclass(frozen=True)
class Settings:
    """One board's settings, as they travel in ``board.json``.

    Attributes:
        name: In the fleet, and the host's name if none was set.
        broker: ``mqtt://HOST:PORT`` or ``mqtts://HOST:PORT``.
        run: The run to take part in.
        memory_mib: The agent's budget.
        profile: Name of the board's profile; may be empty.
        namespace: First level of all topics.
        data: A path on the board; empty if the samples travel with the settings.
        credentials: What lets it in.
    """

    name: str
    broker: str
    run: str
    memory_mib: float
    profile: str = ""
    namespace: str = "scalarfed"
    data: str = ""
    credentials: Credentials = Credentials()

    def to_json(self) -> bytes:
        """Return ``board.json``. It holds the token: keep it out of logs, and erase it where FAT shows it."""
        told: dict[str, object] = {
            "format": 1,
            "name": self.name,
            "broker": self.broker,
            "namespace": self.namespace,
            "run": self.run,
            "memory_mib": self.memory_mib,
            "profile": self.profile,
            "data": self.data,
            "signing_key": self.credentials.signing_key,
            "security": self.broker.startswith("mqtts://"),
        }
        if self.credentials.token:
            told["ticket"] = {
                "name": self.name,
                "url": self.credentials.enrol,
                "ca_sha256": self.credentials.fingerprint,
                "token": self.credentials.token,
            }
        return (json.dumps(told, indent=1) + "\n").encode()


def expand_names(pattern: str) -> list[str]:
    """Return the names that a pattern stands for: ``pi-{01..08}`` is eight, in order, with the zeros kept.

    Raises:
        FlashError: A name could not be a host's name, or the range is empty or beyond 1000.
    """
    match = _RANGE.search(pattern)
    if match is None:
        names = [pattern]
    else:
        first, last, width = int(match[1]), int(match[2]), len(match[1])
        if not 0 <= last - first < _MOST_NAMES:
            raise FlashError(
                f"{match[0]} in --name counts from {first} to {last}; 1 to {_MOST_NAMES} names are allowed",
                hint="Write the smaller number first, as in pi-{01..08}.",
            )
        names = [
            pattern[: match.start()] + str(n).zfill(width) + pattern[match.end() :]
            for n in range(first, last + 1)
        ]
    for name in names:
        if not (is_name(name) and _HOST_NAME.fullmatch(name)):
            raise FlashError(
                f"{name!r} cannot name a board: 1 to 63 small letters, digits and inner hyphens",
                hint="Choose a name such as pi-kitchen, or pi-{01..08} for eight boards.",
            )
    return names


def check_names(names: Sequence[str], taken: Sequence[str]) -> None:
    """Refuse names that boards have already.

    Raises:
        FlashError: One is taken.
    """
    for name in names:
        if name in taken:
            raise FlashError(
                f"the name {name} is in use by another board",
                hint=f"Choose another --name, or give this board the old one's place with --replace {name}.",
            )


def check_address(broker: str) -> None:
    """Refuse a coordinator's address that no board could reach.

    Raises:
        FlashError: It is no address, or one that means "this machine" wherever it is used.
    """
    try:
        parts = urlsplit(broker)
        host = parts.hostname if parts.scheme in ("mqtt", "mqtts") and parts.port != 0 else None
    except ValueError:
        host = None
    if not host:
        raise FlashError(
            f"{broker!r} is no broker's address", hint="Write --broker mqtt://HOST:PORT or mqtts://HOST:PORT."
        )
    try:
        address = ipaddress.ip_address(host)
        own = address.is_loopback or address.is_unspecified
    except ValueError:
        own = host == "localhost" or host.endswith(".localhost")
    if own:
        seen = own_addresses()
        hint = (
            f"This machine is also {' or '.join(seen)}"
            if seen
            else "Give this machine's address in your network"
        )
        raise FlashError(
            f"{host} means the board itself when a board uses it, not this machine",
            hint=f"{hint}; write --broker mqtt://ADDRESS:PORT, and let the broker listen there.",
        )


def own_addresses() -> list[str]:
    """Return addresses at which other machines may reach this one; nothing is sent to find out."""
    found = []
    for family, beyond in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect((beyond, 9))
                found.append(str(probe.getsockname()[0]))
        except OSError:
            continue
    return [address for address in found if not ipaddress.ip_address(address).is_loopback]
