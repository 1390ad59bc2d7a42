"""Tests of enrolment over HTTPS: a real server, and the board's process as the agent starts it."""

import hashlib
import http.client
import json
import os
import socket
import ssl
import stat
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
from cryptography import x509

from coordinator.authority import Authority
from coordinator.enrolment import add_enrolment, server_context, ticket
from coordinator.web import WebServer
from edge_agent.admission import Renewal, admit
from edge_agent.credentials import UNREACHED, client_context, read_credentials, write_secret
from edge_agent.enrol import main as enrol_main
from profiles.errors import SecurityError

ROOT = Path(__file__).parent.parent
needs_modes = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no file modes")


class Place:
    """An authority, its web server, and boards beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = Authority.create(folder / "authority")
        identity = self.authority.server_identity()
        self.server = WebServer(tls=lambda: server_context(self.authority, identity))
        add_enrolment(self.server, self.authority, clock=lambda: 0.0)

    def board(self, device: str, **changes: str) -> Path:
        """Return the folder of a board with a ticket, whose entries may be changed."""
        folder = self.folder / f"board-{device}-{len(list(self.folder.iterdir()))}"
        folder.mkdir(mode=0o700)
        told = ticket(self.authority, device, url=self.server.url, valid_s=600) | changes
        write_secret(folder / "ticket.json", json.dumps(told).encode())
        return folder


@pytest.fixture
def place(tmp_path) -> Iterator[Place]:
    made = Place(tmp_path)
    yield made
    made.server.close()


def run_board(
    folder: Path, *words: str, without_cryptography: bool = False
) -> "subprocess.CompletedProcess[str]":
    """Run the enrolling process; it may be denied the package, as on a board."""
    deny = "sys.modules['cryptography'] = None; " if without_cryptography else ""
    script = f"import sys; {deny}from edge_agent.enrol import main; sys.exit(main({[str(folder), *words]!r}))"
    return subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )


def names_in(folder: Path) -> set[str]:
    """Return what lies in a folder."""
    return {path.name for path in folder.iterdir()}


@needs_modes
@pytest.mark.parametrize("bare", [False, True], ids=["cryptography", "openssl"])
def test_a_ticket_becomes_credentials(place, bare):
    """With the package or with the openssl program alone a board gets what it needs; the ticket is gone."""
    folder = place.board("pi-1")

    done = run_board(folder, without_cryptography=bare)

    assert (done.returncode, done.stderr) == (0, "")
    assert names_in(folder) == {"ca.crt", "device.crt", "device.key", "signing.pub", "enrolled.json"}
    assert stat.S_IMODE((folder / "device.key").stat().st_mode) == 0o600
    found = read_credentials(folder)
    assert client_context(found.ca, found.certificate, found.key)
    assert found.signing_key.hex() == place.authority.signing_key


def test_the_key_stays_on_the_board(place):
    """The private key is nowhere on the coordinator's side."""
    folder = place.board("pi-1")
    run_board(folder)
    secret = (folder / "device.key").read_bytes().splitlines()[1]

    files = [path for path in place.authority.folder.iterdir() if path.is_file()]
    assert len(files) > 4
    assert not any(secret in path.read_bytes() for path in files)


def test_the_token_is_in_no_argument_and_no_output(place):
    """Neither the process list nor what is printed shows the token, whether it is taken or refused."""
    folders = [place.board("pi-1"), place.board("pi-1", name="pi-2"), place.board("pi-1")]
    tokens = [json.loads((folder / "ticket.json").read_text())["token"] for folder in folders]
    taken, refused = run_board(folders[0]), run_board(folders[1])
    with socket.create_server(("127.0.0.1", 0)) as mute:  # takes connections and says nothing
        told = json.loads((folders[2] / "ticket.json").read_text())
        told["url"] = f"https://127.0.0.1:{mute.getsockname()[1]}"
        write_secret(folders[2] / "ticket.json", json.dumps(told).encode())
        process = subprocess.Popen([sys.executable, "-m", "edge_agent.enrol", str(folders[2])], cwd=ROOT)
        try:
            mute.settimeout(60)
            guest, _ = mute.accept()
            with guest:  # as long as nobody answers, the process is there to be looked at
                shown = " ".join([*psutil.Process(process.pid).cmdline(), *map(str, process.args)])
        finally:
            process.kill()
            process.wait()

    assert (taken.returncode, refused.returncode) == (0, SecurityError.exit_code)
    assert "edge_agent.enrol" in shown
    said = taken.stdout + taken.stderr + refused.stdout + refused.stderr
    assert not any(token in shown + said for token in tokens)


