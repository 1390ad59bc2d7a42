"""A flashed image on an emulated 64-bit Arm board with 512 MB trains beside agents of this machine.

One board lives through all the tests below, in their order; `make board-test` builds it and runs them.
"""

import functools
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from coordinator.broker import start_mosquitto
from coordinator.cli import main
from coordinator.config import load_experiment
from coordinator.flash.card import FOLDER
from coordinator.flash.volume import boot_volume_of_image
from coordinator.plans import plan_of
from coordinator.progress import LineProgress
from coordinator.rounds import Rounds, Terms
from coordinator.scalar_log import ScalarLog
from coordinator.service import Service
from coordinator.testbed import prepare
from edge_agent.bundle import read_bundle
from edge_agent.link import MqttLink
from edge_agent.topics import Topics
from tests.board.emulator import EmulatedBoard

pytestmark = [pytest.mark.board, pytest.mark.timeout(1500)]

ROOT = Path(__file__).resolve().parents[2]
ROUNDS = 20
EXPERIMENT = f"""\
name = "board-test"
seed = 7
rounds = {ROUNDS}
[model]
name = "lenet"
[data]
path = "images.npz"
[pruning]
method = "ntk"
density = 0.5
[method]
name = "hiso"
learning_rate = 0.01
perturbations = 8
batch_size = 16
[[devices]]
profile = "pi-zero-2w"
count = 3
"""
BOARD = "pi-zero-2w-1"
FIRST_BOOT_S = 900.0


class Fleet:
    """A coordinator, a broker, two agents of this machine, and the emulated board."""

    def __init__(self, work: Path, built: Path) -> None:
        self.work = work
        digits = np.load(ROOT / "examples/digits.npz")
        images = {key: enlarged(digits[key]) if key.startswith("x") else digits[key] for key in digits.files}
        np.savez(work / "images.npz", **images)
        (work / "board.toml").write_text(EXPERIMENT)
        self.experiment = load_experiment(work / "board.toml", [])
        self.run = work / "run"
        prepare(self.experiment, self.run, observer=LineProgress(sys.stderr))
        self.broker = start_mosquitto(Path("/usr/sbin/mosquitto"), work)
        self.card = work / "card.img"
        port = self.broker.url.rpartition(":")[2]
        told = [
            "--broker",
            f"mqtt://10.0.2.2:{port}",
            "--bundle",
            str(self.run / "bundle"),
            "--python",
            "3.13",
        ]
        told += [
            "--name",
            BOARD,
            "--profile",
            "pi-zero-2w",
            "--data",
            str(self.run / "agents/{name}/data.npz"),
        ]
        assert main(["flash", "image", str(built / "card.img"), "-o", str(self.card), *told]) == 0
        self.board = EmulatedBoard(built, self.card, work)
        self.service: Service | None = None
        self.agents: list[subprocess.Popen[bytes]] = []
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._coordinate, daemon=True)

    def start(self) -> None:
        """Power everything on."""
        self.board.power_on()
        for name in ("pi-zero-2w-2", "pi-zero-2w-3"):
            home = self.run / "agents" / name
            words = ["--broker", self.broker.url, "--run", "board-test", "--name", name, "--state", str(home)]
            words += ["--bundle", str(self.run / "bundle"), "--data", str(home / "data.npz")]
            with (self.work / f"{name}.log").open("wb") as log:
                command = [sys.executable, "-m", "edge_agent", *words]
                self.agents.append(subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log))
        self._thread.start()

    def stop(self) -> None:
        """End everything."""
        self._ending.set()
        self._thread.join(30)
        for agent in self.agents:
            agent.terminate()
            agent.wait(20)
        self.board.cut_power()
        self.broker.stop()

    def status(self) -> dict[str, object]:
        """Return the board's last status."""
        return dict(self.service.statuses.get(BOARD, {})) if self.service else {}

    def until(self, wanted, *, within_s: float) -> dict[str, object]:
        """Return the board's status once it is as wanted."""
        deadline = time.monotonic() + within_s
        while not wanted(self.status()):
            assert self.board.alive(), "the emulator ended"
            assert time.monotonic() < deadline, (
                f"{self.status()}\n{self.board.log.read_text(errors='replace')[-2000:]}"
            )
            time.sleep(0.5)
        return self.status()

    def _coordinate(self) -> None:
        bundle = read_bundle(self.run / "bundle")
        with ScalarLog.open(self.run / "log.sqlite") as log:
            rounds = Rounds(
                fleet=3, epoch=log.next_epoch(), replica=bundle.replica(), seed=7,
                terms_of=lambda _: Terms(
                    lambda round_: plan_of(self.experiment, bundle, round_), ROUNDS, 16, False, None, None,
                    1200.0, 5.0,
                ),
            )  # fmt: skip
            self.rounds = rounds
            link = MqttLink(self.broker.url, client_id="coordinator")
            self.service = Service(
                link=link, topics=Topics("scalarfed", "board-test"), log=log, rounds=rounds,
                agents=[agent.name for agent in self.experiment.agents], bundle_identity=bundle.identity,
            )  # fmt: skip
            self.service.start()
            while not self._ending.is_set():
                self.service.pump(0.2)
            link.close()


