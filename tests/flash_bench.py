"""A bench for flashing without a network: a bundle, a cache of small wheels, a book of boards of its own."""

import hashlib
import threading
import time
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from coordinator.broker import find_mosquitto, start_amqtt, start_mosquitto
from coordinator.flash.payload import REQUIREMENTS, Payload, Target, make_payload
from coordinator.flash.settings import Credentials, Settings
from coordinator.rounds import Rounds, Terms
from coordinator.scalar_log import ScalarLog
from coordinator.service import Service
from edge_agent.bundle import read_bundle
from edge_agent.link import MqttLink
from edge_agent.topics import Topics
from tests.fleet import plan_of
from tests.made_run import make_replayable_run

TOKEN = "tok-0123456789abcdef"


def make_bundle(folder: Path) -> Path:
    """Return the folder of a real bundle: a linear net with 4 inputs and 3 classes."""
    folder.mkdir(parents=True, exist_ok=True)
    return make_replayable_run(folder, rounds=1) / "bundle"


def make_data(path: Path) -> Path:
    """Return samples for that net."""
    rng = np.random.default_rng(2)
    x = rng.normal(size=(60, 4)).astype(np.float32)
    y = rng.integers(0, 3, 60)
    np.savez(path, x_train=x, y_train=y, x_test=x[:9], y_test=y[:9])
    return path


def make_cache(folder: Path, *targets: Target, size: int = 2000) -> Path:
    """Return a cache of wheels that holds one small wheel per target, as if fetched."""
    for target in targets:
        known = hashlib.sha256("\n".join(REQUIREMENTS).encode()).hexdigest()[:8]
        inner = folder / f"{target.arch}-cp{target.python.replace('.', '')}-{known}"
        inner.mkdir(parents=True)
        with zipfile.ZipFile(inner / "small-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr("small.py", np.random.default_rng(1).bytes(size))
    return folder


def make_board(
    tmp_path: Path, *, target: Target | None = None, name: str = "pi-1", size: int = 2000
) -> Payload:
    """Return a payload for a board, with a token."""
    target = target or Target("3.13")
    settings = Settings(name, "mqtt://192.0.2.1", "linear", 128, credentials=Credentials(TOKEN, "ab" * 32))
    cache = tmp_path / "cache"
    if not cache.exists():
        make_cache(cache, target, size=size)
    bundle = tmp_path / "run" / "bundle"
    if not bundle.exists():
        make_bundle(tmp_path / "run")
    return make_payload(target, settings, bundle=bundle, cache=cache)


class Coordinator:
    """A broker and a coordinator with one open run, for agents that come from elsewhere."""

    def __init__(self, folder: Path, bundle: Path, agents: list[str], *, rounds: int = 3) -> None:
        program = find_mosquitto()
        folder.mkdir(parents=True, exist_ok=True)
        self.broker = start_mosquitto(program, folder) if program else start_amqtt(folder)
        self.statuses: dict[str, dict[str, object]] = {}
        self._bundle, self._agents, self._rounds, self._folder = read_bundle(bundle), agents, rounds, folder
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End both."""
        self._ending.set()
        self._thread.join(20)
        self.broker.stop()

    def until(
        self, name: str, wanted: Callable[[Mapping[str, object]], bool], within_s: float = 60.0
    ) -> None:
        """Wait for a status of an agent."""
        deadline = time.monotonic() + within_s
        while not wanted(self.statuses.get(name, {})):
            assert time.monotonic() < deadline, self.statuses
            time.sleep(0.05)

    def _run(self) -> None:
        told = {"bundle": self._bundle.identity, "name": "linear"}
        with ScalarLog.create(self._folder / "own-log.sqlite", told) as log:
            log.set_agents([(n, name, "", 128.0, 64.0) for n, name in enumerate(self._agents)])
            rounds = Rounds(
                fleet=len(self._agents), epoch=1, replica=self._bundle.replica(), seed=1,
                terms_of=lambda _: Terms(plan_of, self._rounds, 8, False, None, None, 60.0, 1.0),
            )  # fmt: skip
            link = MqttLink(self.broker.url, client_id="coordinator")
            service = Service(
                link=link, topics=Topics("scalarfed", "linear"), log=log, rounds=rounds, agents=self._agents,
                bundle_identity=self._bundle.identity,
            )  # fmt: skip
            service.start()
            while not self._ending.is_set():
                service.pump(0.1)
                self.statuses = dict(service.statuses)
            link.close()