def test_a_replayed_ticket_is_refused(place):
    """Who copied a ticket and comes second gets nothing, and the first one's certificate stays good."""
    first = place.board("pi-1")
    second = place.folder / "thief"
    second.mkdir(mode=0o700)
    write_secret(second / "ticket.json", (first / "ticket.json").read_bytes())

    assert run_board(first).returncode == 0
    done = run_board(second)

    assert done.returncode == SecurityError.exit_code
    assert "used already" in done.stderr
    assert "device.crt" not in names_in(second)
    assert [one.revoked for one in place.authority.certificates() if one.name == "pi-1"] == [None]


def test_a_wrong_token_is_refused(place):
    """An invented token gets no certificate, and the reason is said."""
    done = run_board(place.board("pi-1", token="A" * 32))

    assert done.returncode == SecurityError.exit_code
    assert "The token is none for `pi-1`" in done.stderr


def test_an_interrupted_board_goes_on(place):
    """A board that lost the answer asks again with its key and gets its certificate."""
    folder = place.board("pi-1")
    kept = (folder / "ticket.json").read_bytes()
    assert run_board(folder).returncode == 0
    key = (folder / "device.key").read_bytes()
    for name in ("device.crt", "enrolled.json", "signing.pub"):
        (folder / name).unlink()
    write_secret(folder / "ticket.json", kept)

    assert run_board(folder).returncode == 0
    assert (folder / "device.key").read_bytes() == key


def test_another_authority_gets_no_token(place, tmp_path):
    """A board whose ticket names another authority by its hash tells nothing to the one that answers."""
    heard: list[bytes] = []
    other = Authority.create(tmp_path / "other")
    identity = other.server_identity()
    with WebServer(tls=lambda: server_context(other, identity)) as stranger:
        add_enrolment(stranger, other)
        stranger.add_post("/enrol", lambda request: heard.append(request.body))  # type: ignore[func-returns-value]
        folder = place.board("pi-1", url=stranger.url)

        done = run_board(folder)

    assert done.returncode == SecurityError.exit_code
    assert "belongs to another authority" in done.stderr
    assert heard == []
    assert names_in(folder) == {"ticket.json"}


def test_a_server_without_the_authoritys_key_gets_no_token(place, tmp_path):
    """Who shows the right authority's certificate, which is public, but cannot use its key, hears nothing."""
    heard: list[bytes] = []
    other = Authority.create(tmp_path / "other")
    identity = other.server_identity()
    with WebServer(tls=lambda: server_context(other, identity)) as stranger:
        from coordinator.web import Answer

        stranger.add_get("/ca", lambda _: Answer(body=place.authority.ca.read_bytes()))
        stranger.add_post("/enrol", lambda request: heard.append(request.body))  # type: ignore[func-returns-value]

        done = run_board(place.board("pi-1", url=stranger.url))

    assert done.returncode == SecurityError.exit_code
    assert "cannot prove who it is" in done.stderr
    assert heard == []


def test_a_device_cannot_pose_as_the_server(place, tmp_path):
    """A device's certificate is signed by the same authority, yet no board takes it for the coordinator."""
    heard: list[bytes] = []
    place.authority.device_identity("pi-9", tmp_path / "pi-9")

    def context() -> ssl.SSLContext:
        made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        made.load_cert_chain(tmp_path / "pi-9" / "device.crt", tmp_path / "pi-9" / "device.key")
        return made

    with WebServer(tls=context) as stranger:
        from coordinator.web import Answer

        stranger.add_get("/ca", lambda _: Answer(body=place.authority.ca.read_bytes()))
        stranger.add_post("/enrol", lambda request: heard.append(request.body))  # type: ignore[func-returns-value]

        done = run_board(place.board("pi-1", url=stranger.url))

    assert done.returncode == SecurityError.exit_code
    assert heard == []