def enlarged(x):
    """Return 8x8 digits as 28x28 images."""
    blocks = np.kron(x.reshape(-1, 8, 8) * 15, np.ones((1, 3, 3)))
    return np.pad(blocks, ((0, 0), (2, 2), (2, 2))).astype(np.uint8)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    """Return the fleet with the board on its way."""
    built = Path(os.environ.get("BOARD", ROOT / "build/board"))
    if not (built / "card.img").exists():
        pytest.skip("`make board-test` builds the board first")
    os.environ["SCALARFED_BOOK"] = str(tmp_path_factory.mktemp("book") / "boards.json")
    made = Fleet(tmp_path_factory.mktemp("board"), built)
    try:
        made.start()
        yield made
    finally:
        made.stop()


@functools.cache
def say(text: str) -> None:
    """Print a figure, for the notebook."""
    print(f"\n[board] {text}", flush=True)


def test_the_first_boot_ends_in_the_run(fleet):
    """With no internet, from cloud-init's NoCloud seed, the board installs itself and joins."""
    started = time.monotonic()
    status = fleet.until(lambda told: told.get("state") in ("ready", "closed"), within_s=FIRST_BOOT_S)
    say(f"joined {time.monotonic() - started:.0f} s after power on; {json.dumps(status)}")

    assert fleet.board.ask("uname -m") == "aarch64"
    assert "done " in fleet.board.ask(f"cat /boot/firmware/{FOLDER}/report.txt")
    assert "NoCloud" in fleet.board.ask(
        "cloud-init query platform datasource; cat /run/cloud-init/result.json"
    )


def test_the_board_trains_to_the_same_bits(fleet):
    """After 20 rounds the Arm board's replica has the digest of the x86 agents and the coordinator."""
    status = fleet.until(lambda told: told.get("round") == ROUNDS, within_s=600)
    digests = {name: told.get("digest") for name, told in fleet.service.statuses.items()}
    say(f"digests {digests}, estimates {status['estimates']}")

    assert fleet.rounds.finished
    assert status["estimates"] == ROUNDS
    assert status["digest"] == f"{fleet.rounds.replica.digest():016x}"


def test_the_agent_is_small(fleet):
    """The agent's proportional set size on LeNet is at most 70 MiB, after training."""
    rows = fleet.board.ask("cat /proc/$(systemctl show -P MainPID scalarfed-agent)/smaps_rollup").splitlines()
    pss = next(int(row.split()[1]) for row in rows if row.startswith("Pss:")) / 1024
    say(f"PSS {pss:.1f} MiB of {fleet.status()['budget_mib']} MiB, RSS {fleet.status()['rss_mib']} MiB")

    assert pss <= 70
    assert fleet.status()["enforcement"] == "cgroup v2 root"


def test_the_token_is_gone_from_the_card(fleet):
    """board.json is not on the boot partition any more, and what stands there is what was flashed."""
    names = fleet.board.ask(f"ls /boot/firmware/{FOLDER}").split()

    assert "report.txt" in names
    assert "board.json" not in names


def test_a_memory_hog_is_killed_and_the_board_rejoins(fleet):
    """Beyond MemoryMax the kernel kills within the agent's own cgroup; systemd starts it, and it is back."""
    before = fleet.status()["pid"]
    group = "/sys/fs/cgroup/system.slice/scalarfed-agent.service"
    hog = "x=[]; [x.append(bytearray(8<<20)) for _ in range(40)]"
    fleet.board.ask(f"sh -c 'echo $$ >{group}/cgroup.procs; exec python3 -c \"{hog}\"'", within_s=120)
    started = time.monotonic()
    fleet.until(
        lambda told: told.get("pid") not in (None, before) and told["state"] != "offline", within_s=200
    )
    say(f"back {time.monotonic() - started:.0f} s after the kill")

    assert "oom-kill" in fleet.board.ask("journalctl -u scalarfed-agent -b --no-pager -o cat | tail -40")
    assert "agent ended: oom-kill" in fleet.board.ask(f"cat /boot/firmware/{FOLDER}/report.txt")


def test_a_hang_is_ended_by_the_watchdog(fleet):
    """An agent that stands still is ended and started anew."""
    folder = "/run/systemd/system/scalarfed-agent.service.d"
    shorter = "printf '[Service]\\nWatchdogSec=20\\nTimeoutAbortSec=5\\n'"
    fleet.board.ask(
        f"mkdir -p {folder}; {shorter} >{folder}/quick.conf; systemctl daemon-reload", within_s=60
    )
    fleet.board.ask("systemctl restart scalarfed-agent", within_s=200)
    status = fleet.until(lambda told: told.get("state") in ("ready", "closed"), within_s=200)
    before = fleet.board.ask("systemctl show -P MainPID scalarfed-agent")
    fleet.board.ask(f"kill -STOP {before}")
    started = time.monotonic()
    fleet.until(lambda told: told.get("pid") not in (None, status["pid"], int(before)), within_s=200)
    say(f"a new agent {time.monotonic() - started:.0f} s after the hang")

    assert "agent ended: watchdog" in fleet.board.ask(f"cat /boot/firmware/{FOLDER}/report.txt")


def test_the_card_tells_what_happened(fleet):
    """Switched off, the card's report names the last bad end, and the secret is nowhere on its FAT."""
    fleet.board.power_off()
    with boot_volume_of_image(fleet.card, writable=False) as volume:
        assert not volume.exists(f"{FOLDER}/board.json")
    assert main(["doctor", str(fleet.card)]) == 1
