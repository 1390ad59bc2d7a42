"""Updates of a board: a real broker, web server, agent and installer; offers that lie; canaries."""

import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

from coordinator.authority import Authority
from coordinator.boards import Board, read_book, record_board
from coordinator.cli import main
from coordinator.flash.payload import Target, make_payload
from coordinator.flash.settings import Credentials, Settings
from coordinator.update import Outcome, Updater
from edge_agent.commands import Commands, find_led
from edge_agent.update import fetch_offer, is_genuine, make_offer, read_offer, take_over
from edge_agent.update import main as take_over_as_root
from profiles.errors import FetchError
from tests.flash_bench import Coordinator, InstalledBoard, make_bundle, make_data, make_real_cache
from tests.made_run import make_replayable_run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="boards run Linux")

HERE = (platform.machine(), ".".join(platform.python_version_tuple()[:2]))
FILES = {"release": b"r2 any 3\n", "wheels/a.whl": b"wheel" * 999, "install.sh": b"exit 0\n"}


@pytest.fixture
def authority(tmp_path):
    """Return a coordinator's keys."""
    return Authority.create(tmp_path / "authority")


def offer(authority: Authority, **changed: object):
    """Return a signed offer of FILES for this machine."""
    told = {
        "url": "http://127.0.0.1:9", "number": 7, "release": "1.0-r2", "machine": HERE[0], "python": HERE[1],
        "files": FILES, "sign": authority.signer(),
    }  # fmt: skip
    return make_offer(**(told | changed))


def fetched(folder: Path, made) -> Path:
    """Return an agent's folder that holds an offer and all its files."""
    for path, data in FILES.items():
        (folder / "files" / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / "files" / path).write_bytes(data)
    (folder / "offer.json").write_bytes(made.to_json())
    return folder


# ------------------------------------------------------------------------------------------- the offer


def test_an_offer_survives_the_wire(authority):
    """What is read is what was made, and its signature counts; a single other byte ends that."""
    made = offer(authority)
    again = read_offer(made.to_json())

    assert again == made
    assert is_genuine(again, authority.signing_key)
    forged = made.to_json().replace(b"1.0-r2", b"1.0-r3")
    assert not is_genuine(read_offer(forged), authority.signing_key)
    assert not is_genuine(made, "")
    assert not is_genuine(made, "00" * 32)


@pytest.mark.parametrize(
    ("was", "becomes"),
    [
        ('"release"', '"../release"'),
        ('"release"', '"/etc/passwd"'),
        ('"release"', '"a/b/c"'),
        ('"format":1', '"format":2'),
        ('"number":7', '"number":-1'),
        ('"number":7', '"number":true'),
        ('"1.0-r2"', '"1.0 r2; reboot"'),
        ('"files":[[', '"files":[["x"],['),
    ],
)
def test_an_offer_of_another_form_is_refused(authority, was, becomes):
    """Paths that leave the folder, words that a shell would take, other types: nothing is done."""
    told = json.loads(offer(authority).to_json())
    assert was in told["statement"]
    told["statement"] = told["statement"].replace(was, becomes)

    with pytest.raises(FetchError, match="malformed"):
        read_offer(json.dumps(told).encode())


def test_root_takes_over_what_was_offered(authority, tmp_path):
    """The copy holds every file and a manifest that sha256sum accepts."""
    folder = fetched(tmp_path / "update", offer(authority))
    take_over(folder, tmp_path / "incoming", key=authority.signing_key)

    assert (tmp_path / "incoming/wheels/a.whl").read_bytes() == FILES["wheels/a.whl"]
    subprocess.run(["sha256sum", "-c", "--quiet", "MANIFEST"], cwd=tmp_path / "incoming", check=True)


