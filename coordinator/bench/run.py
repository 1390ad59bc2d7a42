"""Runs the measurements net by net, each in a process of its own, and puts their figures together."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from coordinator.bench.child import measure_apart

__all__ = ["measure_memory", "measure_steps"]

_PERTURBATIONS = {"minilm": 4, "opt125m": 2}  # eight of the others, whose forwards take less time
_BATCH = {"lenet": 32, "resnet20": 8, "minilm": 8, "opt125m": 8}
_STEP_FIGURES = ("step_over_forwards", "forward_over_constant", "torch_cpu_over_own")


def measure_steps(
    models: Sequence[str],
    *,
    perturbations: int | None,
    seconds: float,
    limit_s: float,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Return the figures of steps, each an object keyed by net, and what they were made from.

    Args:
        models: Names of nets.
        perturbations: Of a step; None for 8, 4 of MiniLM and 2 of OPT-125M.
        seconds: How long each comparison is measured.
        limit_s: Longest time of a net.
        say: Told what is going on.

    Raises:
        BenchError: A measurement failed.
    """
    found: dict[str, Any] = {figure: {} for figure in _STEP_FIGURES}
    found["detail"] = {}
    for number, name in enumerate(models, 1):
        say(f"{number}/{len(models)}  {name}: making it, then steps, forwards and torch by turns")
        count = str(perturbations or _PERTURBATIONS.get(name, 8))
        one = measure_apart("coordinator.bench.steps", name, count, str(seconds), limit_s=limit_s)
        found["detail"][name] = one
        for figure in _STEP_FIGURES:
            found[figure][name] = one[figure]
    return found


def measure_memory(models: Sequence[str], *, limit_s: float, say: Callable[[str], None]) -> dict[str, Any]:
    """Return the figures of memory, each an object keyed by net, and what they were made from.

    Args:
        models: Names of nets.
        limit_s: Longest time of a process.
        say: Told what is going on.

    Raises:
        BenchError: A measurement failed.
    """
    figures = ("train_rss_over_inference", "train_peak_rss_mib", "over_frugal_inference")
    found: dict[str, Any] = {figure: {} for figure in figures}
    found["detail"] = {}
    module = "coordinator.bench.memory"
    for number, name in enumerate(models, 1):
        with tempfile.TemporaryDirectory() as folder:
            say(f"{number}/{len(models)}  {name}: making it, then training and inference in fresh processes")
            place = (str(Path(folder)), str(_BATCH[name]))
            made = measure_apart(module, "make", name, *place, limit_s=limit_s)
            ways = {
                "train": ("train", "decomfl"),
                "train_hiso": ("train", "hiso"),
                "inference": ("infer", "plain"),
                "frugal_inference": ("infer", "frugal"),
            }
            peaks = {
                way: measure_apart(module, *words, *place, limit_s=limit_s) for way, words in ways.items()
            }
        train, infer = peaks["train"]["peak_mib"], peaks["inference"]["peak_mib"]
        found["train_rss_over_inference"][name] = round(train / infer, 4)
        found["train_peak_rss_mib"][name] = round(train, 1)
        found["over_frugal_inference"][name] = round(train / peaks["frugal_inference"]["peak_mib"], 4)
        found["detail"][name] = {**made, **peaks}
    return found
