"""The writer of FAT partitions, against mkfs.fat, fsck.fat and mtools."""

import hashlib
import time

import numpy as np
import pytest

from coordinator.flash.fat import FatVolume
from coordinator.flash.partitions import fat_partitions
from profiles.errors import FlashError
from tests.card_images import BOOKWORM, FSCK, MKFS, START, fsck, make_image, mtype

pytestmark = pytest.mark.skipif(not (MKFS and FSCK), reason="dosfstools and mtools are not installed")

LAYOUTS = [(32, "MBR"), (32, "GPT"), (16, "MBR"), (16, "GPT")]


def bytes_of(size: int, seed: int = 1) -> bytes:
    """Return bytes that do not repeat."""
    return np.random.default_rng(seed).bytes(size)


@pytest.fixture(params=LAYOUTS, ids=[f"FAT{bits}-{scheme}" for bits, scheme in LAYOUTS])
def card(request, tmp_path):
    """Return an image of each kind."""
    bits, scheme = request.param
    return make_image(tmp_path / "card.img", BOOKWORM, bits=bits, scheme=scheme)


def volume_of(file) -> FatVolume:
    (part,) = fat_partitions(file)
    return FatVolume(file, part.offset, part.size)


def test_what_mtools_wrote_is_read(card):
    """Names, label and bytes come out as mkfs.fat and mtools put them in."""
    with card.open("rb") as file:
        (part,) = fat_partitions(file)
        volume = volume_of(file)

        assert part.offset == START * 512
        assert volume.label == "bootfs"
        assert sorted(volume.names()) == sorted(BOOKWORM)
        assert {name: volume.read(name) for name in BOOKWORM} == BOOKWORM


def test_forty_megabytes_in_two_seconds_and_nothing_for_fsck(card):
    """40 MB in 12 files of a new folder take under 2 s, fsck.fat is content, mtools reads the same bytes."""
    files = {f"scalarfed/wheels/a_rather_long_name-{n}.whl": bytes_of(3_400_000, n) for n in range(12)}
    started = time.perf_counter()
    with card.open("r+b") as file:
        volume = volume_of(file)
        for name, data in files.items():
            volume.write(name, data)
        volume.flush()
    with card.open("rb") as file:
        again = volume_of(file)
        hashes = {name: hashlib.sha256(again.read(name)).hexdigest() for name in files}
    took = time.perf_counter() - started

    assert hashes == {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    assert took < 2.0
    assert fsck(card) == ""
    assert all(mtype(card, name) == data for name, data in files.items())


def test_replacing_and_removing_leaves_a_clean_volume(card):
    """Files that grow, shrink, become empty or go leave no lost cluster, and the free space is right."""
    with card.open("r+b") as file:
        volume = volume_of(file)
        before = volume.free_bytes
        for size in (100_000, 3, 0, 70_000):
            volume.write("CMDLINE.TXT", bytes_of(size))
            volume.write("a/b/c/deep.bin", bytes_of(size + 1))
        volume.write("cmdline.txt", BOOKWORM["cmdline.txt"])
        volume.remove("a")
        volume.flush()

        assert sorted(volume.names()) == sorted(BOOKWORM)
        assert volume.free_bytes == before
    assert fsck(card) == ""
    assert mtype(card, "cmdline.txt") == BOOKWORM["cmdline.txt"]


def test_a_folder_grows(card):
    """A folder takes as many long names as there is room for clusters, each found again."""
    names = [f"data/sample of a board, number {n}.npz" for n in range(300)]
    with card.open("r+b") as file:
        volume = volume_of(file)
        for name in names:
            volume.write(name, name.encode())
        volume.flush()
    with card.open("rb") as file:
        assert [volume_of(file).read(name).decode() for name in names] == names
    assert fsck(card) == ""


def test_a_full_partition_is_refused_before_a_byte_is_written(card):
    """What does not fit is refused with both numbers, and the partition stays as it was."""
    whole = card.read_bytes()
    with card.open("r+b") as file, pytest.raises(FlashError, match="MiB are needed"):
        volume_of(file).write("big", bytes(90 * 2**20))

    assert card.read_bytes() == whole


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda raw: raw[:510] + b"\0\0" + raw[512:], "no partition table"),
        (lambda raw: raw[: 20 * 2**20], "cut short"),
        (lambda raw: raw[START * 512 :], "single FAT partition"),
    ],
    ids=["no table", "cut short", "a lone partition"],
)
def test_an_image_that_is_none_is_refused(tmp_path, damage, says):
    """Each way of giving something else than a whole image is named."""
    image = make_image(tmp_path / "card.img", BOOKWORM)
    image.write_bytes(damage(image.read_bytes()))
    with image.open("rb") as file, pytest.raises(FlashError) as refused:
        fat_partitions(file)
    assert says in f"{refused.value} {refused.value.hint}"


def test_a_damaged_gpt_is_refused(tmp_path):
    """A GPT whose checksum is wrong is not believed."""
    image = make_image(tmp_path / "card.img", BOOKWORM, scheme="GPT")
    raw = bytearray(image.read_bytes())
    raw[1024 + 32] ^= 1
    image.write_bytes(raw)
    with image.open("rb") as file, pytest.raises(FlashError, match="checksum"):
        fat_partitions(file)
