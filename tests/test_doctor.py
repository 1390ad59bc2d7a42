"""The doctor's verdicts, one for each kind of evidence, and what boards tell of themselves."""

import json
from pathlib import Path

import pytest

from coordinator.boards import Board, forget_board, read_book, record_board, rename_board
from coordinator.cli import main
from coordinator.doctor import diagnose_log, diagnose_report, diagnose_status, worst
from coordinator.status import read_status
from edge_agent.telemetry import read_telemetry
from profiles.errors import StateError
from tests.card_images import TRIXIE

DONE = "1.0 begin 1-a\n2.0 wheels: 8 unpacked\n3.0 done 1-a\n"
BOARD = Board("pi-1", "card", "/media/x", "mqtt://192.0.2.1", "scalarfed", "digits", "pi-zero-2w", 128, "1-a")
READY = {
    "name": "pi-1",
    "state": "ready",
    "round": 3,
    "digest": "ab",
    "budget_mib": 128,
    "enforcement": "cgroup v2 root",
}


@pytest.mark.parametrize(
    ("report", "says"),
    [
        (None, "never ran the installer"),
        ("1.0 begin 1-a\n2.0 environment\n", "stopped after 'environment'"),
        ("1.0 begin 1-a\n2.0 FAILED: hash: wheels/numpy.whl: FAILED\n", "tampered"),
        ("1.0 begin 1-a\n2.0 FAILED: wheels: wheels/numpy.whl does not unpack\n", "full or corrupt"),
        ("1.0 begin 1-a\n2.0 FAILED: space: 3 KiB are free\n", "the card is full"),
        ("1.0 begin 1-a\n2.0 FAILED: machine: this is x86_64\n", "another processor"),
        ("1.0 begin 1-a\n2.0 FAILED: import: ImportError: wrong ELF class\n", "does not run on this board"),
        (DONE + "9.0 agent ended: oom-kill killed KILL: \n", "memory limit"),
        (DONE + "9.0 agent ended: watchdog dumped ABRT: \n", "hung"),
        (
            DONE + "9.0 agent ended: exit-code exited 69: no connection: timed out\n",
            "does not reach the broker",
        ),
        (
            DONE + "9.0 agent ended: exit-code exited 69: no connection: Connection refused\n",
            "no broker listens",
        ),
        (
            DONE + "9.0 agent ended: exit-code exited 9: Bad user name or password\n",
            "wrong, used or expired token",
        ),
        (DONE + "9.0 agent ended: exit-code exited 9: certificate verify failed\n", "TLS failed"),
        (DONE + "9.0 agent ended: exit-code exited 4: data.npz lacks x_train\n", "samples are missing"),
        (DONE + "9.0 agent ended: exit-code exited 8: the imports alone hold 60 MiB\n", "budget is smaller"),
    ],
)
def test_a_card_is_understood(report, says):
    """Each way in which a board fails before or after its first boot has its own verdict and next step."""
    verdicts = diagnose_report(report, flashed=True)

    fault = next(verdict for verdict in verdicts if verdict.kind == "fault")
    assert says in fault.text
    assert len(fault.next_step) > 10


@pytest.mark.parametrize(
    "went", ["refused: hash: wheels/a.whl is not what was offered", "returned: 1-b did not join"]
)
def test_an_update_that_went_wrong_is_told(went):
    """The card tells of a last update that was refused, failed or given back; a good one ends that."""
    told = diagnose_report(DONE + f"5.0 update {went}\n", flashed=True)
    assert [verdict.kind for verdict in told] == ["fine", "warning"]
    assert went in told[1].text

    mended = DONE + f"5.0 update {went}\n6.0 update trial: 1-c is installed\n"
    assert worst(diagnose_report(mended, flashed=True)) == "fine"


def test_only_the_last_installation_counts():
    """A repaired card is fine, whatever an earlier try said."""
    report = "1.0 begin 1-a\n2.0 FAILED: space: full\n" + DONE

    assert worst(diagnose_report(report, flashed=True)) == "fine"


def test_a_memory_limit_that_is_not_held_is_a_warning():
    """The installer's word that the kernel limits no memory is passed on."""
    report = DONE.replace("3.0", "2.5 warning: no memory cgroup until the next boot\n3.0")

    assert worst(diagnose_report(report, flashed=True)) == "warning"


@pytest.mark.parametrize(
    ("changed", "kind", "says"),
    [
        ({}, "fine", "at round 3"),
        ({"state": "offline"}, "fault", "last will"),
        ({"state": "refused"}, "fault", "another bundle"),
        ({"state": "starting"}, "warning", "not called it"),
        (
            {"state": "safe mode", "starts": 6, "last_words": "no bundle in /x"},
            "fault",
            "5 failed starts: the bundle",
        ),
        ({"enforcement": "none"}, "warning", "not held by the kernel"),
        ({"telemetry": {"throttled": ["under-voltage"]}}, "warning", "under-voltage now"),
        (
            {"telemetry": {"throttled": [], "throttled_since_boot": ["under-voltage"]}},
            "warning",
            "since its boot",
        ),
        ({"telemetry": {"temperature_c": 84.0}}, "warning", "84 °C"),
        ({"telemetry": {"disk_free_mib": 12}}, "warning", "12 MiB left"),
    ],
)
def test_a_status_is_understood(changed, kind, says):
    """What a board says of itself leads to a verdict."""
    verdicts = diagnose_status(READY | changed, BOARD)

    assert worst(verdicts) == kind
    assert any(says in verdict.text for verdict in verdicts)


