"""What a person sees while a run goes on: a bar on a terminal, lines elsewhere, or nothing.

Knows how to say it. Does not know how a run works: the run tells an observer.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TextIO

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

__all__ = ["BarProgress", "LineProgress", "Observer", "Silence", "Standing"]

_LINE_EVERY_S = 5.0


@dataclass(frozen=True)
class Standing:
    """How far a run is after a round.

    Attributes:
        round: Rounds closed so far.
        rounds: All of them.
        loss: Mean loss of the round; None where it was skipped.
        accuracy: The last evaluation's, if there was one.
        alive: Agents that are there.
        agents: All of them.
        bytes_up: Bytes from the agents so far.
        bytes_down: Bytes to the agents so far.
    """

    round: int
    rounds: int
    loss: float | None
    accuracy: float | None
    alive: int
    agents: int
    bytes_up: int
    bytes_down: int

    def figures(self) -> list[str]:
        """Return what is said of the round, in short pieces."""
        return [
            "skipped" if self.loss is None else f"loss {self.loss:.3f}",
            *([] if self.accuracy is None else [f"acc {self.accuracy:.1%}"]),
            f"{self.alive}/{self.agents} alive",
            f"{decimal(self.bytes_up, precision=0)} up",
            f"{decimal(self.bytes_down, precision=0)} down",
        ]


class Observer(Protocol):
    """Is told how a run goes on."""

    def stage(self, text: str) -> None:
        """Hear that the next part of the work begins."""

    def line(self, text: str) -> None:
        """Hear something that is worth a line."""

    def pruning(self, done: int, total: int) -> None:
        """Hear how far the pruning is."""

    def round(self, standing: Standing) -> None:
        """Hear that a round was closed."""


class Silence:
    """Says nothing."""

    def stage(self, text: str) -> None:
        """Say nothing."""

    def line(self, text: str) -> None:
        """Say nothing."""

    def pruning(self, done: int, total: int) -> None:
        """Say nothing."""

    def round(self, standing: Standing) -> None:
        """Say nothing."""


class LineProgress:
    """Writes plain lines: every stage, and a round every few seconds.

    Args:
        stream: Where they go; each is flushed.
        clock: Monotonic seconds.
    """

    def __init__(self, stream: TextIO, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._first: tuple[int, float] | None = None
        self._said_at = -math.inf

    def stage(self, text: str) -> None:
        """Write a line."""
        self.line(text)

    def line(self, text: str) -> None:
        """Write a line."""
        print(text, file=self._stream, flush=True)

    def pruning(self, done: int, total: int) -> None:
        """Say nothing: the stage was told, and it is short."""

    def round(self, standing: Standing) -> None:
        """Write a line for the first and the last round, and otherwise when the last one is 5 s old."""
        round, rounds, now = standing.round, standing.rounds, self._clock()
        self._first = self._first or (round, now)
        if round < rounds and now - self._said_at < _LINE_EVERY_S:
            return
        self._said_at = now
        done, since = round - self._first[0], now - self._first[1]
        left = f"  {_duration((rounds - round) * since / done)} left" if done and round < rounds else ""
        self.line(f"round {round}/{rounds}  {'  '.join(standing.figures())}{left}")


class BarProgress:
    """Draws a progress bar; use it as a context manager, which leaves the last state on the screen."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("[bold]{task.description}[/bold] {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            expand=True,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> "BarProgress":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def stage(self, text: str) -> None:
        """Print what begins, above the bar."""
        self._progress.console.print("[cyan]>[/cyan]", _plain(text), highlight=False)

    def line(self, text: str) -> None:
        """Print a line above the bar."""
        self._progress.console.print(" ", _plain(text), highlight=False)

    def pruning(self, done: int, total: int) -> None:
        """Move the pruning's bar, and take it away at the end."""
        task = self._task("prune", done, total)
        self._progress.update(task, completed=done, visible=done < total)

    def round(self, standing: Standing) -> None:
        """Move the training's bar."""
        task = self._task("round", standing.round - 1, standing.rounds)
        self._progress.update(task, completed=standing.round, figures=_plain(" ".join(standing.figures())))

    def _task(self, name: str, done: int, total: int) -> TaskID:
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=total, completed=done, figures="")
        return self._tasks[name]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


def _plain(text: str) -> str:
    """Return the text so that rich takes no bracket in it for markup."""
    return text.replace("[", r"\[")
