"""A new release or bundle: offered, fetched by the agent, taken over by root, which does not trust it.

The agent runs as a user of its own and could be another's one day. So it only fetches, into its own folder;
a helper that runs as root (``care.sh``) copies the files out of there and installs them if the offer bears
the coordinator's signature and every file the hash that the offer names. Knows the offer and files. Does not
know messages, processes or what is in a release.

As root: ``python -m edge_agent.update STATE OPT SETTINGS`` leaves the checked files in ``OPT/incoming``.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import stat
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_agent.fetch import fetch
from edge_agent.signature import is_signed
from profiles.errors import FetchError, ScalarfedError

__all__ = [
    "Offer",
    "fetch_offer",
    "is_genuine",
    "last_number",
    "main",
    "make_offer",
    "read_offer",
    "take_over",
]

_PREFIX = b"scalarfed update 1\n"  # no other message that is signed can pass for an offer
_FORMAT = 1
_LONGEST = 64 << 10
_MOST_BYTES = 1 << 30
_MOST_FILES = 1000
_RESERVE = 32 << 20
_PATH = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*(/[A-Za-z0-9][A-Za-z0-9._+-]*)?")
_HASH = re.compile(r"[0-9a-f]{64}")
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")
_PIECE = 64 << 10


@dataclass(frozen=True)
class Offer:
    """A release that the coordinator offers.

    Attributes:
        url: Where its files lie, without a slash at the end.
        statement: The bytes that are signed, as JSON.
        signature: Ed25519, 64 bytes.
        number: Grows from offer to offer; a board never takes a lower one.
        release: Its name.
        machine: As ``uname -m`` says.
        python: Such as ``3.13``.
        files: SHA-256 (hexadecimal) and size in bytes, by path.
    """

    url: str
    statement: bytes
    signature: bytes
    number: int
    release: str
    machine: str
    python: str
    files: Mapping[str, tuple[str, int]]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(size for _, size in self.files.values())

    def to_json(self) -> bytes:
        """Return the offer as it travels and as it is kept."""
        told = {
            "url": self.url,
            "statement": self.statement.decode(),
            "signature": self.signature.hex(),
        }
        return json.dumps({"do": "update", **told}).encode()


def make_offer(
    *,
    url: str,
    number: int,
    release: str,
    machine: str,
    python: str,
    files: Mapping[str, bytes],
    sign: Callable[[bytes], bytes],
) -> Offer:
    """Return a signed offer of ``files``, bytes by path.

    Args:
        url: Where the boards find them.
        number: Larger than that of any offer before.
        release: Its name.
        machine: As ``uname -m`` says.
        python: Such as ``3.13``.
        files: The payload.
        sign: From a message to its Ed25519 signature.
    """
    told = {
        "format": _FORMAT,
        "number": number,
        "release": release,
        "machine": machine,
        "python": python,
        "files": [
            [path, hashlib.sha256(data).hexdigest(), len(data)] for path, data in sorted(files.items())
        ],
    }
    statement = json.dumps(told, separators=(",", ":")).encode()
    made = {"url": url, "statement": statement.decode(), "signature": sign(_PREFIX + statement).hex()}
    return read_offer(json.dumps(made).encode())


def read_offer(payload: bytes) -> Offer:
    """Return an offer whose every field has its form; its signature is not looked at.

    Raises:
        FetchError: It is none.
    """
    try:
        if len(payload) > _LONGEST:
            raise ValueError(f"{len(payload)} bytes")
        told = json.loads(payload)
        statement = told["statement"].encode()
        said = json.loads(statement)
        if said["format"] != _FORMAT:
            raise ValueError(f"format {said['format']!r:.20}")
        offer = Offer(
            url=_text(told["url"]).rstrip("/"),
            statement=statement,
            signature=bytes.fromhex(told["signature"]),
            number=_whole(said["number"], most=2**63),
            release=_matching(_WORD, said["release"]),
            machine=_matching(_WORD, said["machine"]),
            python=_matching(_WORD, said["python"]),
            files={
                _matching(_PATH, path): (_matching(_HASH, sha256), _whole(size, most=_MOST_BYTES))
                for path, sha256, size in said["files"]
            },
        )
        if not 1 <= len(offer.files) <= _MOST_FILES or offer.size > _MOST_BYTES:
            raise ValueError(f"{len(offer.files)} files, {offer.size} bytes")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FetchError(f"the offer of a release is malformed: {error!s:.100}") from None
    return offer


def is_genuine(offer: Offer, key: str) -> bool:
    """Return whether an offer is signed by the owner of a public key, hexadecimal; none owns an empty one."""
    try:
        owner = bytes.fromhex(key)
    except ValueError:
        return False
    return len(owner) == 32 and is_signed(_PREFIX + offer.statement, offer.signature, key=owner)


def last_number(opt: Path) -> int:
    """Return the number of the last offer that root has dealt with; 0 before the first."""
    try:
        return int((opt / "update.number").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 0


def fetch_offer(
    offer: Offer,
    folder: Path,
    *,
    sources: Sequence[Path] = (),
    on_bytes: Callable[[int], None] = lambda _: None,
    **more: Any,
) -> None:
    """Bring all files of an offer into ``folder/files`` and the offer itself beside them, as ``offer.json``.

    What is there already, from an earlier try or in one of ``sources`` under the same path, is not fetched.

    Args:
        offer: Whose signature is known to be good.
        folder: The agent's own; made where missing.
        sources: Folders of earlier payloads.
        on_bytes: Told how many bytes of the whole are there.
        more: For :func:`~edge_agent.fetch.fetch`.

    Raises:
        FetchError: They cannot be had, or the disk is too full.
    """
    files = folder / "files"
    (folder / "offer.json").unlink(missing_ok=True)
    files.mkdir(parents=True, exist_ok=True)
    _drop_others(files, offer)
    free = shutil.disk_usage(folder).free
    there = sum(path.stat().st_size for path in files.rglob("*") if path.is_file())
    if free + there < offer.size + _RESERVE:
        raise FetchError(
            f"{free >> 20} MiB are free, release {offer.release} takes {offer.size >> 20}",
            hint="Free some space on the board's disk.",
        )
    done = 0
    for path, (sha256, size) in offer.files.items():
        target = files / path
        target.parent.mkdir(exist_ok=True)
        for source in sources:
            with contextlib.suppress(OSError):
                if not target.exists() and (source / path).stat().st_size == size:
                    shutil.copyfile(source / path, target)  # fetch looks whether it is the right one
        fetch(
            f"{offer.url}/{path}",
            target,
            sha256=sha256,
            size=size,
            on_bytes=lambda more_bytes, done=done: on_bytes(done + more_bytes),  # type: ignore[misc]
            **more,
        )
        done += size
        on_bytes(done)
    beside = folder / "offer.new"
    beside.write_bytes(offer.to_json())
    beside.replace(folder / "offer.json")


def take_over(folder: Path, target: Path, *, key: str) -> Offer:
    """Copy what an agent fetched to where only root writes, checking all of it on the way; return the offer.

    Args:
        folder: The agent's, from :func:`fetch_offer`; nothing in it is believed.
        target: Root's; it is there whole, with a ``MANIFEST``, or not at all.
        key: The coordinator's public key, hexadecimal.

    Raises:
        FetchError: The signature or a file is not what it must be.
    """
    offer = read_offer(_read_plain(folder / "offer.json", most=_LONGEST))
    if not is_genuine(offer, key):
        raise FetchError("the offer is not signed by this board's coordinator")
    beside = target.with_name(f"{target.name}.new")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True, mode=0o755)
    try:
        for path, (sha256, size) in offer.files.items():
            copy = beside / path
            copy.parent.mkdir(exist_ok=True)
            found = _copied(folder / "files" / path, copy, size=size)
            if found != sha256:
                raise FetchError(f"hash: {path} is not what was offered")
        rows = [f"{sha256}  {path}\n" for path, (sha256, _) in offer.files.items()]
        (beside / "MANIFEST").write_text("".join(rows), encoding="ascii")
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    shutil.rmtree(target, ignore_errors=True)
    beside.rename(target)
    return offer


def main(arguments: Sequence[str] | None = None) -> int:
    """Check what an agent fetched and leave it in ``OPT/incoming``; return the exit code.

    Prints one line: the release, or why it is refused. The offer's number is written as
    ``OPT/update.number``, so that it is dealt with once, whatever becomes of it.
    """
    state, opt, settings = (Path(word) for word in (sys.argv[1:] if arguments is None else arguments))
    try:
        key = str(json.loads(settings.read_text(encoding="utf-8")).get("signing_key") or "")
        offer = take_over(state / "update", opt / "incoming", key=key)
        if offer.number < last_number(opt):
            raise FetchError(f"the offer of {offer.release} is older than what this board has taken")
        beside = opt / "update.number.new"
        beside.write_text(str(offer.number), encoding="ascii")
        beside.replace(opt / "update.number")
    except (ScalarfedError, OSError, ValueError) as error:
        shutil.rmtree(opt / "incoming", ignore_errors=True)
        print(str(error))
        return 1
    print(offer.release)
    return 0


def _drop_others(files: Path, offer: Offer) -> None:
    """Remove what an earlier offer left; a part of a file goes on if the new offer has it too."""
    for path in sorted(files.rglob("*"), reverse=True):
        name = path.relative_to(files).as_posix().removesuffix(".part")
        if path.is_file() and name not in offer.files:
            path.unlink()


def _open_plain(path: Path) -> int:
    """Open a file of somebody who is not trusted: no link is followed, and no pipe waited for."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    number = os.open(path, flags)
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise FetchError(f"{path.name} is no plain file")
    return number


def _read_plain(path: Path, *, most: int) -> bytes:
    with open(_open_plain(path), "rb") as file:
        return file.read(most + 1)


def _copied(source: Path, target: Path, *, size: int) -> str:
    """Copy up to ``size`` bytes and return their SHA-256."""
    found = hashlib.sha256()
    with open(_open_plain(source), "rb") as file, target.open("xb") as copy:
        left = size
        while left > 0 and (piece := file.read(min(_PIECE, left))):
            found.update(piece)
            copy.write(piece)
            left -= len(piece)
        copy.flush()
        os.fsync(copy.fileno())
    return found.hexdigest()


def _text(value: object) -> str:
    if not isinstance(value, str) or not 1 <= len(value) <= 500:
        raise ValueError(f"{value!r:.40}")
    return value


def _matching(pattern: re.Pattern[str], value: object) -> str:
    if not isinstance(value, str) or pattern.fullmatch(value) is None:
        raise ValueError(f"{value!r:.40}")
    return value


def _whole(value: object, *, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        raise ValueError(f"{value!r:.40}")
    return value


if __name__ == "__main__":
    sys.exit(main())
