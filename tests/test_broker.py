"""Tests of coordinator.broker, broker_amqtt and child: with real brokers and real processes."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from coordinator.broker import Broker, find_mosquitto, open_broker, start_amqtt, start_mosquitto, use_broker
from coordinator.child import Child, end_orphan
from edge_agent.link import Connected, Disconnected, Message, MqttLink
from edge_agent.wire import MAX_MESSAGE
from profiles.errors import BrokerError, StateError

MOSQUITTO = find_mosquitto()
PATIENCE_S = 30.0

Starter = Callable[..., Broker]


@pytest.fixture(
    params=[
        pytest.param(
            "mosquitto", marks=pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed")
        ),
        "amqtt",
    ]
)
def start(request, tmp_path) -> Iterator[Starter]:
    """Start a broker of either kind; every one is ended after the test."""
    begun: list[Broker] = []

    def starter(port: int = 0) -> Broker:
        if request.param == "mosquitto":
            assert MOSQUITTO is not None
            begun.append(start_mosquitto(MOSQUITTO, tmp_path, port=port))
        else:
            begun.append(start_amqtt(tmp_path, port=port))
        return begun[-1]

    yield starter
    for broker in begun:
        broker.stop()


@pytest.fixture
def connect() -> Iterator[Callable[[Broker, str], MqttLink]]:
    """Connect an MQTT client that is closed after the test."""
    links: list[MqttLink] = []

    def connect(broker: Broker, name: str) -> MqttLink:
        links.append(MqttLink(broker.url, client_id=name))
        return links[-1]

    yield connect
    for link in links:
        link.close()


def await_event(link: MqttLink, wanted: type) -> object:
    """Return the first event of a class within the patience."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        event = link.receive(1.0)
        if isinstance(event, wanted):
            return event
    raise AssertionError(f"no {wanted.__name__} within {PATIENCE_S} s")


def listening_socket() -> socket.socket:
    """Return a socket that listens on a free port of the loopback."""
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    return taken


def test_broker_keeps_a_retained_message_for_a_later_subscriber(start, connect):
    """What was published with QoS 1 and retained reaches a client that subscribes afterwards."""
    broker = start()
    early = connect(broker, "early")
    early.publish("run/r/0", b"round 3", retain=True)
    early.subscribe("run/#")
    assert await_event(early, Message) == Message("run/r/0", b"round 3")

    late = connect(broker, "late")
    late.subscribe("run/#")

    assert await_event(late, Message) == Message("run/r/0", b"round 3")


def test_broker_says_what_it_is(start):
    """The kind is the program with its version, and the address is on the loopback."""
    broker = start()

    assert broker.kind.split()[0] in ("mosquitto", "amqtt")
    assert broker.kind.split()[1][0].isdigit()
    assert broker.url.startswith("mqtt://127.0.0.1:")
    assert broker.alive()


def test_killed_broker_comes_back_where_it_was(start, connect):
    """After SIGKILL and restart a client that was connected is connected again, by itself."""
    broker = start()
    link = connect(broker, "agent")
    await_event(link, Connected)
    url, pid = broker.url, broker.pid
    os.kill(pid, signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)
    await_event(link, Disconnected)
    psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=PATIENCE_S)
    assert not broker.alive()

    broker.restart()

    assert broker.alive()
    assert (broker.url, broker.pid != pid) == (url, True)
    await_event(link, Connected)


def test_restart_of_a_living_broker_ends_the_old_process(start):
    """There are never two brokers of one run."""
    broker = start()
    pid = broker.pid

    broker.restart()

    assert not psutil.pid_exists(pid)
    assert broker.alive()


def test_stopped_broker_is_gone(start, tmp_path):
    """Stopping leaves neither process nor pid file."""
    broker = start()
    pid = broker.pid

    broker.stop()

    assert not broker.alive()
    assert not psutil.pid_exists(pid)
    assert not (tmp_path / "broker.pid").exists()


def test_port_in_use_is_named(start):
    """A port that somebody else holds is refused before anything is started, with two ways out."""
    with listening_socket() as taken:
        port = taken.getsockname()[1]

        with pytest.raises(BrokerError, match=str(port)) as caught:
            start(port)

    assert "broker.port=0" in caught.value.hint
    assert f"mqtt://127.0.0.1:{port}" in caught.value.hint


def test_asked_port_is_taken(start):
    """A free port that is asked for is the one that the broker gets."""
    with listening_socket() as free:
        port = free.getsockname()[1]

    assert start(port).url == f"mqtt://127.0.0.1:{port}"


@pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed")
def test_oversized_message_is_dropped_by_mosquitto(tmp_path, connect):
    """A message above the wire's limit reaches nobody; the one after it does."""
    assert MOSQUITTO is not None
    with start_mosquitto(MOSQUITTO, tmp_path) as broker:
        reader, writer = connect(broker, "reader"), connect(broker, "writer")
        reader.subscribe("u/#")
        reader.publish("u/0", b"subscribed", retain=True)
        assert await_event(reader, Message) == Message("u/0", b"subscribed")
        writer.publish("u/0", b"x" * (MAX_MESSAGE + 1))
        writer.publish("u/0", b"fair")

        assert await_event(reader, Message) == Message("u/0", b"fair")


