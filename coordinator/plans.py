"""What each round asks: the experiment's settings, its schedule, and changes made under way.

A change takes effect with the first round that is not yet open. The records from there on carry the new
numbers, so that replay needs no word of it; the change itself is an event of the scalar log (kind
:data:`CHANGED`), from which a coordinator that starts again goes on. Knows no clock and no messages.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import fields

from coordinator.config import with_settings
from coordinator.experiment import Experiment, Method
from edge_agent.bundle import Bundle
from edge_agent.head import taking_part
from edge_agent.optimizer import METHODS
from edge_agent.plan import RoundPlan
from profiles.errors import ConfigError

__all__ = ["CHANGED", "Plans", "plan_of"]

CHANGED = "changed"
"""Kind of the event by which the scalar log keeps a change."""

_FIXED = ("name", "constants")
_BESIDE = (
    *(f"fleet.{key}" for key in ("cohort", "quorum", "deadline_s", "resend_s", "aggregation", "liars")),
    *("evaluation.every", "rounds"),
)


class Plans:
    """The plan of every round, with the changes so far; call it with the number of a round.

    Args:
        experiment: As the run was started.
        bundle: What is trained.
        changes: Texts of the earlier changes, as :meth:`change` returned them.

    Raises:
        ConfigError: One of them is none.
    """

    def __init__(self, experiment: Experiment, bundle: Bundle, changes: Iterable[str] = ()) -> None:
        self._bundle = bundle
        self._versions = [(0, experiment)]
        for text in changes:
            try:
                change = json.loads(text)
                self.change(int(change["round"]), change["settings"])
            except (ValueError, KeyError, TypeError):
                raise ConfigError(f"the log holds a change that cannot be read: {text!r:.100}") from None

    def __call__(self, round_: int) -> RoundPlan:
        """Return what a round asks."""
        return plan_of(self.experiment(round_), self._bundle, round_)

    @property
    def latest(self) -> int:
        """The round from which the latest change counts."""
        return self._versions[-1][0]

    def change_at(self, round_: int, settings: Sequence[str]) -> str:
        """Forget the changes from a round on, then change settings there; see :meth:`change`."""
        self._versions = [self._versions[0], *(v for v in self._versions[1:] if v[0] < round_)]
        return self.change(round_, settings)

    def experiment(self, round_: int) -> Experiment:
        """Return the experiment as it stands for a round."""
        return next(version for start, version in reversed(self._versions) if start <= round_)

    def change(self, round_: int, settings: Sequence[str]) -> str:
        """Change settings from a round on; return the text to be logged.

        Args:
            round_: The first one with the new settings, not before the latest change.
            settings: Each ``key=value``: of the method the learning rate, epsilon, perturbations, exact
                scalars, local steps, batch size, difference, schedule or a constant; of the fleet the cohort,
                the quorum, the times, the aggregation; or the rounds. ``method.`` and ``fleet.`` may be left
                out.

        Raises:
            ConfigError: A key may not change under way, or a value breaks its rule.
        """
        start, latest = self._versions[-1]
        if round_ < start:
            raise ConfigError(f"round {round_} lies before the change of round {start}")
        may = [f"method.{item.name}" for item in fields(latest.method) if item.name not in _FIXED]
        may += [f"method.{name}" for name in METHODS[latest.method.name].constants]
        full = [_full(setting, (*may, *_BESIDE)) for setting in settings]
        if not full:
            raise ConfigError("no setting is named", hint=f"What can change: {', '.join((*may, *_BESIDE))}.")
        self._versions.append((round_, with_settings(latest, full)))
        return json.dumps({"round": round_, "settings": full})


def _full(setting: str, may: Sequence[str]) -> str:
    """Return ``key=value`` with the key's section."""
    key, sign, value = setting.partition("=")
    found = [name for name in may if key.strip() in (name, name.rpartition(".")[2])]
    if not found:
        raise ConfigError(
            f"`{key.strip()}` cannot change while the run is under way",
            hint=f"What can: {', '.join(may)}.",
        )
    if not sign:
        raise ConfigError(f"`{setting}` has no value", hint=f"Write {found[0]}=VALUE.")
    return f"{found[0]}={value}"


def plan_of(experiment: Experiment, bundle: Bundle, round_: int) -> RoundPlan:
    """Return what a round of the experiment asks; the learning rate follows its schedule."""
    settings = experiment.method
    factor = 1.0
    if settings.schedule == "cosine":
        factor = 0.5 * (1.0 + math.cos(math.pi * min(1.0, round_ / experiment.rounds)))
    method = METHODS[settings.name]
    constants = {
        name: value * (factor if name in method.scheduled else 1.0)
        for name, value in settings.constants.items()
    }
    if method.nested:
        constants["levels"] = max(1, len(bundle.stops))
    return RoundPlan(
        round=round_,
        seed=experiment.seed,
        method=method.code,
        steps=settings.local_steps,
        perturbations=settings.perturbations,
        epsilon=settings.epsilon,
        learning_rate=settings.learning_rate * factor,
        constants=method.values(constants),
        exact=_exact(settings, bundle),
    )


def _exact(settings: Method, bundle: Bundle) -> int:
    """Return how many exact scalars a step has: as asked, but no more than the layers that take part have."""
    if "layers" in settings.constants:
        last = bundle.layers[-int(settings.constants["layers"]) :]
        return min(settings.exact, sum(tensor.size for layer in last for tensor in layer))
    told = [layer for layer in (bundle.head, bundle.hidden)[: METHODS[settings.name].head] if layer]
    sizes = [sum(tensor.size for tensor in bundle.tensors if tensor.name in layer) for layer in told]
    return min(settings.exact, sum(sizes[: taking_part(settings.exact, sizes)]))
