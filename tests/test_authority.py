"""Tests of coordinator.authority and certificates: keys, tokens, modes, and the list of revocations."""

import contextlib
import os
import sqlite3
import stat
import sys
import threading
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from coordinator.authority import COORDINATOR, OPERATOR, Authority, own_addresses
from edge_agent.credentials import read_credentials
from profiles.errors import SecurityError

DAY_S = 86_400.0
needs_modes = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no file modes")


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def authority(tmp_path, clock) -> Authority:
    return Authority.create(tmp_path / "authority", clock=clock)


def request_for(name: str, key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | None = None) -> bytes:
    """Return a certificate request as a board makes it."""
    own = key or ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    built = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(own, hashes.SHA256())
    return built.public_bytes(serialization.Encoding.PEM)


def revoked_serials(authority: Authority) -> set[int]:
    """Return the numbers in the revocation list, once its signature is checked."""
    crl = x509.load_pem_x509_crl(authority.revocation_list.read_bytes())
    ca = x509.load_pem_x509_certificate(authority.ca.read_bytes())
    assert crl.is_signature_valid(ca.public_key())
    return {entry.serial_number for entry in crl}


@needs_modes
def test_secrets_are_for_their_owner_alone(authority, tmp_path):
    """The folder has mode 0700; every key and the database have 0600, whatever the umask."""
    before = os.umask(0)
    try:
        made = Authority.create(tmp_path / "open")
        made.server_identity()
        made.role_identity(COORDINATOR)
        made.stand_in("pi-1")
        made.device_identity("pi-1", tmp_path / "pi-1")
    finally:
        os.umask(before)
    secrets = [*made.folder.glob("*.key"), made.folder / "authority.sqlite", tmp_path / "pi-1" / "device.key"]
    assert len(secrets) == 7

    assert {stat.S_IMODE(path.stat().st_mode) for path in secrets} == {0o600}
    assert stat.S_IMODE(made.folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "pi-1").stat().st_mode) == 0o700


@needs_modes
@pytest.mark.parametrize("name", ["", "ca.key", "signing.key", "authority.sqlite"])
def test_secrets_that_others_may_read_are_refused(authority, name):
    """A key that somebody made readable is not used in silence."""
    path = authority.folder / name
    path.chmod(0o744 if path.is_dir() else 0o640)

    with pytest.raises(SecurityError, match="may be read by others"):
        Authority(authority.folder)


def test_no_token_is_kept(authority):
    """The database holds a token's hash; neither it nor any file has the token itself."""
    token = authority.new_token("pi-1", valid_s=60)
    assert len(token) >= 32

    for path in authority.folder.iterdir():
        assert token.encode() not in path.read_bytes(), path


def test_a_token_becomes_a_certificate_of_its_name(authority):
    """The certificate has the device's name and key, is signed by the authority, and serves clients only."""
    key = ec.generate_private_key(ec.SECP256R1())

    pem = authority.enrol("pi-1", authority.new_token("pi-1", valid_s=60), request_for("pi-1", key))

    found = x509.load_pem_x509_certificate(pem)
    found.verify_directly_issued_by(x509.load_pem_x509_certificate(authority.ca.read_bytes()))
    assert found.subject.rfc4514_string() == "CN=pi-1"
    assert found.public_key() == key.public_key()
    usage = found.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert not found.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_a_token_counts_once(authority):
    """With a used token nobody else gets a certificate; the same key may ask again for its answer."""
    token, key = authority.new_token("pi-1", valid_s=60), ec.generate_private_key(ec.SECP256R1())
    first = authority.enrol("pi-1", token, request_for("pi-1", key))

    assert authority.enrol("pi-1", token, request_for("pi-1", key)) == first
    with pytest.raises(SecurityError, match="used already"):
        authority.enrol("pi-1", token, request_for("pi-1"))


def test_of_many_at_a_time_one_wins(authority):
    """Of eight devices with one token that ask at the same moment exactly one gets a certificate."""
    token = authority.new_token("pi-1", valid_s=60)
    requests = [request_for("pi-1") for _ in range(8)]
    outcomes = []

    def ask(request: bytes) -> None:
        try:
            outcomes.append(authority.enrol("pi-1", token, request))
        except SecurityError:
            outcomes.append(b"")

    threads = [threading.Thread(target=ask, args=(request,)) for request in requests]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(outcomes) == 8
    assert sum(bool(one) for one in outcomes) == 1


