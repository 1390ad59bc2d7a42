"""The installer and its guard, run by a real shell into a root of their own."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from coordinator.flash.payload import REQUIREMENTS, Target, make_payload, own_wheel
from coordinator.flash.settings import Credentials, Settings
from tests.flash_bench import TOKEN, InstalledBoard, make_board, make_bundle, make_real_cache

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
BOARD = ROOT / "coordinator/flash/board"


def here() -> Target:
    """Return what the python3 on the PATH takes, which the installer uses."""
    told = subprocess.run(
        ["python3", "-c", "import sys; print('%d.%d' % sys.version_info[:2])"],
        capture_output=True,
        text=True,
        check=True,
    )
    return Target(told.stdout.strip(), platform.machine())


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="boards run Linux")


@pytest.fixture
def boot(tmp_path):
    """Return a boot partition's folder with a payload whose wheels are stand-ins: importing fails."""
    payload = make_board(tmp_path, target=here())
    folder = tmp_path / "boot" / "scalarfed"
    for path, data in payload.files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder


def install(folder: Path, root: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", str(folder / "install.sh"), "--root", str(root), "--no-start"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def report(folder: Path) -> str:
    """Return the report without the seconds."""
    return "".join(line.partition(" ")[2] + "\n" for line in (folder / "report.txt").read_text().splitlines())


def test_requirements_are_those_of_the_project():
    """What a board gets is what pyproject.toml says that the agent needs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    assert list(REQUIREMENTS) == project["dependencies"]


def test_our_wheel_is_the_same_every_time():
    """Equal sources give equal bytes, so that a release has one name."""
    assert own_wheel() == own_wheel()


def test_a_tampered_wheel_is_refused_and_named(boot, tmp_path):
    """One flipped bit in a wheel stops the installer; the report names the file, and nothing is installed."""
    wheel = next((boot / "wheels").glob("small-*.whl"))
    raw = bytearray(wheel.read_bytes())
    raw[-40] ^= 1
    wheel.write_bytes(raw)
    done = install(boot, tmp_path / "root")

    assert done.returncode == 1
    assert f"FAILED: hash: wheels/{wheel.name}: FAILED" in report(boot)
    assert not (tmp_path / "root/opt/scalarfed/current").is_symlink()


def test_a_tampered_bundle_is_refused_and_named(boot, tmp_path):
    """The same for the weights."""
    (boot / "bundle/weights.f32").write_bytes(bytes(64))

    assert install(boot, tmp_path / "root").returncode == 1
    assert "FAILED: hash: bundle/weights.f32: FAILED" in report(boot)


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ("1-x riscv64 3.13", "FAILED: machine: this is"),
        (f"1-x {platform.machine()} 3.9", "FAILED: python: this is"),
    ],
)
def test_another_machine_is_refused(boot, tmp_path, told, says):
    """Wheels for another processor or another Python are refused before anything is unpacked."""
    (boot / "release").write_text(told + "\n")
    done = install(boot, tmp_path / "root")

    assert done.returncode == 1
    assert says in report(boot)


def test_a_full_disk_is_refused(boot, tmp_path):
    """Too little space is said with both numbers."""
    (boot / "unpacked_kib").write_text("999999999999\n")
    manifest = (boot / "MANIFEST").read_text().splitlines()
    (boot / "MANIFEST").write_text("\n".join(line for line in manifest if "unpacked_kib" not in line) + "\n")

    assert install(boot, tmp_path / "root").returncode == 1
    assert "KiB are needed" in report(boot)


def test_wheels_that_do_not_import_are_found_before_the_switch(boot, tmp_path):
    """An import that fails is in the report; no release is current, and the token stays for a repair."""
    done = install(boot, tmp_path / "root")

    assert done.returncode == 1
    assert "FAILED: import: " in report(boot)
    assert not (tmp_path / "root/opt/scalarfed/current").is_symlink()
    assert (boot / "board.json").is_file()


def test_two_installers_do_not_race(boot, tmp_path):
    """While one runs another one leaves at once; a lock whose owner is dead is taken over."""
    lock = tmp_path / "root/run/scalarfed-install.lock"
    lock.mkdir(parents=True)
    (lock / "pid").write_text(str(os.getpid()))
    done = install(boot, tmp_path / "root")
    assert done.returncode == 75
    assert not (boot / "report.txt").exists()

    dead = subprocess.Popen(["true"])
    dead.wait()
    (lock / "pid").write_text(str(dead.pid))
    assert install(boot, tmp_path / "root").returncode == 1  # it came as far as the import
    assert "import" in report(boot)
    assert not lock.exists()


# ------------------------------------------------------------------------------------------------ guard


@pytest.fixture
def releases(tmp_path):
    """Return a root with release b on trial after a."""
    opt, var = tmp_path / "opt/scalarfed", tmp_path / "var/lib/scalarfed"
    var.mkdir(parents=True)
    for name in "ab":
        (opt / "releases" / name).mkdir(parents=True)
        (opt / "releases" / name / "complete").touch()
    (opt / "current").symlink_to("releases/b")
    (opt / "trial").write_text("releases/a\n")
    return tmp_path


def guard(root: Path, when: str = "before", **env: str) -> str:
    done = subprocess.run(
        ["sh", str(BOARD / "guard.sh"), when, str(root)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **env},
    )
    return os.readlink(root / "opt/scalarfed/current").removeprefix("releases/") + done.stdout


def test_a_release_that_joins_stays(releases):
    """Once the agent of the new release has joined, the trial is over."""
    assert guard(releases) == "b"
    (releases / "var/lib/scalarfed/healthy").write_text("b")
    assert guard(releases).startswith("b")

    assert not (releases / "opt/scalarfed/trial").exists()
    assert [guard(releases)[0] for _ in range(6)] == ["b"] * 6


def test_a_release_that_never_joins_goes_back_at_its_fifth_start(releases):
    """Four starts without joining, then the former release is current again, and it is written down."""
    assert [guard(releases)[0] for _ in range(5)] == ["b", "b", "b", "b", "a"]
    assert (releases / "opt/scalarfed/returned-from").read_text() == "b\n"
    assert guard(releases) == "a"


def test_a_release_that_gives_up_goes_back_at_once(releases):
    """The agent's own word that it did not join in time is enough."""
    (releases / "var/lib/scalarfed/give-back").touch()

    assert guard(releases)[0] == "a"


def test_a_bad_end_comes_into_the_cards_report(releases):
    """How the agent ended, with its last words, is appended where `doctor CARD` looks; a good end is not."""
    path = releases / "boot/firmware/scalarfed/report.txt"
    path.parent.mkdir(parents=True)
    path.write_text("1.0 done b\n")
    last = {"starts": 2, "last_words": "no connection: refused"}
    (releases / "var/lib/scalarfed/starts.json").write_text(json.dumps(last))
    guard(releases, "after", SERVICE_RESULT="success")
    guard(releases, "after", SERVICE_RESULT="exit-code", EXIT_CODE="exited", EXIT_STATUS="69")

    lines = path.read_text().splitlines()
    assert len(lines) == 2
    assert lines[1].endswith("agent ended: exit-code exited 69: no connection: refused")


def test_a_report_does_not_wear_out_the_card(releases):
    """A board that fails for ever stops writing at 32 KiB."""
    path = releases / "boot/scalarfed/report.txt"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"x" * 32768)
    guard(releases, "after", SERVICE_RESULT="oom-kill")

    assert path.stat().st_size == 32768


