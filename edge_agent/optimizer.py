"""The methods by name: which update a record asks for, and with which constants.

A record carries the number of its method and the values of its constants, in the order given here;
that and the scalars are all that replay needs. Nothing here touches weights.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

__all__ = ["METHODS", "Method", "Normaliser", "method_by_code"]


@dataclass(frozen=True)
class Method:
    """One update rule.

    Attributes:
        name: As written in the experiment file.
        code: As written in a record, 1 to 255; never used twice.
        constants: Names and defaults, in the order in which a record holds them.
        curvature: Whether a replica keeps one bfloat16 curvature value per weight.
        summary: One line for people.
    """

    name: str
    code: int
    constants: Mapping[str, float]
    curvature: bool
    summary: str

    def values(self, given: Mapping[str, float]) -> tuple[float, ...]:
        """Return the constants in a record's order, the given ones over the defaults."""
        return tuple(float(given.get(name, default)) for name, default in self.constants.items())

    def named(self, values: tuple[float, ...]) -> dict[str, float]:
        """Return a record's constants by name."""
        return dict(zip(self.constants, values, strict=True))


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        method.name: method
        for method in (
            Method(
                "decomfl",
                1,
                MappingProxyType({"smoothing": 0.0}),
                False,
                "w -= eta/P sum G z (Li et al., arXiv 2405.15861); smoothing > 0 divides eta by the RMS of G",
            ),
            Method(
                "hiso",
                2,
                MappingProxyType({"nu": 0.05, "floor": 1e-4, "smoothing": 0.0}),
                True,
                "z = u / sqrt(h), h learned from the scalars (arXiv 2506.02370)",
            ),
        )
    }
)


def method_by_code(code: int) -> Method:
    """Return the method that a record means.

    Raises:
        KeyError: No method has this code.
    """
    for method in METHODS.values():
        if method.code == code:
            return method
    raise KeyError(code)


@dataclass
class Normaliser:
    """The running mean square of the scalars, by which a step may be normalised.

    Python floats are IEEE doubles with one rounding per operation on every machine, hence replicas
    agree on it.

    Attributes:
        mean_square: Exponential moving sum of mean squares.
        weight: The same sum of ones, so that ``mean_square / weight`` has no bias at the start.
    """

    mean_square: float = 0.0
    weight: float = 0.0

    def observe(self, scalars: list[float], smoothing: float) -> None:
        """Take in the scalars of a round; smoothing in (0, 1) is the share that the past keeps."""
        total = 0.0
        for scalar in scalars:
            total += scalar * scalar
        self.mean_square = smoothing * self.mean_square + (1.0 - smoothing) * (total / len(scalars))
        self.weight = smoothing * self.weight + (1.0 - smoothing)

    def divide(self, rate: float) -> float:
        """Return ``rate`` over the root of the mean square; 0 while only zeros were seen."""
        if self.mean_square <= 0.0:
            return 0.0
        return rate / math.sqrt(self.mean_square / self.weight)
