"""The simulation: the fleet's bits in one process, at the cost of one replica."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from coordinator.config import load_experiment
from coordinator.progress import Silence
from coordinator.rebuild import rebuild_run
from coordinator.scalar_log import ScalarLog
from coordinator.simulate import simulate, with_agents
from edge_agent.optimizer import METHODS
from profiles.errors import ConfigError

ROOT = Path(__file__).parent.parent
DIGITS = ROOT / "examples" / "digits.toml"
SHORT = ["rounds=6", "pruning.method=none", "model.hidden=[16]", "method.perturbations=4"]


def experiment(*overrides: str):
    return load_experiment(DIGITS, [*SHORT, *overrides])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A simulated run of six rounds by the project's own method."""
    out = tmp_path_factory.mktemp("simulated") / "run"
    return out, simulate(experiment("method.name=headstep", "method.exact=20"), out=out, observer=Silence())


def test_every_round_of_a_simulation_can_be_rebuilt(finished):
    """The folder of a simulation is a run folder: replay from bundle and log ends with its digest."""
    out, summary = finished

    _, replica = rebuild_run(out)
    assert f"{replica.digest():016x}" == summary["final_digest"]
    assert summary["rounds"] == replica.round == 6
    with ScalarLog.open(out / "log.sqlite") as log:
        assert [record.plan.exact for record in log.records()] == [20] * 6
        assert sum(log.replies_of(row.name) for row in log.fleet()) == 36


def test_bytes_and_forwards_are_those_of_the_wire(finished):
    """Four projected gradients and twenty exact scalars are 128 bytes and eight forwards."""
    _, summary = finished

    assert summary["payload_bytes_up_per_agent_round"] == 32 + 4 * (4 + 20)
    assert summary["forwards_per_agent_round"] == 8


@pytest.mark.slow
@pytest.mark.parametrize("method", ["deepstep", "headstep", "hiso"])
def test_a_real_fleet_ends_with_the_same_digest(tmp_path, method):
    """Six agent processes and a broker lead to the very bits that the simulation foretold."""
    from coordinator.testbed import run_testbed

    asked = experiment(f"method.name={method}", "fleet.cohort=3")
    told = simulate(asked, out=tmp_path / "simulated", observer=Silence())
    real = run_testbed(asked, out=tmp_path / "real", resume=False, observer=Silence())

    assert real["digests_agree"]
    assert real["final_digest"] == told["final_digest"]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_by_its_name(tmp_path, method):
    """Each method's name and defaults make an experiment whose log replays to its digest."""
    forward = ["method.difference=forward"] if method == "baffle" else []
    asked = experiment(f"method.name={method}", "rounds=3", *forward)
    summary = simulate(asked, out=tmp_path / "run", observer=Silence())

    _, replica = rebuild_run(tmp_path / "run")
    assert summary["final_digest"] == f"{replica.digest():016x}"
    assert summary["rounds_skipped"] == 0
    assert np.isfinite(summary["test_loss"])


def test_a_thousand_agents_need_the_memory_of_one():
    """At most 1.3 times: there is one copy of the weights, and indices of one copy of the samples."""
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from coordinator.config import load_experiment\n"
        "from coordinator.progress import Silence\n"
        "from coordinator.simulate import simulate, with_agents\n"
        "sets = ['rounds=2', 'pruning.method=none', 'data.min_samples=1', 'data.split=iid']\n"
        "sets.append('fleet.cohort=1')\n"
        f"e = load_experiment(Path({str(DIGITS)!r}), sets)\n"
        "import tempfile\n"
        "with tempfile.TemporaryDirectory() as folder:\n"
        "    e = with_agents(e, int(sys.argv[1]))\n"
        "    print(simulate(e, out=Path(folder) / 'run', observer=Silence())['peak_rss_mib'])\n"
    )
    peaks = [
        float(
            subprocess.run(
                [sys.executable, "-c", script, count], cwd=ROOT, capture_output=True, text=True, check=True
            ).stdout
        )
        for count in ("1", "1000")
    ]
    assert peaks[1] <= 1.3 * peaks[0]


def test_a_cohort_above_the_fleet_is_refused():
    """Fewer agents than a round asks is a fault of the options."""
    asked = replace(experiment(), fleet=replace(experiment().fleet, cohort=5))
    with pytest.raises(ConfigError, match="asks 5 agents, and there are 4"):
        with_agents(asked, 4)


def test_a_run_is_never_overwritten(finished, tmp_path):
    """A folder that holds something is left alone."""
    (tmp_path / "note").write_text("mine")
    with pytest.raises(ConfigError, match="exists already"):
        simulate(experiment(), out=tmp_path, observer=Silence())
    assert (tmp_path / "note").read_text() == "mine"