def test_root_believes_no_file_of_the_agent(authority, tmp_path):
    """A changed file, a longer one, a link, a pipe, another signer: nothing is taken over."""
    made = offer(authority)
    wheel = Path("files/wheels/a.whl")

    def change(folder: Path) -> None:
        (folder / wheel).write_bytes(FILES["wheels/a.whl"][:-1] + b"x")

    def lengthen(folder: Path) -> None:
        (folder / wheel).write_bytes(FILES["wheels/a.whl"] + b"x")
        (folder / "files/install.sh").write_bytes(b"reboot\n")

    def link(folder: Path) -> None:
        (folder / wheel).rename(tmp_path / "elsewhere")
        (folder / wheel).symlink_to(tmp_path / "elsewhere")

    def pipe(folder: Path) -> None:
        (folder / wheel).unlink()
        os.mkfifo(folder / wheel)

    def sign_oneself(folder: Path) -> None:
        other = Authority.create(tmp_path / "other")
        (folder / "offer.json").write_bytes(offer(other).to_json())

    for number, damage in enumerate((change, lengthen, link, pipe, sign_oneself)):
        folder = fetched(tmp_path / f"update{number}", made)
        damage(folder)
        with pytest.raises((FetchError, OSError)):
            take_over(folder, tmp_path / "incoming", key=authority.signing_key)
        assert not (tmp_path / "incoming").exists(), damage.__name__
        assert not (tmp_path / "incoming.new").exists(), damage.__name__


def test_an_older_offer_is_not_taken_again(authority, tmp_path, capsys):
    """A signed release of last year, played again, does not bring its holes back."""
    settings = tmp_path / "board.json"
    settings.write_text(json.dumps({"signing_key": authority.signing_key}))
    opt = tmp_path / "opt"
    opt.mkdir()

    for number, code in ((7, 0), (7, 0), (9, 0), (8, 1)):
        fetched(tmp_path / "state/update", offer(authority, number=number))
        assert take_over_as_root([str(tmp_path / "state"), str(opt), str(settings)]) == code
    assert "older" in capsys.readouterr().out
    assert (opt / "update.number").read_text() == "9"
    assert not (opt / "incoming").exists()


def test_what_the_last_payload_had_is_not_fetched(authority, tmp_path):
    """Only the file that differs is asked for: here nothing, so that no server is needed."""
    for path, data in FILES.items():
        (tmp_path / "payload" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "payload" / path).write_bytes(data)
    (tmp_path / "update/files").mkdir(parents=True)
    (tmp_path / "update/files/of-an-earlier-offer").write_bytes(b"x")
    fetch_offer(offer(authority), tmp_path / "update", sources=[tmp_path / "payload"])

    there = {str(p.relative_to(tmp_path / "update")) for p in (tmp_path / "update").rglob("*") if p.is_file()}
    assert there == {"offer.json", *(f"files/{path}" for path in FILES)}

    (tmp_path / "payload/release").write_bytes(b"another")
    (tmp_path / "update/files/release").unlink()
    with pytest.raises(FetchError, match="refused"):
        fetch_offer(offer(authority), tmp_path / "update", sources=[tmp_path / "payload"], attempts=1)
    assert not (tmp_path / "update/offer.json").exists()


# ------------------------------------------------------------------------------------------ the board


@pytest.fixture
def obeying(authority, tmp_path):
    """Return a board that obeys, installed in name only, and what it was asked to fetch."""
    opt, state = tmp_path / "opt", tmp_path / "state"
    (opt / "releases/1.0-r1").mkdir(parents=True)
    (opt / "current").symlink_to("releases/1.0-r1")
    state.mkdir()
    asked: list[str] = []
    commands = Commands(
        state, opt=opt, key=authority.signing_key, leds=tmp_path / "leds",
        fetch=lambda made, folder, **_: asked.append(made.release),
    )  # fmt: skip
    return commands, asked, opt, state


def settle(commands: Commands) -> str:
    """Return what the board says once its fetching thread has ended."""
    if commands._thread is not None:
        commands._thread.join(20)
    return str(commands.status()["update_state"])


def test_a_board_fetches_and_asks_root(obeying, authority):
    """An offer for it, signed, newer: fetched, and root is asked by a file."""
    commands, asked, _, state = obeying
    commands.obey(offer(authority).to_json())

    assert settle(commands) == "fetched"
    assert asked == ["1.0-r2"]
    assert (state / "asks/update").exists()


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"machine": "riscv64"}, "is for riscv64"),
        ({"python": "3.6"}, "Python 3.6"),
        ({"sign": lambda message: bytes(64)}, "not signed"),
    ],
)
def test_a_board_refuses_what_is_not_for_it(obeying, authority, changed, says):
    """Another processor, another Python, another signer: nothing is fetched, and the status says why."""
    commands, asked, _, state = obeying
    commands.obey(offer(authority, **changed).to_json())
    status = commands.status()

    assert (settle(commands), status["update_number"]) == ("refused", 7)
    assert says in str(status["update"])
    assert asked == []
    assert not (state / "asks").exists()


