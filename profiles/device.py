"""What is known of a board: memory, cores, speed, system, and how an agent gets onto it.

Every figure carries its source, its date and whether somebody measured it on such a board or estimated
it. Built-in profiles are TOML files in ``profiles/devices``; a user's own live in :func:`profile_folder`.
Knows nothing of nets and of what work costs (``cost``, ``budget``), and measures nothing (``selftest``).

TOML is read only inside functions: an agent is told its budget by argument, and the Python 3.10 of some
boards has no TOML reader.
"""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import importlib
import json
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from profiles.errors import ProfileError

__all__ = [
    "FIGURES",
    "Figure",
    "Profile",
    "format_profile",
    "import_profile",
    "load_profile",
    "profile_folder",
    "profile_names",
    "read_profile",
]

_BUILT_IN = Path(__file__).parent / "devices"
_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_PYTHON = re.compile(r"3\.\d{1,2}")
_ARCHITECTURES = ("aarch64", "armv7l", "x86_64")
_WAYS = ("card", "image", "ssh", "local")
_KINDS = ("measured", "estimate")
_TEXTS = ("title", "arch", "os")
_LISTS = ("python", "flash")

FIGURES: Mapping[str, tuple[str, float, float]] = {
    "ram_mib": ("RAM as sold, MiB", 64, 4 * 2**20),
    "memory_mib": ("the agent's budget unless told otherwise, MiB", 32, 4 * 2**20),
    "cores": ("CPU cores", 1, 1024),
    "clock_ghz": ("highest CPU clock, GHz", 0.05, 10),
    "fp32_gflops": (
        "float32 GFLOP/s, all cores: the peak if estimated, a matmul's rate if measured",
        0.01,
        1e6,
    ),
    "bandwidth_gbs": ("memory bandwidth, GB/s: the bus if estimated, a copy's rate if measured", 0.01, 1e5),
}
"""Name of each figure: what it says, and the least and the greatest value that make sense."""


@dataclass(frozen=True)
class Figure:
    """One number about a board, and why it may be believed.

    Attributes:
        value: In the unit that ends the figure's name; a count has no unit.
        source: Who says so, or the formula.
        kind: ``measured`` on such a board, by the source or by us; ``estimate`` for data sheets, formulas
            and general knowledge.
        date: ISO date of the entry.
    """

    value: float
    source: str
    kind: str
    date: str


@dataclass(frozen=True)
class Profile:
    """The facts of one kind of board.

    Attributes:
        name: Lower-case words joined by hyphens, such as ``pi-4-2gb``.
        title: The maker's name of the board.
        arch: ``aarch64``, ``armv7l`` or ``x86_64``.
        os: The usual system.
        python: Versions that this system brings, such as ``3.11``.
        flash: Ways in which an agent gets there: ``card``, ``image``, ``ssh``, ``local``; none where the
            board's Python is too old.
        ram_mib: RAM as sold; Linux sees a little less.
        memory_mib: What the agent may use unless the experiment says otherwise.
        cores: CPU cores.
        clock_ghz: Highest clock.
        fp32_gflops: Peak of all cores if estimated, reached by a matrix product if measured.
        bandwidth_gbs: Of the bus if estimated, reached by a copy if measured.
        note: What a user should know before buying or flashing one.
    """

    name: str
    title: str
    arch: str
    os: str
    python: tuple[str, ...]
    flash: tuple[str, ...]
    ram_mib: Figure
    memory_mib: Figure
    cores: Figure
    clock_ghz: Figure
    fp32_gflops: Figure
    bandwidth_gbs: Figure
    note: str = ""


def profile_folder() -> Path:
    """Return the folder of the user's own profiles; it need not exist."""
    if sys.platform == "win32":
        base = os.environ.get("APPDATA") or str(Path.home())
    else:
        base = os.environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    return Path(base) / "scalarfed" / "devices"


def profile_names(*, folder: Path | None = None) -> list[str]:
    """Return the names of all profiles, built-in and the user's own, in natural order (2gb before 16gb).

    Args:
        folder: The user's profiles; :func:`profile_folder` where left out.
    """
    return sorted(_files(folder), key=_natural)


