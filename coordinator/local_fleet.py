"""The agents of a test-bed: one process for each board of the experiment, on this machine.

Knows the agent's options and where each agent's files lie in a run folder; ``supervisor`` keeps them running.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from coordinator.broker import Broker
from coordinator.experiment import Experiment
from coordinator.family import folders_of
from coordinator.guard import Guard
from coordinator.scalar_log import ScalarLog
from coordinator.supervisor import Supervisor, agent_command

__all__ = ["local_fleet"]


@contextlib.contextmanager
def local_fleet(
    experiment: Experiment,
    out: Path,
    broker: Broker,
    log: ScalarLog,
    guard: Guard | None,
    levels: Sequence[int] = (),
) -> Iterator[Supervisor]:
    """Run the agents for as long as the context lasts.

    Args:
        experiment: Names the agents, their profiles and budgets.
        out: The run folder, with bundle and samples.
        broker: Where they connect.
        log: Told of every restart.
        guard: Gives each agent its certificate; None where the broker asks for none.
        levels: By agent number, the width of the family that it holds; empty where there is one bundle.
    """
    folder = out / "agents"
    bundles = folders_of(out / "bundle", len(experiment.pruning.widths))
    commands = {
        agent.name: [
            *agent_command(),
            *("--broker", broker.agents_url, "--run", experiment.name, "--name", agent.name),
            *("--bundle", str(bundles[levels[agent.id]] if levels else bundles[-1])),
            *("--data", str(folder / agent.name / "data.npz")),
            *("--state", str(folder / agent.name), "--profile", agent.profile),
            *("--memory-mib", f"{agent.memory_mib:g}"),
        ]
        for agent in experiment.agents
    }
    if guard is not None:
        for name, command in commands.items():
            guard.authority.device_identity(name, folder / name / "security")
            command += ["--security", str(folder / name / "security")]
    supervisor = Supervisor(
        commands, folder=folder, on_event=lambda kind, agent, text: log.add_event(kind, agent, text)
    )
    try:
        supervisor.start()
        yield supervisor
    finally:
        supervisor.stop()
