"""What a run does about its own health, if the experiment asks for it.

Halves the learning rate from the next round on, or goes back to the round with the lowest loss as well. Both
are facts of the log: the change is an event, its rate stands in every record that follows, and what was
gone back from stays in the log's file, beside the records that count. Does not know how a round is run.
"""

from coordinator.experiment import Experiment
from coordinator.health import Health
from coordinator.plans import CHANGED, Plans
from coordinator.scalar_log import ScalarLog

__all__ = ["ANSWERED", "Answers", "RolledBack"]

ANSWERED = "answered"
"""Kind of the event that says what was done."""

_PATIENCE = 20  # rounds in which an answer may take effect before the next


class RolledBack(ValueError):  # no error of anybody: it unwinds a run
    """The log was cut; whoever runs the rounds begins again from its end.

    Attributes:
        text: What happened, for people.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text


class Answers:
    """Answers alarms of one run.

    Args:
        experiment: Says whether, and how often.
        plans: Where a lower rate goes.
        log: Where it is written; the answers of an earlier start count too.
        health: Of the run.
    """

    def __init__(self, experiment: Experiment, plans: Plans, log: ScalarLog, health: Health) -> None:
        self._choice = experiment.health
        self._plans = plans
        self._log = log
        self._health = health

    def after(self, round_: int) -> str:
        """Do what is asked after the record of a round was written; return it in words, empty for nothing.

        Raises:
            RolledBack: The log now ends earlier.
        """
        if not self._health.alarming or self._choice.answer == "none":
            return ""
        answered = len(self._log.texts_of(ANSWERED))
        if answered >= self._choice.most or (answered and round_ < self._plans.latest + _PATIENCE):
            return ""
        back = self._choice.answer == "rollback" and 0 < self._health.calmest <= round_
        first = self._health.calmest if back else round_ + 2  # the round after this one is open already
        rate = self._plans.experiment(round_).method.learning_rate / 2
        setting = f"method.learning_rate={rate:.9g}"
        text = f"the learning rate is {rate:g} from round {first} on"
        if not back:
            self._log.add_event(CHANGED, "", self._plans.change(max(first, self._plans.latest), [setting]))
            self._log.add_event(ANSWERED, "", text)
            return text
        text = f"back to round {first}; {text}"
        self._log.roll_back(first, changes=CHANGED, change=self._plans.change_at(first, [setting]))
        self._log.add_event(ANSWERED, "", text)
        raise RolledBack(text)
