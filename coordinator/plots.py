"""Plots of a run, as SVG that takes its colours from the page around it.

Knows matplotlib and what each plot shows. Does not know files or the page. Every function returns one
``<svg>`` element, which uses the page's colours ``--ink``, ``--muted``, ``--line``, ``--track``,
``--accent``, ``--second`` and ``--third``, and so follows it from light to dark.
"""

import io
import re
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter
from numpy.typing import NDArray
from rich.filesize import decimal

from coordinator.history import Event, History

__all__ = ["LANES", "accuracy_plot", "bytes_plot", "fleet_plot", "loss_plot", "slopes_plot"]

LANES = 40
"""A larger fleet is shown as a sum."""

# Stand-ins that the SVG is searched for; matplotlib knows no CSS variables.
_INK, _MUTED, _LINE, _TRACK = "#010101", "#020202", "#030303", "#040404"
_ACCENT, _SECOND, _THIRD = "#050505", "#060606", "#070707"
_COLOURS = {
    _INK: "var(--ink)",
    _MUTED: "var(--muted)",
    _LINE: "var(--line)",
    _TRACK: "var(--track)",
    _ACCENT: "var(--accent)",
    _SECOND: "var(--second)",
    _THIRD: "var(--third)",
}
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "scalarfed",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _MUTED,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.color": _LINE,
    "grid.linewidth": 0.8,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _MUTED,
    "ytick.major.size": 0,
    "lines.solid_capstyle": "round",
    "lines.linewidth": 1.8,
}


def accuracy_plot(history: History) -> str:
    """Return the test accuracy over the rounds."""

    def draw(axes: Axes) -> None:
        rounds, accuracy = history.evaluated, history.test_accuracy
        axes.plot(rounds, accuracy, color=_ACCENT, marker="o", markersize=2.5 if len(rounds) > 25 else 4)
        axes.set_ylim(0, 1.12)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.annotate(
            f"{accuracy[-1]:.1%}",
            (rounds[-1], accuracy[-1]),
            xytext=(0, 6),
            textcoords="offset points",
            ha="right",
            weight="bold",
        )

    return _plot("accuracy", f"Test accuracy over rounds, at the end {history.test_accuracy[-1]:.1%}", draw)


def loss_plot(history: History) -> str:
    """Return the agents' loss of every round, its running mean, and the test loss."""

    def draw(axes: Axes) -> None:
        rounds, loss = history.rounds, history.loss
        axes.plot(rounds, loss, color=_SECOND, alpha=0.3, linewidth=0.8)
        width = max(1, len(loss) // 40)
        axes.plot(rounds, _running_mean(loss, width), color=_SECOND, label="agents, in training")
        if len(history.evaluated):
            axes.plot(history.evaluated, history.test_loss, color=_ACCENT, label="coordinator, test samples")
        axes.set_ylim(bottom=0)
        _legend(axes)

    return _plot("loss", "Loss over rounds", draw)


def slopes_plot(history: History) -> str:
    """Return the magnitudes of the projected gradients: median and the range from decile 1 to 9."""
    slopes = history.slopes

    def draw(axes: Axes) -> None:
        least = 1e-12
        low, median, high = (np.maximum(each, least) for each in (slopes.low, slopes.median, slopes.high))
        axes.fill_between(
            slopes.rounds, low, high, color=_THIRD, alpha=0.22, linewidth=0, label="80 % of the scalars"
        )
        axes.plot(slopes.rounds, median, color=_THIRD, linewidth=1.3, label="median")
        axes.set_yscale("log")
        _legend(axes)

    return _plot("slopes", "Magnitude of the projected gradients over rounds", draw)


def bytes_plot(rounds: int, series: Sequence[tuple[str, float]]) -> str:
    """Return bytes per agent, summed over the rounds.

    Args:
        rounds: Number of rounds, at least 1.
        series: Name and bytes per round of each line, at most three; the first is ours.
    """

    def draw(axes: Axes) -> None:
        x = np.unique(np.geomspace(1, rounds, 64).astype(int))
        places = [(_ACCENT, 6, "bold"), (_SECOND, -17, "normal"), (_THIRD, 6, "normal")]
        for (name, per_round), (colour, above, weight) in zip(series, places, strict=False):
            axes.plot(x, x * per_round, color=colour)
            axes.annotate(
                f"{name}: {decimal(round(rounds * per_round))}",
                (x[-1], x[-1] * per_round),
                xytext=(0, above),
                textcoords="offset points",
                ha="right",
                weight=weight,
            )
        axes.set_yscale("log")
        axes.set_ylim(
            min(per_round for _, per_round in series) / 2,
            max(per_round for _, per_round in series) * rounds * 8,
        )
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: decimal(round(value), precision=0)))

    return _plot("bytes", "Bytes per agent over rounds, against sending all weights", draw)


