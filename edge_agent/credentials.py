"""What a device proves itself with, and whom it believes: a folder of small files.

``ca.crt`` is the fleet's authority, ``device.crt`` and ``device.key`` are the device's own, ``signing.pub``
is the key of what the coordinator says; ``ticket.json`` is there until the device is enrolled. Knows files
and TLS settings; neither makes keys nor talks to anybody (``enrol`` does).
"""

import os
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from profiles.errors import SecurityError

if TYPE_CHECKING:
    import ssl

__all__ = ["UNREACHED", "Credentials", "client_context", "read_credentials", "refuse_shared", "write_secret"]

UNREACHED = 69
"""Exit code of the process that enrols when nobody answered; it is worth trying again."""

_KEY_BYTES = 32


@dataclass(frozen=True)
class Credentials:
    """The files of an enrolled device.

    Attributes:
        ca: The authority's certificate, PEM.
        certificate: The device's own, PEM.
        key: Its private key, PEM; only the owner may read it.
        signing_key: Public Ed25519 key of the coordinator, 32 bytes.
    """

    ca: Path
    certificate: Path
    key: Path
    signing_key: bytes


def read_credentials(folder: Path) -> Credentials:
    """Return the credentials in a folder.

    Raises:
        SecurityError: A file is missing or malformed, or others may read the key.
    """
    found = [folder / name for name in ("ca.crt", "device.crt", "device.key", "signing.pub")]
    missing = [path.name for path in found if not path.is_file()]
    if missing:
        raise SecurityError(
            f"{folder} lacks {', '.join(missing)}: this device is not enrolled.",
            hint="Issue a ticket with scalarfed enrol, and put it there as ticket.json.",
        )
    refuse_shared(found[2])
    try:
        key = bytes.fromhex(found[3].read_text(encoding="ascii"))
    except ValueError:
        key = b""
    if len(key) != _KEY_BYTES:
        raise SecurityError(f"{found[3]} does not hold a key of {_KEY_BYTES} bytes.")
    return Credentials(found[0], found[1], found[2], key)


def client_context(ca: Path, certificate: Path | None = None, key: Path | None = None) -> "ssl.SSLContext":
    """Return TLS settings that believe one authority alone: TLS 1.2 at least, the server's name checked.

    Raises:
        SecurityError: A file is no certificate or key, or they do not belong together.
    """
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_verify_locations(ca)
        if certificate is not None:
            context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise SecurityError(f"The certificates in {ca.parent} cannot be used: {error}.") from None
    return context


def write_secret(path: Path, content: bytes) -> None:
    """Write a file that only its owner may read, whole or not at all, and at no moment with a wider mode."""
    descriptor, beside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # of mode 0600
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError:
        os.unlink(beside)
        raise


def refuse_shared(path: Path) -> None:
    """Refuse a file or folder that others may use; on Windows, without modes, the user's profile protects.

    Raises:
        SecurityError: Its mode lets others in.
    """
    if hasattr(os, "geteuid") and path.exists() and stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise SecurityError(
            f"{path} may be read by others (mode {stat.S_IMODE(path.stat().st_mode):o}).",
            hint=f"Run chmod go= {path}, and make new keys if somebody may have read it.",
        )
