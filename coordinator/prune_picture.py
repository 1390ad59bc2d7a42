"""The picture of a pruning: densities, widths, memory and FLOPs before and after.

Knows matplotlib and what ``scalarfed prune`` says of a bundle. Does not know how a net is pruned.
"""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["BudgetLine", "prune_picture"]

_BEFORE, _AFTER, _LIMIT = "#b8c0c8", "#0b6e99", "#c0392b"
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "scalarfed",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.axisbelow": True,
}


@dataclass(frozen=True)
class BudgetLine:
    """The memory that a board allows: the profile's name and MiB."""

    profile: str
    memory_mib: float


def prune_picture(facts: Mapping[str, Any], budget: BudgetLine | None = None) -> str:
    """Return an SVG with the density of each layer, widths, memory and FLOPs before and after.

    Args:
        facts: What :func:`coordinator.prune_command.prune_to_bundle` returns.
        budget: Drawn as a line across the memory.
    """
    with mpl.rc_context(_STYLE):
        kept = facts.get("kept") or facts["densities"]
        rows = max(len(kept), len(facts.get("widths", ())), 4)
        figure = Figure(figsize=(11, 1.6 + 0.22 * rows), layout="constrained")
        figure.suptitle(
            f"{facts['model']} by {facts['method']}: "
            f"{facts['params']:,} of {facts['params_dense']:,} parameters"
        )
        axes = figure.subplots(1, 4, width_ratios=[4, 4, 1.6, 1.6])
        _densities(axes[0], kept, facts["densities"] if "kept" in facts else {})
        _widths(axes[1], facts.get("widths_dense", {}), facts.get("widths", {}))
        _pair(axes[2], "peak memory\nMiB", facts["predicted_peak_mib_dense"], facts["predicted_peak_mib"])
        if budget is not None:
            axes[2].set_ylim(0, 1.25 * max(budget.memory_mib, axes[2].get_ylim()[1] / 1.25))
            axes[2].axhline(budget.memory_mib, color=_LIMIT, linestyle="--", linewidth=1)
            axes[2].annotate(budget.profile, (0.5, budget.memory_mib), ha="center", va="bottom", color=_LIMIT)
        _pair(axes[3], "a forward\nMFLOP", facts["forward_flops_dense"] / 1e6, facts["forward_flops"] / 1e6)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()


def _densities(axes: Axes, kept: Mapping[str, float], asked: Mapping[str, float]) -> None:
    axes.set_title("density by layer")
    names = [name.removesuffix(".weight") for name in kept]
    axes.barh(names, list(kept.values()), color=_AFTER, label="stays")
    if asked:
        places = [names.index(name.removesuffix(".weight")) for name in asked]
        axes.plot(list(asked.values()), places, "D", color="black", markersize=4, label="the saliency left")
        axes.legend(frameon=False)
    axes.set_xlim(0, 1)
    axes.invert_yaxis()


def _widths(axes: Axes, before: Mapping[str, int], after: Mapping[str, int]) -> None:
    axes.set_title("widths")
    if not after:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "a mask: widths stay", ha="center", va="center")
        return
    axes.barh(list(before), list(before.values()), color=_BEFORE, label="dense")
    axes.barh(list(after), list(after.values()), color=_AFTER, height=0.45, label="pruned")
    axes.invert_yaxis()
    axes.legend(frameon=False)


def _pair(axes: Axes, title: str, before: float, after: float) -> None:
    axes.set_title(title)
    bars = axes.bar(["dense", "pruned"], [before, after], color=[_BEFORE, _AFTER])
    axes.bar_label(bars, fmt="%.3g")
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_ylim(0, 1.25 * max(before, after))
