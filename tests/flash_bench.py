"""A bench for flashing without a network: a bundle, a cache of small wheels, a book of boards of its own."""

import hashlib
import zipfile
from pathlib import Path

import numpy as np

from coordinator.flash.payload import REQUIREMENTS, Payload, Target, make_payload
from coordinator.flash.settings import Credentials, Settings
from tests.made_run import make_replayable_run

TOKEN = "tok-0123456789abcdef"


def make_bundle(folder: Path) -> Path:
    """Return the folder of a real bundle: a linear net with 4 inputs and 3 classes."""
    folder.mkdir(parents=True, exist_ok=True)
    return make_replayable_run(folder, rounds=1) / "bundle"


def make_data(path: Path) -> Path:
    """Return samples for that net."""
    rng = np.random.default_rng(2)
    x = rng.normal(size=(60, 4)).astype(np.float32)
    y = rng.integers(0, 3, 60)
    np.savez(path, x_train=x, y_train=y, x_test=x[:9], y_test=y[:9])
    return path


def make_cache(folder: Path, *targets: Target, size: int = 2000) -> Path:
    """Return a cache of wheels that holds one small wheel per target, as if fetched."""
    for target in targets:
        known = hashlib.sha256("\n".join(REQUIREMENTS).encode()).hexdigest()[:8]
        inner = folder / f"{target.arch}-cp{target.python.replace('.', '')}-{known}"
        inner.mkdir(parents=True)
        with zipfile.ZipFile(inner / "small-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr("small.py", np.random.default_rng(1).bytes(size))
    return folder


def make_board(
    tmp_path: Path, *, target: Target | None = None, name: str = "pi-1", size: int = 2000
) -> Payload:
    """Return a payload for a board, with a token."""
    target = target or Target("3.13")
    settings = Settings(name, "mqtt://192.0.2.1", "linear", 128, credentials=Credentials(TOKEN, "ab" * 32))
    cache = tmp_path / "cache"
    if not cache.exists():
        make_cache(cache, target, size=size)
    bundle = tmp_path / "run" / "bundle"
    if not bundle.exists():
        make_bundle(tmp_path / "run")
    return make_payload(target, settings, bundle=bundle, cache=cache)