def load_profile(name: str, *, folder: Path | None = None) -> Profile:
    """Return the profile called ``name``.

    Args:
        name: One of :func:`profile_names`.
        folder: The user's profiles; :func:`profile_folder` where left out.

    Raises:
        ProfileError: No such profile (the nearest name is in the hint), or its file has faults.
    """
    files = _files(folder)
    if name not in files:
        near = difflib.get_close_matches(name, files, n=1, cutoff=0.4)
        hint = f"Did you mean `{near[0]}`? " if near else f"Known: {', '.join(sorted(files))}. "
        raise ProfileError(f"There is no device profile `{name}`.", hint=hint + ProfileError.hint)
    return read_profile(files[name], folder=folder)


def read_profile(path: Path, *, folder: Path | None = None) -> Profile:
    """Read and check one TOML file; the profile is called like the file.

    What the file leaves out is taken from the profile that its key ``like`` names, if it has one.

    Args:
        path: A ``.toml`` file.
        folder: Where ``like`` looks beside the built-in profiles.

    Raises:
        ProfileError: The file cannot be read, is not TOML, or breaks rules: all of them are listed.
    """
    table = _merged(path, folder, ())
    faults: list[str] = []
    if not _NAME.fullmatch(path.stem):
        faults.append(f"file name `{path.stem}`: a profile is called like `pi-4-2gb`: a-z, 0-9 and hyphens")
    profile = _profile(path.stem, table, faults)
    if profile is None:
        listed = "\n".join(f"- {fault}" for fault in faults)
        raise ProfileError(
            f"The device profile {path} has {len(faults)} fault{'s' * (len(faults) > 1)}:\n{listed}",
            hint="Correct the named keys; `scalarfed profile show pi-4-2gb` prints a sound one.",
        )
    return profile