@pytest.mark.parametrize(
    ("name", "after_s", "token", "message"),
    [
        ("pi-1", 61, None, "expired"),
        ("pi-2", 0, None, "none for"),
        ("pi-1", 0, "guessed", "none for"),
        ("pi-1", 0, "", "none for"),
    ],
)
def test_a_wrong_token_is_refused(authority, clock, name, after_s, token, message):
    """An expired, another device's, or an invented token is none; the right one still counts afterwards."""
    issued = authority.new_token("pi-1", valid_s=60)
    clock.now += after_s

    with pytest.raises(SecurityError, match=message):
        authority.enrol(name, issued if token is None else token, request_for(name))
    assert authority.certificates() == []
    clock.now -= after_s
    assert authority.enrol("pi-1", issued, request_for("pi-1"))


@pytest.mark.parametrize(
    "make",
    [
        lambda: b"",
        lambda: b"no request",
        lambda: request_for("pi-2"),
        lambda: request_for(COORDINATOR),
        lambda: request_for("pi-1", rsa.generate_private_key(65537, 2048)),
        lambda: request_for("pi-1", ec.generate_private_key(ec.SECP384R1())),  # type: ignore[arg-type]
        lambda: request_for("pi-1") + b"\n" * 10_000,
    ],
)
def test_a_wrong_request_is_refused(authority, make):
    """A request that is malformed, too long, by another kind of key or for another name uses no token up."""
    token = authority.new_token("pi-1", valid_s=60)

    with pytest.raises(SecurityError):
        authority.enrol("pi-1", token, make())
    assert authority.enrol("pi-1", token, request_for("pi-1"))


@pytest.mark.parametrize("name", ["", "a b", "pi/1", "#", "+", COORDINATOR, "x" * 64])
def test_only_names_of_devices_get_tokens(authority, name):
    """Nobody can be enrolled under a name that is a pattern, a path or a role."""
    with pytest.raises(SecurityError, match="cannot name a device"):
        authority.new_token(name, valid_s=60)


def test_revoked_certificates_are_on_the_list(authority):
    """Revoking shuts a name out and puts all its certificates onto the signed list, and its tokens go too."""
    for _ in range(2):
        authority.enrol("pi-1", authority.new_token("pi-1", valid_s=60), request_for("pi-1"))
    authority.enrol("pi-2", authority.new_token("pi-2", valid_s=60), request_for("pi-2"))
    waiting = authority.new_token("pi-1", valid_s=60)
    assert authority.shut_out() == frozenset()

    authority.revoke("pi-1")

    mine = {one.serial for one in authority.certificates() if one.name == "pi-1"}
    assert len(mine) == 2
    assert revoked_serials(authority) == mine
    assert authority.shut_out() == {"pi-1"}
    with pytest.raises(SecurityError, match="none for"):
        authority.enrol("pi-1", waiting, request_for("pi-1"))


def test_a_new_certificate_ends_the_old_one(authority):
    """A board that is enrolled again under its name is the only one that has it; it is not shut out."""
    authority.enrol("pi-1", authority.new_token("pi-1", valid_s=60), request_for("pi-1"))
    authority.enrol("pi-1", authority.new_token("pi-1", valid_s=60), request_for("pi-1"))

    first, second = authority.certificates()
    assert revoked_serials(authority) == {first.serial}
    assert second.revoked is None
    assert authority.shut_out() == frozenset()


def test_each_list_is_dated_later(authority):
    """Two lists within one second differ in their date, since a broker takes the one with the later date."""
    dates = []
    for name in ("pi-1", "pi-2", "pi-3"):
        authority.enrol(name, authority.new_token(name, valid_s=60), request_for(name))
        authority.revoke(name)
        dates.append(x509.load_pem_x509_crl(authority.revocation_list.read_bytes()).last_update_utc)

    assert dates == sorted(set(dates))
    assert dates[-1].timestamp() < 1_700_000_000.0