# ------------------------------------------------------------------------------------------- the unit


@pytest.fixture(scope="module")
def units(tmp_path_factory):
    """Return the units of an installed board."""
    folder = tmp_path_factory.mktemp("units")
    target = Target(".".join(platform.python_version_tuple()[:2]), platform.machine())
    settings = Settings("pi-1", "mqtt://192.0.2.1", "linear", 96, credentials=Credentials(TOKEN))
    payload = make_payload(
        target, settings, bundle=make_bundle(folder / "run"), cache=make_real_cache(folder / "cache", target)
    )
    InstalledBoard(folder / "root").install(payload, folder / "boot")
    return folder / "root/etc/systemd/system"


def test_the_unit_keeps_the_budget(units):
    """MemoryMax is the budget of board.json, swap is off, the watchdog is on, no placeholder is left."""
    unit = (units / "scalarfed-agent.service").read_text()
    lines = unit.splitlines()

    assert "MemoryMax=96M" in lines
    assert {"MemorySwapMax=0", "Type=notify", "WatchdogSec=120", "Restart=always", "OOMPolicy=stop"} <= set(
        lines
    )
    assert "@" not in unit
    assert TOKEN not in unit


@pytest.mark.parametrize("name", ["scalarfed-agent.service", "scalarfed-care.service", "scalarfed-care.path"])
def test_systemd_takes_the_unit(units, name):
    """systemd-analyze finds nothing but that the program is not here."""
    try:
        done = subprocess.run(
            ["systemd-analyze", "verify", str(units / name)], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        pytest.skip("systemd-analyze is not installed")
    said = [line for line in done.stderr.splitlines() if "scalarfed-" in line]

    assert [line for line in said if "is not executable" not in line] == []
