"""The main job, end to end: real agent processes, a real broker, real faults."""

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import psutil
import pytest

from coordinator.broker import find_mosquitto

needs_mosquitto = pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed")
pytestmark = pytest.mark.xdist_group("testbed")  # the finished run is shared, and cores are few

ROOT = Path(__file__).parent.parent
SMALL = ["--set", "rounds=40", "--set", "method.perturbations=4", "--set", "evaluation.every=20"]
QUIETLY = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 100, "check": False}
THREE = ["--set", 'devices=[{profile="pi-zero-2w", count=2, name="zero"}, {profile="pi-4-2gb", name="four"}]']


def command(out: Path, *words: str, example: str = "digits") -> list[str]:
    experiment = ROOT / "examples" / f"{example}.toml"
    return [
        sys.executable,
        "-m",
        "coordinator.cli",
        "testbed",
        "run",
        str(experiment),
        "--out",
        str(out),
        *words,
    ]


def run(out: Path, *words: str, example: str = "digits", timeout_s: float = 120) -> dict:
    """Run an experiment to its end and return what --json prints."""
    done = subprocess.run(
        [*command(out, *words, example=example), "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def refused(out: Path, *words: str) -> str:
    """Run an experiment that must be refused; return its message, and see that nothing was left behind."""
    done = subprocess.run(
        command(out, *words), cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode not in (0, 1)
    assert "Traceback" not in done.stderr
    assert not out.exists()
    assert [path for path in out.parent.iterdir() if out.name in path.name] == []
    return " ".join(done.stderr.split())


def processes_of(out: Path) -> list[psutil.Process]:
    """Return the processes that have the run folder on their command line."""
    found = []
    for process in psutil.process_iter():
        try:
            if any(str(out) in word for word in process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def rounds_done(out: Path) -> int:
    try:
        with closing(sqlite3.connect(f"file:{out / 'log.sqlite'}?mode=ro", uri=True)) as db:
            return int(db.execute("SELECT COUNT(*) FROM records").fetchone()[0])
    except sqlite3.Error:
        return 0


def wait_for_round(out: Path, number: int, process: subprocess.Popen, timeout_s: float = 90) -> None:
    deadline = time.monotonic() + timeout_s
    while rounds_done(out) < number:
        assert process.poll() is None, "the run ended too early"
        assert time.monotonic() < deadline, f"round {number} was not reached"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.05)


def pid_in(path: Path) -> int:
    return int(json.loads(path.read_text())["pid"])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A small run that nothing disturbed: its folder and its summary."""
    out = tmp_path_factory.mktemp("testbed") / "run"
    return out, run(out, *SMALL, *THREE)


def test_the_summary_holds_what_it_promises(finished):
    """Every figure is there, and adds up where it can."""
    _, summary = finished
    assert summary["digests_agree"] is True
    assert (summary["rounds"], summary["rounds_skipped"], summary["method"]) == (40, 0, "hiso")
    assert summary["params_pruned"] / summary["params_dense"] == summary["density"] <= 0.5
    assert summary["flops_per_step_pruned"] < 0.6 * summary["flops_per_step_dense"]
    assert summary["test_accuracy"] > 0.1
    for agent in summary["agents"]:
        assert 40 < agent["peak_rss_mib"] <= min(64, agent["budget_mib"])
        assert abs(agent["predicted_peak_mib"] / agent["peak_rss_mib"] - 1) < 0.1
        assert agent["flops_spent"] == 40 * summary["flops_per_step_pruned"]
        assert agent["rounds_missed"] == 0
        assert agent["digest"] == summary["final_digest"]


def test_bytes_are_counted_to_the_message(finished):
    """Four scalars up are 48 payload bytes a round; what goes beyond is a few status messages."""
    _, summary = finished
    statuses = 5 * 800 / 40
    assert 48 <= summary["payload_bytes_up_per_agent_round"] <= 48 + statuses
    assert 16 + 38 < summary["payload_bytes_down_per_agent_round"] <= 400
    assert summary["bytes_up_per_agent_round"] > summary["payload_bytes_up_per_agent_round"] + 20


def test_the_run_folder_is_whole(finished):
    """Log, bundle, report, summary and a log of every agent; no process is left."""
    out, summary = finished
    for name in ("experiment.toml", "log.sqlite", "bundle/manifest.json", "report.html", "summary.json"):
        assert (out / name).stat().st_size > 0
    assert sorted(path.name for path in (out / "agents").glob("*.log")) == [
        "four-1.log",
        "zero-1.log",
        "zero-2.log",
    ]
    assert json.loads((out / "summary.json").read_text()) == summary
    assert processes_of(out) == []


def test_every_round_can_be_rebuilt(finished):
    """Replaying the log gives the digest of each of the 40 records."""
    from coordinator.rebuild import rebuild_run
    from coordinator.scalar_log import ScalarLog

    out, summary = finished
    with ScalarLog.open(out / "log.sqlite") as log:
        digests = [record.digest for record in log.records()]
    assert [rebuild_run(out, n + 1)[1].digest() for n in (0, 17, 39)] == [digests[n] for n in (0, 17, 39)]
    assert f"{digests[-1]:016x}" == summary["final_digest"]


def test_the_same_experiment_gives_the_same_digest_whatever_is_killed(finished, tmp_path):
    """SIGKILL of an agent, of the broker, and of the coordinator, which is then resumed: no round is lost."""
    _, calm = finished
    out = tmp_path / "run"
    with subprocess.Popen(command(out, *SMALL, *THREE), cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        wait_for_round(out, 8, process)
        os.kill(pid_in(out / "agents" / "zero-2.pid"), signal.SIGKILL)
        wait_for_round(out, 16, process)
        os.kill(pid_in(out / "broker.pid"), signal.SIGKILL)
        wait_for_round(out, 24, process)
        process.kill()
    assert rounds_done(out) < 40
    summary = run(out, *SMALL, *THREE, "--resume")
    assert summary["final_digest"] == calm["final_digest"]
    assert summary["digests_agree"] is True
    assert summary["rounds_skipped"] == 0
    assert processes_of(out) == []


def test_ctrl_c_stops_in_order_and_resume_goes_on(finished, tmp_path):
    """SIGINT ends with 130 and leaves no process; the same command with --resume ends like the calm run."""
    _, calm = finished
    out = tmp_path / "run"
    with subprocess.Popen(command(out, *SMALL, *THREE), cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        wait_for_round(out, 12, process)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    assert processes_of(out) == []
    assert run(out, *SMALL, *THREE, "--resume")["final_digest"] == calm["final_digest"]


@pytest.mark.parametrize(
    ("shape", "classes"),
    [((20, 4), 3), ((40, 9, 11), 2), ((60, 6, 6, 3), 14)],
    ids=["rows", "images", "colour images"],
)
def test_other_data_goes_through(tmp_path, shape, classes):
    """The net's input and output follow the file: rows or images, any number of classes."""
    rng = np.random.default_rng(0)
    y = np.arange(shape[0] * 2) % classes
    x = (rng.normal(size=(len(y), *shape[1:])) * 100 + y.reshape(-1, *[1] * (len(shape) - 1))).astype(
        np.float32
    )
    half = shape[0]
    data = tmp_path / "own.npz"
    np.savez(data, x_train=x[:half], y_train=y[:half], x_test=x[half:], y_test=y[half:])
    words = ["--set", f"data.path={data}", "--set", "data.min_samples=2", "--set", "data.split=iid"]
    summary = run(tmp_path / "run", *SMALL, *THREE, *words, "--set", "rounds=3")
    assert summary["digests_agree"] is True


def test_a_budget_too_small_is_refused_before_anything_starts(tmp_path):
    """With the predicted and the allowed MiB, and what would fit."""
    message = refused(tmp_path / "run", *THREE, "--set", "devices.0.memory_mib=44")
    assert "44 MiB" in message
    assert re.search(r"needs \d\d MiB", message)
    assert "hint:" in message


def test_bad_data_is_refused_before_anything_starts(tmp_path):
    """A label of the test part that no training sample has is named."""
    data = tmp_path / "own.npz"
    x = np.zeros((90, 4))
    np.savez(data, x_train=x, y_train=np.arange(90) % 3, x_test=x, y_test=np.arange(90) % 4)
    message = refused(tmp_path / "run", *THREE, "--set", f"data.path={data}")
    assert "labels run from 0 to 3; they must lie in 0 to 2" in message


def test_a_density_that_leaves_no_net_is_refused(tmp_path):
    """With the least density that leaves one."""
    message = refused(tmp_path / "run", *THREE, "--set", "pruning.density=0.001")
    assert "narrowest" in message
    assert "Choose a density of at least" in message


def test_an_unreachable_broker_is_refused(tmp_path):
    """The address is named; no agent was started and no folder is left."""
    message = refused(tmp_path / "run", *THREE, "--broker", "mqtt://127.0.0.1:9")
    assert "127.0.0.1:9" in message


def test_another_experiment_cannot_resume_a_run(finished):
    """The first key that differs is shown, and the run stays as it was."""
    out, _ = finished
    words = [*SMALL, *THREE, "--resume", "--set", "seed=8"]
    done = subprocess.run(
        command(out, *words), cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode not in (0, 1)
    assert "seed = 7" in done.stderr


def test_resuming_a_finished_run_changes_nothing(finished):
    """It says the same summary again, also over another broker, and starts no agent."""
    out, summary = finished
    again = run(out, *SMALL, *THREE, "--resume", "--broker", "mqtt://127.0.0.1:9")
    assert again == summary
    assert json.loads((out / "summary.json").read_text()) == summary


def test_a_run_is_never_overwritten(finished):
    """A second run into the same folder is refused."""
    out, summary = finished
    done = subprocess.run(
        command(out, *SMALL), cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode not in (0, 1)
    assert "--resume" in done.stderr
    assert json.loads((out / "summary.json").read_text()) == summary


@needs_mosquitto
def test_a_secured_run_has_the_same_bits(finished, tmp_path):
    """Over mutual TLS, with signed messages, the same experiment ends with the digest of the open run."""
    _, open_summary = finished
    out = tmp_path / "secured"
    secured = run(out, *SMALL, *THREE, "--set", "broker.security=on")

    assert secured["final_digest"] == open_summary["final_digest"]
    assert secured["digests_agree"] is True
    assert "use_identity_as_username true" in (out / "mosquitto.conf").read_text()
    assert (out / "bundle" / "manifest.sig").stat().st_size == 64


@needs_mosquitto
def test_collectors_change_no_bit(finished, tmp_path):
    """Over mutual TLS, with two collectors on three shards, a run ends with the digest of one without."""
    _, plain = finished
    out = tmp_path / "collected"
    words = ("fleet.shards=3", "fleet.collectors=2", "broker.security=on")
    collected = run(out, *SMALL, *THREE, *(word for one in words for word in ("--set", one)))

    assert collected["final_digest"] == plain["final_digest"]
    assert collected["rounds_skipped"] == 0
    assert collected["messages_dropped"].get("malformed pack", 0) == 0
    assert not list(out.glob("collectors/*.pid"))
    assert len(list(out.glob("collectors/*.log"))) == 2


@needs_mosquitto
@pytest.mark.skipif(os.name != "posix", reason="kills with signals")
def test_a_killed_collector_loses_no_round(finished, tmp_path):
    """One collector after the other is killed amid a round and started again: the digest is the same."""
    _, plain = finished
    out = tmp_path / "killed"
    words = ("fleet.shards=2", "fleet.collectors=2", "fleet.resend_s=20")
    options = [word for one in words for word in ("--set", one)]
    with subprocess.Popen(
        [*command(out, *SMALL, *THREE, *options), "--json"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        for number in (6, 18):
            wait_for_round(out, number, process)
            os.kill(pid_in(out / "collectors" / f"collector-{number // 18}.pid"), signal.SIGKILL)
        said, _ = process.communicate(timeout=100)
    summary = json.loads(said)

    assert summary["final_digest"] == plain["final_digest"]
    assert summary["rounds_skipped"] == 0
    with closing(sqlite3.connect(out / "log.sqlite")) as db:
        ended = db.execute("SELECT agent FROM events WHERE kind = 'collector ended'").fetchall()
    assert sorted(ended) == [("collector-0",), ("collector-1",)]


def test_a_broker_elsewhere_in_the_clear_is_refused(tmp_path):
    """A run is not sent over a network unprotected unless somebody says that it shall be."""
    message = refused(tmp_path / "run", "--broker", "mqtt://192.0.2.1:1883", *SMALL)

    assert "unprotected" in message
    assert "--insecure" in message
