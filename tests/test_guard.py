"""Tests of coordinator.guard: who gets into a real mosquitto with TLS, who may say what, who is put out."""

import contextlib
import inspect
import json
import os
import signal
import socket
import ssl
import stat
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

from coordinator import guard as guard_module
from coordinator.authority import COORDINATOR, OPERATOR, Authority
from coordinator.broker import Broker, find_mosquitto
from coordinator.certificates import make_authority, make_certificate, new_key, private_pem, public_pem
from coordinator.cli import main
from coordinator.experiment import BrokerChoice
from coordinator.guard import Guard, access_rules, guard_of, is_beyond_loopback
from edge_agent.credentials import Credentials, client_context, read_credentials
from edge_agent.link import Connected, Disconnected, Message, MqttLink
from edge_agent.topics import Topics
from profiles.errors import BrokerError, SecurityError

needs_mosquitto = pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed")
PATIENCE_S = 30.0
DAY = timedelta(days=1)
T = Topics("scalarfed", "run")


class Fleet:
    """A guarded broker, the coordinator's link, and devices that connect as they like."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = Authority.create(folder / "authority")
        self.guard = Guard(self.authority, folder)
        self.broker: Broker = self.guard.start(folder)
        self.links: list[MqttLink] = []
        self.carrier, self.coordinator = self.guard.link(T)
        self.links.append(self.carrier)
        self.coordinator.subscribe(T.base + "#")
        await_event(self.coordinator, Connected)

    def credentials(self, name: str) -> Credentials:
        """Enrol a device and return what it has."""
        self.authority.device_identity(name, self.folder / name)
        return read_credentials(self.folder / name)

    def connect(
        self,
        identity: Credentials | None,
        *,
        client_id: str = "any",
        will: tuple[str, bytes] | None = None,
        url: str = "",
        change: Callable[[ssl.SSLContext], None] = lambda context: None,
    ) -> MqttLink:
        """Return a link with a device's certificate; None shows none."""
        if identity is None:
            context = client_context(self.authority.ca)
        else:
            context = client_context(self.authority.ca, identity.certificate, identity.key)
        change(context)
        link = MqttLink(url or self.broker.agents_url, client_id=client_id, will=will, tls=context)
        self.links.append(link)
        return link

    def device(self, name: str, **options: object) -> MqttLink:
        """Enrol a device, connect it and wait until it is in."""
        link = self.connect(self.credentials(name), **options)  # type: ignore[arg-type]
        await_event(link, Connected)
        return link

    def heard(self) -> list[tuple[str, bytes]]:
        """Return what the coordinator was told up to now: all that was sent before a last word of its own."""
        self.coordinator.publish(T.base + "end", b"end")
        found = []
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            event = self.coordinator.receive(1.0)
            if isinstance(event, Message):
                if event.topic == T.base + "end":
                    return found
                found.append((event.topic, event.payload))
        raise AssertionError("the coordinator's own word did not come back")

    def close(self) -> None:
        for link in self.links:
            link.close()
        self.broker.stop()


@pytest.fixture
def fleet(tmp_path) -> Iterator[Fleet]:
    made = Fleet(tmp_path)
    yield made
    made.close()


def await_event(link: object, wanted: type) -> object:
    """Return the first event of a class within the patience."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        event = link.receive(1.0)  # type: ignore[attr-defined]
        if isinstance(event, wanted):
            return event
    raise AssertionError(f"no {wanted.__name__} within {PATIENCE_S} s")


def is_refused(link: MqttLink) -> bool:
    """Return whether a link's first three attempts fail, without one that succeeds."""
    failures = 0
    deadline = time.monotonic() + PATIENCE_S
    while failures < 2 and time.monotonic() < deadline:
        event = link.receive(1.0)
        if isinstance(event, Connected):
            return False
        failures += isinstance(event, Disconnected)
    return failures >= 1


def flushed(link: MqttLink) -> None:
    """Wait until the broker has acknowledged all that was published."""
    assert link.flush(PATIENCE_S)


