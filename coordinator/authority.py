"""The certificate authority of a fleet: its keys, whom it has admitted, and whom it has shut out.

A folder of mode 0700 holds the authority's key, the key that signs what the coordinator says (Ed25519), a
database of certificates and tokens, and the revocation list. Knows files and who is who; ``certificates``
knows X.509. Does not know brokers, topics or the network. Tokens are kept hashed; nothing here is printed.
"""

import contextlib
import hashlib
import os
import secrets
import shutil
import socket
import sqlite3
import ssl
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from coordinator.certificates import (
    make_authority,
    make_certificate,
    make_revocation_list,
    new_key,
    private_pem,
    public_der,
    public_pem,
    read_request,
)
from edge_agent.credentials import refuse_shared, write_secret
from edge_agent.topics import is_name
from profiles.errors import SecurityError

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey

__all__ = ["COORDINATOR", "OPERATOR", "Authority", "Identity", "Issued", "default_folder", "own_addresses"]

COORDINATOR = "scalarfed:coordinator"
"""Common name of the coordinator; no device can be called so, for a colon is in no name."""

OPERATOR = "scalarfed:operator"
"""Common name of tools that look on, and send commands to boards."""

_SERVER = "scalarfed:server"
_LIFETIME = timedelta(days=2 * 365)
_TABLES = """
CREATE TABLE certificates (
    serial TEXT PRIMARY KEY, name TEXT NOT NULL, issued REAL NOT NULL, expires REAL NOT NULL, revoked REAL);
CREATE TABLE tokens (
    hash TEXT PRIMARY KEY, name TEXT NOT NULL, expires REAL NOT NULL, key_sha256 TEXT, certificate BLOB);
CREATE TABLE numbers (name TEXT PRIMARY KEY, value INTEGER NOT NULL);
INSERT INTO numbers VALUES ('list', 0), ('applied', 0), ('said', 0);
"""


@dataclass(frozen=True)
class Identity:
    """A certificate and its key, as the files that TLS takes."""

    certificate: Path
    key: Path


@dataclass(frozen=True)
class Issued:
    """A certificate that was given out.

    Attributes:
        name: Of the device, or the role.
        serial: Of the certificate.
        issued, expires: Unix seconds.
        revoked: Unix seconds, or None.
    """

    name: str
    serial: int
    issued: float
    expires: float
    revoked: float | None


def default_folder() -> Path:
    """Return where this user's authority lies unless told otherwise."""
    if sys.platform == "win32":
        base = os.environ.get("APPDATA") or str(Path.home())
    else:
        base = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(base) / "scalarfed" / "authority"


def own_addresses() -> list[str]:
    """Return the names and addresses by which other machines may know this one."""
    host = socket.gethostname()
    short = host.partition(".")[0]
    found = ["localhost", host, short, f"{short}.local"]
    for entries in psutil.net_if_addrs().values():
        found += [
            entry.address.partition("%")[0]
            for entry in entries
            if entry.family in (socket.AF_INET, socket.AF_INET6)
        ]
    return list(dict.fromkeys(name for name in found if name))


