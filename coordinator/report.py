"""The report of a run: one HTML file that needs nothing else.

Knows what a person wants to see first, and how figures are written. Does not know where they come from
(``history``) nor how a plot is drawn (``plots``).
"""

import os
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from rich.filesize import decimal

from coordinator.history import AgentHistory, History, read_history
from coordinator.plots import LANES, accuracy_plot, bytes_plot, fleet_plot, loss_plot, slopes_plot
from edge_agent.optimizer import METHODS

__all__ = ["write_report"]

_FLOAT_BYTES = 4
_MOST_ROWS = 200


def write_report(run: Path) -> Path:
    """Write ``report.html`` into a run folder and return its path.

    A run that was interrupted gets a report of what there is.

    Raises:
        LogError: The folder holds no scalar log, or it cannot be read.
    """
    history = read_history(run)
    page = Environment(
        loader=PackageLoader("coordinator", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = page.get_template("report.html.j2").render(
        name=history.meta.get("name") or run.resolve().name,
        run=run,
        history=history,
        summary=history.summary,
        verdict=_verdict(history),
        tiles=_tiles(history),
        plots=_plots(history),
        memory=[_memory(agent) for agent in history.agents[:LANES]],
        flops=_flops(history.summary),
        widths=_widths(history.manifest),
        agents=history.agents[:_MOST_ROWS],
        books=history.books[:_MOST_ROWS],
        facts=_facts(history),
        big=_big,
        when=lambda at: datetime.fromtimestamp(at, timezone.utc).strftime("%Y-%m-%d %H:%M:%S"),
    )
    target = run / "report.html"
    part = run / ".report.html.part"
    part.write_text(text, encoding="utf-8")
    os.replace(part, target)
    return target


def _verdict(history: History) -> str:
    """Return what came out, in a sentence or two."""
    rounds, agents = len(history.rounds), len(history.agents)
    fleet, time = f"{agents} agent{'s' * (agents != 1)}", f"{rounds} round{'s' * (rounds != 1)}"
    parts = [f"{fleet} trained {_model(history)} for {time} with forward passes alone."]
    if len(history.test_accuracy):
        parts.append(f"It answers {history.test_accuracy[-1]:.1%} of the test samples.")
    if (up := history.summary.get("payload_bytes_up_per_agent_round")) is not None:
        parts.append(f"An agent sent {decimal(round(up))} a round.")
    if suspected := _suspected(history):
        parts.append(f"Suspected of lying: {', '.join(suspected)}.")
    if not history.summary:
        parts.append("The run did not end: this is what there is of it.")
    return " ".join(parts)


def _suspected(history: History) -> dict[str, str]:
    """Return the agents that were suspected of lying, and not trusted again, with the reason."""
    found: dict[str, str] = {}
    for event in history.events:
        if event.kind == "suspect":
            found[event.agent] = f"round {event.round}: {event.text}"
        elif event.kind == "trusted again":
            found.pop(event.agent, None)
    return found


def _model(history: History) -> str:
    model = history.summary.get("model") or history.manifest.get("model")
    return f"the net {model}" if model else "a net"


def _tiles(history: History) -> list[dict[str, str]]:
    """Return the headline figures: a label, a value, and what it is to be compared with."""
    summary = history.summary
    tiles: list[dict[str, str]] = []

    def add(label: str, value: str, note: str = "") -> None:
        tiles.append({"label": label, "value": value, "note": note})

    if len(history.test_accuracy):
        best = int(history.test_accuracy.argmax())
        note = f"best {history.test_accuracy[best]:.1%} at round {history.evaluated[best]}"
        add("test accuracy", f"{history.test_accuracy[-1]:.1%}", note)
    skipped = int(history.skipped.sum())
    pace = summary.get("seconds_per_round")
    note = f"{skipped} skipped" if skipped else "none skipped"
    add("rounds", f"{len(history.rounds):,}", note + (f", {pace:.2g} s each" if pace else ""))
    up, down = summary.get("bytes_up_per_agent_round"), summary.get("bytes_down_per_agent_round")
    if up is not None and down is not None:
        add("bytes up / down", f"{up:.0f} / {down:.0f}", "per agent and round, MQTT included")
    peaks = [agent.peak_mib for agent in history.agents if agent.peak_mib]
    budgets = [agent.budget_mib for agent in history.agents if agent.budget_mib]
    if peaks:
        note = f"tightest budget {min(budgets):.0f} MiB" if budgets else ""
        add("peak memory", f"{max(peaks):.0f} MiB", note)
    dense, pruned = summary.get("params_dense"), summary.get("params_pruned")
    if dense and pruned:
        add("parameters", f"{pruned:,}", f"of {dense:,}: {pruned / dense:.0%} stay")
    if (agree := summary.get("digests_agree")) is not None:
        where = "on every side" if agree else "at the coordinator"
        add(
            "replicas",
            "equal" if agree else "differ",
            f"digest {str(summary.get('final_digest', '?'))[:8]}… {where}",
        )
    return tiles


def _plots(history: History) -> dict[str, Markup]:
    """Return each plot, empty where there is nothing to show."""
    wanted: dict[str, tuple[bool, Callable[[], str]]] = {
        "accuracy": (len(history.evaluated) > 0, lambda: accuracy_plot(history)),
        "loss": (len(history.rounds) > 0, lambda: loss_plot(history)),
        "slopes": (len(history.slopes.rounds) > 0, lambda: slopes_plot(history)),
        "bytes": (bool(_bytes(history)), lambda: bytes_plot(len(history.rounds), _bytes(history))),
        "fleet": (len(history.rounds) > 0 and len(history.agents) > 0, lambda: fleet_plot(history)),
    }
    return {name: Markup(plot() if there else "") for name, (there, plot) in wanted.items()}


def _bytes(history: History) -> list[tuple[str, float]]:
    """Return bytes per agent and round: ours, and those of sending all weights there and back."""
    summary = history.summary
    up, down = summary.get("bytes_up_per_agent_round"), summary.get("bytes_down_per_agent_round")
    pruned, dense = summary.get("params_pruned"), summary.get("params_dense")
    if not len(history.rounds) or up is None or down is None or not pruned or not dense:
        return []
    series = [("scalars", float(up + down))]
    if pruned < dense:
        series.append(("pruned weights", 2.0 * _FLOAT_BYTES * pruned))
    return [*series, ("dense weights", 2.0 * _FLOAT_BYTES * dense)]


def _memory(agent: AgentHistory) -> dict[str, Any]:
    """Return an agent's bar: measured and predicted in percent of the budget, or of the larger of them."""
    measured, predicted, budget = agent.peak_mib, agent.predicted_mib, agent.budget_mib
    full = budget or max(measured or 0.0, predicted or 0.0) or 1.0
    return {
        "name": agent.name,
        "profile": agent.profile,
        "measured": None if measured is None else min(100.0, 100 * measured / full),
        "predicted": None if predicted is None else min(100.0, 100 * predicted / full),
        "over": measured is not None and budget is not None and measured > budget,
        "text": " / ".join(
            "?" if value is None else f"{value:.0f}" for value in (measured, predicted, budget)
        ),
    }


def _flops(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    dense, pruned = summary.get("flops_per_step_dense"), summary.get("flops_per_step_pruned")
    if not dense or pruned is None:
        return []
    rows = [("dense", dense), ("pruned", pruned)]
    return [
        {"name": name, "part": 100 * value / max(dense, pruned), "text": _big(value)} for name, value in rows
    ]


def _widths(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    pruning = manifest.get("pruning")
    if not isinstance(pruning, Mapping):
        return []
    before, after = pruning.get("widths_dense"), pruning.get("widths")
    if not isinstance(before, Mapping) or not isinstance(after, Mapping):
        return []
    most = max(before.values(), default=1)
    return [
        {
            "name": name,
            "before": 100 * width / most,
            "after": 100 * after.get(name, width) / most,
            "text": f"{width} → {after.get(name, width)}",
        }
        for name, width in before.items()
    ]


def _facts(history: History) -> dict[str, str]:
    """Return what else is known of the run, for the table at its end."""
    summary = history.summary
    facts: dict[str, str] = {}
    if len(history.rounds):
        began = datetime.fromtimestamp(history.opened_at[0], timezone.utc)
        took = history.closed_at[-1] - history.opened_at[0]
        facts["first round"] = f"{began:%Y-%m-%d %H:%M} UTC, all of them in {took:,.0f} s"
    method = summary.get("method")
    if method:
        facts["method"] = f"{method}: {METHODS[method].summary}" if method in METHODS else str(method)
    pruning = history.manifest.get("pruning")
    if isinstance(pruning, Mapping):
        facts["pruning"] = f"{pruning.get('method')} to density {pruning.get('density')}"
    for key in ("seed", "broker", "bundle", "final_digest"):
        value = summary.get(key, history.meta.get(key))
        if value is not None:
            facts[key.replace("_", " ")] = str(value)
    for key, value in _nested(summary, "machine").items():
        facts[key] = str(value)
    if privacy := _nested(summary, "privacy"):
        spent = privacy.get("epsilon")
        facts["privacy"] = (
            f"scalars clipped to a length of {privacy['clip']:g}, no noise: no epsilon"
            if spent is None
            else f"epsilon {spent:.2f} at delta {privacy['delta']:g}, for an agent's {privacy['replies']} "
            f"replies: clip {privacy['clip']:g}, noise of {privacy['noise']:g} clips"
        )
    for name, text in _suspected(history).items():
        facts[f"suspected: {name}"] = text
    dropped = _nested(summary, "messages_dropped")
    if dropped:
        facts["messages dropped"] = ", ".join(
            f"{reason}: {count}" for reason, count in sorted(dropped.items())
        )
    return facts


def _nested(summary: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = summary.get(key)
    return found if isinstance(found, Mapping) else {}


def _big(value: float | None) -> str:
    """Return a count with three digits and a suffix: 1234567 is 1.23 M."""
    if value is None:
        return "?"
    for unit, suffix in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= unit:
            return f"{value / unit:.3g}{suffix}"
    return f"{value:.3g}"