def test_who_has_nothing_cannot_be_revoked(authority):
    """A misspelt name is an error, not a silence that looks like success."""
    with pytest.raises(SecurityError, match="no certificate"):
        authority.revoke("pi-l")


def test_only_who_counts_is_renewed(authority):
    """A certificate is renewed for its own name as long as it is not revoked; both count until then."""
    authority.enrol("pi-1", authority.new_token("pi-1", valid_s=60), request_for("pi-1"))
    (first,) = authority.certificates()

    assert authority.renew("pi-1", first.serial, request_for("pi-1"))
    assert [one.revoked for one in authority.certificates()] == [None, None]
    for name, serial in (("pi-2", first.serial), ("pi-1", 12345)):
        with pytest.raises(SecurityError, match="revoked or unknown"):
            authority.renew(name, serial, request_for(name))
    authority.revoke("pi-1")
    with pytest.raises(SecurityError, match="revoked or unknown"):
        authority.renew("pi-1", first.serial, request_for("pi-1"))


def test_numbers_rise_whatever_happens_to_the_clock(authority, clock):
    """No number is given twice, also when the clock is set back or the process is another one."""
    first = authority.take_numbers(1000)
    clock.now -= 30 * DAY_S
    second = Authority(authority.folder, clock=clock).take_numbers(10)

    assert second[0] == first[-1] + 1
    assert len(second) == 10


def test_the_server_has_all_names_of_this_machine(authority):
    """The server's certificate counts for localhost, each address of this machine and the names given."""
    found = authority.server_identity(["coordinator.example", "192.0.2.7"])

    certificate = x509.load_pem_x509_certificate(found.certificate.read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    dns = names.get_values_for_type(x509.DNSName)
    addresses = {str(address) for address in names.get_values_for_type(x509.IPAddress)}
    assert {"localhost", "coordinator.example"} <= set(dns)
    assert {"127.0.0.1", "192.0.2.7"} <= addresses
    assert len(dns) + len(addresses) >= len(own_addresses())


def test_a_role_keeps_its_certificate(authority, clock):
    """Tools that start a hundred times do not get a hundred certificates; an old one is replaced in time."""
    first = authority.role_identity(OPERATOR).certificate.read_bytes()

    assert authority.role_identity(OPERATOR).certificate.read_bytes() == first
    clock.now += 400 * DAY_S
    assert authority.role_identity(OPERATOR).certificate.read_bytes() != first


def test_two_who_make_it_at_once_have_one(tmp_path):
    """Of several processes that find no authority one makes it, and all use that."""
    made: list[str] = []
    threads = [
        threading.Thread(target=lambda: made.append(Authority.create(tmp_path / "authority").fingerprint))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(made) == 4
    assert len(set(made)) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["authority"]


def test_a_folder_without_an_authority_is_named(tmp_path):
    """A wrong folder is an error that names it, and nothing is made there."""
    with pytest.raises(SecurityError, match="holds no certificate authority"):
        Authority(tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere").exists()


def test_a_failed_enrolment_leaves_the_books_alone(authority, monkeypatch):
    """What fails halfway, such as a full disk, uses no token up and admits nobody."""
    token = authority.new_token("pi-1", valid_s=60)

    def fail(*_: object, **__: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("coordinator.authority._note", fail)
    with pytest.raises(OSError, match="no space"):
        authority.enrol("pi-1", token, request_for("pi-1"))
    monkeypatch.undo()

    assert authority.certificates() == []
    assert authority.enrol("pi-1", token, request_for("pi-1"))


def test_a_device_of_this_machine_needs_no_token(authority, tmp_path):
    """What is written for an agent of a test-bed is what an enrolled board has."""
    authority.device_identity("pi-1", tmp_path / "pi-1")

    found = read_credentials(tmp_path / "pi-1")
    assert found.signing_key.hex() == authority.signing_key
    assert found.ca.read_bytes() == authority.ca.read_bytes()


def test_the_database_is_not_left_locked(authority):
    """Another program may read the books while an authority is in use."""
    authority.certificates()

    with contextlib.closing(sqlite3.connect(Path(authority.folder) / "authority.sqlite")) as database:
        assert database.execute("SELECT count(*) FROM certificates").fetchone() == (0,)
