"""Tables of a TOML file become frozen dataclasses, and every fault is collected on the way.

Knows rules for single values and how to name a misspelt key. Does not know any key of the experiment file: a
dataclass declares its keys with their rules, as ``density: Annotated[float, Number(above=0, most=1)] = 0.5``.
"""

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, Protocol, TypeVar, get_type_hints

from profiles.errors import ConfigError

__all__ = [
    "Choice",
    "CountOrAll",
    "Faults",
    "Fractions",
    "Number",
    "RefusedError",
    "Rule",
    "Text",
    "Whole",
    "Wholes",
    "nearest",
    "read_table",
    "unknown_key",
]

_Table = TypeVar("_Table")


class RefusedError(ValueError):
    """A value breaks its rule; the text says the rule and the remedy."""


class Rule(Protocol):
    """Turns a TOML value into the value of a field, or raises RefusedError."""

    def __call__(self, value: object, /) -> object:
        """Return the value as the field holds it."""


@dataclass(frozen=True)
class Whole:
    """A whole number, least <= value <= most."""

    least: int = 0
    most: int = 2**63 - 1
    remedy: str = ""

    def __call__(self, value: object) -> int:
        """Return the number; true and 3.0 are no whole numbers."""
        if isinstance(value, bool) or not isinstance(value, int) or not self.least <= value <= self.most:
            upper = f" and at most {self.most}" if self.most < 2**63 - 1 else ""
            raise RefusedError(
                _sentences(f"must be a whole number of at least {self.least}{upper}", self.remedy)
            )
        return value