def test_a_board_never_heard_of():
    """Without any status the book tells when and how it was flashed."""
    (verdict,) = diagnose_status(None, BOARD)

    assert "never reported in" in verdict.text
    assert "by card" in verdict.text


def test_a_log_is_understood():
    """The last bad line of a log counts; a quiet log says nothing."""
    assert "does not reach" in diagnose_log(["x INFO fine", "x WARNING disconnected: timed out"])[0].text
    assert diagnose_log(["x INFO connected to mqtt://a"]) == []


def test_doctor_on_a_card(tmp_path, capsys):
    """The command reads a mounted card; it ends with 1 where something is wrong."""
    for name, data in TRIXIE.items():
        (tmp_path / name).write_bytes(data)
    assert main(["doctor", str(tmp_path)]) == 1
    assert "nothing of scalarfed" in capsys.readouterr().out

    (tmp_path / "scalarfed").mkdir()
    (tmp_path / "scalarfed/report.txt").write_text(DONE)
    assert main(["doctor", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == "fine"


# --------------------------------------------------------------------------------------------- the book


def test_the_book_keeps_no_token(tmp_path):
    """Of a token only its hash is kept; boards come back as they were written."""
    path = tmp_path / "book.json"
    record_board(BOARD, token="secret-token", path=path)

    assert "secret-token" not in path.read_text()
    assert read_book(path)["pi-1"].token_sha256
    assert read_book(path)["pi-1"].where == "/media/x"
    assert forget_board("pi-1", path=path)
    assert read_book(path) == {}


def test_a_name_for_people(tmp_path):
    """A board can be shown under another name, but not under another board's."""
    path = tmp_path / "book.json"
    record_board(BOARD, path=path)
    record_board(Board(**{**vars(BOARD), "name": "pi-2"}), path=path)
    rename_board("pi-1", "window sill", path=path)

    assert read_book(path)["pi-1"].shown_as == "window sill"
    with pytest.raises(StateError, match="another board's"):
        rename_board("pi-2", "window sill", path=path)


# -------------------------------------------------------------------------------------------- telemetry


def put(root: Path, files: dict[str, str]) -> Path:
    """Lay out files of sysfs and procfs."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


def test_a_pi_tells_heat_and_voltage(tmp_path):
    """Millidegrees become degrees, the firmware's bits become words, now and since the boot."""
    root = put(
        tmp_path,
        {
            "sys/class/thermal/thermal_zone0/temp": "61837",
            "sys/devices/platform/soc/soc:firmware/get_throttled": "50005",
            "proc/meminfo": "MemTotal: 437000 kB\nMemAvailable: 204800 kB\n"
            "SwapTotal: 2048 kB\nSwapFree: 1024 kB",
            "proc/loadavg": "1.25 0 0 1/2 3",
            "proc/uptime": "99.5 1",
        },
    )

    assert read_telemetry(root=root) == {
        "temperature_c": 61.8,
        "throttled": ["under-voltage", "throttled"],
        "throttled_since_boot": ["under-voltage", "throttled"],
        "ram_mib": 427,
        "available_mib": 200,
        "swap_used_mib": 1,
        "load_1min": 1.25,
        "uptime_s": 99.5,
    }


def test_a_jetson_tells_power(tmp_path):
    """The INA3221's millivolts times milliamperes are watts; the hottest zone counts."""
    root = put(
        tmp_path,
        {
            "sys/class/hwmon/hwmon1/name": "ina3221",
            "sys/class/hwmon/hwmon1/in1_input": "5000",
            "sys/class/hwmon/hwmon1/curr1_input": "1500",
            "sys/class/thermal/thermal_zone0/temp": "45000",
            "sys/class/thermal/thermal_zone1/temp": "52500",
            "sys/class/thermal/thermal_zone2/temp": "-256000",
            "sys/class/devfreq/17000000.gpu/device/load": "250",
            "proc/meminfo": "NvMapMemUsed: 102400 kB",
        },
    )

    told = read_telemetry(root=root)
    assert (told["power_w"], told["temperature_c"], told["gpu_load"], told["gpu_mib"]) == (
        7.5,
        52.5,
        0.25,
        100,
    )


def test_a_board_without_sensors_tells_nothing(tmp_path):
    """What is not there is left out, and nothing is guessed."""
    assert read_telemetry(root=tmp_path) == {}


def test_telemetry_passes_the_coordinators_check():
    """What this machine tells is what a status may carry."""
    told = read_telemetry()
    status = read_status(json.dumps({"state": "ready", "telemetry": told}).encode())

    assert status["telemetry"] == told
