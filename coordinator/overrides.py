"""Changes a TOML table by ``key.path=value``, as ``--set`` on the command line does.

Knows tables, lists and TOML values. Does not know which keys exist: what it puts into the table is checked
with everything else.
"""

import sys
from pathlib import Path
from typing import Any

from profiles.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["override"]


def override(table: dict[str, Any], assignment: str, *, paths: set[str]) -> str:
    """Change ``table`` in place and return the dotted key that was set.

    Args:
        table: Tables and lists, as a TOML reader makes them.
        assignment: ``key.path=value``; a number in the path counts the entries of a list from 0. The value is
            read as TOML, and as a bare string where it is none.
        paths: Dotted keys whose values are paths: taken from the working folder.

    Raises:
        ConfigError: No ``=``, or the path leads through something that has no such entry.
    """
    key, sign, text = assignment.partition("=")
    steps = [step.strip() for step in key.split(".")]
    if not sign or not all(steps):
        raise ConfigError(
            f"`--set {assignment}` is no override: it must look like key=value.",
            hint="For example --set rounds=50 or --set data.path=my.npz.",
        )
    value = _value(text.strip())
    dotted = ".".join(steps)
    if dotted in paths and isinstance(value, str) and value:
        value = str(Path(value).expanduser().resolve())
    place: Any = table
    for depth, step in enumerate(steps):
        at = _entry(place, step, assignment, ".".join(steps[:depth]))
        if depth == len(steps) - 1:
            place[at] = value
        elif isinstance(place, dict):
            place = place.setdefault(step, {})
        else:
            place = place[at]
    return dotted


def _entry(place: Any, step: str, assignment: str, so_far: str) -> str | int:
    if isinstance(place, dict):
        return step
    if not isinstance(place, list):
        raise ConfigError(f"`--set {assignment}`: `{so_far}` is a value and has no keys of its own.")
    if not (step.isdecimal() and int(step) < len(place)):
        raise ConfigError(
            f"`--set {assignment}`: `{so_far}` has {len(place)} entries, and `{step}` is none of them.",
            hint=f"Count from 0: the last one is {so_far}.{len(place) - 1}." if place else None,
        )
    return int(step)


def _value(text: str) -> object:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    value = parsed["value"]
    # A date, or a text that goes on after a line break, was meant as a text.
    return value if len(parsed) == 1 and isinstance(value, bool | int | float | str | list | dict) else text