def test_http_is_refused(place):
    """A ticket with an address in the clear is no ticket: the token is not sent."""
    done = run_board(place.board("pi-1", url=place.server.url.replace("https", "http")))

    assert done.returncode == SecurityError.exit_code
    assert "no address to enrol at" in done.stderr


def test_nobody_there_is_worth_another_try(place):
    """Where nobody answers the process ends with its own code, and the ticket stays."""
    folder = place.board("pi-1")
    place.server.close()

    done = run_board(folder)

    assert done.returncode == UNREACHED
    assert names_in(folder) == {"ticket.json"}


@needs_modes
def test_a_ticket_that_others_may_read_is_refused(place):
    """A ticket in a file of mode 0644 may have been read by somebody; it is not used."""
    folder = place.board("pi-1")
    (folder / "ticket.json").chmod(0o644)

    done = run_board(folder)

    assert done.returncode == SecurityError.exit_code
    assert "may be read by others" in done.stderr


def post(place: Place, path: str, body: bytes, folder: Path | None = None) -> tuple[int, bytes]:
    """Post to the server, with a board's certificate if a folder is given."""
    context = client_context(place.authority.ca)
    if folder is not None:
        found = read_credentials(folder)
        context = client_context(found.ca, found.certificate, found.key)
    connection = http.client.HTTPSConnection(urlsplit(place.server.url).netloc, timeout=30, context=context)
    try:
        connection.request("POST", path, body)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


@pytest.mark.parametrize("body", [b"", b"null", b"[]", b"{}", b'{"name": 1}', b"{" * 5000, b"\xff\xfe"])
def test_a_malformed_request_is_named(place, body):
    """Whatever is posted, the answer is a refusal and the server goes on."""
    assert post(place, "/enrol", body)[0] in (400, 403)
    assert run_board(place.board("pi-1")).returncode == 0


def test_guessing_is_slowed_down(place):
    """After ten refusals an address is not heard for a while, the right token neither."""
    body = json.dumps({"name": "pi-1", "token": "guess", "request": ""}).encode()
    statuses = [post(place, "/enrol", body)[0] for _ in range(12)]

    assert statuses == [403] * 10 + [429] * 2


def test_a_certificate_is_renewed_by_itself(place):
    """Who shows a certificate that counts gets a new one for a new key; both files are replaced."""
    folder = place.board("pi-1")
    assert run_board(folder).returncode == 0
    key, certificate = (folder / "device.key").read_bytes(), (folder / "device.crt").read_bytes()

    done = run_board(folder, "--renew")

    assert (done.returncode, done.stderr) == (0, "")
    assert (folder / "device.key").read_bytes() != key
    assert (folder / "device.crt").read_bytes() != certificate
    assert client_context(folder / "ca.crt", folder / "device.crt", folder / "device.key")


def test_renewal_needs_the_devices_own_certificate(place):
    """Without a certificate, or with another's, nothing is renewed."""
    first, second = place.board("pi-1"), place.board("pi-2")
    assert run_board(first).returncode == run_board(second).returncode == 0
    body = json.dumps({"name": "pi-1", "request": ""}).encode()

    assert post(place, "/renew", body)[0] == 403
    assert post(place, "/renew", body, second)[0] == 403


def test_a_revoked_certificate_does_not_get_through(place):
    """The web server refuses a revoked certificate in the handshake, from the moment of revocation on."""
    folder = place.board("pi-1")
    assert run_board(folder).returncode == 0
    place.authority.revoke("pi-1")

    done = run_board(folder, "--renew")

    assert done.returncode in (SecurityError.exit_code, UNREACHED)
    assert len([one for one in place.authority.certificates() if one.name == "pi-1"]) == 1