def fleet_plot(history: History) -> str:
    """Return who answered when, with restarts and losses; for a large fleet how many answered."""
    if len(history.agents) > LANES:
        return _plot("fleet", "Agents that answered, over rounds", lambda axes: _draw_sum(axes, history))
    height = 0.75 + 0.23 * (len(history.agents) + 1)
    return _plot(
        "fleet", "Rounds answered by each agent", lambda axes: _draw_lanes(axes, history), size=(9.4, height)
    )


def _draw_sum(axes: Axes, history: History) -> None:
    answers = history.answers()
    axes.fill_between(history.rounds, answers, color=_ACCENT, alpha=0.3, linewidth=0, step="mid")
    axes.plot(history.rounds, answers, color=_ACCENT, linewidth=1, drawstyle="steps-mid")
    axes.set_ylim(0, len(history.agents) * 1.05)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))


def _draw_lanes(axes: Axes, history: History) -> None:
    end = len(history.rounds)
    names = ["run", *(agent.name for agent in history.agents)]
    for lane, agent in enumerate(history.agents, start=1):
        axes.broken_barh([(0, end)], (lane - 0.28, 0.56), facecolor=_TRACK)
        axes.broken_barh(_stretches(agent.answered), (lane - 0.28, 0.56), facecolor=_ACCENT)
    lanes = {name: lane for lane, name in enumerate(names)}
    for event in history.events:
        marker = _marker(event)
        if marker and (event.agent or "run") in lanes:
            at = lanes[event.agent or "run"]
            axes.plot(
                event.round,
                at,
                marker,
                color=_SECOND,
                markersize=6,
                markeredgecolor=_INK,
                markeredgewidth=0.5,
                clip_on=False,
                zorder=3,
            )
    if history.skipped.any():
        axes.broken_barh(
            [(float(round_), 1.0) for round_ in np.flatnonzero(history.skipped)],
            (-0.28, 0.56),
            facecolor=_SECOND,
        )
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, max(1, end))
    axes.grid(visible=False)


def _marker(event: Event) -> str | None:
    """Return the shape that stands for an event: a triangle for a restart, a cross for a loss."""
    if event.kind == "coordinator started" and event.round == 0:
        return None
    if event.kind in ("agent ended", "broker ended", "coordinator started"):
        return "^"
    return "x" if event.kind in ("excluded", "interrupted", "estimate failed") else None


def _stretches(rounds: NDArray[np.int64]) -> list[tuple[float, float]]:
    if not len(rounds):
        return []
    breaks = np.flatnonzero(np.diff(rounds) > 1) + 1
    return [(float(part[0]), float(part[-1] - part[0] + 1)) for part in np.split(rounds, breaks)]


def _running_mean(values: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """Return the mean over the last ``width`` values that are there, NaN where none is."""
    there = np.isfinite(values)
    sums = np.cumsum(np.where(there, values, 0.0))
    counts = np.cumsum(there)
    sums[width:] -= sums[:-width].copy()
    counts[width:] -= counts[:-width].copy()
    return np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0)


def _legend(axes: Axes) -> None:
    axes.legend(
        frameon=False,
        fontsize=8.5,
        labelcolor=_MUTED,
        loc="lower left",
        bbox_to_anchor=(-0.02, 1.0),
        ncols=2,
        borderpad=0,
        handlelength=1.4,
    )


def _plot(
    name: str, label: str, draw: Callable[[Axes], None], *, size: tuple[float, float] = (4.6, 2.7)
) -> str:
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, steps=[1, 2, 5, 10]))
        draw(axes)
        axes.set_xlabel("round")
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    return _themed(stream.getvalue(), name, label)


def _themed(svg: str, name: str, label: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(
        r'^<svg [^>]*?viewBox="([^"]+)"[^>]*>',
        rf'<svg role="img" aria-label="{escape(label)}" viewBox="\1">',
        svg,
    )
    used = set(re.findall(r"#([\w-]+)", " ".join(re.findall(r'href="#[\w-]+|url\(#[\w-]+', svg))))
    svg = re.sub(
        r' id="([\w.-]+)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", svg
    )
    svg = re.sub(r'(href="#|url\(#)', rf"\1{name}-", svg).replace("xlink:href", "href")
    for stand_in, colour in _COLOURS.items():
        svg = svg.replace(stand_in, colour)
    return svg
