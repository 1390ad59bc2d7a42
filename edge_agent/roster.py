"""The names of a fleet, in the order of their numbers, written small.

Names that count up, as ``board-1``, ``board-2``, ..., become one entry ``["board-", 1, 5000]``, so that the
control message of five thousand agents is as short as that of six. Knows names and numbers, no topics.
"""

import re
from collections.abc import Sequence

__all__ = ["number_in", "pack_names"]

_COUNTED = re.compile(r"(.*?)(0|[1-9][0-9]{0,8})")
_LONGEST_ROSTER = 100_000


def pack_names(names: Sequence[str]) -> list[str | list[str | int]]:
    """Return the entries for names: a name, or ``[prefix, first, count]`` for names that count up."""
    entries: list[str | list[str | int]] = []
    for name in names:
        found = _COUNTED.fullmatch(name)
        if not found:
            entries.append(name)
            continue
        prefix, number = found[1], int(found[2])
        last = entries[-1] if entries else None
        if isinstance(last, list) and last[0] == prefix and int(last[1]) + int(last[2]) == number:
            last[2] = int(last[2]) + 1
        else:
            entries.append([prefix, number, 1])
    return entries


def number_in(entries: object, name: str) -> int | None:
    """Return the number of a name among entries that :func:`pack_names` wrote, None if it is not there.

    Raises:
        ValueError: These are no such entries.
    """
    if not isinstance(entries, list) or len(entries) > _LONGEST_ROSTER:
        raise ValueError("the fleet is no list of names")
    found = _COUNTED.fullmatch(name)
    before = 0
    for entry in entries:
        if isinstance(entry, str):
            if entry == name:
                return before
            before += 1
            continue
        if not isinstance(entry, list) or [type(part) for part in entry] != [str, int, int]:
            raise ValueError("the fleet holds something else than names")
        prefix, first, count = entry
        if not 0 <= first <= 10**9 or not 1 <= count <= 10**9:
            raise ValueError("the fleet counts beyond all bounds")
        if found and found[1] == prefix and first <= int(found[2]) < first + count:
            return before + int(found[2]) - first
        before += count
    return None
