"""The wizard at a real terminal: four questions, slips of the pen, real card folders."""

import json
import os
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from coordinator.flash.payload import Target
from tests.card_images import BOOKWORM, TRIXIE
from tests.flash_bench import make_bundle, make_cache

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo terminals like these")

ROOT = Path(__file__).resolve().parent.parent


class Terminal:
    """A person at a pseudo terminal."""

    def __init__(self, folder: Path, *words: str) -> None:
        import pty

        own, others = pty.openpty()
        self._own = own
        env = os.environ | {
            "PYTHONPATH": str(ROOT),
            "SCALARFED_BOOK": str(folder / "boards.json"),
            "XDG_CACHE_HOME": str(folder / "cache"),
            "XDG_DATA_HOME": str(folder / "share"),
            "TERM": "dumb",
            "PYTHONUTF8": "1",
        }
        command = [sys.executable, "-m", "coordinator.cli", *words]
        self._child = subprocess.Popen(
            command, stdin=others, stdout=others, stderr=others, cwd=folder, env=env, start_new_session=True
        )
        os.close(others)
        self.said = ""

    def until(self, wanted: str, *, within_s: float = 60.0) -> None:
        """Read until the program has said something that matches."""
        deadline = time.monotonic() + within_s
        while not re.search(wanted, self.said):
            assert time.monotonic() < deadline, f"{wanted!r} did not come: {self.said}"
            if select.select([self._own], [], [], 0.2)[0]:
                try:
                    self.said += os.read(self._own, 65536).decode()
                except OSError:  # the program has ended
                    assert re.search(wanted, self.said), self.said
                    return

    def type(self, line: str) -> None:
        """Type a line; what was said before is done with."""
        self.said = ""
        os.write(self._own, line.encode() + b"\n")

    def end(self) -> int:
        """Return the exit code."""
        code = self._child.wait(60)
        os.close(self._own)
        return code


@pytest.fixture
def desk(tmp_path):
    """Return a folder with cards, a run and a cache of wheels."""
    make_cache(tmp_path / "cache/scalarfed/wheels", Target("3.11"), Target("3.13"))
    make_bundle(tmp_path / "runs/digits")
    (tmp_path / "runs/digits/experiment.toml").write_text('name = "digits"\n')
    for name, files in (("trixie", TRIXIE), ("bookworm", BOOKWORM)):
        (tmp_path / name).mkdir()
        for file, data in files.items():
            (tmp_path / name / file).write_bytes(data)
    return tmp_path


def test_four_answers_make_a_board(desk):
    """Card, name, bundle and broker; name and bundle are suggested, and the card is whole in the end."""
    person = Terminal(desk, "flash")
    person.until("1/4.*: ")
    person.type(str(desk / "trixie"))
    person.until(r"2/4.*\[pi-1\]: ")
    person.type("")
    person.until(r"3/4.*\[runs/digits/bundle\]: ")
    person.type("")
    person.until("4/4.*: ")
    person.type("mqtt://192.0.2.1")
    person.until("reports in by itself")

    assert person.end() == 0
    assert "5/" not in person.said
    told = json.loads((desk / "trixie/scalarfed/board.json").read_text())
    assert (told["name"], told["run"], told["broker"]) == ("pi-1", "digits", "mqtt://192.0.2.1")
    assert json.loads((desk / "trixie/scalarfed/receipt.json").read_text())["complete"]


def test_a_slip_of_the_pen_is_asked_for_again(desk):
    """Each wrong answer is said why and asked again; nothing was written before the last right one."""
    (desk / "old").mkdir()
    (desk / "old/cmdline.txt").write_bytes(b"root=/dev/mmcblk0p2\n")
    (desk / "old/issue.txt").write_bytes(BOOKWORM["issue.txt"])
    person = Terminal(desk, "flash")
    slips = [
        ("1/4", "nowhere", "is no folder"),
        ("1/4", "runs", "no boot partition"),
        ("1/4", "old", "has been booted before"),
        ("1/4", "bookworm", "2/4"),
        ("2/4", "Pi 7!", "cannot name a board"),
        ("2/4", "pi-{1..3}", "flash image"),
        ("2/4", "pi-kitchen", "3/4"),
        ("3/4", "runs/digits", "manifest"),
        ("3/4", "", "4/4"),
        ("4/4", "127.0.0.1", "no broker's address"),
        ("4/4", "mqtt://127.0.0.1", "means the board itself"),
        ("4/4", "http://192.0.2.1", "no broker's address"),
    ]
    for question, answer, says in slips:
        person.until(f"{question}.*: $")
        assert not (desk / "bookworm/scalarfed").exists()
        person.type(answer)
        person.until(says)
    person.until("4/4.*: $")
    person.type("mqtt://192.0.2.1")
    person.until("reports in by itself")

    assert person.end() == 0
    assert json.loads((desk / "bookworm/scalarfed/board.json").read_text())["name"] == "pi-kitchen"


def test_leaving_in_the_middle_writes_nothing(desk):
    """Ctrl-C at any question leaves the card as it was."""
    before = {path.name: path.read_bytes() for path in (desk / "trixie").iterdir()}
    person = Terminal(desk, "flash")
    person.until("1/4.*: ")
    person.type(str(desk / "trixie"))
    person.until("2/4.*: ")
    person.type("\x04")
    assert person.end() != 0

    assert {path.name: path.read_bytes() for path in (desk / "trixie").iterdir()} == before
    assert not (desk / "boards.json").exists()
