"""What a person asked for, checked and completed before anything is written: settings for each board.

Knows options and their defaults. Does not know how settings reach a board.
"""

import os
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from coordinator.boards import Board, read_book, record_board
from coordinator.flash.settings import Credentials, Settings, Wifi, check_address, check_names, expand_names
from profiles.device import load_profile
from profiles.errors import FlashError

__all__ = [
    "Plan",
    "make_plan",
    "mounted_cards",
    "next_free",
    "only_card",
    "record",
    "run_of_bundle",
    "wifi_of",
]

_ON_BOARD = "board:"
_ENROL_PORT = 8443
_TOKEN_S = 7 * 86400.0  # a card may lie in a drawer for some days


@dataclass(frozen=True)
class Plan:
    """One board to be made.

    Attributes:
        settings: What it is told.
        bundle: The bundle folder.
        data: Samples that travel along; None for those that are on the board.
    """

    settings: Settings
    bundle: Path
    data: Path | None


def make_plan(
    names: Sequence[str],
    *,
    broker: str,
    bundle: Path,
    run: str = "",
    data: str = "",
    profile: str = "",
    memory_mib: float | None = None,
    replace: str = "",
    enrol: str = "",
    local: bool = False,
) -> list[Plan]:
    """Return a plan per name.

    Args:
        names: From :func:`~coordinator.flash.settings.expand_names`.
        broker: As the boards will reach it.
        bundle: The bundle folder.
        run: The run; the one of the bundle's run folder where left out.
        data: A file, with ``{name}`` for the board's name, or ``board:/path`` for a file on the board; where
            left out, ``/var/lib/scalarfed/data.npz`` on the board.
        profile: Name of the boards' profile.
        memory_mib: Budget; the profile's where left out.
        replace: A name that may be in use.
        enrol: Where the boards exchange their token for a certificate; port 8443 of the broker's host where
            left out. Only with ``mqtts://``.
        local: For this machine itself, where 127.0.0.1 is a fine address.

    Raises:
        FlashError: A name is in use, the address means the board itself, or something is missing.
        ProfileError: There is no such profile.
    """
    check_names(names, [name for name in read_book() if name != replace])
    if not local:
        check_address(broker)
    if enrol and not enrol.startswith("https://"):
        raise FlashError(f"{enrol!r} is no address to enrol at", hint="Write --enrol https://HOST:PORT.")
    if not (bundle / "manifest.json").is_file():
        raise FlashError(
            f"{bundle} is no bundle",
            hint="Give the folder `bundle` of a run: `scalarfed testbed run` makes one.",
        )
    if memory_mib is None:
        memory_mib = load_profile(profile).memory_mib.value if profile else 128.0
    if not 32 <= memory_mib <= 2**20:
        raise FlashError(
            f"a budget of {memory_mib:g} MiB makes no sense", hint="The agent alone needs about 64 MiB."
        )
    plans = []
    for name in names:
        on_board = data.removeprefix(_ON_BOARD) if data.startswith(_ON_BOARD) else ""
        travels = Path(data.replace("{name}", name)) if data and not on_board else None
        if travels is not None and not travels.is_file():
            raise FlashError(
                f"there is no data file {travels}",
                hint="{name} in --data stands for the board's name; board:/path names a file on the board.",
            )
        settings = Settings(
            name, broker, run or run_of_bundle(bundle), memory_mib, profile=profile, data=on_board,
            credentials=_credentials(name, broker, enrol, bundle, token=not local),
        )  # fmt: skip
        plans.append(Plan(settings, bundle, travels))
    return plans


def _credentials(name: str, broker: str, enrol: str, bundle: Path, *, token: bool) -> Credentials:
    """Return what lets a board in; this user's authority is made where there is none yet."""
    from coordinator.authority import Authority, default_folder
    from edge_agent.bundle import sign_bundle

    authority = Authority.create(default_folder())
    if not broker.startswith("mqtts://"):
        return Credentials(signing_key=authority.signing_key)
    sign_bundle(bundle, authority.signer())
    if not token:
        return Credentials(fingerprint=authority.fingerprint, signing_key=authority.signing_key)
    return Credentials(
        token=authority.new_token(name, valid_s=_TOKEN_S),
        fingerprint=authority.fingerprint,
        enrol=enrol or f"https://{urlsplit(broker).netloc.rpartition(':')[0]}:{_ENROL_PORT}",
        signing_key=authority.signing_key,
    )


def next_free(pattern: str) -> list[str]:
    """Return the first name of a pattern that no board has; all of them if it is a single name.

    Raises:
        FlashError: Every one is taken.
    """
    names = expand_names(pattern)
    if len(names) == 1:
        return names
    taken = read_book()
    free = [name for name in names if name not in taken]
    if not free:
        raise FlashError(
            f"all {len(names)} names of {pattern} are in use", hint="Make the range longer, or use --replace."
        )
    return free[:1]


def run_of_bundle(bundle: Path) -> str:
    """Return the name of the run in whose folder a bundle lies; ``fleet`` for a bundle alone."""
    try:
        lines = (bundle.resolve().parent / "experiment.toml").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "fleet"
    named = [
        line.partition("=")[2].strip().strip("\"'") for line in lines if line.split("=")[0].strip() == "name"
    ]
    return named[0] if named else "fleet"


def wifi_of(ssid: str, country: str) -> Wifi | None:
    """Return the Wi-Fi that was asked for; its password comes from the environment, never from options.

    Raises:
        FlashError: A part is missing or cannot be right.
    """
    if not ssid:
        return None
    return Wifi.of(ssid, os.environ.get("SCALARFED_WIFI_PASSWORD", ""), country)


def mounted_cards() -> list[Path]:
    """Return the mounted partitions that look like a board's boot partition."""
    places = [Path(part.mountpoint) for part in psutil.disk_partitions() if part.fstype.lower() in _FAT_NAMES]
    if os.name == "nt":
        places = [Path(f"{letter}:/") for letter in string.ascii_uppercase[3:]]
    return [place for place in places if (place / "cmdline.txt").is_file() or (place / "user-data").is_file()]


def only_card() -> Path:
    """Return the one mounted card.

    Raises:
        FlashError: There is none, or more than one.
    """
    found = mounted_cards()
    if len(found) != 1:
        names = ", ".join(str(place) for place in found) or "none"
        raise FlashError(
            f"which card? {len(found)} boot partitions are mounted: {names}",
            hint="Write a card with Raspberry Pi Imager, put it in again, and name where it is mounted.",
        )
    return found[0]


_FAT_NAMES = ("vfat", "msdos", "fat32", "exfat")


def record(plan: Plan, *, way: str, where: str, release: str) -> None:
    """Write a board that was made into the book."""
    told = plan.settings
    board = Board(
        name=told.name, way=way, where=where, broker=told.broker, namespace=told.namespace, run=told.run,
        profile=told.profile, memory_mib=told.memory_mib, release=release,
    )  # fmt: skip
    record_board(board, token=told.credentials.token)
