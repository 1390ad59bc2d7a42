"""Security from end to end: agents as processes, enrolled by tickets, over mutual TLS, signed bundles."""

import json
import queue
import shutil
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from coordinator.authority import Authority
from coordinator.broker import find_mosquitto
from coordinator.config import load_experiment
from coordinator.guard import Guard
from coordinator.progress import Silence
from coordinator.simulate import simulate
from edge_agent.bundle import SIGNATURE, check_signed, flat_layout, read_bundle, sign_bundle, write_bundle
from profiles.errors import BrokerError, SecurityError
from tests.fleet import FleetInMemory

ROOT = Path(__file__).parent.parent
PATIENCE_S = 120.0
SHORT = [
    *("rounds=6", "pruning.method=none", "model.hidden=[16]", "method.perturbations=4"),
    'devices=[{profile="pi-zero-2w", count=2, name="zero"}]',
]

# ---------------------------------------------------------------------------------------- signed bundles


@pytest.fixture
def signer() -> Ed25519PrivateKey:
    return Ed25519PrivateKey.generate()


@pytest.fixture
def bundle(tmp_path) -> Path:
    """Return a whole bundle of one small tensor, not signed."""
    tensors, size = flat_layout([("w", (4, 2))])
    write_bundle(
        tmp_path / "bundle",
        graph=b"graph",
        weights=np.ones(size, np.float32),
        tensors=tensors,
        model="mlp",
        classes=2,
        sample_shape=(4,),
        cost={"forward_flops": 1},
        pruning={"method": "none", "density": 1.0, "params_dense": 8, "forward_flops_dense": 1},
    )
    return tmp_path / "bundle"


def key_of(signer: Ed25519PrivateKey) -> bytes:
    """Return the public half as an agent has it."""
    return signer.public_key().public_bytes_raw()


def test_a_signed_bundle_is_taken(bundle, signer):
    """What the coordinator signed passes, and is the same bundle as before."""
    before = read_bundle(bundle)
    sign_bundle(bundle, signer.sign)

    check_signed(read_bundle(bundle), key_of(signer))
    assert read_bundle(bundle).identity == before.identity


def test_an_unsigned_bundle_is_refused(bundle, signer):
    """A bundle without a signature is not taken by who asks for one."""
    with pytest.raises(SecurityError, match="is not signed"):
        check_signed(read_bundle(bundle), key_of(signer))


@pytest.mark.parametrize("what", ["manifest", "weights and manifest", "signature", "another key", "empty"])
def test_a_tampered_bundle_is_refused(bundle, signer, what):
    """A bundle that was changed after signing, even with all hashes put right, is not taken."""
    sign_bundle(bundle, signer.sign)
    key = key_of(signer)
    manifest = json.loads((bundle / "manifest.json").read_text())
    if what == "manifest":
        manifest["model"] = "another"
        (bundle / "manifest.json").write_text(json.dumps(manifest))
    elif what == "weights and manifest":
        import hashlib

        weights = bytearray((bundle / "weights.f32").read_bytes())
        weights[3] ^= 0x80
        (bundle / "weights.f32").write_bytes(weights)
        manifest["files"]["weights.f32"] = hashlib.sha256(weights).hexdigest()
        (bundle / "manifest.json").write_text(json.dumps(manifest))
    elif what == "signature":
        signature = bytearray((bundle / SIGNATURE).read_bytes())
        signature[0] ^= 1
        (bundle / SIGNATURE).write_bytes(signature)
    elif what == "another key":
        key = key_of(Ed25519PrivateKey.generate())
    else:
        (bundle / SIGNATURE).write_bytes(b"")

    with pytest.raises(SecurityError, match="was not signed"):
        check_signed(read_bundle(bundle), key)


def test_all_bundles_of_a_run_are_signed(tmp_path, bundle):
    """Where boards hold nets of several widths, each of their bundles is signed."""
    shutil.copytree(bundle, tmp_path / "bundle-0")
    guard = Guard(Authority.create(tmp_path / "authority"), tmp_path)
    guard.sign_bundles(tmp_path)

    for folder in (bundle, tmp_path / "bundle-0"):
        check_signed(read_bundle(folder), bytes.fromhex(guard.authority.signing_key))


def test_a_message_is_no_bundle(bundle, signer):
    """A signature that was made for a message cannot be used for a bundle with the same bytes."""
    (bundle / SIGNATURE).write_bytes(signer.sign((bundle / "manifest.json").read_bytes()))

    with pytest.raises(SecurityError, match="was not signed"):
        check_signed(read_bundle(bundle), key_of(signer))


# ------------------------------------------------------------------------------------- the agent's process


