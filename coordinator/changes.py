"""An experiment whose constants change while it runs, each change noted in the log before it counts.

A change takes effect with the next round that is opened. What it does to the weights stands in the records
themselves, whose plans hold every constant; this module only sees to it that the next coordinator asks the
same. Knows experiment and log, not rounds.
"""

import json
from collections.abc import Sequence

from coordinator.config import with_settings
from coordinator.experiment import Experiment
from coordinator.scalar_log import ScalarLog
from profiles.errors import ConfigError

__all__ = ["CHANGEABLE", "Changes", "changed"]

CHANGEABLE = (
    *("rounds", "evaluation.every"),
    *(f"method.{key}" for key in ("learning_rate", "epsilon", "perturbations", "exact", "local_steps")),
    *(f"method.{key}" for key in ("batch_size", "difference", "schedule")),
    *(f"fleet.{key}" for key in ("cohort", "quorum", "deadline_s", "resend_s", "aggregation", "liars")),
)
"""What may change while a run goes on, and beside these the constants of its method."""


def changed(experiment: Experiment, assignments: Sequence[str]) -> Experiment:
    """Return the experiment with other constants.

    Args:
        experiment: As it is.
        assignments: Each ``CONSTANT=VALUE``; the section may be left out, as in ``learning_rate=0.01``.

    Raises:
        ConfigError: A constant does not exist, cannot change during a run, or the value is not allowed.
    """
    if not assignments:
        raise ConfigError("no constant is named.", hint="Write CONSTANT=VALUE, such as learning_rate=0.01.")
    constants = tuple(f"method.{name}" for name in experiment.method.constants)
    full = [_full(assignment, (*CHANGEABLE, *constants)) for assignment in assignments]
    return with_settings(experiment, full)


def _full(assignment: str, allowed: Sequence[str]) -> str:
    key, sign, value = assignment.partition("=")
    key = key.strip()
    found = [name for name in allowed if key in (name, name.rpartition(".")[2])]
    if not sign or not found:
        names = ", ".join(name.rpartition(".")[2] for name in allowed)
        raise ConfigError(
            f"`{assignment}` changes nothing that may change during a run: {names}.",
            hint="Write CONSTANT=VALUE, such as learning_rate=0.01; for anything else start another run.",
        )
    return f"{found[0]}={value}"


class Changes:
    """The experiment of each round of a run.

    Args:
        experiment: As the run began.
        log: With the changes so far.

    Raises:
        ConfigError: The log holds a change that this release does not take.
    """

    def __init__(self, experiment: Experiment, log: ScalarLog) -> None:
        self._log = log
        self._made = [(0, experiment)]
        for first, assignments in log.changes():
            self._made.append((first, changed(self.latest, json.loads(assignments))))

    @property
    def latest(self) -> Experiment:
        """The experiment with all changes."""
        return self._made[-1][1]

    def at(self, round_: int) -> Experiment:
        """Return the experiment as it is from the changes up to a round."""
        return next(experiment for first, experiment in reversed(self._made) if first <= round_)

    def make(self, assignments: Sequence[str], *, first: int, author: str) -> Experiment:
        """Change constants from a round on, noted in the log when this returns.

        Args:
            assignments: As for :func:`changed`.
            first: The next round that will be opened.
            author: Who or what wants it, for people.

        Raises:
            ConfigError: A constant or its value is not allowed; nothing is changed.
        """
        experiment = changed(self.latest, assignments)
        self._log.add_change(first, author, json.dumps(list(assignments)))
        self._log.add_event("changed", "", f"{', '.join(assignments)} from round {first} on, by {author}")
        self._made.append((first, experiment))
        return experiment