@pytest.mark.parametrize(
    "payload", [b"{", b"[]", b"7", b'{"do": "reboot"}', b'{"do": "update"}', b"\xff" * 9]
)
def test_nonsense_changes_nothing(obeying, payload):
    """Whatever comes, the board goes on and says that it did not understand."""
    commands, asked, _, _ = obeying
    commands.obey(payload)

    assert settle(commands) == "refused"
    assert asked == []


def test_an_offer_waits_for_a_trial_to_end(obeying, authority):
    """While a release is on trial there is a former one to go back to, which a second update would lose."""
    commands, asked, opt, state = obeying
    (opt / "trial").write_text("releases/1.0-r0\n")
    commands.obey(offer(authority).to_json())
    assert (settle(commands), asked) == ("waiting", [])
    (state / "healthy").write_text("1.0-r1")
    commands.tick()

    assert (settle(commands), asked) == ("fetched", ["1.0-r2"])


def test_what_was_dealt_with_is_not_fetched_again(obeying, authority):
    """The retained offer comes again with each connection."""
    commands, asked, opt, _ = obeying
    (opt / "update.number").write_text("7")
    commands.obey(offer(authority).to_json())
    settle(commands)

    assert asked == []


def test_a_board_without_a_light_says_so(obeying, tmp_path):
    """Locate asks root where there is a light, and says it where there is none; keyboards do not count."""
    commands, _, _, state = obeying
    commands.obey(b'{"do": "locate", "seconds": 5, "number": 12}')
    assert "no light" in str(commands.status()["update"])
    assert commands.status()["update_number"] == 12
    (tmp_path / "leds/input3::capslock").mkdir(parents=True)
    assert find_led(tmp_path / "leds") is None
    (tmp_path / "leds/ACT").mkdir()
    commands.obey(b'{"do": "locate", "seconds": 5}')

    assert "ACT blinks for 5 s" in str(commands.status()["update"])
    assert (state / "asks/locate").read_text() == "5\n"


def test_the_light_blinks_and_is_as_before(tmp_path):
    """Root's helper blinks the light as often as asked and gives it back to what it showed before."""
    from coordinator.flash import payload

    led = tmp_path / "leds/ACT"
    led.mkdir(parents=True)
    (led / "trigger").write_text("none usb-gadget [mmc0] timer\n")
    (led / "brightness").write_text("0")
    (led / "max_brightness").write_text("255")
    asks = tmp_path / "var/lib/scalarfed/asks"
    asks.mkdir(parents=True)
    (asks / "locate").write_text("1; reboot\n")
    (asks / "rubbish").write_text("x")
    script = Path(payload.__file__).parent / "board/care.sh"
    subprocess.run(["sh", str(script), str(tmp_path), str(tmp_path / "leds")], check=True)

    assert (led / "trigger").read_text() == "mmc0\n"
    assert list(asks.iterdir()) == []


# --------------------------------------------------------------------------------------- the roll-out


class PaperRoom:
    """Boards on paper: each says, for the offer it got, what ``fates`` has for it."""

    def __init__(self, fates: dict[str, str]) -> None:
        self.fates, self.told, self._queue = fates, [], []

    def tell(self, name, payload):
        if not payload:
            self.told.append(f"-{name}")
            return
        self.told.append(name)
        number = read_offer(payload).number
        stale = {"name": name, "state": "ready", "update_state": "well", "update_number": number - 1}
        self._queue.append(stale)
        if fate := self.fates.get(name):
            said = {"update_state": fate, "update_number": number, "update": f"it is {fate}"}
            self._queue.append({"name": name, "state": "ready", **said})

    def hear(self, within_s):
        return self._queue.pop(0) if self._queue else None


def rolled_out(authority, fates, canaries):
    ticks = iter(range(10_000))
    room = PaperRoom(fates)
    updater = Updater(room, clock=lambda: float(next(ticks)))
    offers = dict.fromkeys(("a", "b", "c"), offer(authority))
    return room, updater.roll_out(offers, canaries=canaries, within_s=50)


def test_the_others_follow_a_canary_that_is_well(authority):
    """One first, then the two others; every offer is taken back at the end."""
    room, outcomes = rolled_out(authority, {"a": "well", "b": "well", "c": "well"}, 1)

    assert [outcome.state for outcome in outcomes] == ["well"] * 3
    assert room.told == ["a", "-a", "b", "c", "-b", "-c"]