def start_agent(
    folder: Path, bundle: Path, *, broker: str, data: Path, name: str, run: str
) -> "subprocess.Popen":
    """Start an agent with its certificates in ``folder``."""
    options = {
        "--broker": broker,
        "--run": run,
        "--name": name,
        "--bundle": str(bundle),
        "--data": str(data),
        "--security": str(folder),
        "--state": str(folder.parent / f"{name}-state"),
    }
    words = [word for pair in options.items() for word in pair]
    with (folder.parent / f"{name}.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "edge_agent", *words], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT
        )


@pytest.mark.parametrize(
    ("change", "broker", "code", "said"),
    [
        ("unsigned", "mqtts://127.0.0.1:1", SecurityError.exit_code, "is not signed"),
        ("tampered", "mqtts://127.0.0.1:1", SecurityError.exit_code, "was not signed"),
        ("shared key", "mqtts://127.0.0.1:1", SecurityError.exit_code, "may be read by others"),
        ("no key", "mqtts://127.0.0.1:1", SecurityError.exit_code, "not enrolled"),
        ("nothing", "mqtt://127.0.0.1:1", BrokerError.exit_code, "not encrypted"),
    ],
)
def test_an_agent_refuses_what_is_not_secured(tmp_path, bundle, change, broker, code, said):
    """The process ends with its code and the reason before it has connected to anybody."""
    if change == "shared key" and sys.platform == "win32":
        pytest.skip("Windows has no file modes")
    authority = Authority.create(tmp_path / "authority")
    authority.device_identity("pi-1", tmp_path / "security")
    np.savez(tmp_path / "data.npz", x_train=np.ones((8, 4), np.float32), y_train=np.arange(8) % 2)
    if change != "unsigned":
        sign_bundle(bundle, authority.signer())
    if change == "tampered":
        text = (bundle / "manifest.json").read_text()
        (bundle / "manifest.json").write_text(text.replace('"mlp"', '"mlq"'))
    elif change == "shared key":
        (tmp_path / "security" / "device.key").chmod(0o644)
    elif change == "no key":
        (tmp_path / "security" / "device.key").unlink()

    agent = start_agent(
        tmp_path / "security", bundle, broker=broker, data=tmp_path / "data.npz", name="pi-1", run="r"
    )

    assert agent.wait(PATIENCE_S) == code
    assert said in (tmp_path / "pi-1.log").read_text()


# ------------------------------------------------------------------------------------- the coordinator's side


def test_a_revoked_agent_counts_no_more(tmp_path):
    """Whoever is shut out is not counted in the open round nor asked again; the run goes on without it."""
    fleet = FleetInMemory(tmp_path, boards=3, rounds=8)
    fleet.run(until=lambda: fleet.rounds.replica.round >= 3)
    out = fleet.boards[1]
    fleet.service.shut_out({out.name})
    shut_at = fleet.rounds.replica.round
    fleet.run(until=lambda: fleet.rounds.finished)

    counted = fleet.log.replies_of(out.name)
    assert counted <= shut_at + 1
    assert fleet.log.skipped() == 0
    assert fleet.service.counts()["revoked"] > 0
    assert fleet.log.replies_of(fleet.boards[0].name) == 8


def test_who_is_let_in_again_takes_part_again(tmp_path):
    """An agent that is enrolled anew says hello and is asked again."""
    fleet = FleetInMemory(tmp_path, boards=3, rounds=12)
    out = fleet.boards[1]
    fleet.run(until=lambda: fleet.rounds.replica.round >= 2)
    fleet.service.shut_out({out.name})
    fleet.run(until=lambda: fleet.rounds.replica.round >= 6)
    before = fleet.log.replies_of(out.name)
    fleet.service.shut_out(set())
    out.kill()
    out.boot()
    fleet.run(until=lambda: fleet.rounds.finished)

    assert fleet.log.replies_of(out.name) > before


def test_a_status_in_anothers_name_is_dropped(tmp_path):
    """A status whose name is not that of its topic changes nothing and is counted."""
    fleet = FleetInMemory(tmp_path, boards=2, rounds=3)
    fleet.turn()
    from edge_agent.link import MemoryLink
    from tests.fleet import TOPICS

    stranger = MemoryLink(fleet.broker)
    stranger.publish(TOPICS.status("board-0"), json.dumps({"name": "board-1", "state": "offline"}).encode())
    fleet.turn()

    assert fleet.service.counts()["status in another's name"] == 1
    assert fleet.service.statuses["board-0"]["state"] != "offline"


# --------------------------------------------------------------------------------------- a whole little run


