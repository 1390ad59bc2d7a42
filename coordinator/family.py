"""Which board holds which width of a nested family of nets.

Knows bundles of several widths, what each would need of a board, and what the board allows. Does not know
how the nets are cut (``pruning/nested``), nor how their scalars become one (``rounds``).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from coordinator.experiment import AgentPlan, Experiment
from edge_agent.bundle import Bundle, read_bundle
from edge_agent.data import Samples
from edge_agent.optimizer import METHODS
from profiles.budget import Prediction, check_memory, predict_peak_mib
from profiles.cost import Cost
from profiles.passes import runnable_passes

__all__ = ["Family", "deal_levels", "folders_of", "read_family"]


@dataclass(frozen=True)
class Family:
    """The bundles of a run, and who holds which.

    Attributes:
        bundles: The narrowest first; one where all boards hold the same net.
        levels: By agent number, the index of its bundle.
        predictions: By agent number, what it will need at its peak.
    """

    bundles: tuple[Bundle, ...]
    levels: tuple[int, ...]
    predictions: tuple[Prediction, ...]

    def folder_of(self, agent: int) -> Path:
        """Return the bundle's folder of an agent."""
        return self.bundles[self.levels[agent]].folder


def folders_of(bundle: Path, narrower: int) -> list[Path]:
    """Return the folders of a family's bundles, the narrowest first and ``bundle`` itself last."""
    return [*(bundle.with_name(f"{bundle.name}-{level}") for level in range(narrower)), bundle]


def read_family(folder: Path) -> list[Bundle]:
    """Return the bundles of a run, the narrowest first, given the widest one's folder.

    Raises:
        BundleError: One of them is missing or altered.
    """
    widest = read_bundle(folder)
    return [*(read_bundle(path) for path in folders_of(folder, max(0, len(widest.stops) - 1))[:-1]), widest]


def deal_levels(experiment: Experiment, bundles: Sequence[Bundle], slices: Mapping[str, Samples]) -> Family:
    """Give every agent the widest net that its memory holds.

    Args:
        experiment: With the fleet and its budgets.
        bundles: The narrowest first.
        slices: The samples of each agent, by name.

    Raises:
        BudgetError: Not even the narrowest fits; says what would.
    """
    levels, predictions = [], []
    for agent in experiment.agents:
        found = [_predict(experiment, bundle, slices[agent.name]) for bundle in bundles]
        fitting = [level for level, needed in enumerate(found) if needed.total_mib <= agent.memory_mib]
        level = max(fitting, default=0)
        if experiment.fleet.unfit != "fit":
            _check(found[level], bundles[level], agent)
        levels.append(level)
        predictions.append(found[level])
    return Family(tuple(bundles), tuple(levels), tuple(predictions))


def _predict(experiment: Experiment, bundle: Bundle, samples: Samples) -> Prediction:
    """Return what an agent will need at its peak."""
    rule = METHODS[experiment.method.name]
    return predict_peak_mib(
        Cost.from_dict(bundle.cost, params=bundle.params),
        batch_size=experiment.method.batch_size,
        passes=runnable_passes(bundle.passes),
        curvature_bytes_per_param=rule.bytes_beyond(bundle.params, bundle.groups(rule.group)) / bundle.params,
        autodiff=rule.autodiff,
        data_bytes=samples.x.nbytes + samples.y.nbytes,
        graph_bytes=bundle.graph_path.stat().st_size,
    )


def _check(prediction: Prediction, bundle: Bundle, agent: AgentPlan) -> None:
    check_memory(
        prediction,
        agent.memory_mib,
        model=bundle.model,
        device=agent.name,
        density=bundle.params / bundle.pruning["params_dense"],
    )
