"""Writes a payload and a first boot onto a boot partition, believes nothing until it is read back, undoes it.

The payload goes first and the files that start it last, so that a card pulled out in the middle boots as if
nothing had happened. A receipt on the partition keeps the files as they were: the next run starts from those,
and ``undo`` brings them back.
"""

import base64
import binascii
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from coordinator.flash.formats import FirstBoot, detect, merge, texts_of
from coordinator.flash.payload import Payload
from coordinator.flash.settings import Wifi
from coordinator.flash.volume import BootVolume
from profiles.errors import FlashError

__all__ = ["FOLDER", "Receipt", "check_volume", "flash_volume", "look", "read_receipt", "undo_volume"]

FOLDER = "scalarfed"
"""The folder of the payload on a boot partition."""

_RECEIPT = f"{FOLDER}/receipt.json"
_REPORT = f"{FOLDER}/report.txt"
_MARGIN = 1 << 20
_MERGED = ("firstrun.sh", "network-config", "meta-data", "user-data", "cmdline.txt")


@dataclass(frozen=True)
class Receipt:
    """What was done to a boot partition.

    Attributes:
        name: The board's.
        complete: Whether it was done to the end.
        originals: The merged files as they were; None for one that was not there.
        hashes: SHA-256 of each file written, by path on the partition.
    """

    name: str
    complete: bool
    originals: Mapping[str, str | None]
    hashes: Mapping[str, str]

    def to_json(self) -> bytes:
        """Return the receipt's file."""
        originals = {
            key: None if text is None else base64.b64encode(text.encode()).decode()
            for key, text in self.originals.items()
        }
        told = {"format": 1, "name": self.name, "complete": self.complete}
        return json.dumps(told | {"originals": originals, "hashes": dict(self.hashes)}, indent=1).encode()


def read_receipt(volume: BootVolume) -> Receipt | None:
    """Return the receipt on a partition, or None where nothing of ours was begun.

    Raises:
        FlashError: It is damaged.
    """
    if not volume.exists(_RECEIPT):
        return None
    try:
        told: dict[str, Any] = json.loads(volume.read(_RECEIPT))
        originals = {
            key: None if text is None else base64.b64decode(text, validate=True).decode()
            for key, text in told["originals"].items()
        }
        return Receipt(str(told["name"]), bool(told["complete"]), originals, dict(told["hashes"]))
    except (ValueError, KeyError, TypeError, AttributeError, binascii.Error):
        raise FlashError(
            f"{_RECEIPT} on the partition is damaged", hint="Write the card again with Imager, then flash it."
        ) from None


def look(volume: BootVolume, *, forced: str = "", again: bool = False) -> FirstBoot:
    """Return the partition's first boot, after refusing a card that has had one.

    Args:
        volume: The boot partition.
        forced: A format, where a person knows better.
        again: Take a card that has been booted.

    Raises:
        FlashError: As :func:`~coordinator.flash.formats.detect` says, or the card has been booted.
    """
    found = detect(volume, _base_texts(volume), forced=forced)
    if not again and (found.booted or volume.exists(_REPORT)):
        why = "its report of an installation is on it" if volume.exists(_REPORT) else found.evidence[-1]
        raise FlashError(
            f"the card has been booted before: {why}",
            hint="Write it again with Imager; or, to set up the running board anew, `scalarfed flash ssh "
            "USER@HOST`; or --again to let its next boot install once more.",
        )
    return found


