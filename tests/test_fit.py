"""Tests of scalarfed fit: what a board can train is said before anything is flashed."""

import json
import sys

import pytest
from made_run import make_replayable_run

from coordinator.bench.child import measure_apart
from coordinator.cli import main
from coordinator.fit import Work, fit
from edge_agent.bundle import read_bundle
from profiles.device import load_profile
from profiles.errors import BudgetError


@pytest.fixture
def bundle(tmp_path):
    return make_replayable_run(tmp_path / "run") / "bundle"


def test_a_bundle_that_fits_is_accepted(bundle, capsys):
    """Memory term by term, the work of a round, the bytes of a reply."""
    assert main(["fit", str(bundle), "--device", "pi-zero-2w", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["fits"]
    assert said["predicted_mib"] == pytest.approx(sum(said["prediction"].values()), abs=0.01)
    assert said["bytes_up"] == 64
    assert said["largest_batch"] > 16
    assert said["flops_per_round"] > 0


def test_what_a_method_remembers_is_counted(bundle, capsys):
    """Nothing for decomfl, 2 bytes a weight for hiso, 12 a row or tensor for those that share curvature."""
    made = read_bundle(bundle)
    expected = {
        "decomfl": 0,
        "hiso": 2 * made.params,
        "hiso-row": 12 * sum(t.shape[0] if len(t.shape) > 1 else 1 for t in made.tensors),
        "hiso-tensor": 12 * len(made.tensors),
        "zo-average": 4 * made.params,
    }
    for method, count in expected.items():
        assert main(["fit", str(bundle), "--device", "pi-zero-2w", "--method", method, "--json"]) == 0
        said = json.loads(capsys.readouterr().out)["prediction"]["curvature"]
        assert said == pytest.approx(count / 2**20, rel=0.01)


def test_a_bundle_that_does_not_fit_is_refused_with_what_would(bundle, capsys):
    """The message has both figures, the hint a batch; both come with the JSON's own answer."""
    code = main(["fit", str(bundle), "--device", "pi-zero-2w", "--samples", "100000000", "--json"])
    captured = capsys.readouterr()
    assert code == BudgetError.exit_code
    assert not json.loads(captured.out)["fits"]
    assert "allows" in captured.err


def test_a_smaller_budget_allows_a_smaller_batch(bundle, capsys):
    """The largest batch grows with the budget, and the batch it names does fit."""
    largest = []
    for budget in (80, 120):
        assert main(["fit", str(bundle), "--device", "pi-4-2gb", "--memory-mib", str(budget), "--json"]) == 0
        largest.append(json.loads(capsys.readouterr().out)["largest_batch"])
    assert largest[0] < largest[1]
    options = ["--device", "pi-4-2gb", "--memory-mib", "80", "--batch-size"]
    assert main(["fit", str(bundle), *options, str(largest[0])]) == 0
    assert main(["fit", str(bundle), *options, str(largest[0] + 2)]) == BudgetError.exit_code


@pytest.mark.skipif(sys.platform != "linux", reason="the constants were fitted on Linux")
@pytest.mark.parametrize(
    ("model", "batch", "method"),
    [
        ("lenet", 32, "decomfl"),
        ("resnet20", 8, "hiso"),
        pytest.param("minilm", 8, "hiso", marks=pytest.mark.slow),
        pytest.param("opt125m", 8, "decomfl", marks=pytest.mark.slow),
    ],
)
def test_the_prediction_is_within_ten_percent_of_training(tmp_path, model, batch, method):
    """Of the peak that a fresh process measures of itself which trains as an agent does."""
    module = "coordinator.bench.memory"
    measure_apart(module, "make", model, str(tmp_path), str(batch), limit_s=300)
    measured = measure_apart(module, "train", method, str(tmp_path), str(batch), limit_s=300)["peak_mib"]
    work = Work(method=method, batch_size=batch, perturbations=2)
    predicted = fit(read_bundle(tmp_path), load_profile("pi-4-2gb"), work).prediction
    assert predicted.total_mib == pytest.approx(measured, rel=0.10), predicted.describe()
