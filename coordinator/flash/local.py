"""Makes this machine a board: the same service as on a Raspberry Pi, within a budget that is enforced.

Knows folders and processes here, not the network: whether the agent joined is seen in its status.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from coordinator.authority import Authority, default_folder
from coordinator.flash.settings import Settings
from edge_agent.bundle import read_bundle
from profiles.errors import FlashError
from profiles.limit import scope_command

__all__ = ["end_local", "local_folder", "prepare_local", "remove_local", "start_local"]

_END_S = 10.0


def local_folder(name: str) -> Path:
    """Return where an agent of this machine lives; it need not exist."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or str(Path.home())
    else:
        base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(base) / "scalarfed" / name


def prepare_local(settings: Settings, *, bundle: Path, data: Path | None, folder: Path) -> None:
    """Lay out an agent's folder: settings that only this user reads, the bundle, the samples.

    Raises:
        BundleError: The bundle is damaged.
        FlashError: An agent runs from this folder, or the data file is missing.
    """
    if _running(folder) is not None:
        raise FlashError(
            f"an agent called {settings.name} runs on this machine already, process {_running(folder)}",
            hint=f"End it with `scalarfed flash undo {folder}`, or choose another --name.",
        )
    read_bundle(bundle)
    if data is not None and not data.is_file():
        raise FlashError(f"there is no data file {data}", hint="Give this machine's samples, an .npz.")
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / "bundle", ignore_errors=True)
    shutil.copytree(bundle, folder / "bundle")
    if data is not None:
        shutil.copyfile(data, folder / "data.npz")
    if settings.broker.startswith("mqtts://"):
        Authority(default_folder()).device_identity(settings.name, folder / "security")
    path = folder / "board.json"
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(settings.to_json())


def start_local(settings: Settings, folder: Path) -> "subprocess.Popen[bytes]":
    """Start the agent of a folder within its budget; its log goes to ``agent.log`` there."""
    command = [*scope_command(settings.memory_mib), sys.executable, "-m", "edge_agent.service"]
    one = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    with (folder / "agent.log").open("ab") as log:
        child = subprocess.Popen(
            [*command, str(folder / "board.json"), str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C is for the command that watches; it ends the agent in order
            env={**os.environ, **one},
        )
    (folder / "agent.pid").write_text(str(child.pid), encoding="utf-8")
    return child


def end_local(folder: Path) -> bool:
    """End the agent of a folder and return whether one ran."""
    pid = _running(folder)
    if pid is None:
        return False
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + _END_S
        while _running(folder) == pid and time.monotonic() < deadline:
            with contextlib.suppress(ChildProcessError, OSError):
                os.waitpid(pid, getattr(os, "WNOHANG", 0))
            time.sleep(0.05)
        if _running(folder) == pid:
            os.kill(pid, getattr(signal, "SIGKILL", signal.SIGTERM))
    (folder / "agent.pid").unlink(missing_ok=True)
    return True


def remove_local(folder: Path) -> str:
    """End the agent of a folder and remove the folder; return the agent's name.

    Raises:
        FlashError: It is no agent's folder.
    """
    if not (folder / "board.json").is_file():
        raise FlashError(
            f"{folder} is no agent's folder", hint="Give what `scalarfed flash local` said, or a card."
        )
    end_local(folder)
    shutil.rmtree(folder)
    return folder.name


def _running(folder: Path) -> int | None:
    """Return the process of a folder's agent, if that number is still an agent's."""
    import psutil

    try:
        process = psutil.Process(int((folder / "agent.pid").read_text(encoding="utf-8")))
        alive = process.status() != psutil.STATUS_ZOMBIE and str(folder / "board.json") in process.cmdline()
    except (OSError, ValueError, psutil.Error):
        return None
    return int(process.pid) if alive else None
