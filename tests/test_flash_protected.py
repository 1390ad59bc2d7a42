"""Boards of a protected fleet: enrolled by a ticket, reached by the operator, shut out again."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from coordinator.authority import Authority, default_folder
from coordinator.boards import Board, record_board
from coordinator.broker import find_mosquitto
from coordinator.cli import main
from coordinator.flash.payload import Target, make_payload
from coordinator.flash.settings import Credentials, Settings
from edge_agent.bundle import sign_bundle
from tests.flash_bench import Coordinator, InstalledBoard, make_bundle, make_data, make_real_cache

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="boards run Linux"),
    pytest.mark.skipif(find_mosquitto() is None, reason="a protected broker needs mosquitto"),
    pytest.mark.timeout(240),
]

HERE = Target(".".join(platform.python_version_tuple()[:2]), platform.machine())


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Return a folder with a bundle and samples, a protected coordinator that waits for pi-1, its keys."""
    monkeypatch.setenv("SCALARFED_BOOK", str(tmp_path / "boards.json"))
    for name in ("XDG_DATA_HOME", "XDG_CACHE_HOME", "XDG_STATE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parent.parent))
    make_real_cache(tmp_path / "XDG_CACHE_HOME/scalarfed/wheels", HERE)
    bundle = make_bundle(tmp_path / "run")
    make_data(tmp_path / "samples.npz")
    authority = Authority.create(default_folder())
    coordinator = Coordinator(tmp_path / "coordinator", bundle, ["pi-1"], authority=authority)
    yield tmp_path, coordinator, authority
    coordinator.stop()


def make(folder, coordinator, authority, *, token: str = "") -> tuple[InstalledBoard, str]:
    """Return a board with a ticket, not started yet, and its token."""
    token = token or authority.new_token("pi-1", valid_s=60)
    settings = Settings(
        "pi-1", coordinator.url, "linear", 128,
        credentials=Credentials(token, authority.fingerprint, coordinator.enrol_url, authority.signing_key),
    )  # fmt: skip
    sign_bundle(folder / "run/bundle", authority.signer())
    payload = make_payload(HERE, settings, bundle=folder / "run/bundle", data=folder / "samples.npz")
    board = InstalledBoard(folder / "root")
    board.install(payload, folder / "boot")
    record_board(
        Board("pi-1", "card", "a card", coordinator.url, "scalarfed", "linear", "", 128, payload.release)
    )
    return board, token


def test_a_ticket_becomes_a_certificate_and_is_gone(bench, capsys):
    """The board enrols, trains over mutual TLS, is updated over HTTPS, and is out once it is revoked."""
    folder, coordinator, authority = bench
    board, token = make(folder, coordinator, authority)
    secrets = [path for path in folder.rglob("*") if path.is_file() and token.encode() in path.read_bytes()]
    assert [path.name for path in secrets] == ["ticket.json"]
    assert secrets[0].stat().st_mode & 0o077 == 0
    board.start()
    try:
        coordinator.until("pi-1", lambda status: status.get("round") == 3)
        assert not secrets[0].exists()
        assert main(["devices", "list", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["pi-1"]["status"]["state"] in ("ready", "closed")
        assert main(["devices", "locate", "pi-1"]) == 0
        assert "pi-1: " in capsys.readouterr().out

        first = board.release
        (cache,) = (folder / "XDG_CACHE_HOME/scalarfed").glob("wheels")
        make_real_cache(cache, HERE, change="sys.second = True")
        assert main(["update", "--wait", "90"]) == 0, capsys.readouterr().out
        assert "at https://127.0.0.1:" in capsys.readouterr().out
        assert board.release != first

        assert main(["devices", "revoke", "pi-1"]) == 0
        assert "its connection was ended" in capsys.readouterr().out
    finally:
        board.stop()


def test_a_wrong_token_is_named_from_the_card(bench, capsys):
    """The agent's last words come into the card's report, and doctor says what they mean."""
    folder, coordinator, authority = bench
    (folder / "root/boot/firmware/scalarfed").mkdir(parents=True)
    board, _ = make(folder, coordinator, authority, token="nobody-issued-this")
    report = folder / "root/boot/firmware/scalarfed/report.txt"
    report.write_bytes((folder / "boot/report.txt").read_bytes())
    guard = ["sh", str(board.opt / "guard.sh"), "after", str(board.root)]
    python = [str(board.opt / "current/venv/bin/python"), "-m", "edge_agent.service"]
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    words = [str(board.root / "etc/scalarfed/board.json"), str(board.state), str(board.opt)]
    code = subprocess.run([*python, *words], env=env, check=False, timeout=60, cwd="/").returncode
    assert code == 22
    ended = {"SERVICE_RESULT": "exit-code", "EXIT_CODE": "exited", "EXIT_STATUS": str(code)}
    subprocess.run(guard, env=env | ended, check=True)

    assert main(["doctor", str(folder / "root/boot/firmware")]) == 1
    said = capsys.readouterr().out
    assert "wrong, used or expired token" in said
    assert "nobody-issued-this" not in said + report.read_text()


def test_this_machine_joins_a_protected_fleet(bench, capsys):
    """`flash local` needs no token here: the authority is at hand."""
    folder, coordinator, _ = bench
    words = ["--name", "pi-1", "--run", "linear", "--broker", coordinator.url, "--memory-mib", "128"]
    words += ["--bundle", str(folder / "run/bundle"), "--data", str(folder / "samples.npz"), "--detach"]
    home = folder / "XDG_STATE_HOME/scalarfed/pi-1"
    try:
        assert main(["flash", "local", *words]) == 0, capsys.readouterr().err
        coordinator.until("pi-1", lambda status: status.get("round") == 3)
    finally:
        main(["flash", "undo", str(home)])
