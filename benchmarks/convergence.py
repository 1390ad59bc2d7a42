"""Rounds, forwards and bytes to an accuracy: every method tuned with the same budget, on paired seeds.

    python benchmarks/convergence.py digits --out results/convergence-digits.json
    python benchmarks/convergence.py mnist --mnist mnist10k.npz

For every method the same number of settings is tried on one seed, judged on a fifth of the training
samples that no agent has; the setting that reaches the target first is then run on other seeds with all
training samples and judged on the test samples. Every run is a simulation: the protocol and the bits of
a fleet. A round counts as reached where the accuracy, looked at every five rounds, first is at least
the target.
"""

import argparse
import itertools
import json
import math
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from coordinator.config import load_experiment
from coordinator.experiment import Experiment
from coordinator.progress import Silence
from coordinator.rounds import Commit
from coordinator.simulate import Spending, deal, play
from coordinator.testbed import Evaluator, make_bundle, make_rounds
from edge_agent.bundle import Bundle
from edge_agent.data import Samples, load_samples
from edge_agent.optimizer import METHODS

__all__ = ["TASKS", "Run", "Task", "main", "run_once"]

_EVERY = 5


@dataclass(frozen=True)
class Task:
    """What is learned, and how each method is tuned.

    Attributes:
        experiment: Keys of the experiment file.
        rounds: Where a run ends.
        targets: Accuracies to reach.
        tuned_for: The one that the tuning looks at.
        grids: By method, the settings that are tried, as many for each.
    """

    experiment: Mapping[str, Any]
    rounds: int
    targets: tuple[float, ...]
    tuned_for: float
    grids: Mapping[str, Sequence[Mapping[str, float]]]


def _grid(**axes: Sequence[float]) -> list[dict[str, float]]:
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


_NORMALISED = [0.01, 0.02, 0.04]

TASKS: Mapping[str, Task] = {
    "digits": Task(
        {
            "model": {"name": "mlp", "hidden": [32]},
            "data": {"split": "dirichlet", "alpha": 0.5},
            "method": {"perturbations": 5, "batch_size": 16, "exact": 66},
            "fleet": {"cohort": 4},
            "devices": [{"profile": "pi-4-2gb", "count": 8}],
        },
        800,
        (0.60, 0.70, 0.80, 0.85, 0.90),
        0.85,
        {
            "decomfl": _grid(learning_rate=[0.003, 0.006, 0.01, 0.015, 0.02, 0.03]),
            "hiso": _grid(learning_rate=[0.005, 0.01, 0.02], nu=[0.05, 0.1]),
            "normalised": _grid(learning_rate=[0.01, 0.014, 0.02, 0.028, 0.04, 0.056]),
            "headstep": _grid(learning_rate=[0.01, 0.02, 0.04], head_rate=[0.5, 1.0]),
        },
    ),
}
