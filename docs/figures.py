"""Writes the table of figures in README.md from the summaries of real runs.

Run it by ``make figures RUNS="runs/demo runs/mnist"``; nothing in the table is typed by hand.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["figures", "main"]

_README = Path(__file__).resolve().parent.parent / "README.md"
_BEGIN, _END = "<!-- figures: written by `make figures` -->\n", "<!-- end of figures -->\n"

_ROWS: Sequence[tuple[str, Callable[[Mapping[str, Any]], str]]] = (
    ("test accuracy", lambda run: f"{run['test_accuracy']:.1%}"),
    ("rounds, agents", lambda run: f"{run['rounds']}, {len(run['agents'])}"),
    ("method", lambda run: run["method"]),
    ("parameters, of the dense net", lambda run: f"{run['params_pruned']:,} of {run['params_dense']:,}"),
    (
        "MFLOPs of a step, of the dense net",
        lambda run: f"{run['flops_per_step_pruned'] / 1e6:.1f} of {run['flops_per_step_dense'] / 1e6:.1f}",
    ),
    ("bytes up per agent and round, MQTT included", lambda run: f"{run['bytes_up_per_agent_round']:.0f}"),
    ("bytes down", lambda run: f"{run['bytes_down_per_agent_round']:.0f}"),
    ("the pruned weights alone, in bytes", lambda run: f"{4 * run['params_pruned']:,}"),
    ("largest peak RSS of an agent, MiB", lambda run: f"{_peak(run):.0f}"),
    ("seconds per round", lambda run: f"{run['seconds_per_round']:.2f}"),
    ("one digest on every side", lambda run: "yes" if run["digests_agree"] else "no"),
    ("broker", lambda run: run["broker"]),
    ("machine", lambda run: "{system} {processor}, Python {python}".format(**run["machine"])),
)


def figures(runs: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table with a column for each run's summary."""
    head = ["", *(run["name"] for run in runs)]
    rows = [head, ["---"] * len(head), *([label, *map(tell, runs)] for label, tell in _ROWS)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def main(folders: Sequence[str]) -> None:
    """Read the runs' summaries and rewrite README.md in place.

    Raises:
        ValueError: The marks around the table are not there.
    """
    runs = [json.loads((Path(folder) / "summary.json").read_text(encoding="utf-8")) for folder in folders]
    before, begin, rest = _README.read_text(encoding="utf-8").partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not (begin and end and runs):
        raise ValueError(f"name at least one run, and keep {_BEGIN!r} and {_END!r} in README.md")
    _README.write_text(f"{before}{begin}\n{figures(runs)}\n{end}{after}", encoding="utf-8")


def _peak(run: Mapping[str, Any]) -> float:
    return max(agent["peak_rss_mib"] for agent in run["agents"])


if __name__ == "__main__":
    main(sys.argv[1:])
