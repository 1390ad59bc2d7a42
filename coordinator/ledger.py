"""The books of a fleet: what each board may spend, what a round will cost it, what it has spent.

Before a round it says which agents take smaller batches and which cannot take part, with the reason;
afterwards it is charged with what the boards measured. An account is kept for each agent and day (UTC), as
plain values that the scalar log holds. Does no input or output; the day is asked for.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from edge_agent.plan import RoundPlan
from profiles.budget import Budget, predict_seconds

__all__ = ["Account", "Fitting", "Ledger", "Price", "Work"]

_COOLER_C = 3.0
_FULLER_PERCENT = 5.0
_NOISE_MIB = 1.0
_LONGEST_POWER_S = 120.0


@dataclass(frozen=True)
class Price:
    """What a round costs one agent.

    Attributes:
        peak_mib: Predicted peak of its resident memory.
        flops: Of its forward passes, and of the passes over the weights.
        wire_bytes: Both ways, MQTT included.
    """

    peak_mib: float
    flops: int
    wire_bytes: int


@dataclass(frozen=True)
class Work:
    """What a round asks of one agent.

    Attributes:
        agent: Its number.
        plan: Of the round.
        batch_size: Samples of a local step.
        central: Central differences.
    """

    agent: int
    plan: RoundPlan
    batch_size: int
    central: bool


@dataclass
class Account:
    """One agent's day; the fields are what is stored.

    Attributes:
        rounds: Replies that came.
        flops_predicted: Of all rounds that it was asked.
        flops_spent: Of its replies, by the batch that they name.
        flops_measured: As the agent itself counted them.
        bytes_measured: As its link counted them, both ways.
        peak_predicted_mib: Highest that was predicted.
        peak_measured_mib: Highest that it measured.
        temperature_c: Highest that it told.
        energy_wh: Its power over time.
        batch_size: The latest that was given to it.
        refused: Why it was last left out; empty if it was not.
    """

    rounds: int = 0
    flops_predicted: int = 0
    flops_spent: int = 0
    flops_measured: int = 0
    bytes_measured: int = 0
    peak_predicted_mib: float = 0.0
    peak_measured_mib: float = 0.0
    temperature_c: float | None = None
    energy_wh: float = 0.0
    batch_size: int = 0
    refused: str = ""


@dataclass
class _Board:
    """How an agent is now, and what its counters stood at; not stored but for the counters.

    Attributes:
        pid: Process whose counters these are.
        cap: Largest batch, once the memory that it measured was too much.
        cap_peak_mib: The peak that led to the cap; only a higher one lowers it again.
        held: Why it is left alone for now: heat or an empty battery.
        gflops: Its rate, where it has measured that.
    """

    pid: int = 0
    flops: int = 0
    wire_bytes: int = 0
    cap: int | None = None
    cap_peak_mib: float = 0.0
    power_at: float | None = None
    held: str = ""
    gflops: float | None = None


@dataclass(frozen=True)
class Fitting:
    """What of a round fits whom.

    Attributes:
        plan: What is asked; with fewer perturbations where that alone makes a quorum.
        batches: Agents that take smaller batches.
        left_out: Agents that cannot take part, with the reason.
    """

    plan: RoundPlan
    batches: Mapping[int, int]
    left_out: Mapping[int, str]


class Ledger:
    """The accounts of a run's agents.

    Args:
        names: Of the agents, in the order of their numbers.
        budgets: What each may spend.
        price: What work costs.
        today: The day, such as ``2026-11-21``.
        deadline_s: Within which a board has to answer, by the speed that it has measured of itself.
        stored: Accounts that were kept: day, agent, text.
    """

    def __init__(
        self,
        names: Sequence[str],
        budgets: Sequence[Budget],
        price: Callable[[Work], Price],
        *,
        today: Callable[[], str],
        deadline_s: float = math.inf,
        stored: Iterable[tuple[str, str, str]] = (),
    ) -> None:
        self._names = list(names)
        self._numbers = {name: number for number, name in enumerate(names)}
        self._budgets = list(budgets)
        self._price = price
        self._today = today
        self._deadline_s = deadline_s
        self._accounts: dict[tuple[str, int], Account] = {}
        self._boards = [_Board() for _ in names]
        self._changed: set[tuple[str, int]] = set()
        for day, name, text in stored:
            self._restore(day, name, text)

    def account(self, agent: int) -> Account:
        """Return an agent's account of today."""
        return self._accounts.setdefault((self._today(), agent), Account())

    def fit(
        self, plan: RoundPlan, *, batch_size: int, central: bool, agents: Sequence[int], needed: int
    ) -> Fitting:
        """Fit a round to the budgets: smaller batches first, then fewer perturbations, then fewer agents.

        Args:
            plan: What the round would ask.
            batch_size: Samples of a local step, for whom it fits.
            central: Central differences.
            agents: Who could be asked.
            needed: Perturbations are halved, at most down to one, until so many agents can take part.
        """
        tried = plan
        while True:
            fitting = self._fit(tried, batch_size, central, agents)
            if len(agents) - len(fitting.left_out) >= min(needed, len(agents)) or tried.perturbations == 1:
                break
            tried = replace(tried, perturbations=tried.perturbations // 2)
        if len(agents) - len(fitting.left_out) < min(needed, len(agents)):
            fitting = self._fit(plan, batch_size, central, agents)  # fewer perturbations were no help
        for agent in agents:
            self.account(agent).refused = fitting.left_out.get(agent, "")
        return fitting

    def ask(self, work: Work) -> None:
        """Note what a round that was opened will cost an agent."""
        price, account = self._price(work), self.account(work.agent)
        account.flops_predicted += price.flops
        account.peak_predicted_mib = max(account.peak_predicted_mib, price.peak_mib)
        account.batch_size = work.batch_size
        self._touch(work.agent)

    def charge(self, work: Work, *, peak_mib: float) -> list[str]:
        """Charge an agent for a reply; return what is worth telling.

        Args:
            work: What it did, by the samples that its reply names.
            peak_mib: What it measured of itself.
        """
        account, budget, board = self.account(work.agent), self._budgets[work.agent], self._boards[work.agent]
        account.rounds += 1
        account.flops_spent += self._price(work).flops
        account.peak_measured_mib = max(account.peak_measured_mib, peak_mib)
        self._touch(work.agent)
        allowed = budget.memory_mib
        if allowed is None or peak_mib <= allowed or peak_mib <= board.cap_peak_mib + _NOISE_MIB:
            return []
        # The peak of a process never falls: only a higher one says that the smaller batch is too large too.
        board.cap, board.cap_peak_mib = work.batch_size // 2, peak_mib
        what = f"batches of {board.cap} from now on" if board.cap else "left out from now on"
        return [f"measured {peak_mib:.1f} MiB of {allowed:.1f} allowed: {what}"]

    def note_status(self, agent: int, status: Mapping[str, Any], *, now: float) -> None:
        """Take in what an agent's board tells of itself.

        Args:
            agent: Its number.
            status: As checked by ``status.read_status``.
            now: Monotonic seconds.
        """
        account, board, budget = self.account(agent), self._boards[agent], self._budgets[agent]
        pid = int(status.get("pid", 0))
        counters = (int(status.get("flops", board.flops)), board.wire_bytes)
        if "traffic" in status:
            counters = (counters[0], status["traffic"]["packet_up"] + status["traffic"]["packet_down"])
        before = (board.flops, board.wire_bytes) if pid == board.pid else (0, 0)
        account.flops_measured += max(0, counters[0] - before[0])
        account.bytes_measured += max(0, counters[1] - before[1])
        board.pid, (board.flops, board.wire_bytes) = pid, counters
        board.gflops = status.get("measured", {}).get("fp32_gflops") or board.gflops
        told = {**status.get("telemetry", {}), **status}
        power, at = told.get("power_w"), board.power_at
        if power is not None:
            if at is not None and 0 <= now - at <= _LONGEST_POWER_S:
                account.energy_wh += power * (now - at) / 3600
            board.power_at = now
        heat, charge = told.get("temperature_c"), told.get("battery_percent")
        if heat is not None:
            account.temperature_c = max(heat, account.temperature_c or heat)
        board.held = _held(board.held, heat, charge, budget)
        if (peak := status.get("peak_rss_mib")) is not None:
            account.peak_measured_mib = max(account.peak_measured_mib, peak)
        self._touch(agent)

    def left(self, agent: int) -> dict[str, float]:
        """Return what an agent may still spend today, for each limit that it has."""
        budget, account = self._budgets[agent], self.account(agent)
        found: dict[str, float] = {}
        if budget.flops_per_day is not None:
            found["flops"] = budget.flops_per_day - max(account.flops_spent, account.flops_measured)
        if budget.bytes_per_day is not None:
            found["bytes"] = budget.bytes_per_day - account.bytes_measured
        if budget.energy_wh_per_day is not None:
            found["energy_wh"] = budget.energy_wh_per_day - account.energy_wh
        return found

    def unsaved(self) -> list[tuple[str, str, str]]:
        """Return the accounts that changed since the last call: day, agent, text."""
        rows = []
        for day, agent in sorted(self._changed):
            board = self._boards[agent]
            told = {
                **asdict(self._accounts[day, agent]),
                "counters": [board.pid, board.flops, board.wire_bytes],
            }
            told["budget"] = {key: value for key, value in asdict(self._budgets[agent]).items() if value}
            rows.append((day, self._names[agent], json.dumps(told)))
        self._changed.clear()
        return rows

    def _fit(self, plan: RoundPlan, batch_size: int, central: bool, agents: Sequence[int]) -> Fitting:
        batches: dict[int, int] = {}
        left_out: dict[int, str] = {}
        for agent in agents:
            full = Work(agent, plan, batch_size, central)
            reason = self._refusal(full)
            if not reason:
                continue
            smaller = self._largest(full)
            if smaller:
                batches[agent] = smaller
            else:
                left_out[agent] = self._refusal(replace(full, batch_size=1)) or reason
        return Fitting(plan, batches, left_out)

    def _largest(self, work: Work) -> int:
        """Return the largest batch that fits, by bisection; 0 if not even one sample does."""
        low, high = 0, work.batch_size
        while high - low > 1:
            middle = (low + high) // 2
            if self._refusal(replace(work, batch_size=middle)):
                high = middle
            else:
                low = middle
        return low

    def _refusal(self, work: Work) -> str:
        """Return why a board cannot do this work; empty if it can."""
        budget, board = self._budgets[work.agent], self._boards[work.agent]
        if board.held:
            return board.held
        if board.cap is not None and work.batch_size > board.cap:
            return f"it measured {board.cap_peak_mib:.1f} MiB of {budget.memory_mib:.1f} allowed"
        price, left = self._price(work), self.left(work.agent)
        pairs = (
            ("MiB at its peak", price.peak_mib, budget.memory_mib),
            ("FLOPs in a round", price.flops, budget.flops_per_round),
            ("FLOPs, and today", price.flops, left.get("flops")),
            ("bytes, and today", price.wire_bytes, left.get("bytes")),
        )
        if left.get("energy_wh", 1.0) <= 0:
            return f"it spent the {budget.energy_wh_per_day:g} Wh allowed today"
        if board.gflops and (seconds := predict_seconds(price.flops, gflops=board.gflops)) > self._deadline_s:
            speed = f"{seconds:,.3g} s at the {board.gflops:.3g} GFLOP/s that it measured"
            return f"{work.batch_size} samples take {speed}; the deadline is {self._deadline_s:g} s"
        for what, needs, allowed in pairs:
            if allowed is not None and needs > allowed:
                return f"{work.batch_size} samples take {needs:,.6g} {what} {max(0.0, allowed):,.6g} are left"
        return ""

    def _touch(self, agent: int) -> None:
        self._changed.add((self._today(), agent))

    def _restore(self, day: str, name: str, text: str) -> None:
        agent = self._numbers.get(name)
        if agent is None:
            return
        told = json.loads(text)
        known = {item.name for item in fields(Account)}
        self._accounts[day, agent] = Account(**{key: told[key] for key in known & told.keys()})
        board = self._boards[agent]
        board.pid, board.flops, board.wire_bytes = told.get("counters", [0, 0, 0])


def _held(before: str, heat: float | None, charge: float | None, budget: Budget) -> str:
    """Return why a board is to be left alone; what held it before ends a little beyond its limit."""
    ceiling, floor = budget.temperature_c, budget.battery_percent
    if ceiling is not None and heat is not None:
        limit = ceiling - (_COOLER_C if "°C" in before else 0.0)
        if heat > limit:
            return f"{heat:.1f} °C of {ceiling:.1f} °C allowed"
    if floor is not None and charge is not None:
        limit = floor + (_FULLER_PERCENT if "battery" in before else 0.0)
        if charge < limit:
            return f"its battery has {charge:.0f} % of {floor:.0f} % wanted"
    unknown = ("°C" in before and heat is None) or ("battery" in before and charge is None)
    return before if unknown else ""
