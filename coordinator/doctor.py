"""What is wrong with a board: verdicts from evidence, each with the next step. Pure: facts in, verdicts out.

The evidence is a card's report, a status message, the book of boards, a log. Knows nothing of how they were
come by.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coordinator.boards import Board

__all__ = ["Verdict", "diagnose_log", "diagnose_report", "diagnose_status", "worst"]

_ORDER = ("fault", "warning", "fine")
_HOT_C = 80.0
_LOW_DISK_MIB = 100.0


@dataclass(frozen=True)
class Verdict:
    """One thing that the evidence says.

    Attributes:
        kind: ``fine``, ``warning`` or ``fault``.
        text: What it is, with the evidence's own words.
        next_step: What to do; empty where nothing is.
    """

    kind: str
    text: str
    next_step: str = ""


_ENDS = {
    "oom-kill": (
        "the kernel ended the agent at its memory limit",
        "Prune to a lower density, set a smaller batch size, or give it a larger --memory-mib.",
    ),
    "watchdog": (
        "the agent hung, and the watchdog ended it",
        "Once is no harm. If it comes back: is the card worn out, the power weak, the board too hot?",
    ),
    "signal": ("the agent crashed", "Send `scalarfed devices logs NAME` with a report of the bug."),
    "exit-code": ("the agent ended by itself", "The words above say what it missed."),
    "timeout": ("the agent did not start in time", "The card is very slow or worn out: use another."),
}
_WORDS = (
    (
        r"not authori[sz]ed|bad user name or password|token|enrol",
        "the coordinator does not let it in: wrong, used or expired token or certificate",
        "Flash the board again: that gives it a new token.",
    ),
    (
        r"certificate|tls|ssl",
        "TLS failed: the authority is another one, or the board's clock is wrong",
        "Does the coordinator still have the authority of the day when the board was flashed? Has the board "
        "a network time server?",
    ),
    (
        r"refused",
        "the broker's machine answers, but no broker listens at that port",
        "Start the coordinator; let its broker listen on the network, not on 127.0.0.1 alone.",
    ),
    (
        r"no connection|not reached|does not answer|timed? ?out|unreachable|name or service|getaddrinfo",
        "the board does not reach the broker: Wi-Fi, DHCP, address or firewall",
        "Is the board in the same network? Is the broker's address still the same? Is its port open?",
    ),
    (
        r"x_train|\.npz|samples of shape|data file",
        "the board's samples are missing or do not fit the bundle",
        "Put them where --data said, or flash again with --data FILE.",
    ),
    (
        r"bundle|manifest",
        "the bundle is damaged or is another run's",
        "Flash the board again with the bundle of the run.",
    ),
    (
        r"imports alone hold|budget allows",
        "the budget is smaller than what the agent holds before it does anything",
        "Give it a larger --memory-mib: 96 is little, 128 is usual.",
    ),
    (
        r"illegal instruction|elf|cannot execute|wrong elf class",
        "the wheels are for another processor",
        "Flash again with the right system: 64-bit Arm for Raspberry Pi and Jetson.",
    ),
)  # fmt: skip
_UPDATES_GONE_WRONG = ("refused", "failed", "returned")
_FAILED = {
    "machine": ("the payload is for another processor", "Use an image of the board's own architecture."),
    "python": ("the system's Python is another one than the wheels'", "Flash again with --python."),
    "hash": ("a file on the card is not what was written: tampered with, or the card is bad",
             "Flash again; if it comes back, use another card."),
    "space": ("the card is full", "Use a larger card, or let the system grow its partition first."),
    "wheels": ("the card is full or corrupt: a wheel does not unpack", "Use another card."),
    "import": ("what was installed does not run on this board", "Is it a 64-bit system of a supported kind?"),
    "service": ("systemd did not take the service", "`scalarfed flash ssh` shows its words."),
    "settings": ("the settings are gone", "Flash again."),
}  # fmt: skip


def diagnose_report(report: str | None, *, flashed: bool) -> list[Verdict]:
    """Return what a card tells.

    Args:
        report: Its ``report.txt``; None if there is none.
        flashed: Whether our payload is on the card.
    """
    if not flashed:
        return [
            Verdict("fault", "nothing of scalarfed is on this card", "`scalarfed flash card` puts it there.")
        ]
    if report is None:
        return [
            Verdict(
                "fault",
                "no report: the first boot never ran the installer",
                "Was the card in the board, with power, for minutes? Then its system does not read this "
                "first-boot format: write it again with a current Imager, and flash it again.",
            )
        ]
    lines = [line.partition(" ")[2] for line in report.splitlines() if line.strip()]
    begun = max((n for n, line in enumerate(lines) if line.startswith("begin ")), default=0)
    last = lines[begun:]
    failed = next((line for line in reversed(last) if line.startswith("FAILED: ")), None)
    if failed is not None:
        step, _, words = failed.removeprefix("FAILED: ").partition(": ")
        text, next_step = _FAILED.get(step, ("the installer failed", "Flash again."))
        return [Verdict("fault", f"{text} ({words.strip()})", next_step)]
    if not any(line.startswith("done ") for line in last):
        where = last[-1] if last else "nothing"
        return [
            Verdict(
                "fault",
                f"the installer stopped after {where!r}: power cut, full or corrupt card",
                "Boot it once more: it goes on by itself. If it stops there again, use another card.",
            )
        ]
    verdicts = [Verdict("fine", f"installed: {lines[begun].removeprefix('begin ')}")]
    verdicts += [
        Verdict("warning", line.removeprefix("warning: "), "Boot it once more, then look again.")
        for line in last
        if line.startswith("warning: ")
    ]
    updates = [line.removeprefix("update ") for line in lines if line.startswith("update ")]
    if updates and updates[-1].startswith(_UPDATES_GONE_WRONG):
        verdicts.append(
            Verdict("warning", f"its last update was {updates[-1]}", "`scalarfed update` offers it again.")
        )
    ends = [line.removeprefix("agent ended: ") for line in last if line.startswith("agent ended: ")]
    if ends:
        verdicts.append(_of_end(ends[-1], len(ends)))
    return verdicts


def diagnose_status(status: Mapping[str, Any] | None, board: Board | None) -> list[Verdict]:
    """Return what a board's last status message tells.

    Args:
        status: As the broker keeps it; None if there never was one.
        board: Its line in the book; None if it was not flashed from here.
    """
    if status is None:
        known = "" if board is None else f" It was flashed at {board.flashed_at}, by {board.way}."
        return [
            Verdict(
                "fault",
                f"it never reported in.{known}",
                "Has it power and network? Its card tells more: `scalarfed doctor` on the card.",
            )
        ]
    verdicts = [_of_state(status)]
    budget, rung = status.get("budget_mib"), str(status.get("enforcement", ""))
    if budget and rung in ("none", "", "sampler"):
        verdicts.append(
            Verdict(
                "warning",
                f"its budget of {budget:g} MiB is not held by the kernel ({rung or 'nothing'} holds it)",
                "On a Raspberry Pi cgroup_enable=memory is missing in cmdline.txt: flash again, or add it.",
            )
        )
    return verdicts + _of_telemetry(status.get("telemetry") or {})


def diagnose_log(lines: Sequence[str]) -> list[Verdict]:
    """Return what the last lines of an agent's log tell; empty where they tell nothing bad."""
    for line in reversed(lines):
        if re.search(r"\b(ERROR|WARNING)\b|error:|hint:|Traceback|scalarfed: ", line):
            found = _of_words(line)
            if found is not None:
                return [found]
    return []