def test_old_tls_is_refused(place):
    """The server speaks TLS 1.2 and 1.3, and nothing older."""
    for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
        context = client_context(place.authority.ca)
        context.minimum_version = context.maximum_version = version
        assert _version_with(place, context) == version.name.replace("_", ".")
    old = client_context(place.authority.ca)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        old.minimum_version = ssl.TLSVersion.TLSv1
        old.maximum_version = ssl.TLSVersion.TLSv1_1
    old.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.raises(ssl.SSLError):
        _version_with(place, old)


def _version_with(place: Place, context: ssl.SSLContext) -> str | None:
    with (
        socket.create_connection(("127.0.0.1", place.server.port), 30) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as secured,
    ):
        return secured.version()


def test_admission_waits_for_the_coordinator(place):
    """An agent that starts before the coordinator tries again, and is in as soon as it answers."""
    folder = place.board("pi-1")
    port = place.server.port
    place.server.close()
    waits: list[int] = []

    def on_wait() -> None:
        waits.append(1)
        if len(waits) == 1:
            identity = place.authority.server_identity()
            place.server = WebServer(port=port, tls=lambda: server_context(place.authority, identity))
            add_enrolment(place.server, place.authority)

    assert admit(folder, stopping=threading.Event(), on_wait=on_wait).certificate.is_file()
    assert waits


def test_admission_gives_up_where_it_is_refused(place):
    """A refused ticket is an error with the coordinator's reason, not an endless loop."""
    with pytest.raises(SecurityError, match="none for `pi-1`"):
        admit(place.board("pi-1", token="A" * 32), stopping=threading.Event())


def test_admission_needs_something(tmp_path):
    """A folder with neither ticket nor certificate is an error that says what to put there."""
    with pytest.raises(SecurityError, match="not enrolled") as refused:
        admit(tmp_path, stopping=threading.Event())
    assert "scalarfed enrol" in refused.value.hint


def test_a_certificate_is_renewed_in_its_last_third(place):
    """Before two thirds of its life nothing happens; after that a child renews it while the agent works."""
    folder = place.board("pi-1")
    assert run_board(folder).returncode == 0
    before = (folder / "device.crt").read_bytes()
    told = json.loads((folder / "enrolled.json").read_text())
    life = told["expires"] - told["issued"]
    now = told["issued"] + 0.6 * life
    renewal = Renewal(folder, clock=lambda: now)
    assert not renewal.tick()
    assert renewal._child is None

    now = told["issued"] + 0.7 * life
    assert not renewal.tick()
    assert renewal._child is not None
    renewal._child.wait(60)
    assert renewal.tick()
    assert (folder / "device.crt").read_bytes() != before


def test_a_refused_connection_prints_nothing(place, capfd):
    """What strangers send appears in no log: neither a path nor a body nor a stack."""
    post(place, "/enrol", json.dumps({"name": "x", "token": "s3cret", "request": "r"}).encode())
    connection = http.client.HTTPConnection("127.0.0.1", place.server.port, timeout=10)
    connection.request("GET", "/s3cret")
    with pytest.raises((OSError, http.client.HTTPException)):
        connection.getresponse()

    said = capfd.readouterr()
    assert "s3cret" not in said.out + said.err


def test_the_command_line_of_enrolling_is_small():
    """Wrong words are a usage line and code 2."""
    assert enrol_main([]) == 2
    assert enrol_main(["a", "--all"]) == 2


def test_the_fingerprint_is_that_of_the_certificate(place):
    """The hash in a ticket is the SHA-256 of the authority's certificate, as any tool shows it."""
    found = x509.load_pem_x509_certificate(place.authority.ca.read_bytes())
    from cryptography.hazmat.primitives.serialization import Encoding

    told = ticket(place.authority, "pi-1", url=place.server.url, valid_s=60)
    assert told["ca_sha256"] == hashlib.sha256(found.public_bytes(Encoding.DER)).hexdigest()
    assert os.sep not in told["token"]
