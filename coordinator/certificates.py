"""X.509 for a fleet: the authority's certificate, the ones it signs, requests, and the revocation list.

Values in, values out: knows neither files nor who was admitted. All keys of certificates are P-256, all
signatures ECDSA with SHA-256 (RFC 5280, RFC 5480). ``cryptography`` is imported when it is needed.
"""

import contextlib
import ipaddress
import secrets
from collections.abc import Iterable
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING

from profiles.errors import SecurityError

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey

__all__ = [
    "make_authority",
    "make_certificate",
    "make_revocation_list",
    "new_key",
    "private_pem",
    "public_der",
    "public_pem",
    "read_request",
    "validity",
]

_AUTHORITY_DAYS = 20 * 365
_EARLIER = timedelta(days=1)  # a board's clock may be behind; without a battery it often is
_LARGEST_REQUEST = 8192


def new_key() -> "EllipticCurvePrivateKey":
    """Return a new P-256 key.

    Raises:
        SecurityError: ``cryptography`` is not installed.
    """
    try:
        from cryptography.hazmat.primitives.asymmetric import ec
    except ImportError:
        raise SecurityError(
            "Certificates need the package cryptography, which is not installed.",
            hint="Install it on the coordinator's machine: pip install 'scalarfed[coordinator]'.",
        ) from None
    return ec.generate_private_key(ec.SECP256R1())


def private_pem(key: "EllipticCurvePrivateKey") -> bytes:
    """Return a key as PKCS #8, PEM, not encrypted: the file's mode protects it."""
    from cryptography.hazmat.primitives import serialization as form

    return key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())


def public_pem(certificate: "x509.Certificate") -> bytes:
    """Return a certificate as PEM."""
    from cryptography.hazmat.primitives.serialization import Encoding

    return certificate.public_bytes(Encoding.PEM)


def public_der(key: "EllipticCurvePublicKey") -> bytes:
    """Return a public key as SubjectPublicKeyInfo, DER."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def make_authority(key: "EllipticCurvePrivateKey", *, now: float) -> "x509.Certificate":
    """Return a certificate with which ``key`` may sign others, but no further authority.

    Args:
        key: Signs itself.
        now: Unix seconds.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives.hashes import SHA256

    name = _name(f"scalarfed authority {secrets.token_hex(4)}")
    builder = _builder(name, name, key.public_key(), lifetime=timedelta(days=_AUTHORITY_DAYS), now=now)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(authority=True), critical=True)
    builder = builder.add_extension(
        x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
    )
    return builder.sign(key, SHA256())


def make_certificate(
    authority: "x509.Certificate",
    authority_key: "EllipticCurvePrivateKey",
    *,
    name: str,
    key: "EllipticCurvePublicKey",
    lifetime: timedelta,
    now: float,
    addresses: Iterable[str] = (),
) -> "x509.Certificate":
    """Return a certificate for ``key``.

    Args:
        authority: Whose name it is issued in.
        authority_key: Its key.
        name: Becomes the common name.
        key: What is certified.
        lifetime: From now; it also counts for the day before.
        now: Unix seconds.
        addresses: Host names and IP addresses of a server; without any it is a client's certificate, with
            which nobody can pose as a server.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.x509.oid import ExtendedKeyUsageOID

    names: list[x509.GeneralName] = []
    for address in dict.fromkeys(addresses):
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(address)))
        except ValueError:
            with contextlib.suppress(ValueError):  # not ASCII: nobody can ask for it either
                names.append(x509.DNSName(address))
    purpose = ExtendedKeyUsageOID.SERVER_AUTH if names else ExtendedKeyUsageOID.CLIENT_AUTH
    builder = _builder(_name(name), authority.subject, key, lifetime=lifetime, now=now)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(authority=False), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
    builder = builder.add_extension(
        x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(authority_key, SHA256())


def make_revocation_list(
    authority: "x509.Certificate",
    authority_key: "EllipticCurvePrivateKey",
    *,
    number: int,
    revoked: Iterable[tuple[int, float]],
) -> bytes:
    """Return a revocation list, PEM.

    A broker that reads a new list keeps the old one too and takes the one with the later date, by seconds; so
    each list is dated a second after the one before, from the day before the authority began.

    Args:
        authority: Who revokes.
        authority_key: Its key.
        number: Of the list, rising.
        revoked: Serial numbers, and when, as Unix seconds.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.serialization import Encoding

    dated = authority.not_valid_before_utc + timedelta(seconds=number)
    builder = x509.CertificateRevocationListBuilder().issuer_name(authority.subject)
    builder = builder.last_update(dated).next_update(authority.not_valid_after_utc)
    builder = builder.add_extension(x509.CRLNumber(number), critical=False)
    for serial, at in revoked:
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(_moment(at))
        builder = builder.add_revoked_certificate(entry.build())
    return builder.sign(authority_key, SHA256()).public_bytes(Encoding.PEM)


def read_request(name: str, request: bytes) -> "EllipticCurvePublicKey":
    """Return the public key of a certificate request (PKCS #10, PEM) for ``name``.

    Raises:
        SecurityError: It is none, is not signed by its own P-256 key, or is for another name.
    """
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    bad = SecurityError(f"The certificate request for `{name}` is malformed.", hint="Enrol the board again.")
    if len(request) > _LARGEST_REQUEST:
        raise bad
    try:
        found = x509.load_pem_x509_csr(request)
        key = found.public_key()
        names = [(attribute.oid, attribute.value) for attribute in found.subject]
        valid = found.is_signature_valid
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        raise bad from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1) or not valid:
        raise bad
    if names != [(NameOID.COMMON_NAME, name)]:
        raise SecurityError(
            f"The certificate request is not for `{name}` alone.", hint="Enrol the board under its own name."
        )
    return key


def validity(certificate: bytes) -> tuple[float, float]:
    """Return from when until when a certificate (PEM) counts, as Unix seconds."""
    from cryptography import x509

    found = x509.load_pem_x509_certificate(certificate)
    return found.not_valid_before_utc.timestamp(), found.not_valid_after_utc.timestamp()


def _builder(
    subject: "x509.Name",
    issuer: "x509.Name",
    key: "EllipticCurvePublicKey",
    *,
    lifetime: timedelta,
    now: float,
) -> "x509.CertificateBuilder":
    from cryptography import x509

    moment = _moment(now)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key)
    builder = builder.serial_number(x509.random_serial_number())
    return builder.not_valid_before(moment - _EARLIER).not_valid_after(moment + lifetime)


def _name(text: str) -> "x509.Name":
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _usage(*, authority: bool) -> "x509.KeyUsage":
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=not authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=authority,
        crl_sign=authority,
        encipher_only=False,
        decipher_only=False,
    )


def _moment(unix_s: float) -> datetime:
    return datetime.fromtimestamp(unix_s, timezone.utc).replace(microsecond=0)
