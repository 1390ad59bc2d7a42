"""Gets a device its certificate: makes a key, asks the coordinator with a token, and checks whom it asks.

Runs as a process of its own, ``python -m edge_agent.enrol FOLDER``, so that the agent never holds what keys
are made with: the package ``cryptography``, or else the program ``openssl``. The folder holds ``ticket.json``
(name, url, ca_sha256, token), or the certificate that is to be renewed. The key never leaves the device, the
token goes only to a server whose certificate the named authority has signed, and neither is printed.
"""

import hashlib
import http.client
import json
import shutil
import ssl
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from edge_agent.credentials import (
    UNREACHED,
    client_context,
    read_credentials,
    refuse_shared,
    write_secret,
)
from edge_agent.topics import is_name
from profiles.errors import ScalarfedError, SecurityError

__all__ = ["enrol", "main", "renew"]

_PATIENCE_S = 30.0
_LARGEST = 64 << 10


def main(arguments: Sequence[str] | None = None) -> int:
    """Enrol, or renew with ``--renew``, in a folder; return 0, an error's code, or UNREACHED."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if len(words) not in (1, 2) or words[1:] not in ([], ["--renew"]):
        print("usage: python -m edge_agent.enrol FOLDER [--renew]", file=sys.stderr)
        return 2
    try:
        (renew if words[1:] else enrol)(Path(words[0]))
    except ScalarfedError as error:
        print(f"{error}\nhint: {error.hint}", file=sys.stderr)
        return error.exit_code
    except (OSError, http.client.HTTPException) as error:
        print(
            f"the coordinator's web server does not answer: {type(error).__name__}: {error}", file=sys.stderr
        )
        return UNREACHED
    return 0


def enrol(folder: Path) -> None:
    """Turn the ticket in a folder into credentials; the ticket is removed, since it is used up.

    A process that was cut off goes on with the same key, to which the same ticket still fits.

    Args:
        folder: Holds ``ticket.json``.

    Raises:
        SecurityError: The ticket is malformed or refused, or the server is not the one that it names.
        OSError, http.client.HTTPException: Nobody answers.
    """
    path = folder / "ticket.json"
    try:
        refuse_shared(path)
        ticket = json.loads(path.read_text(encoding="utf-8"))
        name, url, ca_sha256, token = (str(ticket[key]) for key in ("name", "url", "ca_sha256", "token"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SecurityError(
            f"{path} is no ticket: {type(error).__name__}.", hint="Issue another: scalarfed enrol NAME."
        ) from None
    if not is_name(name):
        raise SecurityError(f"{path} names no device: {name[:64]!r}.")
    _fetch_authority(url, ca_sha256, folder / "ca.crt")
    request = _request_of(folder / "device.key", name)
    asked = {"name": name, "token": token, "request": request.decode()}
    answer = _post(url, "/enrol", asked, client_context(folder / "ca.crt"))
    _keep(folder, answer, folder / "device.key", {"name": name, "url": url})
    path.unlink()


def renew(folder: Path) -> None:
    """Replace a certificate that still counts by a new one, with a new key.

    Raises:
        SecurityError: The coordinator refuses, or the folder holds no credentials.
        OSError, http.client.HTTPException: Nobody answers.
    """
    credentials = read_credentials(folder)
    told = json.loads((folder / "enrolled.json").read_text(encoding="utf-8"))
    fresh = folder / "device.key.new"
    request = _request_of(fresh, str(told["name"]))
    context = client_context(credentials.ca, credentials.certificate, credentials.key)
    answer = _post(str(told["url"]), "/renew", {"name": told["name"], "request": request.decode()}, context)
    _keep(folder, answer, fresh, {key: str(told[key]) for key in ("name", "url")})


def _fetch_authority(url: str, ca_sha256: str, path: Path) -> None:
    """Get the authority's certificate from whoever answers, and keep it only if it has the named hash."""
    unchecked = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    unchecked.minimum_version = ssl.TLSVersion.TLSv1_2
    unchecked.check_hostname = False
    unchecked.verify_mode = ssl.CERT_NONE  # nothing secret is sent here, and the hash decides
    pem = _ask(url, "GET", "/ca", None, unchecked)
    try:
        found = hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem.decode("ascii"))).hexdigest()
    except ValueError:
        found = "no certificate"
    if found != ca_sha256.lower():
        raise SecurityError(
            f"{url} belongs to another authority: {found[:16]}..., the ticket names {ca_sha256[:16]}...",
            hint="Issue a ticket from the authority that counts now; or else a stranger answers there.",
        )
    path.write_bytes(ssl.DER_cert_to_PEM_cert(ssl.PEM_cert_to_DER_cert(pem.decode("ascii"))).encode())


