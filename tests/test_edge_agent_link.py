"""The contract of links: the in-memory link and the MQTT link (a real mosquitto) behave alike."""

import shutil
import socket
import struct
import subprocess
import sys
import time

import pytest

from edge_agent.link import Connected, Disconnected, MemoryBroker, MemoryLink, Message, MqttLink
from edge_agent.mqtt_client import BufferedSocket
from profiles.errors import BrokerError

MOSQUITTO = shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")


class Mosquitto:
    """A real broker on a free port of the loopback."""

    def __init__(self, folder):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.config = folder / "mosquitto.conf"
        self.config.write_text(f"listener {self.port} 127.0.0.1\nallow_anonymous true\npersistence false\n")
        self.start()

    def start(self):
        self.process = subprocess.Popen([MOSQUITTO, "-c", self.config], stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                assert self.process.poll() is None, "mosquitto ended at once"
        raise AssertionError("mosquitto does not listen")

    def kill(self):
        self.process.kill()
        self.process.wait()

    def link(self, name, will=None):
        return MqttLink(f"mqtt://127.0.0.1:{self.port}", client_id=name, will=will)


class InMemory:
    """The same factory for links without a network."""

    def __init__(self):
        self.broker = MemoryBroker()

    def link(self, name, will=None):
        return MemoryLink(self.broker, will=will)


@pytest.fixture
def mosquitto(tmp_path):
    if MOSQUITTO is None:
        pytest.skip("mosquitto is not installed")
    broker = Mosquitto(tmp_path)
    yield broker
    broker.kill()


@pytest.fixture(params=["memory", "mqtt"])
def network(request):
    return InMemory() if request.param == "memory" else request.getfixturevalue("mosquitto")


@pytest.fixture
def connect(network):
    links = []

    def make(name, will=None):
        link = network.link(name, will)
        links.append(link)
        assert isinstance(wait_for(link, Connected), Connected)
        return link

    yield make
    for link in links:
        link.close()


def wait_for(link, kind, timeout_s=10.0):
    """Return the next event of a kind, bounded."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        event = link.receive(deadline - time.monotonic())
        if isinstance(event, kind):
            return event
    raise AssertionError(f"no {kind} within {timeout_s} s")


def test_messages_arrive_in_order(connect):
    """A hundred messages come out as they went in."""
    one, two = connect("one"), connect("two")
    two.subscribe("t/#")
    one.subscribe("back")
    two.publish("back", b"subscribed", retain=True)  # acknowledged in order, hence the subscription stands
    wait_for(one, Message)
    for number in range(100):
        one.publish(f"t/{number}", str(number).encode())
    got = [wait_for(two, Message) for _ in range(100)]
    assert [message.payload for message in got] == [str(number).encode() for number in range(100)]


def test_retained_messages_wait_for_a_subscriber(connect):
    """Who subscribes later gets the newest retained message."""
    one = connect("one")
    one.subscribe("r/+")
    one.publish("r/0", b"old", retain=True)
    one.publish("r/0", b"new", retain=True)
    assert [wait_for(one, Message).payload for _ in range(2)] == [b"old", b"new"]
    late = connect("late")
    late.subscribe("r/0")
    assert wait_for(late, Message) == Message("r/0", b"new")


def test_both_sides_count_the_same_bytes(connect):
    """What one link counts as sent, the other counts as received: payload and packets."""
    one, two = connect("one"), connect("two")
    two.subscribe("u/0/pi")
    one.subscribe("back")
    two.publish("back", b"!", retain=True)
    wait_for(one, Message)
    sent_before = (one.traffic.payload_up, one.traffic.packet_up)
    one.publish("u/0/pi", bytes(64))
    wait_for(two, Message)
    payload = one.traffic.payload_up - sent_before[0]
    packet = one.traffic.packet_up - sent_before[1]
    assert (payload, packet) == (two.traffic.payload_down, two.traffic.packet_down - 4)
    assert (payload, packet) == (64, 2 + 2 + 6 + 2 + 64)


def test_nothing_arrives_without_a_subscription(connect):
    """A link hears only what it asked for."""
    one, two = connect("one"), connect("two")
    two.subscribe("mine")
    one.publish("other", b"x")
    one.publish("mine", b"y")
    one.publish("mine", b"z", retain=True)
    assert wait_for(two, Message).topic == "mine"


def test_a_last_will_is_published_for_a_killed_process(mosquitto):
    """A process that is killed, not closed, leaves its will behind."""
    watcher = mosquitto.link("watcher")
    watcher.subscribe("st/pi")
    program = (
        "import sys, time; from edge_agent.link import MqttLink, Connected\n"
        f"link = MqttLink('mqtt://127.0.0.1:{mosquitto.port}', client_id='pi', will=('st/pi', b'gone'))\n"
        "assert isinstance(link.receive(10), Connected); print('up', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"up\n"
        process.kill()
    assert wait_for(watcher, Message).payload == b"gone"
    watcher.close()


def test_a_link_comes_back_after_its_broker(mosquitto):
    """The broker is killed and started again: both links reconnect and hear each other, unasked."""
    one, two = mosquitto.link("one"), mosquitto.link("two")
    two.subscribe("t")
    for link in (one, two):
        wait_for(link, Connected)
    mosquitto.kill()
    for link in (one, two):
        wait_for(link, Disconnected)
    mosquitto.start()
    for link in (one, two):
        wait_for(link, Connected, 30)
    two.publish("t", b"own")  # delivered after its own subscription
    assert wait_for(two, Message).payload == b"own"
    one.publish("t", b"again")
    assert wait_for(two, Message).payload == b"again"
    for link in (one, two):
        link.close()


@pytest.mark.skipif(sys.platform != "linux", reason="TCP_INFO is Linux's")
def test_counted_packets_are_what_the_kernel_sent(mosquitto):
    """The packet bytes of a thousand messages agree with TCP's own count, to the byte."""
    link = mosquitto.link("one")
    wait_for(link, Connected)

    def acknowledged_by_peer() -> int:
        info = link._client.socket().getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192)
        return struct.unpack_from("<Q", info, 120)[0]  # tcpi_bytes_acked

    assert link.flush(10)
    link.publish("t", b"first")
    assert link.flush(10)
    before = (acknowledged_by_peer(), link.traffic.packet_up)
    for size in range(1000):
        link.publish("some/topic", bytes(size))
    assert link.flush(30)
    deadline = time.monotonic() + 10
    expected = link.traffic.packet_up - before[1]
    while time.monotonic() < deadline and acknowledged_by_peer() - before[0] < expected:
        pass
    assert acknowledged_by_peer() - before[0] == expected
    link.close()