# -------------------------------------------------------------------------------------------- who gets in


@needs_mosquitto
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_an_enrolled_device_gets_in(fleet, version):
    """With its certificate a device connects over TLS 1.2 and 1.3, and is heard."""

    def only(context: ssl.SSLContext) -> None:
        context.minimum_version = context.maximum_version = version

    link = fleet.device("pi-1", change=only)
    link.publish(T.reply(0, "pi-1"), b"scalars")
    flushed(link)

    assert fleet.heard() == [(T.reply(0, "pi-1"), b"scalars")]


@needs_mosquitto
def test_without_a_certificate_nobody_gets_in(fleet):
    """Who trusts the authority but shows no certificate is refused."""
    assert is_refused(fleet.connect(None))


@needs_mosquitto
def test_in_the_clear_nobody_gets_in(fleet):
    """Neither port answers to MQTT without TLS."""
    for url in (fleet.broker.url, fleet.broker.agents_url):
        plain = MqttLink(url.replace("mqtts", "mqtt"), client_id="plain")
        fleet.links.append(plain)
        assert is_refused(plain)


@needs_mosquitto
def test_another_authoritys_certificate_is_refused(fleet, tmp_path):
    """A certificate with the right name from another authority does not count."""
    other = Authority.create(tmp_path / "other")
    other.device_identity("pi-1", tmp_path / "stranger")

    assert is_refused(fleet.connect(read_credentials(tmp_path / "stranger")))


@needs_mosquitto
def test_a_homemade_certificate_is_refused(fleet, tmp_path):
    """A certificate that names our authority as issuer but is signed by another key does not count."""
    from cryptography import x509

    ours = x509.load_pem_x509_certificate(fleet.authority.ca.read_bytes())
    key, forger = new_key(), new_key()
    forged = make_certificate(ours, forger, name="pi-1", key=key.public_key(), lifetime=DAY, now=time.time())
    (tmp_path / "forged.crt").write_bytes(public_pem(forged))
    (tmp_path / "forged.key").write_bytes(private_pem(key))
    made_of = Credentials(fleet.authority.ca, tmp_path / "forged.crt", tmp_path / "forged.key", b"")

    assert is_refused(fleet.connect(made_of))


@needs_mosquitto
@pytest.mark.parametrize("days", [-800, 30], ids=["expired", "not yet"])
def test_a_certificate_out_of_its_time_is_refused(fleet, tmp_path, days):
    """An expired certificate, or one of the future, does not count."""
    then = Authority(fleet.authority.folder, clock=lambda: time.time() + days * DAY.total_seconds())
    then.device_identity("pi-1", tmp_path / "pi-1")

    assert is_refused(fleet.connect(read_credentials(tmp_path / "pi-1")))


@needs_mosquitto
def test_a_revoked_certificate_is_refused(fleet):
    """Who was revoked while away does not get in any more; the others do."""
    revoked = fleet.credentials("pi-1")
    fleet.authority.revoke("pi-1")
    fleet.guard.watch()

    assert is_refused(fleet.connect(revoked))
    assert fleet.device("pi-2")


@needs_mosquitto
def test_a_servers_certificate_opens_no_door(fleet):
    """The server's own certificate cannot be used by a client."""
    server = fleet.authority.server_identity()

    assert is_refused(fleet.connect(Credentials(fleet.authority.ca, server.certificate, server.key, b"")))


@needs_mosquitto
def test_old_tls_is_refused(fleet):
    """The broker speaks nothing older than TLS 1.2."""
    identity = fleet.credentials("pi-1")
    old = client_context(fleet.authority.ca, identity.certificate, identity.key)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        old.minimum_version = ssl.TLSVersion.TLSv1
        old.maximum_version = ssl.TLSVersion.TLSv1_1
    old.set_ciphers("ALL:@SECLEVEL=0")
    port = urlsplit(fleet.broker.agents_url).port

    with (
        socket.create_connection(("127.0.0.1", port), PATIENCE_S) as plain,
        pytest.raises(ssl.SSLError, match="protocol"),
    ):
        old.wrap_socket(plain, server_hostname="localhost")


