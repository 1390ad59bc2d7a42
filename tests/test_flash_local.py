"""This machine as a board, and the service around the agent: real processes, a real broker."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from coordinator.cli import main
from edge_agent.service import SAFE_AFTER, StartCounter, agent_arguments
from profiles.errors import ConfigError
from tests.flash_bench import Coordinator, make_bundle, make_data

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Return a folder with a bundle and samples, and the user's folders turned into it."""
    monkeypatch.setenv("SCALARFED_BOOK", str(tmp_path / "boards.json"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "share"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    make_bundle(tmp_path / "run")
    make_data(tmp_path / "samples.npz")
    return tmp_path


@pytest.fixture
def coordinator(home):
    """Return a coordinator that waits for the agent `laptop`."""
    made = Coordinator(home / "coordinator", home / "run" / "bundle", ["laptop"])
    yield made
    made.stop()


def local(home: Path, broker: str, *more: str) -> int:
    return main(
        [
            *(
                "flash",
                "local",
                "--name",
                "laptop",
                "--run",
                "linear",
                "--broker",
                broker,
                "--memory-mib",
                "128",
            ),
            *("--bundle", str(home / "run/bundle"), "--data", str(home / "samples.npz"), *more),
        ]
    )


def test_one_command_to_a_joined_agent_with_an_enforced_budget(home, coordinator, capsys):
    """`flash local` returns with the agent in its run, training, its budget held, and undo ends it."""
    assert local(home, coordinator.broker.url, "--detach") == 0
    said = capsys.readouterr().out
    folder = home / "state/scalarfed/laptop"
    pid = int((folder / "agent.pid").read_text())
    try:
        coordinator.until("laptop", lambda told: told.get("round") == 3)
        status = coordinator.statuses["laptop"]
        assert "has joined run linear" in said
        assert "budget 128 MiB, held by" in said
        assert status["pid"] == pid
        assert status["enforcement"] not in ("none", "sampler")
        assert status["telemetry"]["ram_mib"] > 0
        assert json.loads((folder / "starts.json").read_text())["starts"] == 0
        assert (folder / "board.json").stat().st_mode & 0o77 == 0

        assert main(["devices", "list", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["laptop"]["status"]["pid"] == pid
        assert main(["doctor", "laptop", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["verdict"] == "fine"
        assert local(home, coordinator.broker.url) != 0
        assert "runs on this machine already" in capsys.readouterr().err
    finally:
        assert main(["flash", "undo", str(folder)]) == 0
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    assert not folder.exists()
    assert json.loads((home / "boards.json").read_text())["boards"] == []


def test_an_agent_that_does_not_join_is_ended_and_explained(home, coordinator, capsys):
    """Where no run calls the agent the command fails with the reason, and leaves no process."""
    bad = local(home, coordinator.broker.url, "--run", "other", "--wait", "4")
    said = capsys.readouterr().err

    assert bad == 20
    assert "did not join run other" in said
    assert not (home / "state/scalarfed/laptop/agent.pid").exists()


# ---------------------------------------------------------------------------------------- the service


def service(home: Path, settings: dict[str, object], **env: str) -> subprocess.CompletedProcess[str]:
    state = home / "board"
    state.mkdir(exist_ok=True)
    (home / "board.json").write_text(json.dumps(settings))
    return subprocess.run(
        [sys.executable, "-m", "edge_agent.service", str(home / "board.json"), str(state)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **env},
        check=False,
    )


def test_a_start_that_fails_keeps_its_last_words(home):
    """A board without a bundle ends with an error, is counted, and says why in its file."""
    settings = {"name": "pi", "broker": "mqtt://127.0.0.1:1", "run": "linear", "memory_mib": 128}
    for _ in range(2):
        assert service(home, settings).returncode != 0
    starts, words = StartCounter(home / "board").read()

    assert starts == 2
    assert "bundle" in words


def test_after_five_failures_the_board_only_reports(home, coordinator):
    """In safe mode no bundle is read; the status tells state, starts and the last words."""
    state = home / "board"
    state.mkdir()
    counter = StartCounter(state)
    for _ in range(SAFE_AFTER):
        counter.count()
    counter.failed("the bundle is damaged")
    settings = {"name": "laptop", "broker": coordinator.broker.url, "run": "linear", "memory_mib": 128}
    (home / "board.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "edge_agent.service", str(home / "board.json"), str(state)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as child:
        try:
            coordinator.until("laptop", lambda told: told.get("state") == "safe mode")
            told = coordinator.statuses["laptop"]
        finally:
            child.terminate()

    assert told["starts"] == SAFE_AFTER + 1
    assert told["last_words"] == "the bundle is damaged"


def test_settings_that_lack_something_are_named():
    """A board.json without a run is refused with the key's name."""
    with pytest.raises(ConfigError, match="run"):
        agent_arguments({"name": "a", "broker": "b", "memory_mib": 64})


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="systemd's protocol needs Unix sockets")
def test_the_service_manager_hears_ready_and_progress(home, coordinator):
    """A real socket gets READY once the loop turns, WATCHDOG while it does, STOPPING at the end."""
    state = home / "board"
    state.mkdir()
    (state / "bundle").symlink_to(home / "run/bundle")
    (state / "data.npz").symlink_to(home / "samples.npz")
    settings = {"name": "laptop", "broker": coordinator.broker.url, "run": "linear", "memory_mib": 256}
    (home / "board.json").write_text(json.dumps(settings))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(home / "n"))
        manager.settimeout(60)
        command = [sys.executable, "-m", "edge_agent.service", str(home / "board.json"), str(state)]
        env = {**os.environ, "NOTIFY_SOCKET": str(home / "n")}
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=env) as child:
            first = manager.recv(4096).decode()
            coordinator.until("laptop", lambda told: told.get("round") == 3)
            later = [manager.recv(4096).decode() for _ in range(3)]
            child.terminate()
            while "STOPPING=1" not in later:
                later.append(manager.recv(4096).decode())

    assert first.startswith("READY=1\nSTATUS=linear loaded")
    assert "WATCHDOG=1" in later
    assert "STATUS=in run linear as laptop" in later
    assert child.returncode == 0
