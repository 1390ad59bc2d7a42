"""`scalarfed flash` as a person types it: cards, images, and what is refused before anything is written."""

import json

import pytest

from coordinator.cli import main
from coordinator.flash.payload import Target
from tests.card_images import BOOKWORM, FSCK, MKFS, TRIXIE, make_image, mtype
from tests.flash_bench import make_bundle, make_cache, make_data

needs_fat = pytest.mark.skipif(not (MKFS and FSCK), reason="dosfstools and mtools are not installed")


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Return a folder with a bundle, a book of its own and a cache of wheels."""
    monkeypatch.setenv("SCALARFED_BOOK", str(tmp_path / "boards.json"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "share"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    make_cache(tmp_path / "cache/scalarfed/wheels", Target("3.11"), Target("3.13"))
    make_bundle(tmp_path / "run")
    (tmp_path / "run/experiment.toml").write_text('name = "garden"\n')
    card = tmp_path / "bootfs"
    card.mkdir()
    for name, data in TRIXIE.items():
        (card / name).write_bytes(data)
    return tmp_path


def flash(bench, *words: str) -> int:
    told = ["--broker", "mqtt://192.0.2.1", "--bundle", str(bench / "run/bundle")]
    return main(["flash", *words, *told])


def test_a_card_from_the_command_line(bench, capsys):
    """One command flashes a card; check agrees, the book knows it, undo takes it back and frees the name."""
    card = bench / "bootfs"
    before = {path.name: path.read_bytes() for path in card.iterdir()}
    assert flash(bench, "card", str(card), "--name", "pi-{01..08}", "--profile", "pi-zero-2w") == 0
    told = json.loads((card / "scalarfed/board.json").read_text())
    assert (told["name"], told["run"], told["memory_mib"]) == ("pi-01", "garden", 128)
    assert main(["flash", "check", str(card)]) == 0
    assert "pi-01" in json.loads((bench / "boards.json").read_text())["boards"][0]["name"]

    assert main(["flash", "undo", str(card)]) == 0
    assert {path.name: path.read_bytes() for path in card.iterdir()} == before
    assert json.loads((bench / "boards.json").read_text())["boards"] == []
    capsys.readouterr()


@needs_fat
def test_eight_images_from_one(bench):
    """A range of names makes an image for each, with its own samples, and leaves the source as it was."""
    source = make_image(bench / "source.img", BOOKWORM)
    whole = source.read_bytes()
    for name in ("pi-1", "pi-2"):
        make_data(bench / f"{name}.npz")
    words = ["image", str(source), "-o", str(bench / "cards"), "--name", "pi-{1..2}"]
    assert flash(bench, *words, "--data", str(bench / "{name}.npz")) == 0

    assert source.read_bytes() == whole
    for name in ("pi-1", "pi-2"):
        image = bench / "cards" / f"{name}.img"
        assert json.loads(mtype(image, "scalarfed/board.json"))["name"] == name
        assert mtype(image, "scalarfed/data.npz") == (bench / f"{name}.npz").read_bytes()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--name", "Pi 1"], "cannot name a board"),
        (["--name", "pi-1", "--memory-mib", "5"], "makes no sense"),
        (["--name", "pi-1", "--profile", "pi-9"], "pi-9"),
        (["--name", "pi-1", "--data", "nowhere.npz"], "no data file"),
        (["--name", "pi-1", "--wifi-ssid", "home"], "country"),
        (["--name", "pi-1", "--python", "3.6"], "3.10 or newer"),
        (["--name", "pi-1", "--format", "windows"], "no format"),
        (["--name", "pi-1", "--broker", "mqtt://127.0.0.1"], "means the board itself"),
        (["--name", "pi-1", "--bundle", "."], "is no bundle"),
    ],
)
def test_what_cannot_be_is_refused_and_the_card_is_untouched(bench, capsys, monkeypatch, words, says):
    """Each refusal names what is wrong and the next step, ends with an error code and writes nothing."""
    monkeypatch.setenv("SCALARFED_WIFI_PASSWORD", "long enough")
    card = bench / "bootfs"
    before = {path.name: path.read_bytes() for path in card.iterdir()}
    told = ["--broker", "mqtt://192.0.2.1", "--bundle", str(bench / "run/bundle")]

    assert main(["flash", "card", str(card), *told, *words]) not in (0, 1)
    said = " ".join(capsys.readouterr().err.split())
    assert says in said
    assert "hint:" in said
    assert {path.name: path.read_bytes() for path in card.iterdir()} == before
    assert not (bench / "boards.json").exists()


def test_a_name_in_use_is_refused_on_the_command_line(bench, capsys):
    """The second card of a name needs --replace."""
    card = bench / "bootfs"
    assert flash(bench, "card", str(card), "--name", "pi-1") == 0
    assert flash(bench, "card", str(card), "--name", "pi-1") == 20
    assert "in use" in capsys.readouterr().err
    assert flash(bench, "card", str(card), "--name", "pi-1", "--replace", "pi-1") == 0


@needs_fat
def test_a_refused_image_leaves_nothing_behind(bench, capsys):
    """Where the source cannot be flashed no copy is made."""
    source = make_image(bench / "source.img", BOOKWORM | {"kernel7.img": b""})

    assert flash(bench, "image", str(source), "-o", str(bench / "out.img"), "--name", "pi-1") == 20
    assert "32-bit" in capsys.readouterr().err
    assert not (bench / "out.img").exists()


def test_without_a_terminal_the_wizard_does_not_ask(capsys, monkeypatch):
    """Four questions need somebody to answer them."""
    monkeypatch.setattr("sys.stdin", open("/dev/null"))  # noqa: SIM115
    assert main(["flash"]) == 20
    assert "no terminal" in capsys.readouterr().err
