"""A snapshot too large for a message: offered where it is less than the records, fetched, and checked."""

import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from coordinator.actions import Terms
from coordinator.broker import open_broker
from coordinator.catch_up import CatchUp
from coordinator.rebuild import CHECKPOINT, rebuild_run
from coordinator.rounds import Rounds
from coordinator.scalar_log import ScalarLog
from coordinator.serve_fleet import Shelf
from coordinator.service import Service
from coordinator.web import Request, WebServer
from edge_agent.link import MqttLink
from edge_agent.offer import Offer, decode_offer, encode_offer, is_offer
from edge_agent.plan import RoundPlan
from edge_agent.topics import Topics
from edge_agent.wire import Slice, decode
from profiles.errors import WireError
from tests.made_run import make_replayable_run

OFFER = Offer(3, 500, 1_500_000, 8443, True, bytes(range(32)))


def test_golden_bytes_of_an_offer():
    """51 bytes: head, round, size, port, whether it is secured, SHA-256."""
    assert encode_offer(OFFER).hex() == (
        "0109" "0300" "f4010000" "60e3160000000000" "fb20" "01" + bytes(range(32)).hex()
    )  # fmt: skip
    assert decode_offer(encode_offer(OFFER)) == OFFER
    assert is_offer(encode_offer(OFFER))


def test_an_offer_leads_to_the_brokers_host_alone():
    """The message holds no host: it cannot send an agent elsewhere."""
    assert OFFER.url("laptop.local") == f"https://laptop.local:8443/snapshots/{bytes(range(32)).hex()}"
    assert OFFER.url("fd00::1").startswith("https://[fd00::1]:8443/")


@pytest.mark.parametrize("change", [slice(0, 1), slice(1, 2), slice(50, 51)])
def test_what_is_no_offer_is_refused(change):
    """A byte less is no offer, and neither is one of size or port zero."""
    data = bytearray(encode_offer(OFFER))
    del data[change]
    with pytest.raises(WireError):
        decode_offer(bytes(data))
    for wrong in (Offer(1, 1, 0, 1, True, b"h" * 32), Offer(1, 1, 1, 0, True, b"h" * 32)):
        with pytest.raises(WireError):
            decode_offer(encode_offer(wrong))


@pytest.fixture
def run(tmp_path):
    """A run of 120 rounds with its checkpoint at the end."""
    return make_replayable_run(tmp_path / "run", rounds=120)


def test_the_snapshot_is_offered_three_times_and_then_come_records(run):
    """Whoever cannot fetch is not left alone: the fourth answer is a slice."""
    bundle, replica = rebuild_run(run)
    with ScalarLog.open(run / "log.sqlite") as log:
        late = CatchUp(
            log,
            run="linear",
            epoch=1,
            identities=[bundle.identity],
            checkpoint=run / CHECKPOINT,
            web=(8080, False),
        )
        late.take_snapshot(replica)
        late._snapshots.clear()  # as if it were beyond a message
        assert [is_offer(late.answer("late", 0)) for _ in range(4)] == [True, True, True, False]
        assert isinstance(decode(late.answer("late", 0)), Slice)
        assert is_offer(late.answer("another", 0))
        assert not is_offer(late.answer("third", 119))
        assert late.stored == decode_offer(late.answer("another", 0))


def test_the_shelf_hands_out_what_was_asked_for_alone(tmp_path):
    """By its hash; an older one is gone."""
    shelf = Shelf(tmp_path / "checkpoint")

    def asked(rest: str):
        return shelf(Request(rest, b"", "127.0.0.1", None, None, {}))

    assert asked("") is None
    shelf.sha256 = "ab" * 32
    assert asked("ab" * 32) == tmp_path / "checkpoint"
    assert asked("cd" * 32) is None
    assert asked("") is None


class Coordinator:
    """A coordinator of the made run at its end, with a broker and a web server, in a thread of its own."""

    def __init__(self, run):
        self.run = run
        self.broker = open_broker(run)
        self.asked = []
        shelf = Shelf(run / CHECKPOINT)

        def hand_out(request):
            self.asked.append(request.rest)
            return shelf(request)

        self.web = WebServer()
        self.web.add_get("/snapshots/", hand_out)
        self.shelf = shelf
        self.status = {}
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self):
        bundle, replica = rebuild_run(self.run)
        plan = RoundPlan(120, 7, 2, 1, 4, 1e-3, 0.05, (0.05, 1e-4, 0.0))
        with ScalarLog.open(self.run / "log.sqlite") as log:
            rounds = Rounds(
                fleet=1,
                terms_of=lambda _: Terms(lambda round_: plan, 120, 4, True, None, None, 60.0, 1.0),
                epoch=log.next_epoch(),
                replica=replica,
                recent=list(log.records(116)),
                seed=1,
            )
            link = MqttLink(self.broker.url, client_id="coordinator")
            service = Service(
                link=link,
                topics=Topics("scalarfed", "linear"),
                log=log,
                rounds=rounds,
                agents=["late"],
                bundle_identity=bundle.identity,
                checkpoint=self.run / CHECKPOINT,
                web=(self.web.port, False),
            )
            service.start()
            service.late._snapshots.clear()  # as if it were beyond a message
            self.shelf.sha256 = service.late.stored.sha256.hex()
            while not self._ending.is_set():
                service.pump(0.05)
                self.status = dict(service.statuses.get("late", {}))
            link.close()

    def close(self):
        self._ending.set()
        self._thread.join(20)
        self.web.close()
        self.broker.stop()


@pytest.mark.timeout(120)
def test_a_late_agent_process_fetches_its_replica(run, tmp_path):
    """A real agent, 120 rounds late, gets one file over HTTP instead of 120 records, and the same digest."""
    _, replica = rebuild_run(run)
    rng = np.random.default_rng(1)
    np.savez(tmp_path / "data.npz", x_train=rng.normal(0, 1, (30, 4)), y_train=np.arange(30) % 3)
    coordinator = Coordinator(run)
    command = [sys.executable, "-m", "edge_agent", "--broker", coordinator.broker.url, "--run", "linear"]
    command += ["--name", "late", "--bundle", str(run / "bundle"), "--data", str(tmp_path / "data.npz")]
    try:
        with subprocess.Popen([*command, "--state", str(tmp_path / "state")]) as agent:
            deadline = time.monotonic() + 60
            while coordinator.status.get("round") != 120:
                assert agent.poll() is None
                assert time.monotonic() < deadline, coordinator.status
            agent.terminate()
    finally:
        coordinator.close()
    assert coordinator.status["digest"] == f"{replica.digest():016x}"
    assert coordinator.asked == [coordinator.shelf.sha256]
    assert not (tmp_path / "state" / "snapshot").exists()
