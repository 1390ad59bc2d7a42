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
    """One update rule: a few pieces put together.

    Attributes:
        name: As written in the experiment file.
        code: As written in a record, 1 to 255; never used twice.
        constants: Names and defaults, in the order in which a record holds them.
        summary: One line for people.
        curvature: What the noise is divided by: nothing (""), or the root of one learned value for each
            "weight" (bfloat16), "row" of a matrix or "tensor" (float32); or the "scale" of each tensor, which
            follows from its weights.
        directions: What a perturbation moves: all weights ("full"), one tensor after the other ("block"),
            a fixed share of them ("sparse"), or the layers of the agent's share ("layers"); or all weights
            by noise of a low rank ("lowrank"), or the first perturbation by past updates ("guided").
        rule: What the scalars do: "descent" along the directions, by their "sign", with "momentum", by
            "adam", or a "choice" among multiples of the step by the mean loss at each.
        candidates: The multiples that a choice is made of.
        reuse: Whether a step's losses at w + epsilon z serve as each other's base: P forwards, one batch.
        head: Of how many last linear layers a plan may ask exact scalars: of none, 1 or 2.
        fresh: Whether every perturbation is measured on a batch of its own (central differences only).
        scheduled: Constants that follow the schedule of the learning rate.
        nested: Whether boards may hold narrower nets of one family, each weight moving by the mean over the
            agents that hold it; the constant ``levels`` counts the widths.
        autodiff: What torch computes on the board: nothing (""), the slope along a direction in forward mode
            ("slope"), or the gradient of the last layers in reverse mode ("gradient").
    """

    name: str
    code: int
    constants: Mapping[str, float]
    summary: str
    curvature: str = ""
    directions: str = "full"
    rule: str = "descent"
    head: int = 0
    fresh: bool = False
    scheduled: tuple[str, ...] = ()
    nested: bool = False
    autodiff: str = ""
    candidates: tuple[float, ...] = ()
    reuse: bool = False

    @property
    def losses(self) -> int:
        """Mean losses that a step sends beside its other scalars."""
        return len(self.candidates)

    @property
    def moments(self) -> int:
        """Float32 values that a replica keeps for every weight, beside the curvature."""
        return {"momentum": 1, "adam": 2}.get(self.rule, self.guided) + self.averaged

    @property
    def guided(self) -> bool:
        """Whether past updates are remembered as a direction."""
        return self.directions == "guided"

    @property
    def averaged(self) -> bool:
        """Whether a running mean of the weights is judged and kept: the last of the moments."""
        return "average" in self.constants

    @property
    def group(self) -> str:
        """Which weights share a curvature value: those of a "row" or a "tensor"; empty where none do."""
        return {"row": "row", "tensor": "tensor", "scale": "tensor"}.get(self.curvature, "")

    @property
    def bytes_per_weight(self) -> float:
        """What a replica remembers for each weight, in bytes."""
        return 2.0 * (self.curvature == "weight" or self.directions == "sparse") + 4.0 * self.moments

    def bytes_beyond(self, weights: int, groups: int) -> float:
        """Return the memory of a replica beyond the weights, in bytes.

        Args:
            weights: How many there are.
            groups: Rows or tensors that share a curvature value, as :attr:`group` says; each has a float32
                and an int64 that tells where it begins.
        """
        return self.bytes_per_weight * weights + 12.0 * groups * bool(self.group)

    @property
    def stateful_steps(self) -> bool:
        """Whether a step needs more than this round's scalars, so that there can be one a round only."""
        return self.rule in ("momentum", "adam", "choice") or self.moments > 0

    def values(self, given: Mapping[str, float]) -> tuple[float, ...]:
        """Return the constants in a record's order, the given ones over the defaults."""
        return tuple(float(given.get(name, default)) for name, default in self.constants.items())

    def levels(self, values: tuple[float, ...]) -> int:
        """Return how many widths a family has; 1 where all boards hold the same net, 0 for no number."""
        count = self.named(values)["levels"] if self.nested else 1.0
        return int(count) if count in range(1, 256) else 0

    def named(self, values: tuple[float, ...]) -> dict[str, float]:
        """Return a record's constants by name."""
        return dict(zip(self.constants, values, strict=True))


_HISO = MappingProxyType({"nu": 0.05, "floor": 1e-4, "smoothing": 0.0})
_ADAM = {"beta1": 0.9, "beta2": 0.999, "stabiliser": 1e-8}

