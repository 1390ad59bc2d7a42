"""Over SSH: a real OpenSSH server on the loopback, installing into a root of its own; and what is refused."""

import json
import os
import pwd
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from coordinator.cli import main
from coordinator.flash.ssh import Host, Machine
from profiles.errors import FlashError
from tests.card_images import SBIN
from tests.flash_bench import TOKEN, Coordinator, make_bundle, make_data

ROOT = Path(__file__).resolve().parent.parent
SSHD = shutil.which("sshd", path=SBIN)
needs_sshd = pytest.mark.skipif(
    not (SSHD and shutil.which("ssh-keygen")) or sys.platform != "linux", reason="there is no sshd"
)

ORIN = Machine(
    arch="aarch64", hostname="orin", python="3.10", bits=64, systemd=True, ram_mib=7600, free_mib=9000,
    root=False, sudo=True, memory_cgroup=True, release="",
)  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Return the options with which ssh reaches a server of our own."""
    folder = tmp_path_factory.mktemp("sshd")
    for name in ("host", "user"):
        key = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(key, check=True)
    (folder / "authorized").write_bytes((folder / "user.pub").read_bytes())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = [
        f"ListenAddress 127.0.0.1:{port}", f"HostKey {folder}/host",
        f"AuthorizedKeysFile {folder}/authorized", "StrictModes no", "UsePAM no",
        "PermitRootLogin prohibit-password", "PasswordAuthentication no", f"PidFile {folder}/pid",
    ]  # fmt: skip
    (folder / "config").write_text("\n".join(config) + "\n")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    with (folder / "log").open("wb") as log:
        child = subprocess.Popen([str(SSHD), "-D", "-e", "-f", str(folder / "config")], stderr=log)
    try:
        deadline = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert time.monotonic() < deadline, (folder / "log").read_text()
                time.sleep(0.05)
        known = (folder / "host.pub").read_text().split()
        (folder / "known").write_text(f"[127.0.0.1]:{port} {known[0]} {known[1]}\n")
        options = [f"IdentityFile={folder}/user", f"UserKnownHostsFile={folder}/known", "IdentitiesOnly=yes"]
        yield ["--port", str(port), *(word for option in options for word in ("--ssh-option", option))]
    finally:
        child.terminate()
        child.wait(10)


def words(server) -> list[str]:
    """Return the same options as ssh itself takes them."""
    return ["-p", server[1], *("-o" if word == "--ssh-option" else word for word in server[2:])]


@pytest.fixture
def me():
    """Return who we are, as ssh names a destination."""
    return f"{pwd.getpwuid(os.geteuid()).pw_name}@127.0.0.1"


@needs_sshd
def test_a_look_tells_what_the_machine_is(server, me):
    """Architecture, Python, RAM and rights come over a real connection, and nothing is changed."""
    with Host(me, options=words(server)) as host:
        machine = host.look()

    assert machine.arch == os.uname().machine
    assert machine.bits == 64
    assert machine.ram_mib > 100
    assert machine.root == (os.geteuid() == 0)


@needs_sshd
def test_a_server_that_does_not_let_us_in_is_named(server, me):
    """A wrong key gives ssh's own words, and the hint to try by hand."""
    options = [word for word in words(server) if not word.startswith("IdentityFile")]
    options = [
        word for n, word in enumerate(options) if not (word == "-o" and options[n + 1 : n + 2] == ["-o"])
    ]
    with Host(me, options=options) as host, pytest.raises(FlashError, match="Permission denied") as refused:
        host.look()
    assert "by hand" in refused.value.hint


