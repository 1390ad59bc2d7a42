"""A bundle's folder that appears when it is whole.

Knows the files of a bundle that was there before. Does not know how a bundle is made.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from edge_agent.bundle import SIGNATURE
from profiles.errors import ConfigError

__all__ = ["all_at_once", "check_out"]


def check_out(out: Path) -> None:
    """Raise ConfigError unless a folder can be made and written at ``out``."""
    found = out.absolute()
    while not found.exists() and found != found.parent:
        found = found.parent
    if not found.is_dir():
        raise ConfigError(f"--out {out} cannot be made: {found} is a file", hint="Name another folder.")
    if not os.access(found, os.W_OK | os.X_OK):
        raise ConfigError(
            f"--out {out} cannot be made: {found} may not be written", hint="Name another folder."
        )


@contextlib.contextmanager
def all_at_once(out: Path) -> Iterator[Path]:
    """Yield a folder beside ``out``; when all is written its files go there, and none if anything fails.

    Files of a bundle that was there before are replaced or removed, others are left alone.
    """
    beside = out.absolute().parent / f".{out.absolute().name}.{os.getpid()}"
    try:
        yield beside
        if not out.exists():
            beside.rename(out)
            return
        new = {path.name for path in beside.iterdir()}
        for path in [*out.glob("graph.*.onnx"), out / SIGNATURE]:  # of the bundle that was there
            if path.name not in new:
                path.unlink(missing_ok=True)
        for name in sorted(new, key=lambda name: name == "manifest.json"):  # the manifest goes last
            (beside / name).replace(out / name)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