@pytest.mark.parametrize("fate", ["returned", "refused", "failed", ""])
def test_a_sick_canary_saves_the_others(authority, fate):
    """Returned, refused, failed or silent: nobody else is offered the release."""
    room, outcomes = rolled_out(authority, {"a": fate, "b": "well", "c": "well"}, 1)

    assert [outcome.state for outcome in outcomes] == [fate or "silent", "held", "held"]
    assert room.told == ["a", "-a"]
    assert Outcome("x", "well").well


# ------------------------------------------------------------------------------------------- for real


@pytest.fixture
def board(tmp_path, monkeypatch):
    """Return an installed board in its run, whose coordinator keeps a book and keys of its own."""
    for name in ("XDG_DATA_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    from coordinator.authority import default_folder

    keys = Authority.create(default_folder())
    bundle = make_bundle(tmp_path / "run")
    coordinator = Coordinator(tmp_path / "coordinator", bundle, ["pi-1"])
    target = Target(HERE[1], HERE[0])
    cache = make_real_cache(tmp_path / "XDG_CACHE_HOME/scalarfed/wheels", target)
    settings = Settings(
        "pi-1", coordinator.broker.url, "linear", 128, credentials=Credentials(signing_key=keys.signing_key)
    )
    made = InstalledBoard(tmp_path / "root")
    try:
        payload = make_payload(
            target, settings, bundle=bundle, data=make_data(tmp_path / "samples.npz"), cache=cache
        )
        made.install(payload, tmp_path / "boot")
        record_board(
            Board("pi-1", "card", "a card", settings.broker, "scalarfed", "linear", "", 128, payload.release)
        )
        made.start()
        coordinator.until("pi-1", lambda status: status.get("round") == 3)
        made.coordinator, made.cache, made.target = coordinator, cache, target
        yield made
    finally:
        made.stop()
        coordinator.stop()


@pytest.mark.timeout(240)
def test_an_update_is_taken_and_a_bad_one_given_back(board, capsys):
    """A new release is fetched, checked, installed and joins; one that never joins is given back."""
    first = board.release
    assert board.coordinator.statuses["pi-1"]["measured"]["fp32_gflops"] > 0  # as the installer found it
    make_real_cache(board.cache, board.target, change="sys.second = True")
    assert main(["update", "--wait", "90"]) == 0, capsys.readouterr().out
    second = board.release

    assert second != first
    assert read_book()["pi-1"].release == second
    assert not (board.opt / "trial").exists() or (board.state / "healthy").read_text() == second
    assert re.search(r"update trial: \S+ is installed", (board.opt / "report.txt").read_text())

    change = "sys.orig_argv[1:3] == ['-m', 'edge_agent.service'] and sys.exit(5)"
    make_real_cache(board.cache, board.target, change=change)
    capsys.readouterr()
    assert main(["update", "--wait", "90"]) == 1
    said = capsys.readouterr().out
    assert "did not join" in said
    assert board.release == second
    board.coordinator.until("pi-1", lambda status: status.get("update_state") == "returned")
    assert read_book()["pi-1"].release == second


@pytest.mark.timeout(240)
def test_another_bundle_takes_a_board_into_another_run(board, tmp_path, capsys):
    """A new bundle reaches the board and it trains in that run; one that cannot start is given back."""
    make_replayable_run(tmp_path / "other", rounds=1, seed=99)
    beyond = Coordinator(
        tmp_path / "beyond", tmp_path / "other/bundle", ["pi-1"], run="second", beside=board.coordinator
    )
    try:
        words = ["update", "--wait", "90", "--bundle", str(tmp_path / "other/bundle"), "--run", "second"]
        assert main(words) == 0, capsys.readouterr().out
        beyond.until("pi-1", lambda status: status.get("round") == 3)
    finally:
        beyond.stop()
    assert read_book()["pi-1"].run == "second"

    manifest = board.state / "bundle/manifest.json"
    before, settings = manifest.read_bytes(), (board.root / "etc/scalarfed/board.json").read_bytes()
    (board.state / "data.npz").rename(board.state / "away.npz")
    make_replayable_run(tmp_path / "third", rounds=1, seed=5)
    capsys.readouterr()
    assert main([*words[:3], "--bundle", str(tmp_path / "third/bundle"), "--run", "third"]) == 1
    assert "returned" in capsys.readouterr().out
    assert manifest.read_bytes() == before
    assert (board.root / "etc/scalarfed/board.json").read_bytes() == settings
