"""A run among faults: processes are killed, links cut, messages repeated, late and out of order.

    python -m benchmarks.chaos --seed 7 --rounds 200 --faults 60 [--collectors 2]

Six agent processes and a coordinator process talk through a faulty proxy to a real mosquitto. The same run
without faults comes first; the last line is a JSON object with both digests. With quorum = all no round may
be lost, and every replica and the log must end with the digest of the run without faults.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from benchmarks.fault_proxy import FaultProxy
from coordinator.broker import Broker, find_mosquitto, start_mosquitto
from coordinator.config import load_experiment
from coordinator.experiment import Experiment
from coordinator.progress import LineProgress
from coordinator.rebuild import rebuild_run
from coordinator.testbed import prepare

ROOT = Path(__file__).resolve().parent.parent
KINDS = (
    "kill agent",
    "kill coordinator",
    "kill broker",
    "cut links",
    "duplicate",
    "delay",
    "reorder",
    "disk full",
)
LEAST_S, MOST_S = 0.2, 1.5
STATE_DISK_KIB = 256


class Process:
    """A process that is killed and started again, its output appended to a file."""

    def __init__(self, command: list[str], log: Path) -> None:
        self.command, self.log = command, log
        self.process: subprocess.Popen[bytes] | None = None
        self.start_at = 0.0
        self.starts = 0

    def start(self) -> None:
        """Start it."""
        one = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                self.command,
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **one},
            )
        self.starts += 1

    def alive(self) -> bool:
        """Return whether it runs."""
        return self.process is not None and self.process.poll() is None

    def kill(self, back_in_s: float) -> None:
        """End it by SIGKILL; it may be started again after a while."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        self.start_at = time.monotonic() + back_in_s

    def stop(self) -> None:
        """Ask it to end, and end it."""
        if self.process is not None and self.alive():
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


