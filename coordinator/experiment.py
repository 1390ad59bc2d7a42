"""The experiment: everything that one run is made of, as plain values with the rule of each.

Knows every key of the experiment file and what a single value must be. Does not know files (``config`` reads
and writes them), nor what the keys demand of each other.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from coordinator.aggregation import RULES
from coordinator.schema import Choice, CountOrAll, Fractions, Number, Text, Whole, Wholes
from edge_agent.optimizer import METHODS
from profiles.budget import Budget

__all__ = [
    "AgentPlan",
    "BrokerChoice",
    "Data",
    "Device",
    "Evaluation",
    "Experiment",
    "Fleet",
    "Health",
    "Method",
    "Model",
    "Privacy",
    "Pruning",
]

_NAME = Text(
    pattern=r"[A-Za-z0-9][A-Za-z0-9._-]{0,47}",
    rule="must be 1 to 48 letters, digits, dots, dashes or underscores, and begin with a letter or digit",
    remedy="It names folders and MQTT topics.",
)


@dataclass(frozen=True)
class Model:
    """Which net is trained; its input and output follow the data.

    Attributes:
        name: ``auto`` takes what suits the shape of the data; ``FILE.py:FUNCTION``, with the file named as in
            ``data.path``, a torch module of one's own, which gets the data file's values as they are.
        hidden: Widths of the hidden layers before pruning; only an MLP looks at it.
    """

    name: Annotated[
        str,
        Choice(
            ("auto", "mlp", "lenet", "resnet20", "wrn10_2", "dscnn"),
            pattern=r"(?s).+\.py:[A-Za-z_]\w*",
            rule="FILE.py:FUNCTION for a module of your own",
        ),
    ] = "auto"
    hidden: Annotated[tuple[int, ...], Wholes(remedy="For example `hidden = [64, 32]`.")] = (64, 32)


@dataclass(frozen=True)
class Data:
    """Where the samples are, and how they are dealt to the agents.

    Attributes:
        path: An ``.npz`` file; in the experiment file relative to that file, in an override to the working
            folder.
        split: ``iid``, ``dirichlet`` (label shares drawn per agent) or ``shards`` (few labels per agent).
        alpha: Concentration of the Dirichlet split; the smaller, the more unlike the agents.
        min_samples: No agent gets fewer.
    """

    path: Annotated[Path, Text(rule="must be the path of an .npz file")]
    split: Annotated[str, Choice(("iid", "dirichlet", "shards"))] = "dirichlet"
    alpha: Annotated[float, Number(above=0, remedy="0.1 is very uneven, 10 nearly even.")] = 0.5
    min_samples: Annotated[int, Whole(1)] = 8


@dataclass(frozen=True)
class Pruning:
    """How the net is made smaller before training.

    Attributes:
        method: The saliency, or ``none``, which makes the density 1.
        density: The fraction of the parameters that stays.
        draws: Redrawn nets per schedule step.
        schedule_steps: Steps in which the density falls.
        widths: Fractions of every layer's width, of further nets that are trained with the pruned one and
            share its weights: every board gets the widest that its memory holds.
    """

    method: Annotated[
        str,
        Choice(
            ("ntk", "ntk-widths", "synflow", "snip", "grasp", "magnitude", "erk", "random", "uniform", "none")
        ),
    ] = "uniform"
    density: Annotated[
        float,
        Number(
            above=0, most=1, remedy="It is the fraction of the parameters that stays: 0.5 halves the net."
        ),
    ] = 0.5
    draws: Annotated[int, Whole(1, 1000)] = 5
    schedule_steps: Annotated[int, Whole(1, 1000)] = 20
    widths: Annotated[tuple[float, ...], Fractions(remedy="For example `widths = [0.25, 0.5, 0.75]`.")] = ()


@dataclass(frozen=True)
class Method:
    """The update rule. Constants of the method stand beside these keys in the file.

    Attributes:
        learning_rate: Step size at the start.
        name: One of `edge_agent.optimizer.METHODS`.
        epsilon: Step of the finite difference.
        perturbations: Random directions per step.
        exact: Exact scalars of the last layer per step, where the method has them; all that the layer has, if
            it has fewer.
        local_steps: Steps between two messages.
        batch_size: Samples per step and agent.
        difference: ``central`` takes 2P forward passes a step, ``forward`` P + 1.
        schedule: How the learning rate changes over the rounds.
        constants: All constants of the method, its own defaults included.
    """

    learning_rate: Annotated[
        float, Number(above=0, remedy="Try 0.01 first, and a tenth of it if the loss climbs.")
    ]
    name: Annotated[str, Choice(tuple(METHODS))] = "deepstep"
    epsilon: Annotated[float, Number(above=0, most=1, remedy="1e-3 suits most nets.")] = 1e-3
    perturbations: Annotated[int, Whole(1, 65535, remedy="8 is a good start.")] = 8
    exact: Annotated[int, Whole(0, 16384, remedy="64 is a good start; each is 4 bytes of a reply.")] = 64
    local_steps: Annotated[int, Whole(1, 255)] = 1
    batch_size: Annotated[int, Whole(1, 65535, remedy="16 is a good start.")] = 16
    difference: Annotated[str, Choice(("central", "forward"))] = "central"
    schedule: Annotated[str, Choice(("constant", "cosine"))] = "constant"
    constants: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Fleet:
    """How many agents a round asks, and how long it waits.

    Attributes:
        cohort: Agents asked in a round.
        quorum: Answers that close it at its deadline; ``all`` means the whole cohort.
        deadline_s: Seconds until a round closes or is extended.
        resend_s: Seconds after which an unanswered round message is sent again.
        aggregation: How the agents' scalars become one: ``mean`` trusts all, ``median``, ``trimmed`` (mean
            without the smallest and largest) and ``krum`` bear some liars, and leave out who is suspected.
        liars: The share of the agents that may lie; the mean does not look at it.
        shards: Topics over which the agents' replies are spread; fixed with the run.
        collectors: Processes that read them and hand them up in packs, for fleets of thousands; 0 for none.
        unfit: What becomes of a board whose memory cannot hold the work: ``refuse`` the run before it begins,
            or ``fit`` a smaller batch to it, and leave it out if none fits.
    """

    cohort: Annotated[int | Literal["all"], CountOrAll()] = "all"
    quorum: Annotated[int | Literal["all"], CountOrAll()] = "all"
    deadline_s: Annotated[float, Number(above=0, most=86400)] = 60.0
    resend_s: Annotated[float, Number(above=0, most=86400)] = 2.0
    aggregation: Annotated[str, Choice(tuple(RULES))] = "mean"
    liars: Annotated[float, Number(least=0, most=0.49, remedy="0.2 bears one liar among five.")] = 0.2
    shards: Annotated[int, Whole(1, 256)] = 1
    collectors: Annotated[int, Whole(0, 64)] = 0
    unfit: Annotated[str, Choice(("refuse", "fit"))] = "refuse"


@dataclass(frozen=True)
class Device:
    """Some equal devices.

    Attributes:
        profile: Name of a device profile.
        count: How many of them.
        memory_mib: Memory budget of the agent; the profile's, if not given.
        flops_per_round: What a round may cost it at most; a smaller batch costs less.
        flops_per_day: And a day (UTC).
        bytes_per_day: On the wire, both ways.
        temperature_c: A board hotter than this is left alone until it has cooled down.
        battery_percent: And one with less charge, until it has more.
        energy_wh_per_day: Watt-hours a day, where the board reports its power.
        name: What the agents' names begin with; the profile's name, if not given.
    """

    profile: Annotated[str, Text()]
    count: Annotated[int, Whole(1, 10000)] = 1
    memory_mib: Annotated[float | None, Number(above=0, remedy="A bare agent needs about 55 MiB.")] = None
    flops_per_round: Annotated[float | None, Number(above=0, remedy="2e9 is two billion.")] = None
    flops_per_day: Annotated[float | None, Number(above=0, remedy="1e13 is ten trillion.")] = None
    bytes_per_day: Annotated[float | None, Number(above=0, remedy="1e6 is a megabyte.")] = None
    temperature_c: Annotated[float | None, Number(above=0, most=150, remedy="70 is a good ceiling.")] = None
    battery_percent: Annotated[float | None, Number(least=0, most=100)] = None
    energy_wh_per_day: Annotated[float | None, Number(above=0)] = None
    name: Annotated[str | None, _NAME] = None

    @property
    def budget(self) -> Budget:
        """What each of them may spend."""
        return Budget(
            memory_mib=self.memory_mib,
            flops_per_round=_whole(self.flops_per_round),
            flops_per_day=_whole(self.flops_per_day),
            bytes_per_day=_whole(self.bytes_per_day),
            temperature_c=self.temperature_c,
            battery_percent=self.battery_percent,
            energy_wh_per_day=self.energy_wh_per_day,
        )


@dataclass(frozen=True)
class BrokerChoice:
    """Which MQTT broker carries the messages.

    Attributes:
        url: A running broker; empty to start one.
        port: Port of the broker that is started; 0 for any free one.
        listen: Address on which it is started; the loopback keeps it to this machine.
        security: ``auto`` is on beyond the loopback; ``insecure`` does without where ``auto`` would not.
    """

    url: Annotated[
        str,
        Text(
            pattern=r"|mqtt://[^\s/]+/?",
            rule="must be empty or look like mqtt://HOST:PORT",
        ),
    ] = ""
    port: Annotated[int, Whole(0, 65535)] = 0
    listen: Annotated[str, Text(pattern=r"[0-9A-Za-z.:_-]+", rule="must be an address or a host name")] = (
        "127.0.0.1"
    )
    security: Annotated[str, Choice(("auto", "on", "insecure"))] = "auto"


@dataclass(frozen=True)
class Evaluation:
    """When the coordinator evaluates its replica on the test samples: every few rounds, and at the end."""

    every: Annotated[int, Whole(1)] = 10


@dataclass(frozen=True)
class Health:
    """What is done when a run is not well: a loss jumps or diverges, or weights reach the end of their grid.

    Attributes:
        answer: ``none`` only says so; ``halve`` halves the learning rate; ``rollback`` also goes back to the
            round with the lowest loss so far.
        most: How often that is done in a run.
    """

    answer: Annotated[str, Choice(("none", "halve", "rollback"))] = "none"
    most: Annotated[int, Whole(1, 20)] = 3


@dataclass(frozen=True)
class Privacy:
    """How little a reply says of any one agent.

    Attributes:
        clip: Largest Euclidean length of an agent's vector of scalars; 0 for no such bound.
        noise: Standard deviation of the secret Gaussian noise that an agent adds to each scalar, in clips.
        delta: For the epsilon in the report.
        masks: ``pairwise`` hides each reply among those of its cohort; the coordinator reads their sum alone.
    """

    clip: Annotated[float, Number(least=0, remedy="A length that most replies have is a good start.")] = 0.0
    noise: Annotated[float, Number(least=0, most=1e6, remedy="1 is a lot for a single agent.")] = 0.0
    delta: Annotated[float, Number(above=0, most=0.1, remedy="1e-5 is usual.")] = 1e-5
    masks: Annotated[str, Choice(("none", "pairwise"))] = "none"


@dataclass(frozen=True)
class AgentPlan:
    """One agent of the fleet; ids count from 0 in the order of the file."""

    id: int
    name: str
    profile: str
    memory_mib: float
    budget: Budget = field(default_factory=Budget)


@dataclass(frozen=True)
class Experiment:
    """Everything that one run is made of. Made by :func:`load_experiment`, which checks and resolves it."""

    name: Annotated[str, _NAME]
    model: Model
    data: Data
    pruning: Pruning
    method: Method
    fleet: Fleet
    devices: tuple[Device, ...]
    broker: BrokerChoice
    evaluation: Evaluation
    health: Health
    privacy: Privacy = field(default_factory=Privacy)
    seed: Annotated[int, Whole()] = 7
    rounds: Annotated[int, Whole(1, 2**31 - 1)] = 400

    @property
    def agents(self) -> tuple[AgentPlan, ...]:
        """The agents, named after their devices: ``pi-zero-2w-1``, ``pi-zero-2w-2``, ..."""
        return tuple(_agents(self.devices))

    @property
    def cohort_size(self) -> int:
        """How many agents a round asks."""
        agents = sum(device.count for device in self.devices)
        return agents if self.fleet.cohort == "all" else self.fleet.cohort

    @property
    def quorum_size(self) -> int:
        """How many answers a round needs."""
        return self.cohort_size if self.fleet.quorum == "all" else self.fleet.quorum


def _agents(devices: Sequence[Device]) -> Iterator[AgentPlan]:
    taken: Counter[str] = Counter()
    for device in devices:
        prefix = device.name or device.profile
        for _ in range(device.count):
            taken[prefix] += 1
            memory_mib = device.memory_mib or 0.0
            yield AgentPlan(
                taken.total() - 1, f"{prefix}-{taken[prefix]}", device.profile, memory_mib, device.budget
            )


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)