def flash_volume(
    volume: BootVolume,
    payload: Payload,
    found: FirstBoot,
    *,
    name: str,
    wifi: Wifi | None = None,
    tick: Callable[[str], None] = lambda _: None,
) -> Receipt:
    """Write everything, read it back, and compare hashes.

    Args:
        volume: The boot partition.
        payload: For this board.
        found: From :func:`look`.
        name: The board's.
        wifi: Where Imager was not told one.
        tick: Told of each thing that is done and was read back.

    Raises:
        FlashError: It does not fit, cannot be merged, or does not read back as it was written.
    """
    texts = _base_texts(volume)
    instance = "scalarfed-" + hashlib.sha256(payload.files["MANIFEST"]).hexdigest()[:12]
    boot = merge(texts, found.format, name=name, instance=instance, wifi=wifi)
    _check_space(volume, payload)
    begun = Receipt(name, False, {key: texts.get(key) for key in _MERGED}, {})
    old = [entry for entry in volume.names(FOLDER) if f"{FOLDER}/{entry}" != _RECEIPT]
    volume.write(_RECEIPT, begun.to_json())
    for entry in old:
        volume.remove(f"{FOLDER}/{entry}")
    files = {f"{FOLDER}/{path}": data for path, data in payload.files.items()}
    for path, data in files.items():
        volume.write(path, data)
    volume.flush()
    hashes = {path: _written(volume, path, data) for path, data in files.items()}
    tick(f"{len(files)} files, {payload.size / 2**20:.1f} MiB: written and read back")
    for path, text in boot.items():
        volume.write(path, text.encode())
        hashes[path] = _written(volume, path, text.encode())
        tick(f"{path}: {'merged' if texts.get(path) else 'written'} and read back")
    done = replace(begun, complete=True, hashes=hashes)
    volume.write(_RECEIPT, done.to_json())
    volume.flush()
    return done


def check_volume(volume: BootVolume) -> list[str]:
    """Return what is wrong with a flashed partition; empty if it is as it was flashed.

    Raises:
        FlashError: Nothing of ours is on it.
    """
    receipt = _receipt(volume)
    if not receipt.complete:
        return ["flashing was begun and not ended: run the same command again"]
    booted = volume.exists(_REPORT)
    wrong = []
    for path, expected in receipt.hashes.items():
        if booted and (path in _MERGED or path in (f"{FOLDER}/board.json", f"{FOLDER}/MANIFEST")):
            continue  # the first boot uses these up
        if not volume.exists(path):
            wrong.append(f"{path} is missing")
        elif hashlib.sha256(volume.read(path)).hexdigest() != expected:
            wrong.append(f"{path} is not what was written")
    return wrong


def undo_volume(volume: BootVolume) -> str:
    """Bring the partition back to what it was before it was flashed; return the board's name.

    Raises:
        FlashError: Nothing of ours is on it, or its files were changed since, by a boot for instance.
    """
    receipt = _receipt(volume)
    for path in receipt.originals:
        expected = receipt.hashes.get(path)
        if expected is None:
            continue
        if not volume.exists(path) or hashlib.sha256(volume.read(path)).hexdigest() != expected:
            raise FlashError(
                f"{path} was changed after the card was flashed, most likely by its first boot",
                hint="Write the card again with Imager: a booted card cannot be made unbooted.",
            )
    for path in reversed(list(receipt.originals)):
        original = receipt.originals[path]
        if original is None:
            volume.remove(path)
        elif not volume.exists(path) or volume.read(path) != original.encode():
            volume.write(path, original.encode())
    volume.remove(FOLDER)
    volume.flush()
    return receipt.name


def _base_texts(volume: BootVolume) -> dict[str, str]:
    """Return the first-boot files as they were before anything of ours."""
    texts = texts_of(volume)
    receipt = read_receipt(volume)
    if receipt is None or volume.exists(_REPORT):
        return texts
    for path, text in receipt.originals.items():
        if text is None:
            texts.pop(path, None)
        else:
            texts[path] = text
    return texts


def _check_space(volume: BootVolume, payload: Payload) -> None:
    kept = 0
    for path in (f"{FOLDER}/{path}" for path in payload.files):
        if volume.exists(path):
            kept += len(volume.read(path))
    room = volume.free_bytes + kept
    if room < payload.size + _MARGIN:
        raise FlashError(
            f"the boot partition has {room / 2**20:.0f} MiB left, "
            f"{(payload.size + _MARGIN) / 2**20:.0f} MiB are needed",
            hint="Use the maker's current image, whose boot partition has 256 MiB or more, or remove what "
            "you put there.",
        )


def _written(volume: BootVolume, path: str, data: bytes) -> str:
    expected = hashlib.sha256(data).hexdigest()
    if hashlib.sha256(volume.read(path)).hexdigest() != expected:
        raise FlashError(
            f"{path} does not read back as it was written",
            hint="The card is worn out or a fake: use another.",
        )
    return expected


def _receipt(volume: BootVolume) -> Receipt:
    receipt = read_receipt(volume)
    if receipt is None:
        raise FlashError(
            "nothing of scalarfed is on this partition",
            hint="`scalarfed flash card PATH` or `scalarfed flash image IN -o OUT` puts it there.",
        )
    return receipt