class Authority:
    """An authority in a folder; several processes may use it at a time.

    Args:
        folder: Made by :meth:`create`.
        clock: Unix seconds.

    Raises:
        SecurityError: The folder holds no authority, or others may read its keys.
    """

    def __init__(self, folder: Path, *, clock: Callable[[], float] = time.time) -> None:
        self.folder = folder
        self._clock = clock
        if not (folder / "ca.key").is_file():
            raise SecurityError(
                f"{folder} holds no certificate authority.",
                hint="`scalarfed enrol` makes one; or name the right folder with --authority.",
            )
        for path in (folder, *(folder / name for name in ("ca.key", "signing.key", "authority.sqlite"))):
            refuse_shared(path)

    @classmethod
    def create(cls, folder: Path, *, clock: Callable[[], float] = time.time) -> "Authority":
        """Return the authority in ``folder``, made now if there is none.

        Raises:
            SecurityError: ``cryptography`` is not installed, or the folder cannot be made.
        """
        if (folder / "ca.key").exists():
            return cls(folder, clock=clock)
        key = new_key()
        staging = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
        try:
            staging.mkdir(parents=True, mode=0o700)
            _fill(staging, key, now=clock())
            with contextlib.suppress(OSError):  # another process was faster; else the next line tells
                staging.replace(folder)
            made = cls(folder, clock=clock)
        except OSError as error:
            raise SecurityError(
                f"A certificate authority cannot be made in {folder}: {error}.",
                hint="Name another folder with --authority.",
            ) from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        with made._database() as database:
            made._write_list(database)
        return made

    @property
    def ca(self) -> Path:
        """The authority's own certificate, PEM."""
        return self.folder / "ca.crt"

    @property
    def revocation_list(self) -> Path:
        """The certificates that count no more, signed, PEM."""
        return self.folder / "crl.pem"

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the authority's certificate (DER), hexadecimal: what a board is told to trust."""
        return hashlib.sha256(ssl.PEM_cert_to_DER_cert(self.ca.read_text(encoding="ascii"))).hexdigest()

    @property
    def signing_key(self) -> str:
        """The public half of the key that signs what the coordinator says: 32 bytes, hexadecimal."""
        return (self.folder / "signing.pub").read_text(encoding="ascii").strip()

    def signer(self) -> Callable[[bytes], bytes]:
        """Return a function from a message to its Ed25519 signature (RFC 8032), 64 bytes."""
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        return Ed25519PrivateKey.from_private_bytes((self.folder / "signing.key").read_bytes()).sign

    def take_numbers(self, count: int) -> range:
        """Return numbers that nobody had before, above all that were taken in any process.

        They begin at the time in milliseconds, so that they rise even if an older copy of the folder is used.
        """
        with self._database() as database:
            (last,) = database.execute("SELECT value FROM numbers WHERE name = 'said'").fetchone()
            first = max(int(self._clock() * 1000), last + 1)
            database.execute("UPDATE numbers SET value = ? WHERE name = 'said'", (first + count - 1,))
        return range(first, first + count)

    def server_identity(self, names: Iterable[str] = ()) -> Identity:
        """Return a new certificate for broker and web server on this machine, also under other names."""
        addresses = sorted({*own_addresses(), *names})
        # A file for each set of names: another process may serve under others beside this one.
        stem = f"server-{hashlib.sha256(' '.join(addresses).encode()).hexdigest()[:8]}"
        return self._own_identity(stem, _SERVER, addresses)

    def role_identity(self, role: str) -> Identity:
        """Return the certificate for :data:`COORDINATOR` or :data:`OPERATOR`, a new one where it is old."""
        if role not in (COORDINATOR, OPERATOR):
            raise ValueError(f"{role!r} is no role")
        stem = role.partition(":")[2]
        young = self._clock() + _LIFETIME.total_seconds() / 2
        good = any(
            one.name == role and one.revoked is None and one.expires > young for one in self.certificates()
        )
        found = Identity(self.folder / f"{stem}.crt", self.folder / f"{stem}.key")
        if good and found.certificate.is_file() and found.key.is_file():
            return found
        return self._own_identity(stem, role)

    def stand_in(self, name: str) -> Identity:
        """Return a certificate of an hour in a device's name, to take its place at the broker.

        With it the connection of a device that was revoked is ended; it is not in the list of certificates.
        """
        key = new_key()
        certificate = self._sign(name, key.public_key(), lifetime=timedelta(hours=1))
        return self._write_identity("stand-in", public_pem(certificate), key)

    def device_identity(self, name: str, folder: Path) -> None:
        """Write all that an agent on this very machine needs into a folder, without a token.

        Args:
            name: Of the agent.
            folder: Made with mode 0700: ``ca.crt``, ``device.crt``, ``device.key`` and ``signing.pub``.
        """
        folder.mkdir(mode=0o700, exist_ok=True)
        key = new_key()
        certificate = self._issue(name, key.public_key())
        write_secret(folder / "device.key", private_pem(key))
        (folder / "device.crt").write_bytes(certificate)
        (folder / "ca.crt").write_bytes(self.ca.read_bytes())
        (folder / "signing.pub").write_text(self.signing_key + "\n", encoding="ascii")

    def new_token(self, name: str, *, valid_s: float) -> str:
        """Return a token with which the device ``name`` may enrol once; only its hash is kept.

        Raises:
            SecurityError: That is no device's name.
        """
        if not is_name(name):
            raise SecurityError(
                f"`{name}` cannot name a device: 1 to 63 letters, digits, dots, - or _.",
                hint="Choose the name that the experiment has for the device.",
            )
        token = secrets.token_urlsafe(24)
        now = self._clock()
        with self._database() as database:
            database.execute("DELETE FROM tokens WHERE expires < ?", (now,))
            database.execute(
                "INSERT INTO tokens (hash, name, expires) VALUES (?, ?, ?)",
                (_hash(token), name, now + valid_s),
            )
        return token

    def enrol(self, name: str, token: str, request: bytes) -> bytes:
        """Return the certificate (PEM) for which a token stands, and use the token up.

        Earlier certificates of the name are revoked. The same key gets the same certificate again as long as
        the token would count, since an answer may get lost.

        Raises:
            SecurityError: The token is unknown, used, expired or another's, or the request is bad.
        """
        key = read_request(name, request)
        key_sha256 = hashlib.sha256(public_der(key)).hexdigest()
        with self._database() as database:
            row = database.execute(
                "SELECT name, expires, key_sha256, certificate FROM tokens WHERE hash = ?", (_hash(token),)
            ).fetchone()
            if row is None or row[0] != name:
                raise SecurityError(f"The token is none for `{name}`.", hint=_ANOTHER)
            if row[1] < self._clock():
                raise SecurityError(f"The token for `{name}` is expired.", hint=_ANOTHER)
            if row[2] not in (None, key_sha256):
                raise SecurityError(f"The token for `{name}` is used already.", hint=_ANOTHER)
            if row[3] is not None:
                return bytes(row[3])
            certificate = self._replace(database, name, key)
            database.execute(
                "UPDATE tokens SET key_sha256 = ?, certificate = ? WHERE hash = ?",
                (key_sha256, certificate, _hash(token)),
            )
        return certificate

    def renew(self, name: str, serial: int, request: bytes) -> bytes:
        """Return a new certificate (PEM) for a device that has shown one that still counts.

        The old one stays good until it expires or the device is revoked, since the answer may get lost.

        Raises:
            SecurityError: The certificate is revoked or not from here, or the request is bad.
        """
        key = read_request(name, request)
        if serial not in {
            one.serial for one in self.certificates() if one.revoked is None and one.name == name
        }:
            raise SecurityError(f"The certificate of `{name}` is revoked or unknown.", hint=_ANOTHER)
        return self._issue(name, key)

    def revoke(self, name: str) -> int:
        """Make all certificates and tokens of a device worthless; return how many certificates there were.

        Raises:
            SecurityError: It has neither.
        """
        with self._database() as database:
            count = _revoke(database, name, self._clock())
            tokens = database.execute("DELETE FROM tokens WHERE name = ?", (name,)).rowcount
            if count:
                self._write_list(database)
        if not count and not tokens:
            raise SecurityError(
                f"`{name}` has no certificate that could be revoked.",
                hint="`scalarfed devices certificates` lists those that have one.",
            )
        return count

    def certificates(self) -> list[Issued]:
        """Return what was given out, oldest first."""
        with self._database() as database:
            rows = database.execute(
                "SELECT name, serial, issued, expires, revoked FROM certificates ORDER BY issued, rowid"
            ).fetchall()
        return [Issued(name, int(serial, 16), *rest) for name, serial, *rest in rows]

    def shut_out(self) -> frozenset[str]:
        """Return the names that had a certificate and have none that counts."""
        found = self.certificates()
        counting = {one.name for one in found if one.revoked is None}
        return frozenset(one.name for one in found) - counting

    def list_number(self) -> int:
        """Return the number of the newest revocation list."""
        return self._numbers()["list"]

    def note_applied(self, number: int) -> None:
        """Note that a broker goes by the revocation list of that number."""
        with self._database() as database:
            database.execute("UPDATE numbers SET value = ? WHERE name = 'applied'", (number,))

    def is_applied(self) -> bool:
        """Return whether a broker has noted that it goes by the newest revocation list."""
        numbers = self._numbers()
        return numbers["applied"] == numbers["list"]

    def _numbers(self) -> dict[str, int]:
        with self._database() as database:
            return dict(database.execute("SELECT name, value FROM numbers").fetchall())

    def _own_identity(self, stem: str, name: str, addresses: Iterable[str] = ()) -> Identity:
        key = new_key()
        return self._write_identity(stem, self._issue(name, key.public_key(), addresses), key)

    def _write_identity(self, stem: str, certificate: bytes, key: "EllipticCurvePrivateKey") -> Identity:
        found = Identity(self.folder / f"{stem}.crt", self.folder / f"{stem}.key")
        write_secret(found.key, private_pem(key))
        found.certificate.write_bytes(certificate)
        return found

    def _issue(self, name: str, key: "EllipticCurvePublicKey", addresses: Iterable[str] = ()) -> bytes:
        certificate = self._sign(name, key, addresses=addresses)
        with self._database() as database:
            _note(database, certificate, name)
        return public_pem(certificate)

    def _replace(self, database: sqlite3.Connection, name: str, key: "EllipticCurvePublicKey") -> bytes:
        certificate = self._sign(name, key)
        if _revoke(database, name, self._clock()):
            self._write_list(database)
        _note(database, certificate, name)
        return public_pem(certificate)

    def _sign(
        self,
        name: str,
        key: "EllipticCurvePublicKey",
        *,
        lifetime: timedelta = _LIFETIME,
        addresses: Iterable[str] = (),
    ) -> "x509.Certificate":
        return make_certificate(
            *self._root(), name=name, key=key, lifetime=lifetime, now=self._clock(), addresses=addresses
        )

    def _write_list(self, database: sqlite3.Connection) -> None:
        """Write the revocation list; the transaction keeps two processes from doing so at a time."""
        database.execute("UPDATE numbers SET value = value + 1 WHERE name = 'list'")
        (number,) = database.execute("SELECT value FROM numbers WHERE name = 'list'").fetchone()
        rows = database.execute("SELECT serial, revoked FROM certificates WHERE revoked NOT NULL").fetchall()
        revoked = [(int(serial, 16), at) for serial, at in rows]
        beside = self.revocation_list.with_suffix(".new")
        beside.write_bytes(make_revocation_list(*self._root(), number=number, revoked=revoked))
        beside.replace(self.revocation_list)

    def _root(self) -> "tuple[x509.Certificate, EllipticCurvePrivateKey]":
        from cryptography import x509
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        key = load_pem_private_key((self.folder / "ca.key").read_bytes(), None)
        return x509.load_pem_x509_certificate(self.ca.read_bytes()), key  # type: ignore[return-value]

    @contextlib.contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        path = self.folder / "authority.sqlite"
        with contextlib.closing(sqlite3.connect(path, timeout=10.0, isolation_level=None)) as database:
            database.execute("BEGIN IMMEDIATE")
            try:
                yield database
            except BaseException:
                database.rollback()
                raise
            database.commit()