@needs_mosquitto
def test_a_device_does_not_believe_another_broker(fleet, tmp_path):
    """A broker of another authority, under the same address, gets neither connection nor status."""
    other = Authority.create(tmp_path / "other")
    other.device_identity("pi-1", tmp_path / "pi-1")
    stranger = read_credentials(tmp_path / "pi-1")
    context = client_context(stranger.ca, stranger.certificate, stranger.key)

    link = MqttLink(fleet.broker.agents_url, client_id="x", tls=context)
    fleet.links.append(link)
    assert is_refused(link)


@needs_mosquitto
def test_a_device_checks_the_brokers_name(tmp_path):
    """A certificate of the right authority for another address is not the broker's."""
    authority = Authority.create(tmp_path / "authority")
    mine = authority.device_identity("pi-1", tmp_path / "pi-1")
    assert mine is None
    found = read_credentials(tmp_path / "pi-1")
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    ca_key = load_pem_private_key((authority.folder / "ca.key").read_bytes(), None)
    ca = x509.load_pem_x509_certificate(authority.ca.read_bytes())
    key = new_key()
    elsewhere = make_certificate(
        ca,
        ca_key,  # type: ignore[arg-type]
        name="x",
        key=key.public_key(),
        lifetime=DAY,
        now=time.time(),
        addresses=["elsewhere.example"],
    )
    (tmp_path / "server.crt").write_bytes(public_pem(elsewhere))
    (tmp_path / "server.key").write_bytes(private_pem(key))
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(tmp_path / "server.crt", tmp_path / "server.key")
    with socket.create_server(("127.0.0.1", 0)) as door:
        door.settimeout(PATIENCE_S)
        link = MqttLink(
            f"mqtts://127.0.0.1:{door.getsockname()[1]}",
            client_id="pi-1",
            tls=client_context(found.ca, found.certificate, found.key),
        )
        guest, _ = door.accept()
        with guest:
            said = _first_byte(server, guest)
        assert said == b""
        link.close()


def _first_byte(server: ssl.SSLContext, guest: socket.socket) -> bytes:
    """Return the first byte that a guest says over TLS; empty if it leaves before it says any."""
    try:
        with server.wrap_socket(guest, server_side=True) as secured:
            return secured.recv(1)
    except OSError:
        return b""


# --------------------------------------------------------------------------------------- who may say what


@needs_mosquitto
@pytest.mark.parametrize(
    "topic",
    [
        T.reply(0, "pi-2"),
        T.status("pi-2"),
        T.request("pi-2"),
        T.round(0),
        T.control,
        T.answer("pi-1"),
        T.base + "c/pi-1",
        T.pack(0),
        T.base + "end",
        "scalarfed/run/u/0/pi-1/more",
        "elsewhere/run/u/0/pi-1",
    ],
)
def test_a_device_speaks_on_its_own_topics_alone(fleet, topic):
    """What a device publishes under another's name, or where the coordinator speaks, reaches nobody."""
    link = fleet.device("pi-1")
    link.publish(topic, b"forged", retain=True)
    link.publish(T.status("pi-1"), b"own", retain=True)
    flushed(link)

    assert fleet.heard() == [(T.status("pi-1"), b"own")]


@needs_mosquitto
def test_a_device_hears_what_is_meant_for_it(fleet):
    """Rounds, control and its own answers reach a device; another's answers, replies and statuses do not."""
    one, two = fleet.device("pi-1"), fleet.device("pi-2")
    one.subscribe("#")
    one.subscribe(T.base + "#")
    for topic in (T.control, T.round(0), T.answer("pi-1"), T.base + "c/pi-1"):
        one.subscribe(topic)
    fleet.carrier.publish(T.control, b"0", retain=True)
    await_event(one, Message)
    two.publish(T.reply(0, "pi-2"), b"two's scalars")
    two.publish(T.status("pi-2"), b"two's status", retain=True)
    flushed(two)
    for topic in (T.answer("pi-2"), T.base + "c/pi-2", T.round(0), T.answer("pi-1"), T.base + "c/pi-1"):
        fleet.carrier.publish(topic, b"1")

    heard = set()
    deadline = time.monotonic() + PATIENCE_S
    while T.base + "c/pi-1" not in heard and time.monotonic() < deadline:
        event = one.receive(1.0)
        if isinstance(event, Message):
            heard.add(event.topic)
    assert heard - {T.control} == {T.round(0), T.answer("pi-1"), T.base + "c/pi-1"}