def import_profile(path: Path, *, folder: Path | None = None) -> Profile:
    """Check a user's profile and keep a copy, so that :func:`load_profile` finds it by name.

    Args:
        path: A ``.toml`` file, called like the profile.
        folder: Where to keep it; :func:`profile_folder` where left out. An older copy is replaced.

    Raises:
        ProfileError: The file has faults, its name is that of a built-in profile, or it cannot be kept.
    """
    target = (profile_folder() if folder is None else folder) / f"{path.stem}.toml"
    profile = read_profile(path, folder=folder)
    if (_BUILT_IN / target.name).exists():
        raise ProfileError(
            f"`{profile.name}` is a built-in device profile.", hint=f"Rename {path.name} and import it again."
        )
    fresh = target.with_suffix(".part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text(format_profile(profile), encoding="utf-8")
        os.replace(fresh, target)
    except OSError as error:
        raise ProfileError(
            f"The device profile cannot be kept in {target.parent}: {error.strerror}.",
            hint="Make that folder writable, or set XDG_CONFIG_HOME to another one.",
        ) from error
    return profile


def format_profile(profile: Profile) -> str:
    """Return the profile as TOML text that :func:`read_profile` reads back as the same profile."""
    lines = [f"{key} = {_quoted(getattr(profile, key))}" for key in _TEXTS]
    if profile.note:
        lines.append(f"note = {_quoted(profile.note)}")
    lines += [f"{key} = [{', '.join(map(_quoted, getattr(profile, key)))}]" for key in _LISTS]
    for key in FIGURES:
        figure: Figure = getattr(profile, key)
        lines += ["", f"[{key}]", f"value = {figure.value!r}"]
        lines += [f"{part} = {_quoted(getattr(figure, part))}" for part in ("kind", "source", "date")]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    # A JSON string is a TOML basic string, but for DEL, which JSON leaves bare.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _natural(name: str) -> list[tuple[str, int]]:
    return [(text, int(digits or 0)) for text, digits in re.findall(r"(\D*)(\d*)", name)]


def _files(folder: Path | None) -> dict[str, Path]:
    own = profile_folder() if folder is None else folder
    found = {path.stem: path for path in own.glob("*.toml")} if own.is_dir() else {}
    # Built-in ones win: a stale copy in the user's folder must not change what a name means.
    return {**found, **{path.stem: path for path in _BUILT_IN.glob("*.toml")}}


def _parsed(path: Path) -> dict[str, Any]:
    try:
        toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    except ImportError as error:
        raise ProfileError(
            "This Python has no TOML reader, which device profiles need.", hint="Run `pip install tomli`."
        ) from error
    try:
        parsed: dict[str, Any] = toml.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ProfileError(f"The device profile {path} cannot be read: {error.strerror}.") from error
    except ValueError as error:  # TOMLDecodeError and UnicodeDecodeError are both ValueErrors
        raise ProfileError(f"{path} is not a TOML file: {error}.", hint="Correct that place.") from error
    return parsed


def _merged(path: Path, folder: Path | None, seen: tuple[Path, ...]) -> dict[str, Any]:
    table = _parsed(path)
    like = table.pop("like", None)
    if like is None:
        return table
    files = _files(folder)
    if not isinstance(like, str) or like not in files:
        near = difflib.get_close_matches(str(like), files, n=1)
        hint = f"Did you mean `{near[0]}`? " if near else ""
        raise ProfileError(f"{path}: `like` names no profile: {like!r}.", hint=hint + ProfileError.hint)
    if files[like] in (*seen, path):
        raise ProfileError(f"{path}: `like` leads back to itself.", hint="Remove one `like`.")
    return {**_merged(files[like], folder, (*seen, path)), **table}


def _profile(name: str, table: dict[str, Any], faults: list[str]) -> Profile | None:
    """Build the profile, or append every fault that was found and return None."""
    known = (*_TEXTS, *_LISTS, *FIGURES, "note")
    for key in table.keys() - set(known):
        near = difflib.get_close_matches(key, known, n=1)
        faults.append(f"`{key}` is no key of a profile" + (f"; did you mean `{near[0]}`?" if near else ""))
    for key in (*_TEXTS, "note"):
        if not isinstance(table.get(key, "" if key == "note" else None), str):
            faults.append(f"`{key}` must be a text, not {table.get(key, 'left out')!r}")
    if isinstance(table.get("arch"), str) and table["arch"] not in _ARCHITECTURES:
        faults.append(f"`arch` must be one of {', '.join(_ARCHITECTURES)}, not {table['arch']!r}")
    for key in _LISTS:
        entries = table.get(key)
        if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
            faults.append(f"`{key}` must be a list of texts, not {table.get(key, 'left out')!r}")
        elif key == "python":
            faults += [
                f"`python`: {e!r} is no version such as 3.11" for e in entries if not _PYTHON.fullmatch(e)
            ]
        else:
            faults += [f"`flash`: {e!r} is none of {', '.join(_WAYS)}" for e in entries if e not in _WAYS]
    figures = {key: _figure(key, table.get(key), faults) for key in FIGURES}
    ram, memory, cores = figures["ram_mib"], figures["memory_mib"], figures["cores"]
    if ram and memory and memory.value > ram.value:
        faults.append(f"`memory_mib` is {memory.value:g}, more than the board's `ram_mib` of {ram.value:g}")
    if cores and cores.value != int(cores.value):
        faults.append(f"`cores` must be a whole number, not {cores.value:g}")
    if faults:
        return None
    fields: dict[str, Any] = {**table, **figures, **{key: tuple(table[key]) for key in _LISTS}}
    return Profile(name=name, **fields)


def _figure(key: str, table: Any, faults: list[str]) -> Figure | None:
    """Read one figure; append what is wrong with it and return None."""
    parts = [field.name for field in dataclasses.fields(Figure)]
    if not isinstance(table, dict):
        written = "left out" if table is None else repr(table)
        faults.append(f"`{key}` must be a table with {', '.join(parts)}, not {written}")
        return None
    before = len(faults)
    for part in sorted(table.keys() - set(parts)):
        faults.append(f"`{key}.{part}` is not known; a figure has {', '.join(parts)}")
    value, (meaning, least, most) = table.get("value"), FIGURES[key]
    if isinstance(value, bool) or not isinstance(value, int | float):
        faults.append(f"`{key}.value` must be a number ({meaning}), not {table.get('value', 'left out')!r}")
    elif not least <= value <= most:  # also refuses nan
        faults.append(f"`{key}.value` must lie in {least:g} to {most:g} ({meaning}), not {value:g}")
    if table.get("kind") not in _KINDS:
        faults.append(f"`{key}.kind` must be measured or estimate, not {table.get('kind', 'left out')!r}")
    if not isinstance(table.get("source"), str) or not table["source"].strip():
        faults.append(f"`{key}.source` must say where the number comes from")
    date = table.get("date")
    iso = date.isoformat() if isinstance(date, datetime.date) else date
    try:
        datetime.date.fromisoformat(iso)  # type: ignore[arg-type]  # a wrong type is the fault told below
    except (TypeError, ValueError):
        faults.append(
            f"`{key}.date` must be a date such as 2026-11-21, not {table.get('date', 'left out')!r}"
        )
    if len(faults) > before:
        return None
    return Figure(value=table["value"], source=table["source"], kind=table["kind"], date=str(iso))