METHODS: Mapping[str, Method] = MappingProxyType(
    {
        method.name: method
        for method in (
            Method(
                "decomfl",
                1,
                MappingProxyType({"smoothing": 0.0}),
                "w -= eta/P sum G z (Li et al., arXiv 2405.15861); smoothing > 0 divides eta by the RMS of G",
            ),
            Method(
                "hiso",
                2,
                _HISO,
                "z = u / sqrt(h), h learned from the scalars (arXiv 2506.02370)",
                curvature="weight",
            ),
            Method(
                "headstep",
                3,
                MappingProxyType({"smoothing": 0.9, "head_rate": 1.0}),
                "the last layer by exact scalars, the body by steps normalised by the RMS of its scalars",
                head=1,
                fresh=True,
                scheduled=("head_rate",),
            ),
            Method(
                "mezo",
                4,
                MappingProxyType({}),
                "w -= eta/P sum G z, P = 1 (Malladi et al., arXiv 2305.17333)",
            ),
            Method(
                "fedmezo",
                5,
                MappingProxyType({}),
                "K local MeZO steps along shared directions, then their mean (arXiv 2402.05926)",
            ),
            Method(
                "baffle",
                6,
                MappingProxyType(
                    {**_ADAM, "beta2": 0.99, "decay": 5e-4, "clip": 0.3, "average": 0.995},
                ),
                "Adam on the mean of G z, and a running mean of the weights (Feng et al., arXiv 2301.12195)",
                rule="adam",
            ),
            Method("zo-sgd", 7, MappingProxyType({}), "w -= eta/P sum G z (arXiv 2402.11592)"),
            Method(
                "zo-sign",
                8,
                MappingProxyType({}),
                "w -= eta/P sum sign(G) z (arXiv 2402.11592)",
                rule="sign",
            ),
            Method(
                "zo-momentum",
                9,
                MappingProxyType({"momentum": 0.9}),
                "v <- mu v + mean G z; w -= eta v (arXiv 2402.11592)",
                rule="momentum",
            ),
            Method(
                "zo-adam",
                10,
                MappingProxyType({**_ADAM, "decay": 0.0, "clip": 0.0}),
                "Adam on the mean of G z (arXiv 2402.11592)",
                rule="adam",
            ),
            Method(
                "zo-conservative",
                11,
                MappingProxyType({}),
                "the best by mean loss of w - eta/P sum G z, w and w + eta/P sum G z (arXiv 2402.11592)",
                rule="choice",
                candidates=(1.0, 0.0, -1.0),
            ),
            Method(
                "zo-block",
                12,
                MappingProxyType({}),
                "perturbation p moves tensor p mod T alone, by its own scalar (arXiv 2402.11592)",
                directions="block",
            ),
            Method(
                "zo-sparse",
                13,
                MappingProxyType({"kept": 0.1}),
                "a fixed random share of the weights is perturbed and moves (arXiv 2402.11592)",
                directions="sparse",
            ),
            Method(
                "forward-gradient",
                14,
                MappingProxyType({}),
                "G = z . grad L exactly, by a forward-mode pass a direction (arXiv 2202.08587); needs torch",
                autodiff="slope",
            ),
            Method(
                "spry",
                15,
                MappingProxyType({"shares": 2.0}),
                "forward gradients, each agent on its share of the layers (arXiv 2405.15551); needs torch",
                directions="layers",
                autodiff="slope",
            ),
            Method(
                "hybrid",
                16,
                MappingProxyType({"layers": 2.0, "head_rate": 0.1}),
                "backpropagation on the last layers, w -= eta/P sum G z elsewhere (arXiv 2402.11592); "
                "needs torch",
                head=1,
                scheduled=("head_rate",),
                autodiff="gradient",
            ),
            Method(
                "nested",
                20,
                MappingProxyType({"levels": 1.0, "smoothing": 0.9}),
                "boards hold nested widths of one net; a weight moves by the mean over those that hold it",
                nested=True,
            ),
            Method(
                "fanstep",
                17,
                MappingProxyType({"smoothing": 0.9, "head_rate": 1.0, "shares": 8.0}),
                "headstep, each agent along directions of its own: a round has shares times P of them",
                head=1,
                fresh=True,
                scheduled=("head_rate",),
            ),
            Method(
                "zo-search",
                19,
                MappingProxyType({"smoothing": 0.0}),
                "the best by mean loss of a quarter, one and four times the step eta/P sum G z, or none",
                rule="choice",
                candidates=(1.0, 0.0, 0.25, 4.0),
            ),
            Method(
                "zo-reuse",
                21,
                MappingProxyType({"smoothing": 0.0}),
                "w -= eta/P sum G z, each of P losses at w + epsilon z less the mean of the others",
                reuse=True,
            ),
            Method(
                "zo-orthogonal",
                22,
                MappingProxyType({"smoothing": 0.0}),
                "the gradient's projection on the span of a round's directions, by their exact Gram matrix",
                rule="orthogonal",
            ),
            Method(
                "hiso-row",
                23,
                _HISO,
                "hiso with one curvature value for each row of a matrix, from the mean square of its step",
                curvature="row",
            ),
            Method(
                "hiso-tensor",
                24,
                _HISO,
                "hiso with one curvature value for each tensor, from the mean square of its step",
                curvature="tensor",
            ),
            Method(
                "hiso-block",
                25,
                _HISO,
                "perturbation p probes tensor p mod T alone, whose curvature learns from its own scalars",
                curvature="tensor",
                directions="block",
            ),
            Method(
                "zo-scaled",
                26,
                MappingProxyType({"smoothing": 0.0, "floor": 0.01}),
                "z of each tensor is as large as its weights, so that a step is a share of them",
                curvature="scale",
            ),
            Method(
                "zo-lowrank",
                27,
                MappingProxyType({"smoothing": 0.0, "rank": 4.0}),
                "z of each matrix is a sum of few products u v' (arXiv 2410.07698)",
                directions="lowrank",
            ),
            Method(
                "zo-guided",
                28,
                MappingProxyType({"smoothing": 0.0, "memory": 0.9}),
                "a round's first direction is the sign of the past updates' running sum (arXiv 1806.10230)",
                directions="guided",
            ),
            Method(
                "zo-average",
                29,
                MappingProxyType({"smoothing": 0.0, "average": 0.98}),
                "w -= eta/P sum G z; a running mean of the weights is judged and kept",
            ),
            Method(
                "deepstep",
                18,
                MappingProxyType({"smoothing": 0.9, "head_rate": 1.0}),
                "headstep with exact scalars of the last two linear layers",
                head=2,
                fresh=True,
                scheduled=("head_rate",),
            ),
        )
    }
)


def method_by_code(code: int) -> Method:
    """Return the method that a record means.

    Raises:
        KeyError: No method has this code.
    """
    return _BY_CODE[code]


_BY_CODE = {method.code: method for method in METHODS.values()}


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