@dataclass(frozen=True)
class Number:
    """A finite number; ``above`` excludes its bound, ``least`` and ``most`` include theirs."""

    above: float | None = None
    least: float | None = None
    most: float | None = None
    remedy: str = ""

    def __call__(self, value: object) -> float:
        """Return the number as a float; whole numbers will do."""
        good = (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and math.isfinite(value)
            and (self.above is None or value > self.above)
            and (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
        )
        if not good:
            raise RefusedError(_sentences(f"must be {self.range()}", self.remedy))
        return float(value)  # type: ignore[arg-type]

    def range(self) -> str:
        """Return the legal range in words, such as ``in (0, 1]``."""
        lower = self.least if self.above is None else self.above
        if lower is not None and self.most is not None:
            return f"in {'[' if self.above is None else '('}{lower:g}, {self.most:g}]"
        if self.above is not None:
            return f"a number above {self.above:g}"
        if self.least is not None:
            return f"a number of at least {self.least:g}"
        return "a finite number" if self.most is None else f"a number of at most {self.most:g}"


@dataclass(frozen=True)
class Choice:
    """One of a few names, or a text that matches ``pattern`` as a whole; ``rule`` says the same in words."""

    names: Sequence[str]
    pattern: str = ""
    rule: str = ""

    def __call__(self, value: object) -> str:
        """Return the name, or refuse and offer the nearest."""
        if isinstance(value, str) and (
            value in self.names or (self.pattern and re.fullmatch(self.pattern, value))
        ):
            return value
        rule = f"must be one of {_list(self.names)}" + (f", or {self.rule}" if self.rule else "")
        raise RefusedError(_sentences(rule, _did_you_mean(value, self.names)))


@dataclass(frozen=True)
class Text:
    """A string that matches ``pattern`` as a whole; ``rule`` says the same in words."""

    pattern: str = r"(?s).+"
    rule: str = "must be a text that is not empty"
    remedy: str = ""

    def __call__(self, value: object) -> str:
        """Return the string."""
        if not isinstance(value, str) or not re.fullmatch(self.pattern, value):
            raise RefusedError(_sentences(self.rule, self.remedy))
        return value


@dataclass(frozen=True)
class Wholes:
    """A list of whole numbers, each of at least ``least``; empty is allowed."""

    least: int = 1
    remedy: str = ""

    def __call__(self, value: object) -> tuple[int, ...]:
        """Return the numbers as a tuple."""
        if not isinstance(value, list):
            raise RefusedError(_sentences("must be a list of whole numbers", self.remedy))
        if any(isinstance(item, bool) or not isinstance(item, int) or item < self.least for item in value):
            raise RefusedError(_sentences(f"must hold whole numbers of at least {self.least}", self.remedy))
        return tuple(value)


@dataclass(frozen=True)
class Fractions:
    """A list of different numbers in (0, 1); empty is allowed."""

    remedy: str = ""

    def __call__(self, value: object) -> tuple[float, ...]:
        """Return the numbers in ascending order."""
        if not isinstance(value, list):
            raise RefusedError(_sentences("must be a list of numbers", self.remedy))
        numbers = [item for item in value if isinstance(item, int | float) and 0 < item < 1]
        if len(numbers) < len(value) or len(set(numbers)) < len(numbers) or len(numbers) > 15:
            raise RefusedError(_sentences("must hold at most 15 different numbers in (0, 1)", self.remedy))
        return tuple(sorted(float(number) for number in numbers))


@dataclass(frozen=True)
class CountOrAll:
    """``"all"``, or a whole number of at least 1."""

    remedy: str = ""

    def __call__(self, value: object) -> int | str:
        """Return ``"all"`` or the number."""
        if value == "all":
            return "all"
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise RefusedError(_sentences('must be "all" or a whole number of at least 1', self.remedy))
        return value


class Faults:
    """The faults of one file, in the order in which they were found."""

    def __init__(self) -> None:
        self._found: list[tuple[str, str]] = []

    def add(self, where: str, message: str) -> None:
        """Note a fault at the dotted key ``where``."""
        self._found.append((where, message))

    def refuse(self, where: str, value: object, message: str) -> None:
        """Note that the key ``where`` has a value that breaks its rule."""
        self.add(where, f"= {_show(value)} {message}")

    def clear(self, *keys: str) -> bool:
        """Say whether none of the keys, nor anything below them, has a fault so far."""
        return not any(
            where == key or where.startswith(f"{key}.") or key.startswith(f"{where}.")
            for where, _ in self._found
            for key in keys
        )

    def raise_if_any(self, source: str) -> None:
        """Raise one ConfigError that lists them all, if there are any.

        Raises:
            ConfigError: At least one fault was noted.
        """
        lines = [f"`{where}` {message}" for where, message in self._found]
        if len(lines) == 1:
            raise ConfigError(f"{source}: {lines[0]}")
        if lines:
            raise ConfigError("\n  - ".join([f"{source} has {len(lines)} faults:", *lines]))


def read_table(
    cls: type[_Table],
    table: object,
    *,
    where: str,
    faults: Faults,
    given: Mapping[str, Any],
    extra: Iterable[str] = (),
    homes: Mapping[str, str],
) -> _Table:
    """Make a dataclass of a TOML table; faulty and missing keys are noted, and stand as None.

    The result may be used only once ``faults`` turned out to be empty.

    Args:
        cls: A dataclass; a field with a Rule in its annotation is a key of the table, and must be there if it
            has no default.
        table: What the file says; anything but a table is a fault.
        where: Dotted key of the table, empty for the top of the file.
        faults: Collects what is wrong.
        given: Values of the fields that are not keys of the table.
        extra: Keys that the table may hold besides, which the caller reads.
        homes: Where a key of another table belongs, in words, to help who put it here.
    """
    rules = _rules(cls)
    values: dict[str, Any] = dict(given)
    if not isinstance(table, Mapping):
        faults.refuse(where, table, f"must be a table: write it as [{where}] with its keys below.")
        table = {}
    for key in table:
        if key not in rules and key not in extra:
            faults.add(_dotted(where, key), unknown_key(key, [*rules, *extra], homes))
    for field in fields(cls):  # type: ignore[arg-type]
        if field.name not in rules:
            continue
        if field.name in table:
            try:
                values[field.name] = rules[field.name](table[field.name])
            except RefusedError as refused:
                faults.refuse(_dotted(where, field.name), table[field.name], str(refused))
                values[field.name] = None
        elif field.default is MISSING and field.default_factory is MISSING:
            faults.add(_dotted(where, field.name), "is missing.")
            values[field.name] = None
    return cls(**values)


def unknown_key(key: str, known: Sequence[str], homes: Mapping[str, str]) -> str:
    """Return what is to be said of an unknown key: its home, else the nearest known key, else all of them."""
    if key in homes:
        return f"is not a known key here. It belongs {homes[key]}."
    return f"is not a known key. {_did_you_mean(key, known) or f'Known here: {_list(known)}.'}"


def nearest(word: object, known: Sequence[str]) -> str | None:
    """Return the known word that ``word`` was probably meant to be, or None."""
    if not isinstance(word, str):
        return None
    plain = {name.lower().replace("-", "_"): name for name in known}
    found = difflib.get_close_matches(word.lower().replace("-", "_"), list(plain), n=1, cutoff=0.6)
    return plain[found[0]] if found else None


def _did_you_mean(word: object, known: Sequence[str]) -> str:
    found = nearest(word, known)
    return f"Did you mean `{found}`?" if found else ""


def _rules(cls: type[Any]) -> dict[str, Rule]:
    hints = get_type_hints(cls, include_extras=True)
    found = {
        name: [note for note in getattr(hint, "__metadata__", ()) if callable(note)]
        for name, hint in hints.items()
    }
    return {name: rules[0] for name, rules in found.items() if rules}


def _dotted(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _sentences(rule: str, remedy: str) -> str:
    return f"{rule}. {remedy}".rstrip()


def _list(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _show(value: object) -> str:
    text = (
        f'"{value}"'
        if isinstance(value, str)
        else str(value).lower()
        if isinstance(value, bool)
        else str(value)
    )
    return text if len(text) <= 80 else f"{text[:77]}..."