@needs_sshd
def test_a_machine_without_systemd_is_refused(server, me, tmp_path, monkeypatch, capsys):
    """Nothing is copied to a machine that could not keep the agent running."""
    monkeypatch.setenv("SCALARFED_BOOK", str(tmp_path / "boards.json"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "share"))
    make_bundle(tmp_path / "run")
    bare = tmp_path / "bare"
    bare.mkdir()
    told = ["--name", "x", "--broker", "mqtt://192.0.2.1", "--bundle", str(tmp_path / "run/bundle")]

    assert main(["flash", "ssh", me, *server, *told, "--root", str(bare)]) == 20
    assert "has no systemd" in capsys.readouterr().err
    assert list(bare.iterdir()) == []


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"systemd": False}, "has no systemd"),
        ({"ram_mib": 200.0}, "leaves the system less than"),
        ({"python": ""}, "has no python3"),
        ({"python": "3.6"}, "wheels are needed for 3.10"),
        ({"arch": "armv7l", "bits": 32}, "32-bit Python"),
        ({"bits": 32}, "32-bit Python"),
    ],
)
def test_a_machine_that_cannot_carry_an_agent_is_refused(changed, says):
    """Each thing that is missing is named with the next step."""
    with pytest.raises(FlashError, match=says) as refused:
        replace(ORIN, **changed).target(memory_mib=128)
    assert len(refused.value.hint) > 20


def test_a_jetson_is_fine():
    """JetPack 6: Python 3.10 on aarch64."""
    assert (ORIN.target(memory_mib=128).python, ORIN.target(memory_mib=128).arch) == ("3.10", "aarch64")


@needs_sshd
@pytest.mark.slow
def test_end_to_end_into_a_root_of_its_own(server, me, tmp_path, monkeypatch, capsys):
    """Looked at, copied, installed by the real installer; the release joins, trains, and is updated."""
    monkeypatch.setenv("SCALARFED_BOOK", str(tmp_path / "boards.json"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "share"))
    bundle = make_bundle(tmp_path / "run")
    data = make_data(tmp_path / "samples.npz")
    root = tmp_path / "root"
    (root / "run/systemd/system").mkdir(parents=True)
    (root / "etc/scalarfed").mkdir(parents=True)
    told = ["--name", "ssh-1", "--broker", "mqtt://192.0.2.1", "--run", "linear", "--bundle", str(bundle)]
    told += ["--data", str(data), "--memory-mib", "128", "--root", str(root)]

    assert main(["flash", "ssh", me, *server, *told]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "hashes: all as in MANIFEST" in said
    assert "done " in said
    current = root / "opt/scalarfed/current"
    first = os.readlink(current)
    assert (current / "complete").exists()
    assert not list(Path("/var/tmp").glob("scalarfed.*/board.json"))
    settings_path = root / "etc/scalarfed/board.json"
    settings = json.loads(settings_path.read_text())
    assert settings["memory_mib"] == 128
    assert TOKEN not in said

    coordinator = Coordinator(tmp_path / "coordinator", bundle, ["ssh-1"])
    try:
        settings_path.write_text(json.dumps(settings | {"broker": coordinator.broker.url}))
        python = current / "venv/bin/python"
        command = [
            str(python),
            "-m",
            "edge_agent.service",
            str(settings_path),
            str(root / "var/lib/scalarfed"),
        ]
        env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        with subprocess.Popen(command, cwd="/", env=env) as agent:
            try:
                coordinator.until("ssh-1", lambda status: status.get("round") == 3, within_s=90)
            finally:
                agent.terminate()
    finally:
        coordinator.stop()

    # An update: other sources make another release; the former one stays beside it, on trial.
    newer = tmp_path / "newer"
    for floor in ("coordinator", "edge_agent", "profiles"):
        shutil.copytree(ROOT / floor, newer / floor, ignore=shutil.ignore_patterns("__pycache__"))
    (newer / "edge_agent/newer.py").write_text('"""Nothing but a difference."""\n')
    command = [
        sys.executable,
        "-m",
        "coordinator.cli",
        "flash",
        "ssh",
        me,
        *server,
        *told,
        "--replace",
        "ssh-1",
    ]
    subprocess.run(command, cwd=newer, env={**os.environ, "PYTHONPATH": str(newer)}, check=True)
    assert os.readlink(current) != first
    assert (root / "opt/scalarfed/trial").read_text().strip() == first
    for _ in range(5):
        subprocess.run(["sh", str(root / "opt/scalarfed/guard.sh"), "before", str(root)], check=True)
    assert os.readlink(current) == first