def test_running_broker_can_be_used_and_is_left_alone(start):
    """A named broker is greeted, used, and survives our stop."""
    ours = start()

    external = use_broker(ours.url)
    assert (external.kind, external.pid, external.alive()) == ("external", None, True)
    external.stop()

    assert ours.alive()
    ours.stop()
    assert not external.alive()
    with pytest.raises(BrokerError, match="not ours"):
        external.restart()


def test_unreachable_broker_is_told_soon():
    """Nobody listens there: the message has the address, the hint a remedy, within a few seconds."""
    with listening_socket() as taken:
        url = f"mqtt://127.0.0.1:{taken.getsockname()[1]}"

    with pytest.raises(BrokerError, match=url) as caught:
        use_broker(url)

    assert "--broker" in caught.value.hint


def test_something_else_than_a_broker_is_told():
    """A listener that never answers as a broker does is not taken for one."""
    with listening_socket() as mute:
        began = time.monotonic()
        with pytest.raises(BrokerError, match="no answer within 5 s"):
            use_broker(f"mqtt://127.0.0.1:{mute.getsockname()[1]}")
        assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    "url", ["localhost:1883", "http://localhost", "mqtt://", "mqtt://x:99999", "mqtt://x/y"]
)
def test_malformed_address_is_refused(url):
    """Only mqtt://HOST[:PORT] is a broker address."""
    with pytest.raises(BrokerError, match="no broker address"):
        use_broker(url)


def test_no_mosquitto_means_amqtt(tmp_path, monkeypatch):
    """On a machine without mosquitto the fallback is started."""
    monkeypatch.setattr("coordinator.broker.find_mosquitto", lambda: None)

    with open_broker(tmp_path) as broker:
        assert broker.kind.startswith("amqtt ")


def test_broker_that_cannot_start_tells_its_own_words(tmp_path):
    """What the program printed last stands in the error."""
    program = tmp_path / "mosquitto"
    program.write_text(f"#!{sys.executable}\nimport sys\nsys.exit('Error: no listeners today')\n")
    program.chmod(0o755)

    with pytest.raises(BrokerError, match="no listeners today"):
        start_mosquitto(program, tmp_path)


PARENT_OF_A_BROKER = """
import sys
from pathlib import Path
from coordinator.broker import open_broker
print(open_broker(Path(sys.argv[1])).pid, flush=True)
input()
"""


def start_a_parent(folder: Path) -> "tuple[subprocess.Popen[str], int]":
    """Start a process that starts a broker and waits; return it and the broker's pid."""
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT_OF_A_BROKER, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert parent.stdout is not None
    return parent, int(parent.stdout.readline())


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its parent")
def test_broker_dies_with_its_killed_parent(tmp_path):
    """SIGKILL of the coordinator ends its broker too."""
    parent, pid = start_a_parent(tmp_path)
    child = psutil.Process(pid)

    parent.kill()
    parent.communicate()

    assert not psutil.wait_procs([child], timeout=PATIENCE_S)[1]


def test_orphan_is_ended_by_the_next_run(tmp_path):
    """A process whose parent is gone is found by its pid file and ended."""
    child = Child(
        [sys.executable, "-c", "import time; time.sleep(600)"], log=tmp_path / "log", pid_file=tmp_path / "p"
    )
    note = json.loads((tmp_path / "p").read_text())
    note["parent_started"] -= 1000  # as if another process, now gone, had written it
    (tmp_path / "p").write_text(json.dumps(note))

    assert end_orphan(tmp_path / "p")

    assert child.wait(PATIENCE_S) is not None
    assert not (tmp_path / "p").exists()


def test_process_of_a_living_run_is_not_disturbed(tmp_path):
    """A second run in the same folder is refused while the first one lives."""
    parent, pid = start_a_parent(tmp_path)
    try:
        with pytest.raises(StateError, match=f"in use by process {parent.pid}"):
            end_orphan(tmp_path / "broker.pid")
        assert psutil.pid_exists(pid)
    finally:
        parent.kill()
        psutil.Process(pid).kill()
        parent.communicate()


def test_stranger_with_a_recycled_number_is_not_ended(tmp_path):
    """A pid file is believed only if the process began when the file says."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as stranger:
        note = {"pid": stranger.pid, "started": 1.0, "parent": 1, "parent_started": 1.0}
        (tmp_path / "p").write_text(json.dumps(note))

        assert not end_orphan(tmp_path / "p")

        assert stranger.poll() is None
        stranger.kill()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": "x"}', "null"])
def test_damaged_pid_file_is_removed(tmp_path, text):
    """A pid file that says nothing is no reason to stop."""
    (tmp_path / "p").write_text(text)

    assert not end_orphan(tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_child_that_ignores_the_request_is_killed(tmp_path):
    """After the grace a deaf process is ended for good."""
    deaf = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "print('deaf', flush=True); time.sleep(600)"
    )
    child = Child([sys.executable, "-u", "-c", deaf], log=tmp_path / "log")
    deadline = time.monotonic() + PATIENCE_S
    while b"deaf" not in (tmp_path / "log").read_bytes() and time.monotonic() < deadline:
        assert child.wait(0.02) is None

    child.stop(grace_s=0.1)

    assert not child.alive()
