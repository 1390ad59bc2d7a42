"""A bench for flashing without a network: a bundle, a cache of small wheels, a book of boards of its own."""

import hashlib
import os
import subprocess
import sysconfig
import threading
import time
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from coordinator.actions import Terms
from coordinator.authority import Authority
from coordinator.broker import find_mosquitto, start_amqtt, start_mosquitto
from coordinator.enrolment import add_enrolment, server_context
from coordinator.flash.payload import REQUIREMENTS, Payload, Target, kernel_path, make_payload
from coordinator.flash.settings import Credentials, Settings
from coordinator.guard import Guard
from coordinator.rounds import Rounds
from coordinator.scalar_log import ScalarLog
from coordinator.service import Service
from coordinator.web import WebServer
from edge_agent.bundle import read_bundle
from edge_agent.link import Link, MqttLink
from edge_agent.native.kernel import find_kernel
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
    """Return a cache of wheels that holds one small wheel per target, as if fetched, and stand-in kernels."""
    for target in targets:
        kernel = kernel_path(target.arch, cache=folder)
        kernel.parent.mkdir(parents=True, exist_ok=True)
        kernel.write_bytes(b"a kernel")
        known = hashlib.sha256("\n".join(REQUIREMENTS).encode()).hexdigest()[:8]
        inner = folder / f"{target.arch}-cp{target.python.replace('.', '')}-{known}"
        inner.mkdir(parents=True)
        with zipfile.ZipFile(inner / "small-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr("small.py", np.random.default_rng(1).bytes(size))
    return folder


def make_real_cache(folder: Path, target: Target, *, change: str = "") -> Path:
    """Return a cache whose wheel lends a board this Python's own packages, so that a real agent runs there.

    Args:
        folder: Of the cache.
        target: Which must be this machine and this Python.
        change: Python that a board runs at each start; another text makes another release.
    """
    known = hashlib.sha256("\n".join(REQUIREMENTS).encode()).hexdigest()[:8]
    inner = folder / f"{target.arch}-cp{target.python.replace('.', '')}-{known}"
    inner.mkdir(parents=True, exist_ok=True)
    kernel = kernel_path(target.arch, cache=folder)
    if not kernel.exists() and (own := find_kernel()):
        kernel.parent.mkdir(parents=True, exist_ok=True)
        kernel.write_bytes(own.file.read_bytes())
    with zipfile.ZipFile(inner / "lent-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(zipfile.ZipInfo("lent.pth"), sysconfig.get_path("purelib") + "\n")
        wheel.writestr(zipfile.ZipInfo("change.pth"), f"import sys; {change or 'pass'}\n")
    return folder


class InstalledBoard:
    """A board installed by the real installer into a root of its own, kept running as its units say.

    Plays systemd: guard, agent, guard, again and again; root's helper whenever something lies in ``asks``.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.opt, self.state = root / "opt/scalarfed", root / "var/lib/scalarfed"
        self.said = ""
        self._ending = threading.Event()
        self._agent: subprocess.Popen[bytes] | None = None
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._keep, self._care)]

    def install(self, payload: Payload, folder: Path) -> None:
        """Install from a folder, as a first boot does."""
        for path, data in payload.files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(data)
        self._sh(folder / "install.sh", "--root", str(self.root), "--no-start")

    def start(self) -> None:
        """Power on."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Power off."""
        self._ending.set()
        self._end_agent()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(30)

    @property
    def release(self) -> str:
        """The current release."""
        return os.readlink(self.opt / "current").removeprefix("releases/")

    def _keep(self) -> None:
        env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        while not self._ending.is_set():
            self._sh(self.opt / "guard.sh", "before", str(self.root))
            settings = self.root / "etc/scalarfed/board.json"
            words = ["-m", "edge_agent.service", str(settings), str(self.state), str(self.opt)]
            with (self.root / "agent.log").open("ab") as log:
                command = [str(self.opt / "current/venv/bin/python"), *words]
                self._agent = subprocess.Popen(command, cwd="/", env=env, stdout=log, stderr=log)
            self._agent.wait()
            self._ending.wait(0.1)

    def _care(self) -> None:
        asks = self.state / "asks"
        while not self._ending.wait(0.1):
            if any(asks.iterdir()):
                before = (self.release, (self.state / "bundle/manifest.json").read_bytes())
                self._sh(self.opt / "care.sh", str(self.root), str(self.root / "leds"))
                if before != (self.release, (self.state / "bundle/manifest.json").read_bytes()):
                    self._end_agent()  # the installer would have started it anew

    def _end_agent(self) -> None:
        if self._agent is not None and self._agent.poll() is None:
            self._agent.terminate()
            try:
                self._agent.wait(20)
            except subprocess.TimeoutExpired:
                self._agent.kill()

    def _sh(self, script: Path, *words: str) -> None:
        env = os.environ | {"SCALARFED_MEASURE_S": "0.1"}
        done = subprocess.run(
            ["sh", str(script), *words], capture_output=True, text=True, env=env, check=False
        )
        self.said += done.stdout + done.stderr
        assert done.returncode == 0, done.stdout + done.stderr


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
    """A broker and a coordinator with one open run, for agents that come from elsewhere.

    Args:
        folder: Is made.
        bundle: Of the run.
        agents: Their names.
        rounds: How many.
        run: Its name.
        beside: Another one, whose broker serves this one too.
        authority: Protects the broker, and enrols boards at ``enrol_url``.

    Attributes:
        url: Where agents find the broker.
    """

    def __init__(
        self,
        folder: Path,
        bundle: Path,
        agents: list[str],
        *,
        rounds: int = 3,
        run: str = "linear",
        beside: "Coordinator | None" = None,
        authority: Authority | None = None,
    ) -> None:
        program = find_mosquitto()
        folder.mkdir(parents=True, exist_ok=True)
        self._guard: Guard | None = None
        self._web: WebServer | None = None
        self._run_name, self._own_broker = run, beside is None
        if beside is not None:
            self.broker = beside.broker
        elif authority is not None:
            self._guard = Guard(authority, folder)
            self.broker = self._guard.start(folder)
            identity = authority.server_identity()
            self._web = WebServer(tls=lambda: server_context(authority, identity))
            add_enrolment(self._web, authority)
            self.enrol_url = self._web.url
        else:
            self.broker = start_mosquitto(program, folder) if program else start_amqtt(folder)
        self.url = self.broker.agents_url
        self.statuses: dict[str, dict[str, object]] = {}
        self._bundle, self._agents, self._rounds, self._folder = read_bundle(bundle), agents, rounds, folder
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End both."""
        self._ending.set()
        self._thread.join(20)
        if self._web is not None:
            self._web.close()
        if self._own_broker:
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
        told = {"bundle": self._bundle.identity, "name": self._run_name}
        with ScalarLog.create(self._folder / "own-log.sqlite", told) as log:
            log.set_agents([(n, name, "", 128.0, 64.0) for n, name in enumerate(self._agents)])
            rounds = Rounds(
                fleet=len(self._agents), epoch=1, replica=self._bundle.replica(), seed=1,
                terms_of=lambda _: Terms(plan_of, self._rounds, 8, False, None, None, 60.0, 1.0),
            )  # fmt: skip
            topics = Topics("scalarfed", self._run_name)
            carrier: MqttLink
            link: Link
            if self._guard is not None:
                carrier, link = self._guard.link(topics)
            else:
                link = carrier = MqttLink(self.broker.url, client_id=f"coordinator-{self._run_name}")
            service = Service(
                link=link, topics=topics, log=log, rounds=rounds,
                agents=self._agents, bundle_identity=self._bundle.identity,
            )  # fmt: skip
            service.start()
            while not self._ending.is_set():
                service.pump(0.1)
                if self._guard is not None:
                    self._guard.watch()
                self.statuses = dict(service.statuses)
            carrier.close()