def _request_of(key: Path, name: str) -> bytes:
    """Return a signed certificate request for ``name``, by the key in a file that is made if missing."""
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.x509.oid import NameOID
    except ImportError:
        return _request_by_openssl(key, name)
    if not key.is_file():
        made = ec.generate_private_key(ec.SECP256R1())
        form = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        write_secret(key, made.private_bytes(serialization.Encoding.PEM, *form))
    refuse_shared(key)
    own: Any = serialization.load_pem_private_key(key.read_bytes(), None)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(own, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM)


def _request_by_openssl(key: Path, name: str) -> bytes:
    program = shutil.which("openssl")
    if program is None:
        raise SecurityError(
            "A key cannot be made: there is neither the package cryptography nor the program openssl.",
            hint="Install one of them on the board, such as apt install openssl.",
        )
    if not key.is_file():
        write_secret(key, _run(program, "genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"))
    refuse_shared(key)
    # A configuration of our own: the system's may be missing, or ask questions.
    settings = key.with_name("request.cnf")
    settings.write_text(
        "[req]\ndistinguished_name = dn\nprompt = no\n[dn]\nCN = " + name + "\n", encoding="ascii"
    )
    try:
        return _run(program, "req", "-new", "-sha256", "-key", str(key), "-config", str(settings))
    finally:
        settings.unlink()


def _run(*command: str) -> bytes:
    done = subprocess.run(
        command, capture_output=True, timeout=_PATIENCE_S, stdin=subprocess.DEVNULL, check=False
    )
    if done.returncode:
        raise SecurityError(f"openssl {command[1]} failed with code {done.returncode}.")
    return done.stdout


def _keep(folder: Path, answer: dict[str, Any], key: Path, told: dict[str, str]) -> None:
    """Write what was received; the certificate last, since it says that all the rest is there."""
    try:
        certificate = str(answer["certificate"]).encode("ascii")
        signing_key = bytes.fromhex(answer["signing_key"])
        kept = {**told, "issued": float(answer["issued"]), "expires": float(answer["expires"])}
    except (KeyError, TypeError, ValueError):
        raise SecurityError(f"{told['url']} answers with something that is no certificate.") from None
    beside = folder / "device.crt.new"
    beside.write_bytes(certificate)
    client_context(folder / "ca.crt", beside, key)  # raises unless key and certificate belong together
    (folder / "signing.pub").write_text(signing_key.hex() + "\n", encoding="ascii")
    (folder / "enrolled.json").write_text(json.dumps(kept), encoding="utf-8")
    if key.name != "device.key":
        key.replace(folder / "device.key")
    beside.replace(folder / "device.crt")


def _post(url: str, path: str, asked: dict[str, str], context: ssl.SSLContext) -> dict[str, Any]:
    try:
        found = json.loads(_ask(url, "POST", path, json.dumps(asked).encode(), context))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise SecurityError(f"{url} answers with something that is no certificate.")
    return found


def _ask(url: str, method: str, path: str, body: bytes | None, context: ssl.SSLContext) -> bytes:
    parts = urlsplit(url)
    if parts.scheme != "https" or not parts.hostname:
        raise SecurityError(
            f"{url!r} is no address to enrol at; the form is https://HOST:PORT.",
            hint="Issue another ticket: scalarfed enrol NAME.",
        )
    connection = http.client.HTTPSConnection(
        parts.hostname, parts.port or 443, timeout=_PATIENCE_S, context=context
    )
    try:
        connection.request(method, path, body)
        answer = connection.getresponse()
        found = answer.read(_LARGEST)
    except ssl.SSLCertVerificationError as error:
        raise SecurityError(
            f"{url} cannot prove who it is: {error.verify_message}.",
            hint="Correct the clock of this board, or the address in the ticket; somebody else may answer.",
        ) from None
    except ssl.SSLError as error:
        raise SecurityError(
            f"{url} refuses the connection: {error.reason}.",
            hint="The certificate may be revoked: enrol again.",
        ) from None
    finally:
        connection.close()
    if answer.status in (429, 500, 503):
        raise http.client.HTTPException(f"HTTP {answer.status}, try again later")
    if answer.status != 200:
        try:
            reason = str(json.loads(found)["error"])
        except (ValueError, KeyError, TypeError):
            reason = f"HTTP {answer.status}"
        raise SecurityError(
            f"{url} refuses: {reason[:200]}", hint="Issue another ticket: scalarfed enrol NAME."
        )
    return found


if __name__ == "__main__":
    sys.exit(main())