@needs_mosquitto
def test_a_last_will_cannot_be_in_anothers_name(fleet):
    """A device that leaves without a word cannot have the broker say that another one is gone."""
    forged, honest = b"two is gone", b"one is gone"
    thief = fleet.device("pi-1", will=(T.status("pi-2"), forged))
    other = fleet.device("pi-3", will=(T.status("pi-3"), honest))
    for link in (thief, other):
        _cut(link)

    deadline = time.monotonic() + PATIENCE_S
    heard: list[tuple[str, bytes]] = []
    while (T.status("pi-3"), honest) not in heard and time.monotonic() < deadline:
        heard += fleet.heard()
    assert (T.status("pi-3"), honest) in heard
    assert forged not in {payload for _, payload in heard}


def _cut(link: MqttLink) -> None:
    """End a connection as a power cut does."""
    sock = link._client.socket()
    assert sock is not None
    link._closing = True
    link._client.reconnect_delay_set(60, 60)
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


@needs_mosquitto
def test_anothers_client_id_puts_nobody_out(fleet):
    """A device that connects with another's client id, or the coordinator's, ends no other connection."""
    two = fleet.device("pi-2", client_id="run-pi-2")
    for stolen in ("run-pi-2", "pi-2", "run-coordinator", COORDINATOR, f"{COORDINATOR}:run"):
        fleet.device("pi-1", client_id=stolen)
    fleet.device("run-coordinator")
    assert fleet.coordinator.receive(0.5) is None
    two.publish(T.status("pi-2"), b"still here")
    flushed(two)

    assert (T.status("pi-2"), b"still here") in fleet.heard()
    assert not isinstance(two.receive(0.0), Disconnected)


@needs_mosquitto
def test_the_operator_looks_and_commands(fleet):
    """The operator's certificate reads all and writes commands; it is not the coordinator's."""
    identity = fleet.authority.role_identity(OPERATOR)
    operator = fleet.connect(Credentials(fleet.authority.ca, identity.certificate, identity.key, b""))
    await_event(operator, Connected)
    operator.publish(T.control, b"forged", retain=True)
    operator.publish(T.round(0), b"forged", retain=True)
    operator.publish(T.base + "c/pi-1", b"blink")
    flushed(operator)

    assert fleet.heard() == [(T.base + "c/pi-1", b"blink")]


@needs_mosquitto
def test_a_restarted_broker_is_as_shut_as_before(fleet):
    """After SIGKILL the broker comes back with the same rules, and the fleet with it."""
    link = fleet.device("pi-1")
    pid = fleet.broker.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)
    psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=PATIENCE_S)
    fleet.broker.restart()

    await_event(link, Connected)
    assert is_refused(fleet.connect(None))


# -------------------------------------------------------------------------------------------- revocation


@needs_mosquitto
def test_revoking_ends_a_connection(fleet):
    """A connected device is put out at once, and for good; the others notice nothing."""
    one, two = fleet.device("pi-1"), fleet.device("pi-2")
    began = time.monotonic()
    fleet.authority.revoke("pi-1")
    assert fleet.guard.watch() == {"pi-1"}
    await_event(one, Disconnected)
    took_s = time.monotonic() - began

    assert is_refused(one)
    two.publish(T.status("pi-2"), b"still here")
    flushed(two)
    assert (T.status("pi-2"), b"still here") in fleet.heard()
    assert fleet.authority.is_applied()
    assert took_s < 5.0


