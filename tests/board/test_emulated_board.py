"""A flashed image on an emulated 64-bit Arm board with 512 MB trains beside agents of this machine.

One board lives through all the tests below, in their order; `make board-test` builds it and runs them. All
of it is protected: the board enrols with the token of its card, and speaks over mutual TLS.
"""

import functools
import json
import mmap
import os
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

from coordinator.authority import Authority, default_folder
from coordinator.cli import main
from coordinator.config import load_experiment
from coordinator.enrolment import add_enrolment, server_context
from coordinator.flash.card import FOLDER
from coordinator.flash.payload import Target, cache_folder, fetch_wheels
from coordinator.flash.volume import boot_volume_of_image
from coordinator.guard import Guard
from coordinator.open_run import rounds_of
from coordinator.progress import LineProgress
from coordinator.scalar_log import ScalarLog
from coordinator.service import Service
from coordinator.testbed import prepare
from coordinator.web import WebServer
from edge_agent.bundle import read_bundle
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
[fleet]
deadline_s = 1200
resend_s = 5
[[devices]]
profile = "pi-zero-2w"
count = 3
"""
BOARD = "pi-zero-2w-1"
HOST = "10.0.2.2"  # this machine, as qemu shows it to the board
FAT_END = (8 + 256) << 20  # as build.sh lays out the card
FIRST_BOOT_S = 900.0
UPDATE_S = 900.0
ARM = Target("3.13")


class Fleet:
    """A coordinator, a broker, two agents of this machine, and the emulated board."""

    def __init__(self, work: Path, built: Path) -> None:
        self.work = work
        self.run = built / "run"  # kept: only its log is of one test alone
        (work / "board.toml").write_text(EXPERIMENT)
        digits = np.load(ROOT / "examples/digits.npz")
        images = {key: enlarged(digits[key]) if key.startswith("x") else digits[key] for key in digits.files}
        np.savez(work / "images.npz", **images)
        self.experiment = load_experiment(work / "board.toml", [])
        shutil.rmtree(self.run, ignore_errors=True)
        prepare(self.experiment, self.run, observer=LineProgress(sys.stderr))
        self.authority = Authority.create(default_folder())
        self.guard = Guard(self.authority, work)
        self.broker = self.guard.start(work, host="0.0.0.0", names=[HOST])
        identity = self.authority.server_identity([HOST])
        self.web = WebServer(host="0.0.0.0", tls=lambda: server_context(self.authority, identity))
        add_enrolment(self.web, self.authority)
        self.card = work / "card.img"
        self.port = self.broker.agents_url.rpartition(":")[2]
        told = ["--broker", f"mqtts://{HOST}:{self.port}", "--enrol", f"https://{HOST}:{self.web.port}"]
        told += ["--bundle", str(self.run / "bundle"), "--python", ARM.python, "--name", BOARD]
        told += ["--profile", "pi-zero-2w", "--data", str(self.run / "agents/{name}/data.npz")]
        assert main(["flash", "image", str(built / "card.img"), "-o", str(self.card), *told]) == 0
        with boot_volume_of_image(self.card, writable=False) as volume:
            self.token = json.loads(volume.read(f"{FOLDER}/board.json"))["ticket"]["token"]
        self.board = EmulatedBoard(built, self.card, work)
        self.service: Service | None = None
        self.joined = False
        self.agents: list[subprocess.Popen[bytes]] = []
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._coordinate, daemon=True)

    def start(self) -> None:
        """Power everything on."""
        self.board.power_on()
        for name in ("pi-zero-2w-2", "pi-zero-2w-3"):
            home = self.run / "agents" / name
            self.authority.device_identity(name, home / "security")
            words = ["--broker", self.broker.agents_url, "--run", "board-test", "--name", name]
            words += ["--bundle", str(self.run / "bundle"), "--data", str(home / "data.npz")]
            words += ["--state", str(home), "--security", str(home / "security")]
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
        self.web.close()
        self.broker.stop()

    def status(self) -> dict[str, object]:
        """Return the board's last status."""
        return dict(self.service.statuses.get(BOARD, {})) if self.service else {}

    def until(self, wanted, *, within_s: float) -> dict[str, object]:
        """Return the board's status once it is as wanted."""
        deadline = time.monotonic() + within_s
        while not wanted(self.status()):
            assert self.board.alive(), "the emulator ended"
            assert self._thread.is_alive(), "the coordinator ended"
            assert time.monotonic() < deadline, (
                f"{self.status()}\n{self.board.log.read_text(errors='replace')[-3000:]}"
            )
            time.sleep(0.5)
        return self.status()

    def _coordinate(self) -> None:
        bundle = read_bundle(self.run / "bundle")
        topics = Topics("scalarfed", "board-test")
        with ScalarLog.open(self.run / "log.sqlite") as log:
            rounds = rounds_of(self.experiment, bundle, bundle.replica(), epoch=log.next_epoch())
            self.rounds = rounds
            carrier, link = self.guard.link(topics)
            self.service = Service(
                link=link, topics=topics, log=log, rounds=rounds,
                agents=[agent.name for agent in self.experiment.agents], bundle_identity=bundle.identity,
            )  # fmt: skip
            self.service.start()
            while not self._ending.is_set():
                self.service.pump(0.2)
                self.guard.watch()
            carrier.close()