class Serving:
    """``scalarfed serve`` as a process, and what it printed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        settings = [word for text in SHORT for word in ("--set", text)]
        options = ["--port", "0", "--web-port", "0", "--authority", str(folder / "authority"), "--json"]
        words = [str(ROOT / "examples" / "digits.toml"), "--out", str(folder / "run"), *options, *settings]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "coordinator.cli", "serve", *words],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.said = ""
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        assert self.process.stderr is not None
        threading.Thread(target=self._read, args=(self.process.stderr,), daemon=True).start()

    def _read(self, stream: object) -> None:
        for line in stream:  # type: ignore[attr-defined]
            self._lines.put(line)

    def line_with(self, word: str) -> str:
        """Return the first line that holds a word."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            try:
                line = self._lines.get(timeout=1.0)
            except queue.Empty:
                assert self.process.poll() is None, self.said
                continue
            self.said += line
            if word in line:
                return line
        raise AssertionError(f"{word!r} was not said: {self.said}")


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[tuple[Path, dict, list[str], list[str]]]:
    """A run of two boards over mutual TLS: folder, how it ended, what was shown and printed, tokens."""
    if find_mosquitto() is None:
        pytest.skip("mosquitto is not installed")
    folder = tmp_path_factory.mktemp("served")
    serving = Serving(folder)
    agents: list[subprocess.Popen] = []
    shown: list[str] = []
    tokens = []
    try:
        broker = serving.line_with("mqtts://").split("mqtts://")[1].split()[0]
        url = serving.line_with("https://").split()[-1]
        for name in ("zero-1", "zero-2"):
            (folder / name).mkdir(mode=0o700)
        words = ["--url", url, "--authority", str(folder / "authority"), "--out", str(folder / "tickets")]
        done = subprocess.run(
            [sys.executable, "-m", "coordinator.cli", "enrol", "zero-1", "zero-2", *words],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        for name in ("zero-1", "zero-2"):
            ticket = folder / "tickets" / f"{name}.ticket.json"
            tokens.append(json.loads(ticket.read_text())["token"])
            ticket.replace(folder / name / "ticket.json")
            data = folder / "run" / "agents" / name / "data.npz"
            agents.append(
                start_agent(
                    folder / name,
                    folder / "run" / "bundle",
                    broker=f"mqtts://{broker}",
                    data=data,
                    name=name,
                    run="digits",
                )
            )
        for process in (serving.process, *agents):
            shown += psutil.Process(process.pid).cmdline()
        out, _ = serving.process.communicate(timeout=PATIENCE_S)
        assert serving.process.returncode == 0, serving.said
        yield folder, json.loads(out), [*shown, done.stdout, done.stderr], tokens
    finally:
        for process in (serving.process, *agents):
            process.kill()
            process.wait()


def test_a_secured_fleet_ends_with_the_digest_of_an_open_one(served, tmp_path):
    """Two boards that enrolled by tickets train over mutual TLS to the bits that the simulation foretells."""
    _, ended, _, _ = served
    expected = simulate(
        load_experiment(ROOT / "examples" / "digits.toml", SHORT), out=tmp_path / "run", observer=Silence()
    )

    assert (ended["rounds"], ended["rounds_skipped"]) == (6, 0)
    assert ended["final_digest"] == expected["final_digest"]
    assert {agent["digest"] for agent in ended["agents"].values()} == {expected["final_digest"]}
    assert len(ended["agents"]) == 2


def test_no_secret_is_said(served):
    """No token and no key stands in an argument, in what was printed, or in any log of the run."""
    folder, _, shown, tokens = served
    keys = [*folder.glob("*/device.key"), *(folder / "authority").glob("*.key")]
    secrets = [token.encode() for token in tokens]
    secrets += [path.read_bytes().splitlines()[1] for path in keys if path.read_bytes().startswith(b"-----")]
    secrets += [(folder / "authority" / "signing.key").read_bytes()]
    assert len(secrets) >= 2 + 2 + 3 + 1
    texts = [" ".join(shown).encode()]
    own = {path for path in folder.rglob("*") if path.suffix == ".key"}
    files = [path for path in folder.rglob("*") if path.is_file() and path not in own]
    texts += [path.read_bytes() for path in files]
    assert {"zero-1.log", "broker.log", "mosquitto.conf", "log.sqlite", "authority.sqlite"} <= {
        path.name for path in files
    }

    assert not any(secret in text for secret in secrets for text in texts)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no file modes")
def test_every_key_of_the_run_is_for_its_owner(served):
    """Whatever file holds a private key has mode 0600, in a folder of mode 0700."""
    folder, _, _, _ = served
    keys = [path for path in folder.rglob("*.key") if path.is_file()]
    assert len(keys) >= 6

    assert {stat.S_IMODE(path.stat().st_mode) for path in keys} == {0o600}
    assert {stat.S_IMODE(path.parent.stat().st_mode) for path in keys} == {0o700}


def test_a_ticket_is_used_up(served):
    """An agent that has enrolled keeps its credentials, and no ticket that somebody could find."""
    folder, _, _, _ = served

    assert "enrolled" in (folder / "zero-1.log").read_text()
    assert (folder / "zero-1" / "enrolled.json").is_file()
    assert not (folder / "zero-1" / "ticket.json").exists()
