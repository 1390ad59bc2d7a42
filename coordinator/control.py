"""Carries out what ``scalarfed ctl`` asks of the coordinator at work.

Orders lie in the run's log, so that whoever may write the run folder may steer the run, on every system and
without a socket; each is answered there. Knows orders, not how they are made.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from coordinator.plans import CHANGED, Plans
from coordinator.scalar_log import ScalarLog
from profiles.errors import ScalarfedError

__all__ = ["VERBS", "Control", "Steered"]

VERBS = ("pause", "resume", "stop", "set", "status")
"""What can be asked."""


class Steered(Protocol):
    """What is steered: the coordinator's service."""

    def pause(self) -> None:
        """Open no new round."""

    def resume(self) -> None:
        """Go on after a pause."""

    def next_round(self) -> int:
        """Return the round that will be opened next."""

    def status(self) -> dict[str, Any]:
        """Return how the run is."""


class Control:
    """Answers the orders of one run.

    Args:
        log: Where they lie.
        plans: What the rounds ask, where changes go.
        service: What is steered.
        on_change: Called after constants were changed, with what is to be told.

    Attributes:
        stopped: Whether the run shall end before its last round; it can be resumed.
    """

    def __init__(
        self,
        log: ScalarLog,
        plans: Plans,
        service: Steered,
        *,
        on_change: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.stopped = False
        self._log = log
        self._plans = plans
        self._service = service
        self._on_change = on_change

    def poll(self) -> None:
        """Carry out and answer whatever was asked since the last time."""
        for order in self._log.open_orders():
            try:
                answer = self._carry_out(order.verb, order.arguments)
            except ScalarfedError as error:
                answer = {"error": str(error), "hint": error.hint}
            self._log.answer_order(order.number, json.dumps(answer))

    def _carry_out(self, verb: str, arguments: str) -> Mapping[str, Any]:
        if verb == "pause":
            self._service.pause()
            self._log.add_event("paused", "", f"before round {self._service.next_round()}")
        elif verb == "resume":
            self._service.resume()
            self._log.add_event("resumed", "", f"at round {self._service.next_round()}")
        elif verb == "stop":
            self.stopped = True
            self._log.add_event("stopped", "", f"before round {self._service.next_round()}")
        elif verb == "set":
            assignments = _strings(arguments)
            first = self._service.next_round()
            self._log.add_event(CHANGED, "", self._plans.change(first, assignments))
            self._on_change(f"{', '.join(assignments)} from round {first} on")
        elif verb != "status":
            return {"error": f"`{verb}` is no order", "hint": f"There are {', '.join(VERBS)}."}
        return self._service.status() | self._constants()

    def _constants(self) -> dict[str, Any]:
        experiment = self._plans.experiment(self._service.next_round())
        method = experiment.method
        names = ("learning_rate", "epsilon", "perturbations", "local_steps", "batch_size")
        values = {name: getattr(method, name) for name in names} | dict(method.constants)
        return {"rounds": experiment.rounds, "constants": values, "stopping": self.stopped}


def _strings(arguments: str) -> list[str]:
    try:
        found = json.loads(arguments)
    except ValueError:
        found = None
    return [str(item) for item in found] if isinstance(found, list) else []