@needs_mosquitto
def test_a_revoked_device_that_hurries_stays_out(fleet):
    """A device that connects again in the very moment in which it is put out does not slip in."""
    identity = fleet.credentials("pi-1")
    fast = fleet.connect(identity)
    await_event(fast, Connected)
    fast._back_off = lambda: fast._client.reconnect_delay_set(0.001, 0.001)  # type: ignore[method-assign]
    fleet.authority.revoke("pi-1")
    fleet.guard.watch()

    await_event(fast, Disconnected)
    assert is_refused(fast)
    assert not any(topic.endswith("pi-1") for topic, _ in fleet.heard())


@needs_mosquitto
def test_revoking_works_where_there_are_no_signals(fleet, monkeypatch):
    """Where mosquitto cannot be told to read its lists, as on Windows, it is started again with them."""
    monkeypatch.delattr(signal, "SIGHUP", raising=False)
    one, two = fleet.device("pi-1"), fleet.device("pi-2")
    fleet.authority.revoke("pi-1")
    fleet.guard.watch()

    await_event(one, Disconnected)
    await_event(two, Disconnected)
    await_event(two, Connected)
    assert is_refused(one)


@needs_mosquitto
def test_the_command_waits_for_the_effect(fleet, capsys):
    """`devices revoke` says that it is in effect once a coordinator has seen to it."""
    link = fleet.device("pi-1")
    words = ["devices", "revoke", "pi-1", "--authority", str(fleet.authority.folder)]
    codes: list[int] = []
    command = threading.Thread(target=lambda: codes.append(main(words)))
    command.start()
    while command.is_alive():
        fleet.guard.watch()
        command.join(0.05)

    assert codes == [0]
    assert "in effect" in capsys.readouterr().out
    await_event(link, Disconnected)