_ANOTHER = "Issue another token: scalarfed enrol NAME."


def _fill(folder: Path, key: "EllipticCurvePrivateKey", *, now: float) -> None:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    signing = Ed25519PrivateKey.generate()
    write_secret(folder / "ca.key", private_pem(key))
    write_secret(folder / "signing.key", signing.private_bytes_raw())
    write_secret(folder / "authority.sqlite", b"")
    (folder / "signing.pub").write_text(
        signing.public_key().public_bytes_raw().hex() + "\n", encoding="ascii"
    )
    (folder / "ca.crt").write_bytes(public_pem(make_authority(key, now=now)))
    with contextlib.closing(sqlite3.connect(folder / "authority.sqlite")) as database, database:
        database.executescript(_TABLES)


def _note(database: sqlite3.Connection, certificate: "x509.Certificate", name: str) -> None:
    issued, expires = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    database.execute(
        "INSERT INTO certificates VALUES (?, ?, ?, ?, NULL)",
        (f"{certificate.serial_number:x}", name, issued.timestamp(), expires.timestamp()),
    )


def _revoke(database: sqlite3.Connection, name: str, now: float) -> int:
    statement = "UPDATE certificates SET revoked = ? WHERE name = ? AND revoked IS NULL"
    return database.execute(statement, (now, name)).rowcount


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
