"""A card is flashed whole or not at all: order, read-back, space, a card pulled out, undo."""

import hashlib

import pytest

from coordinator.flash.card import FOLDER, check_volume, flash_volume, look, read_receipt, undo_volume
from coordinator.flash.volume import FolderVolume, boot_volume_of_image
from profiles.errors import FlashError
from tests.card_images import BOOKWORM, FSCK, MKFS, TRIXIE, fsck, make_image, mtype
from tests.flash_bench import TOKEN, make_board


class Card(FolderVolume):
    """A mounted card that can be pulled out, is worn, or is small."""

    def __init__(self, folder):
        super().__init__(folder)
        self.written = []
        self.pulled_after = None
        self.rots = ""
        self.free = None

    @property
    def free_bytes(self):
        return super().free_bytes if self.free is None else self.free

    def write(self, path, data):
        if self.pulled_after is not None and len(self.written) >= self.pulled_after:
            raise FlashError("input/output error")
        self.written.append(path)
        super().write(path, data[:-1] + b"?" if path == self.rots else data)


@pytest.fixture(params=[BOOKWORM, TRIXIE], ids=["Bookworm", "Trixie"])
def card(request, tmp_path):
    """Return a freshly written card of each format."""
    folder = tmp_path / "bootfs"
    folder.mkdir()
    for name, data in request.param.items():
        (folder / name).write_bytes(data)
    return Card(folder)


@pytest.fixture
def payload(tmp_path):
    """Return a payload."""
    return make_board(tmp_path)


def files_of(volume, path=""):
    """Return every file of a volume with its bytes."""
    found = {}
    for name in volume.names(path):
        inner = f"{path}/{name}".lstrip("/")
        found |= files_of(volume, inner) if volume.is_folder(inner) else {inner: volume.read(inner)}
    return found


def flash(volume, payload):
    return flash_volume(volume, payload, look(volume), name="pi-1")


def test_everything_is_on_the_card_and_the_first_boot_comes_last(card, payload):
    """All files of the payload are there; what starts them is written after them, cmdline.txt last."""
    flash(card, payload)

    there = files_of(card)
    assert {path: there[f"{FOLDER}/{path}"] for path in payload.files} == dict(payload.files)
    starters = [n for n, path in enumerate(card.written) if not path.startswith(FOLDER)]
    assert starters
    assert max(
        n for n, path in enumerate(card.written) if path in {f"{FOLDER}/{p}" for p in payload.files}
    ) < min(starters)
    assert card.written[starters[-1]] == "cmdline.txt"
    assert check_volume(card) == []


def test_undo_brings_back_every_byte(card, payload):
    """After undo the card is what it was before."""
    before = files_of(card)
    flash(card, payload)

    assert undo_volume(card) == "pi-1"
    assert files_of(card) == before


def test_a_card_pulled_out_in_the_middle_is_repaired(card, payload, tmp_path):
    """Wherever the card is pulled out, the next run leaves the same bytes as one that was left alone.

    Until then the board boots as before, or has everything that its first boot needs.
    """
    before = files_of(card)
    flash(card, payload)
    whole, writes = files_of(card), len(card.written)
    for pulled_after in range(0, writes, 3):
        undo_volume(card)
        card.written, card.pulled_after = [], pulled_after
        with pytest.raises(FlashError):
            flash(card, payload)
        if card.read("cmdline.txt") != before["cmdline.txt"]:
            assert whole.keys() - files_of(card).keys() == set()
        card.pulled_after = None
        flash(card, payload)
        assert files_of(card) == whole


def test_flashing_twice_is_flashing_once(card, payload):
    """A second run starts from the card as Imager left it, not from our lines."""
    flash(card, payload)
    once = files_of(card)
    flash(card, payload)

    assert files_of(card) == once


def test_a_card_that_does_not_keep_what_is_written_is_named(card, payload):
    """A byte that reads back wrong ends it before the first boot is touched."""
    card.rots = f"{FOLDER}/install.sh"
    before = card.read("cmdline.txt")
    with pytest.raises(FlashError, match=r"install\.sh does not read back"):
        flash(card, payload)

    assert card.read("cmdline.txt") == before


def test_a_full_card_is_refused_untouched(card, payload):
    """Too little space is said with both numbers before anything is written."""
    card.free = 1000
    with pytest.raises(FlashError, match="MiB are needed"):
        flash(card, payload)

    assert card.written == []


def test_a_booted_card_is_refused(card, payload):
    """A report of an installation means that the card was booted; --again overrides."""
    flash(card, payload)
    card.write(f"{FOLDER}/report.txt", b"12.3 done 0\n")

    with pytest.raises(FlashError, match="booted before"):
        look(card)
    assert look(card, again=True).format


def test_undo_after_a_boot_is_refused(card, payload):
    """What the first boot has changed is not overwritten with something older."""
    flash(card, payload)
    card.write("cmdline.txt", b"root=x\n")
    before = files_of(card)

    with pytest.raises(FlashError, match="was changed"):
        undo_volume(card)
    assert files_of(card) == before


def test_check_names_a_rotten_file(card, payload):
    """A single bit is found; a missing file is found."""
    flash(card, payload)
    path = f"{FOLDER}/bundle/weights.f32"
    raw = bytearray(card.read(path))
    raw[5] ^= 1
    card.write(path, bytes(raw))
    card.remove(f"{FOLDER}/guard.sh")

    assert sorted(check_volume(card)) == [
        f"{path} is not what was written",
        f"{FOLDER}/guard.sh is missing",
    ]


def test_the_receipt_holds_no_token(card, payload):
    """The token is in board.json, which the board erases, and nowhere else."""
    flash(card, payload)

    assert [path for path, data in files_of(card).items() if TOKEN.encode() in data] == [
        f"{FOLDER}/board.json"
    ]
    assert (
        read_receipt(card).hashes[f"{FOLDER}/board.json"]
        == hashlib.sha256(payload.files["board.json"]).hexdigest()
    )


@pytest.mark.skipif(not (MKFS and FSCK), reason="dosfstools and mtools are not installed")
@pytest.mark.parametrize("files", [BOOKWORM, TRIXIE], ids=["Bookworm", "Trixie"])
def test_an_image_is_flashed_without_mounting(tmp_path, files):
    """In an image, too, everything is there, fsck.fat is content, and mtools reads what was written."""
    image = make_image(tmp_path / "card.img", files)
    payload = make_board(tmp_path)
    with boot_volume_of_image(image, writable=True) as volume:
        flash(volume, payload)
    with boot_volume_of_image(image, writable=False) as volume:
        assert check_volume(volume) == []

    assert fsck(image) == ""
    assert mtype(image, f"{FOLDER}/MANIFEST") == payload.files["MANIFEST"]
    assert b"cgroup_enable=memory" in mtype(image, "cmdline.txt")
