"""What survives a power cut: the replica, in one file that is either whole or the one before.

Written beside, flushed to the disk, then renamed. What is read back must have the digest that was
written with it, and belong to the same bundle and run; else the agent starts from the bundle and
asks for the log.
"""

import contextlib
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from edge_agent.moments import Clock
from edge_agent.optimizer import Normaliser
from edge_agent.replay import Replica
from profiles.errors import StateError

__all__ = ["load_replica", "read_replica", "replica_bytes", "save_replica"]

_HEAD = struct.Struct("<8s64s32sIBBddddQ")
_MAGIC = b"SFSTATE2"
_MOST_MOMENTS = 3
_AVERAGED = 0x80  # added to the number of moments whose last is the running mean of the weights
_KINDS = {2: "row", 3: "tensor"}  # of shared curvature; 1 is one value a weight, 0 none


def replica_bytes(replica: Replica, *, bundle_identity: str, run: str) -> bytes:
    """Return a replica as the bytes of a state file; arguments as for :func:`save_replica`."""
    return b"".join(_pieces(replica, bundle_identity, run))


def save_replica(path: Path, replica: Replica, *, bundle_identity: str, run: str) -> None:
    """Write a replica so that a crash at any moment leaves the old file or the new one.

    Args:
        path: The file; its folder exists.
        replica: What to save.
        bundle_identity: SHA-256 of the bundle's manifest, hexadecimal.
        run: Name of the run.

    Raises:
        StateError: The file cannot be written; the old one is as it was.
    """
    beside = path.with_suffix(".new")
    try:
        with beside.open("wb") as file:
            for piece in _pieces(replica, bundle_identity, run):
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
        with contextlib.suppress(OSError):  # a folder cannot be opened on every system
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise StateError(f"{path} cannot be written: {error}") from None


def load_replica(path: Path, fresh: Replica, *, bundle_identity: str, run: str) -> Replica | None:
    """Return the saved replica, or None if there is none for this bundle and run.

    Args:
        path: The file.
        fresh: A replica of round 0, whose memory is overwritten and returned.
        bundle_identity: As for :func:`save_replica`.
        run: As for :func:`save_replica`.

    Raises:
        StateError: The file is damaged; ``fresh`` can no longer be used.
    """
    try:
        with path.open("rb") as file:
            return read_replica(file, fresh, bundle_identity=bundle_identity, run=run, name=str(path))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StateError(f"{path} cannot be read: {error}") from None


def read_replica(
    file: BinaryIO, fresh: Replica, *, bundle_identity: str, run: str, name: str
) -> Replica | None:
    """Return the replica that a file or message holds; as :func:`load_replica`; ``name`` is for errors."""
    raw = file.read(_HEAD.size)
    if len(raw) < _HEAD.size:
        raise StateError(f"{name} is cut short at {len(raw)} bytes")
    magic, identity, saved_run, round_, curved, moments, *floats, digest = _HEAD.unpack(raw)
    belongs = (magic, identity, saved_run.rstrip(b"\0")) == (
        _MAGIC,
        bundle_identity.encode(),
        run.encode()[:32],
    )
    if not belongs:
        return None
    averaged, moments = moments >= _AVERAGED or moments == 3, moments % _AVERAGED
    if moments > _MOST_MOMENTS:
        raise StateError(f"{name} holds {moments} moments; no method has more than {_MOST_MOMENTS}")
    wanted = fresh.weights.nbytes
    found = file.readinto(fresh.weights.view(np.uint8).data)  # type: ignore[attr-defined]
    if curved == 1:
        fresh.curvature = np.empty(fresh.weights.size, np.uint16)
        wanted += fresh.curvature.nbytes
        found += file.readinto(fresh.curvature.view(np.uint8).data)  # type: ignore[attr-defined]
    if curved in _KINDS:
        fresh.shared = fresh.groups(_KINDS[curved])
        wanted += fresh.shared.values.nbytes
        found += file.readinto(fresh.shared.values.view(np.uint8).data)  # type: ignore[attr-defined]
    if moments:
        fresh.averaged = averaged
        fresh.moments = np.empty((moments, fresh.weights.size), np.float32)
        wanted += fresh.moments.nbytes
        found += file.readinto(fresh.moments.view(np.uint8).data)  # type: ignore[attr-defined]
    if found != wanted:
        raise StateError(f"{name} is cut short: {found} of {wanted} bytes")
    fresh.round = round_
    fresh.normaliser = Normaliser(*floats[:2])
    fresh.clock = Clock(*floats[2:])
    if fresh.digest() != digest:
        raise StateError(f"{name} does not have the digest {digest:016x} that it was saved with")
    return fresh


def _pieces(replica: Replica, bundle_identity: str, run: str) -> Iterator[bytes | memoryview]:
    yield _HEAD.pack(
        _MAGIC,
        bundle_identity.encode(),
        run.encode()[:32],
        replica.round,
        _curved(replica),
        0 if replica.moments is None else len(replica.moments) + _AVERAGED * replica.averaged,
        replica.normaliser.mean_square,
        replica.normaliser.weight,
        replica.clock.first,
        replica.clock.second,
        replica.digest(),
    )
    shared = None if replica.shared is None else replica.shared.values
    for array in (replica.weights, replica.curvature, shared, replica.moments):
        if array is not None:
            yield array.view(np.uint8).data


def _curved(replica: Replica) -> int:
    """Return which curvature a replica has, as its file says it."""
    if replica.shared is None:
        return int(replica.curvature is not None)
    tensors = replica.shared.starts.size == replica.groups("tensor").starts.size
    return 3 if tensors else 2