@pytest.mark.parametrize("url", ["", "http://host", "mqtt://", "mqtt://host:port", "host:1883"])
def test_an_address_of_another_form_is_refused(url):
    """The message shows the form."""
    with pytest.raises(BrokerError, match="mqtt://HOST:PORT"):
        MqttLink(url, client_id="x")


def test_a_flood_waits_at_the_broker(mosquitto):
    """Of 100 messages of a megabyte at most 65 are in our memory at any time, and all of them arrive."""
    flooded, flooder = mosquitto.link("flooded"), mosquitto.link("flooder")
    try:
        flooded.subscribe("flood")
        for link in (flooded, flooder):
            assert isinstance(link.receive(10), Connected)
        flooder.publish("flood", b"first", retain=True)  # its arrival shows that the subscription stands
        assert isinstance(flooded.receive(10), Message)
        for number in range(100):
            flooder.publish("flood", bytes([number]) * (1 << 20))
        assert flooder.flush(60)
        arrived = []
        most = 0
        while len(arrived) < 100:
            most = max(most, flooded._events.qsize())
            event = flooded.receive(30)
            assert isinstance(event, Message), f"only {len(arrived)} arrived"
            arrived.append(event.payload[0])
        assert arrived == list(range(100))
        assert 10 < most <= 65
    finally:
        flooded.close()
        flooder.close()


class Wire:
    """A socket whose network takes so many bytes at a time and hands out what it was given."""

    def __init__(self, arrived: bytes = b"", takes: int = 3) -> None:
        self.arrived, self.takes = bytearray(arrived), takes
        self.sent = bytearray()
        self.reads = 0

    def recv(self, size):
        self.reads += 1
        if not self.arrived:
            raise BlockingIOError
        piece = bytes(self.arrived[:size])
        del self.arrived[:size]
        return piece

    def send(self, data):
        if not self.takes:
            raise BlockingIOError
        taken = bytes(data[: self.takes])
        self.sent += taken
        return len(taken)


def test_a_buffered_socket_reads_ahead():
    """Byte by byte out of one read; what is left can be asked for, and an empty network says so."""
    wire = Wire(b"abcdef")
    sock = BufferedSocket(wire)
    assert sock.recv(1) + sock.recv(1) == b"ab"
    assert (sock.ahead(), sock.pending(), wire.reads) == (4, 4, 1)
    assert sock.recv(10) == b"cdef"
    with pytest.raises(BlockingIOError):
        sock.recv(1)


def test_a_corked_socket_sends_all_together_and_loses_nothing():
    """Held back, then sent in order, however little the network takes and when."""
    wire = Wire(takes=0)
    sock = BufferedSocket(wire)
    sock.cork()
    assert [sock.send(b"one"), sock.send(b"two")] == [3, 3]
    sock.uncork()
    assert sock.holds
    sock.cork()
    sock.send(b"three")
    wire.takes = 4
    sock.uncork()
    assert not sock.holds
    assert bytes(wire.sent) == b"onetwothree"
    assert sock.send(b"four") == 4
    assert bytes(wire.sent) == b"onetwothreefour"