def enlarged(x):
    """Return 8x8 digits as 28x28 images."""
    blocks = np.kron(x.reshape(-1, 8, 8) * 15, np.ones((1, 3, 3)))
    return np.pad(blocks, ((0, 0), (2, 2), (2, 2))).astype(np.uint8)


def other_release(text: str) -> None:
    """Put one more wheel among those that boards get, so that there is another release to update to."""
    (folder,) = cache_folder().glob(f"{ARM.arch}-cp{ARM.python.replace('.', '')}-*")
    with zipfile.ZipFile(folder / "change-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(zipfile.ZipInfo("change.pth"), f"import sys; {text}\n")


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    """Return the fleet with the board on its way."""
    built = Path(os.environ.get("BOARD", ROOT / "build/board"))
    if not (built / "card.img").exists():
        pytest.skip("`make board-test` builds the board first")
    wheels = fetch_wheels(ARM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SCALARFED_BOOK", str(tmp_path_factory.mktemp("book") / "boards.json"))
        patch.setenv("XDG_DATA_HOME", str(tmp_path_factory.mktemp("share")))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        own = cache_folder() / wheels[0].parent.name
        own.mkdir(parents=True)
        for wheel in wheels:
            shutil.copy(wheel, own)
        made = Fleet(tmp_path_factory.mktemp("board"), built)
        try:
            made.start()
            yield made
        finally:
            made.stop()


@pytest.fixture(autouse=True)
def _needs_a_board_that_joined(request, fleet):
    """Skip what could only wait for a board that never joined."""
    if not fleet.joined and "first_boot" not in request.node.name:
        pytest.skip("the board did not join")


@functools.cache
def say(text: str) -> None:
    """Print a figure, for the notebook."""
    print(f"\n[board] {text}", flush=True)


def test_the_first_boot_ends_in_the_run(fleet):
    """With no internet, from cloud-init's NoCloud seed, the board installs itself, enrols and joins."""
    started = time.monotonic()
    status = fleet.until(lambda told: told.get("state") in ("ready", "closed"), within_s=FIRST_BOOT_S)
    fleet.joined = True
    say(f"joined {time.monotonic() - started:.0f} s after power on; {json.dumps(status)}")

    assert fleet.board.ask("uname -m") == "aarch64"
    report = fleet.board.ask(f"cat /boot/firmware/{FOLDER}/report.txt")
    say(report)
    assert "done " in report
    assert "NoCloud" in fleet.board.ask(
        "cloud-init query platform datasource; cat /run/cloud-init/result.json"
    )
    assert {one.name for one in fleet.authority.certificates()} >= {BOARD}


def test_the_board_trains_to_the_same_bits(fleet):
    """After 20 rounds the Arm board's replica has the digest of the x86 agents and the coordinator."""
    fleet.until(lambda told: told.get("round") == ROUNDS, within_s=600)
    names = [f"pi-zero-2w-{number}" for number in (1, 2, 3)]
    for name in names:
        fleet.until(lambda _, name=name: fleet.service.statuses[name].get("round") == ROUNDS, within_s=60)
    digests = {name: fleet.service.statuses[name].get("digest") for name in names}
    say(f"digests {digests}, estimates {fleet.status()['estimates']}")

    assert fleet.rounds.finished
    assert fleet.status()["estimates"] == ROUNDS
    assert set(digests.values()) == {f"{fleet.rounds.replica.digest():016x}"}


def test_the_agent_is_small(fleet):
    """The agent's proportional set size on LeNet is at most 70 MiB, after training."""
    rows = fleet.board.ask("cat /proc/$(systemctl show -P MainPID scalarfed-agent)/smaps_rollup").splitlines()
    pss = next(int(row.split()[1]) for row in rows if row.startswith("Pss:")) / 1024
    say(f"PSS {pss:.1f} MiB of {fleet.status()['budget_mib']} MiB; {fleet.status()}")
    say("; ".join(" ".join(row.split()) for row in rows))

    assert pss <= 70
    assert fleet.status()["enforcement"] == "cgroup v2 root"


def test_the_token_is_gone_from_the_card(fleet):
    """board.json is not on the boot partition any more, nor the ticket on the board: it is used up."""
    names = fleet.board.ask(f"ls /boot/firmware/{FOLDER}").split()

    assert "report.txt" in names
    assert "board.json" not in names
    assert "ticket" not in fleet.board.ask("ls /var/lib/scalarfed/security; cat /etc/scalarfed/board.json")
    assert fleet.board.ask(f"grep -rl {fleet.token} /etc/scalarfed /var/lib/scalarfed /opt/scalarfed/*") == ""


def test_a_memory_hog_is_killed_and_the_board_rejoins(fleet):
    """Beyond MemoryMax the kernel kills within the agent's own cgroup; systemd starts it, and it is back."""
    before = fleet.status()["pid"]
    group = "/sys/fs/cgroup/system.slice/scalarfed-agent.service"
    hog = "x=[]; [x.append(bytearray(8<<20)) for _ in range(40)]"
    fleet.board.ask(f"sh -c 'echo $$ >{group}/cgroup.procs; exec python3 -c \"{hog}\"'", within_s=120)
    started = time.monotonic()
    fleet.until(
        lambda told: told.get("pid") not in (None, before) and told["state"] in ("ready", "closed"),
        within_s=300,
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
    was = fleet.status()["pid"]
    fleet.board.ask("systemctl restart scalarfed-agent", within_s=200)
    status = fleet.until(
        lambda told: told.get("pid") not in (None, was) and told["state"] in ("ready", "closed"), within_s=200
    )
    fleet.board.ask(f"kill -STOP {status['pid']}")
    started = time.monotonic()
    fleet.until(
        lambda told: told.get("pid") not in (None, status["pid"]) and told["state"] in ("ready", "closed"),
        within_s=300,
    )
    say(f"a new agent {time.monotonic() - started:.0f} s after the hang")
    fleet.board.ask(f"rm {folder}/quick.conf; systemctl daemon-reload", within_s=60)

    assert "agent ended: watchdog" in fleet.board.ask(f"cat /boot/firmware/{FOLDER}/report.txt")


def test_an_update_arrives_and_a_bad_one_is_given_back(fleet, capsys):
    """A release comes over HTTPS, is checked by root, and joins; one that cannot start is given back."""
    first = fleet.status()["release"]
    words = ["update", BOARD, "--address", HOST, "--broker", f"mqtts://127.0.0.1:{fleet.port}"]
    words += ["--wait", str(UPDATE_S)]
    other_release("sys.second = True")
    started = time.monotonic()
    assert main(words) == 0, capsys.readouterr().out
    said = capsys.readouterr().out
    second = fleet.status()["release"]
    say(f"{first} to {second} in {time.monotonic() - started:.0f} s: {said}")
    assert second != first
    assert fleet.status()["state"] in ("ready", "closed")

    other_release("sys.orig_argv[1:3] == ['-m', 'edge_agent.service'] and sys.exit(5)")
    started = time.monotonic()
    assert main(words) == 1
    said = capsys.readouterr().out
    say(f"given back in {time.monotonic() - started:.0f} s: {said}")
    assert "did not join" in said
    assert fleet.board.ask("readlink /opt/scalarfed/current") == f"releases/{second}"


def test_a_wrong_token_and_what_happened_are_told_by_the_card(fleet, capsys):
    """A token that does not count is named by doctor from the card, on whose FAT no secret is left."""
    folder = "/var/lib/scalarfed/security"
    ticket = json.dumps(
        {
            "name": BOARD,
            "url": f"https://{HOST}:{fleet.web.port}",
            "ca_sha256": fleet.authority.fingerprint,
            "token": "a-token-that-nobody-issued",
        }
    )
    fleet.board.ask(f"rm -f {folder}/device.*; echo '{ticket}' >{folder}/ticket.json; "
                    f"chown scalarfed: {folder}/ticket.json; chmod 600 {folder}/ticket.json")  # fmt: skip
    fleet.board.ask("systemctl restart --no-block scalarfed-agent")
    deadline = time.monotonic() + 200
    report = ""
    while "token" not in report.partition("agent ended: exit-code")[2]:
        assert time.monotonic() < deadline, report
        time.sleep(3)
        report = fleet.board.ask(f"cat /boot/firmware/{FOLDER}/report.txt")
    fleet.board.power_off()
    with boot_volume_of_image(fleet.card, writable=False) as volume:
        assert not volume.exists(f"{FOLDER}/board.json")
    capsys.readouterr()
    assert main(["doctor", str(fleet.card)]) == 1
    said = capsys.readouterr().out
    say(said)
    assert "wrong, used or expired token" in said
    assert "its last update was returned" in said
    with fleet.card.open("rb") as file, mmap.mmap(file.fileno(), FAT_END, access=mmap.ACCESS_READ) as fat:
        assert fat.find(b"report.txt") + fat.find(b"agent ended") > 0  # this is where things are
        assert fat.find(fleet.token.encode()) == -1, "the token still lies on the FAT partition"
