"""The ledger of a run, read back for people: what each board was to spend, spent, and has left.

Knows the accounts as the log holds them. Keeps none (``ledger``).
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["Entry", "last_entries"]


@dataclass(frozen=True)
class Entry:
    """One board's latest day. None where there is no such limit, or nobody told.

    Attributes:
        batch_size: The latest that it was given.
        flops_spent: The larger of what its replies say and what it counted itself.
        refused: Why it was left out last; empty if it takes part.
    """

    agent: str
    day: str
    rounds: int
    batch_size: int
    peak_predicted_mib: float
    peak_measured_mib: float
    memory_mib: float | None
    flops_predicted: int
    flops_spent: int
    flops_allowed: int | None
    bytes_spent: int
    bytes_allowed: int | None
    temperature_c: float | None
    temperature_allowed_c: float | None
    energy_wh: float
    energy_allowed_wh: float | None
    refused: str

    @property
    def flops_left(self) -> int | None:
        """FLOPs that it may still spend on that day."""
        return None if self.flops_allowed is None else max(0, self.flops_allowed - self.flops_spent)

    @property
    def bytes_left(self) -> int | None:
        """Bytes that it may still spend on that day."""
        return None if self.bytes_allowed is None else max(0, self.bytes_allowed - self.bytes_spent)


def last_entries(accounts: Iterable[tuple[str, str, str]]) -> dict[str, Entry]:
    """Return the latest day's entry of each agent.

    Args:
        accounts: Day, agent, text; days ascending, as ``ScalarLog.accounts`` returns them.
    """
    found: dict[str, Entry] = {}
    for day, agent, text in accounts:
        told = json.loads(text)
        budget = told.get("budget", {})
        found[agent] = Entry(
            agent=agent,
            day=day,
            rounds=told["rounds"],
            batch_size=told["batch_size"],
            peak_predicted_mib=told["peak_predicted_mib"],
            peak_measured_mib=told["peak_measured_mib"],
            memory_mib=budget.get("memory_mib"),
            flops_predicted=told["flops_predicted"],
            flops_spent=max(told["flops_spent"], told["flops_measured"]),
            flops_allowed=budget.get("flops_per_day"),
            bytes_spent=told["bytes_measured"],
            bytes_allowed=budget.get("bytes_per_day"),
            temperature_c=told["temperature_c"],
            temperature_allowed_c=budget.get("temperature_c"),
            energy_wh=told["energy_wh"],
            energy_allowed_wh=budget.get("energy_wh_per_day"),
            refused=told["refused"],
        )
    return found