def worst(verdicts: Sequence[Verdict]) -> str:
    """Return the worst kind among verdicts; ``fine`` if there are none."""
    return min((verdict.kind for verdict in verdicts), key=_ORDER.index, default="fine")


def _of_state(status: Mapping[str, Any]) -> Verdict:
    state = str(status.get("state", ""))
    if state == "offline":
        return Verdict(
            "fault",
            "it joined and was lost: the broker has its last will",
            "Power, Wi-Fi, or the agent ended. It comes back by itself; else `scalarfed doctor` on its card.",
        )
    if state == "safe mode":
        words = str(status.get("last_words", ""))
        found = _of_words(words)
        why = f"{found.text} ({words.strip()[-200:]})" if found else words.strip()[-200:] or "no last words"
        step = found.next_step if found else "Look at `scalarfed devices logs` with its name."
        return Verdict(
            "fault", f"safe mode after {int(status.get('starts', 6)) - 1} failed starts: {why}", step
        )
    if state == "refused":
        return Verdict(
            "fault",
            "it is connected, but not in the run: another bundle, or not in the experiment's fleet",
            "Does the experiment name this board, and was the board flashed with this run's bundle?",
        )
    if state in ("ready", "closed"):
        return Verdict("fine", f"{state}, at round {status.get('round')} with digest {status.get('digest')}")
    return Verdict(
        "warning",
        f"connected and {state or 'silent'}: the run has not called it yet",
        "Start the coordinator with an experiment that names this board.",
    )


def _of_telemetry(told: Mapping[str, Any]) -> list[Verdict]:
    found = []
    now, since = told.get("throttled") or [], told.get("throttled_since_boot") or []
    if "under-voltage" in now or "under-voltage" in since:
        found.append(
            Verdict(
                "warning",
                f"under-voltage {'now' if 'under-voltage' in now else 'since its boot'}",
                "Use the maker's power supply and a short, thick cable.",
            )
        )
    temperature = told.get("temperature_c")
    if isinstance(temperature, (int, float)) and temperature >= _HOT_C:
        found.append(
            Verdict(
                "warning", f"{temperature:g} °C: it throttles or soon will", "Give it a heat sink or a fan."
            )
        )
    disk = told.get("disk_free_mib")
    if isinstance(disk, (int, float)) and disk < _LOW_DISK_MIB:
        found.append(
            Verdict("warning", f"{disk:g} MiB left on its disk", "Remove old logs and packages there.")
        )
    return found


def _of_end(ended: str, count: int) -> Verdict:
    result, _, words = ended.partition(" ")
    found = _of_words(words)
    if result == "exit-code" and found is not None:
        return Verdict("fault", f"{found.text} ({words.partition(': ')[2].strip()})", found.next_step)
    text, next_step = _ENDS.get(result, (f"the agent ended: {result}", "Look at its log."))
    told = words.partition(": ")[2].strip()
    return Verdict(
        "fault", f"{text}, {count} time{'s' * (count > 1)}{f' ({told})' if told else ''}", next_step
    )


def _of_words(words: str) -> Verdict | None:
    for pattern, text, next_step in _WORDS:
        if re.search(pattern, words, re.IGNORECASE):
            return Verdict("fault", text, next_step)
    return None