def test_the_commands_tell_what_they_did(tmp_path, capsys, monkeypatch):
    """Enrolling writes a ticket of mode 0600 and shows no token; the list and revoking name the device."""
    monkeypatch.setattr("coordinator.cli.enrol._EFFECT_S", 0.2)
    place = ["--authority", str(tmp_path / "authority")]
    assert main(["enrol", "pi-1", "--out", str(tmp_path / "tickets"), *place]) == 0
    path = tmp_path / "tickets" / "pi-1.ticket.json"
    told = json.loads(path.read_text())
    said = capsys.readouterr().out
    assert told["token"] not in said
    assert told["ca_sha256"] in said
    assert sys.platform == "win32" or stat.S_IMODE(path.stat().st_mode) == 0o600

    Authority(tmp_path / "authority").device_identity("pi-1", tmp_path / "pi-1")
    assert main(["devices", "certificates", *place]) == 0
    assert "counts" in capsys.readouterr().out
    assert main(["devices", "revoke", "pi-1", *place]) == 0
    assert "takes effect when one starts" in capsys.readouterr().out
    assert main(["devices", "certificates", "--json", *place]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == ["pi-1"]
    assert main(["devices", "revoke", "pi-2", *place]) == SecurityError.exit_code


@needs_mosquitto
def test_who_is_enrolled_again_gets_in_again(fleet):
    """After a new enrolment the new certificate counts, and the revoked one does not."""
    old = fleet.credentials("pi-1")
    kept = Credentials(old.ca, fleet.folder / "old.crt", fleet.folder / "old.key", old.signing_key)
    kept.certificate.write_bytes(old.certificate.read_bytes())
    kept.key.write_bytes(old.key.read_bytes())
    fleet.authority.revoke("pi-1")
    fleet.guard.watch()
    new = fleet.device("pi-1")
    assert fleet.guard.watch() == {"pi-1"}  # the list of revocations did not change, the rules are as before

    fleet.authority.revoke("pi-1")
    fleet.guard.watch()
    await_event(new, Disconnected)
    assert is_refused(fleet.connect(kept))


# -------------------------------------------------------------------------------------- when it is needed


@pytest.mark.parametrize(
    ("host", "beyond"),
    [
        *[(host, False) for host in ("127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost")],
        *[(host, True) for host in ("0.0.0.0", "::", "192.168.1.5", "10.0.0.1", "laptop.local", "")],
    ],
)
def test_only_the_loopback_is_this_machine_alone(host, beyond):
    """Whatever others can reach, or may be able to, counts as beyond the loopback."""
    assert is_beyond_loopback(host) is beyond


@pytest.mark.parametrize(
    ("choice", "guarded"),
    [
        (BrokerChoice(), False),
        (BrokerChoice(security="on"), True),
        (BrokerChoice(listen="0.0.0.0"), True),
        (BrokerChoice(listen="0.0.0.0", security="insecure"), False),
        (BrokerChoice(url="mqtt://127.0.0.1:1883"), False),
        (BrokerChoice(url="mqtt://192.168.1.5", security="insecure"), False),
    ],
)
def test_security_is_on_beyond_the_loopback(tmp_path, choice, guarded):
    """A broker that others can reach is guarded unless somebody says that it shall not be."""
    assert (guard_of(choice, tmp_path) is not None) is guarded


@pytest.mark.parametrize(
    "choice",
    [BrokerChoice(url="mqtt://192.168.1.5:1883"), BrokerChoice(url="mqtt://127.0.0.1", security="on")],
)
def test_a_broker_in_the_clear_elsewhere_is_refused(tmp_path, choice):
    """A run is not sent over a network unprotected without --insecure."""
    with pytest.raises(BrokerError, match="unprotected") as refused:
        guard_of(choice, tmp_path)
    assert "--insecure" in refused.value.hint


def test_amqtt_cannot_be_guarded(tmp_path, monkeypatch):
    """Without mosquitto a guarded broker is refused with the reason, not replaced by an open one."""
    monkeypatch.setattr(guard_module, "find_mosquitto", lambda: None)

    with pytest.raises(BrokerError, match="needs mosquitto"):
        Guard(Authority.create(tmp_path / "authority"), tmp_path).start(tmp_path)


@pytest.mark.parametrize("name", ["mqtt://localhost", "tcp://localhost:1883"])
def test_a_link_with_certificates_does_not_step_down(tmp_path, name):
    """Who is enrolled never speaks in the clear, whatever address it is given."""
    with pytest.raises(BrokerError, match="not encrypted"):
        MqttLink(name, client_id="x", tls=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))


def test_a_link_without_certificates_says_so(tmp_path):
    """An address that asks for TLS is not tried without certificates."""
    with pytest.raises(BrokerError, match="certificates") as refused:
        MqttLink("mqtts://localhost", client_id="x")
    assert "enrol" in refused.value.hint


def test_the_rules_name_every_topic():
    """Each kind of topic that a run has is in the access list, so that a new one is not forgotten."""
    rules = access_rules("scalarfed")
    values = {"shard": 0, "agent": "N"}
    found = {T.control}
    for called, method in inspect.getmembers(T, inspect.ismethod):
        wanted = inspect.signature(method).parameters
        if not called.startswith("_") and wanted.keys() <= values.keys():
            found.add(method(**{name: values[name] for name in wanted}))
    assert len(found) >= 7

    for topic in found:
        kind = topic.removeprefix(T.base).partition("/")[0]
        assert f"scalarfed/+/{kind}" in rules


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no file modes")
@needs_mosquitto
def test_the_brokers_files_hold_no_secret(fleet):
    """Configuration, rules and log of the broker name files and no key."""
    fleet.device("pi-1")
    key_line = (fleet.folder / "pi-1" / "device.key").read_bytes().splitlines()[1]

    for name in ("mosquitto.conf", "mosquitto.acl", "broker.log"):
        text = (fleet.folder / name).read_bytes()
        assert text
        assert b"PRIVATE" not in text
        assert key_line not in text


def test_authorities_differ():
    """Two authorities have different names, so that one's certificates are never tried on the other's."""
    first, second = (make_authority(new_key(), now=time.time()) for _ in range(2))

    assert first.subject != second.subject