class Disk:
    """A place for an agent's state that can be full: a small tmpfs, or else a limit on files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={STATE_DISK_KIB}k", "tmpfs", str(folder)]
        self.mounted = (
            sys.platform == "linux"
            and subprocess.run(mount, capture_output=True, check=False).returncode == 0
        )
        self.full_until = 0.0

    def fill(self, agent: Process, seconds: float) -> None:
        """Leave no room for a while."""
        self.full_until = time.monotonic() + seconds
        if self.mounted:
            with contextlib.suppress(OSError), (self.folder / "filler").open("wb") as filler:
                while True:
                    filler.write(bytes(4096))
                    filler.flush()
        elif agent.process is not None and agent.alive():
            self._limit(agent, 4096)

    def free(self, agent: Process) -> None:
        """Make room."""
        self.full_until = 0.0
        if self.mounted:
            (self.folder / "filler").unlink(missing_ok=True)
        elif agent.alive():
            self._limit(agent, -1)

    def close(self) -> None:
        """Take the tmpfs away."""
        if self.mounted:
            subprocess.run(["umount", "-l", str(self.folder)], check=False, capture_output=True)

    @staticmethod
    def _limit(agent: Process, size: int) -> None:
        if sys.platform == "linux" and agent.process is not None:
            import resource

            limits = (size, resource.RLIM_INFINITY)
            resource.prlimit(agent.process.pid, resource.RLIMIT_FSIZE, limits)


def rounds_done(log: Path) -> int:
    """Return how many rounds are in a log that another process writes."""
    try:
        with contextlib.closing(sqlite3.connect(f"{log.as_uri()}?mode=ro", uri=True, timeout=5)) as db:
            return int(db.execute("SELECT COALESCE(MAX(round) + 1, 0) FROM records").fetchone()[0])
    except sqlite3.Error:
        return 0


class Fleet:
    """All processes of one run."""

    def __init__(self, run: Path, experiment: Experiment, seed: int) -> None:
        self.run = run
        program = find_mosquitto()
        if program is None:
            raise SystemExit("chaos needs mosquitto")
        self.broker: Broker = start_mosquitto(program, run)
        self.proxy = FaultProxy(int(self.broker.url.rpartition(":")[2]), seed=seed)
        url = f"mqtt://127.0.0.1:{self.proxy.port}"
        python = sys.executable
        self.coordinator = Process(
            [python, "-m", "coordinator.serve", str(run), url], run / "coordinator.log"
        )
        self.agents: dict[str, Process] = {}
        self.disks: dict[str, Disk] = {}
        for agent in experiment.agents:
            home = run / "agents" / agent.name
            self.disks[agent.name] = Disk(home / "state")
            options = ["--broker", url, "--run", experiment.name, "--name", agent.name]
            options += ["--bundle", str(run / "bundle"), "--data", str(home / "data.npz")]
            options += ["--state", str(home / "state"), "--save-every-s", "0.5"]
            self.agents[agent.name] = Process([python, "-m", "edge_agent", *options], home / "agent.log")
        self.broker_back_at = 0.0

    def start(self) -> None:
        """Start the agents and the coordinator."""
        for process in (*self.agents.values(), self.coordinator):
            process.start()

    def watch(self) -> None:
        """Start again what was killed, when its time has come; end what a fault does for a while."""
        now = time.monotonic()
        if self.broker_back_at and now >= self.broker_back_at:
            self.broker_back_at = 0.0
            self.broker.restart()
        for process in self.agents.values():
            if not process.alive() and now >= process.start_at:
                process.start()
        coordinator = self.coordinator
        if not coordinator.alive() and now >= coordinator.start_at and not self.finished():
            coordinator.start()
        for name, disk in self.disks.items():
            if disk.full_until and now >= disk.full_until:
                disk.free(self.agents[name])

    def finished(self) -> bool:
        """Return whether the coordinator ended by itself and well."""
        process = self.coordinator.process
        return process is not None and process.poll() == 0

    def strike(self, kind: str, chance: random.Random) -> None:
        """Do one fault."""
        name = chance.choice(sorted(self.agents))
        pause_s = chance.uniform(LEAST_S, MOST_S)
        if kind == "kill agent":
            self.agents[name].kill(pause_s)
        elif kind == "kill coordinator":
            self.coordinator.kill(pause_s)
        elif kind == "kill broker":
            if self.broker.pid is not None and not self.broker_back_at:
                os.kill(self.broker.pid, 9)
            self.broker_back_at = time.monotonic() + pause_s
        elif kind == "kill collector":  # its coordinator starts it again
            for path in sorted((self.run / "collectors").glob("*.pid"))[:: chance.choice([1, 2])]:
                with contextlib.suppress(OSError, ValueError, psutil.Error):
                    process = psutil.Process(json.loads(path.read_text(encoding="utf-8"))["pid"])
                    if "coordinator.collector" in process.cmdline():  # the file may be of a dead one
                        process.kill()
        elif kind == "cut links":
            self.proxy.cut(share=chance.choice([0.3, 1.0]))
        elif kind == "disk full":
            self.disks[name].fill(self.agents[name], 1.0 + pause_s)
        else:
            self.proxy.disturb(kind, pause_s)

    def close(self) -> None:
        """End everything."""
        for process in (self.coordinator, *self.agents.values()):
            process.stop()
        self.proxy.close()
        self.broker.stop()
        for disk in self.disks.values():
            disk.close()


@contextlib.contextmanager
def fleet_of(run: Path, experiment: Experiment, seed: int) -> Iterator[Fleet]:
    """Yield a started fleet, and end all of it."""
    fleet = Fleet(run, experiment, seed)
    try:
        fleet.start()
        yield fleet
    finally:
        fleet.close()


def run_once(run: Path, experiment: Experiment, *, seed: int, faults: int, limit_s: float) -> dict[str, Any]:
    """Run all rounds with so many faults, spread over them, and return how it ended.

    A fault comes when its round is reached, or sooner if nothing moves for long.
    """
    chance = random.Random(seed)
    possible = [*KINDS, *(["kill collector"] if experiment.fleet.collectors else [])]
    kinds = [possible[number % len(possible)] for number in range(faults)]
    chance.shuffle(kinds)
    struck: Counter[str] = Counter()
    deadline = time.monotonic() + limit_s
    log = run / "log.sqlite"
    with fleet_of(run, experiment, seed) as fleet:
        while not fleet.finished():
            if time.monotonic() > deadline:
                print(f"stopped after {limit_s:g} s in round {rounds_done(log)}", file=sys.stderr)
                break
            fleet.watch()
            done = rounds_done(log)
            number = struck.total()
            if (
                kinds
                and done >= max(1, experiment.rounds * number / (faults + 1))
                and done < experiment.rounds
            ):
                kind = kinds.pop()
                fleet.strike(kind, chance)
                struck[kind] += 1
                print(f"round {done}: {kind}", file=sys.stderr)
            time.sleep(chance.uniform(0.01, 0.05))
        proxied = dict(fleet.proxy.done)
        starts = fleet.coordinator.starts + sum(agent.starts for agent in fleet.agents.values())
        mounted = all(disk.mounted for disk in fleet.disks.values())
    return {
        "faults": dict(struck),
        "packets": proxied,
        "starts": starts,
        "disk": "tmpfs" if mounted else "RLIMIT_FSIZE",
    }


def last_result(run: Path) -> dict[str, Any]:
    """Return what the last coordinator printed at its end; nothing if it did not come so far."""
    lines = (run / "coordinator.log").read_text(errors="replace").splitlines()
    ended = [line for line in lines if line.startswith("{")]
    return json.loads(ended[-1]) if ended else {}


def digests_of(run: Path, rounds: int) -> dict[str, str]:
    """Return the digest of every replica after the last round, and of the log replayed from the bundle."""
    ended = last_result(run)
    _, replica = rebuild_run(run)
    digests = {"log": f"{replica.digest():016x}", "coordinator": ended.get("final_digest", "missing")}
    for name, status in ended.get("agents", {}).items():
        there = status["round"] == rounds
        digests[name] = status["digest"] if there else f"round {status['round']}"
    return digests


def main() -> int:
    """Run without faults, then with; print the comparison and return 0 if nothing was lost."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--faults", type=int, default=60)
    parser.add_argument("--limit-s", type=float, default=1200.0, help="of the run with faults")
    parser.add_argument("--collectors", type=int, default=0, help="processes that read the replies")
    options = parser.parse_args()
    settings = [
        f"rounds={options.rounds}",
        "method.perturbations=4",
        "evaluation.every=1000",
        "fleet.quorum=all",
        "fleet.deadline_s=300",
        "fleet.resend_s=0.5",
        f"fleet.shards={max(1, options.collectors)}",
        f"fleet.collectors={options.collectors}",
    ]
    experiment = load_experiment(ROOT / "examples" / "digits.toml", settings)
    with tempfile.TemporaryDirectory(prefix="chaos-") as scratch:
        calm, stormy = Path(scratch) / "calm", Path(scratch) / "stormy"
        prepare(experiment, calm, observer=LineProgress(sys.stderr))
        shutil.copytree(calm, stormy)
        run_once(calm, experiment, seed=options.seed, faults=0, limit_s=300)
        fault_free = digests_of(calm, options.rounds)
        begun = time.monotonic()
        seen = run_once(stormy, experiment, seed=options.seed, faults=options.faults, limit_s=options.limit_s)
        took_s = time.monotonic() - begun
        digests = digests_of(stormy, options.rounds)
        done = rounds_done(stormy / "log.sqlite")
        lost = int(last_result(stormy).get("rounds_skipped", 0)) + options.rounds - done
        result = {
            "rounds_done": done,
            "rounds_lost": lost,
            "faults": sum(seen["faults"].values()),
            "digests": sorted(set(digests.values())),
            "fault_free_digest": fault_free["log"],
            "replicas": len(digests),
            "agents": len(experiment.agents),
            "by_kind": seen["faults"],
            "packets": seen["packets"],
            "process_starts": seen["starts"],
            "disk": seen["disk"],
            "seconds": round(took_s, 1),
        }
        good = (
            lost == 0
            and set(digests.values()) == set(fault_free.values())
            and len(set(digests.values())) == 1
            and len(digests) == len(experiment.agents) + 2
        )
        if not good:
            keep = ROOT / "runs" / f"chaos-{options.seed}"
            shutil.copytree(stormy, keep, dirs_exist_ok=True, ignore=shutil.ignore_patterns("filler"))
            print(f"the run is kept in {keep}", file=sys.stderr)
        print(json.dumps(result), flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
