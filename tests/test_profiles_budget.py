"""Predictions against what fresh processes really use, and refusals that say what would fit."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import profiles_nets
import pytest

from profiles.budget import (
    Budget,
    Prediction,
    Spent,
    check_memory,
    flops_per_step,
    forwards_per_step,
    predict_peak_mib,
)
from profiles.cost import Cost, graph_cost, graph_pass
from profiles.errors import BudgetError
from profiles.passes import Pass

# What an agent does to its memory: its imports, a session, weights bound as inputs by pointer from one flat
# buffer, optimizer state, data, chunk buffers, three forward passes in pieces. It prints its own peak.
AGENT = """
import json, ssl, sys, edge_agent.__main__
import numpy as np
from pathlib import Path
from edge_agent.footprint import give_back, giving_back
from edge_agent.session import open_session
from profiles.memory import current_rss_mib, peak_rss_mib
path, batch, at_once, curvature, data, chunks, threads = sys.argv[1], *map(int, sys.argv[2:])
give_back()
imports = current_rss_mib()
with giving_back():
    session = open_session(Path(path), threads=threads)
inputs = {i.name: i.shape for i in session.get_inputs()}
x = np.ones((batch, *inputs.pop("x")[1:]), np.float32); inputs.pop("y"); y = np.zeros(batch, np.int64)
sizes = {name: -(-int(np.prod(shape)) // 16) * 16 for name, shape in inputs.items()}
flat = np.full(sum(sizes.values()) + 16, 0.01, np.float32)
flat = flat[-flat.ctypes.data % 64 // 4 :]
kept = [np.ones(n, np.uint8) for n in (int(curvature * sum(sizes.values())), data, chunks)]
kept += [x + 1, np.ones(x.size, np.uint8)]  # the batch before, and what this one was made of
loss = np.zeros((), np.float32)
binding, offset = session.io_binding(), 0
for name, shape in inputs.items():
    binding.bind_input(name, "cpu", 0, np.float32, shape, flat.ctypes.data + 4 * offset)
    offset += sizes[name]
binding.bind_output("loss", "cpu", 0, np.float32, (), loss.ctypes.data)
pieces = -(-batch // at_once)
for number in range(3 * pieces):
    start, stop = number % pieces * batch // pieces, (number % pieces + 1) * batch // pieces
    part, labels = x[start:stop], y[start:stop]
    binding.bind_input("x", "cpu", 0, np.float32, part.shape, part.ctypes.data)
    binding.bind_input("y", "cpu", 0, np.int64, labels.shape, labels.ctypes.data)
    session.run_with_iobinding(binding)
print(json.dumps([imports, peak_rss_mib()]))
"""
MIB = 2**20
linux = pytest.mark.skipif(sys.platform != "linux", reason="the constants were fitted on Linux")


@pytest.fixture(scope="module")
def graphs(tmp_path_factory):
    """Return a function that exports a net once and returns the path of its graph and its cost."""
    folder, made = tmp_path_factory.mktemp("graphs"), {}

    def get(name: str) -> tuple[Path, Cost, Pass]:
        if name not in made:
            path = profiles_nets.export(profiles_nets.NETS[name](), folder / f"{name}.onnx")
            made[name] = path, graph_cost(path), graph_pass(path)
        return made[name]

    return get


def measured_peak(path: Path, batch: int, at_once: int, *, curvature=0, data=0, chunks=0, threads=1) -> float:
    """Run the work of an agent in a fresh process and return its peak resident memory in MiB."""
    numbers = map(str, (batch, at_once, curvature, data, chunks, threads))
    done = subprocess.run(
        [sys.executable, "-c", AGENT, str(path), *numbers], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)[1]


@linux
@pytest.mark.parametrize(
    ("name", "batch"),
    [
        ("lenet", 1),
        ("lenet", 32),
        ("lenet", 1024),
        ("resnet20", 8),
        ("resnet20", 32),
        ("resnet20", 256),
        ("minilm", 8),
        ("minilm", 32),
        pytest.param("minilm", 100, marks=pytest.mark.slow),
        pytest.param("opt125m", 8, marks=pytest.mark.slow),
        pytest.param("opt125m", 32, marks=pytest.mark.slow),
        pytest.param("opt125m", 50, marks=pytest.mark.slow),
    ],
)
def test_the_predicted_peak_is_within_five_percent(name, batch, graphs):
    """Of the peak that a fresh process measures of itself, from one image to a batch of a thousand."""
    path, cost, asked = graphs(name)
    predicted = predict_peak_mib(
        cost, batch_size=batch, passes=[asked], chunk_bytes=0, graph_bytes=path.stat().st_size
    )
    measured = measured_peak(path, batch, cost.at_once)

    assert predicted.total_mib == pytest.approx(measured, rel=0.05), predicted.describe()


@linux
def test_state_data_chunks_and_threads_are_in_the_peak(graphs):
    """With bf16 curvature, 40 MiB of samples, 2 MiB of buffers and two threads: still within 5 %."""
    path, cost, asked = graphs("minilm")
    predicted = predict_peak_mib(
        cost,
        batch_size=8,
        passes=[asked],
        curvature_bytes_per_param=2,
        data_bytes=40 * MIB,
        chunk_bytes=2 * MIB,
        threads=2,
    )
    measured = measured_peak(path, 8, cost.at_once, curvature=2, data=40 * MIB, chunks=2 * MIB, threads=2)

    assert predicted.total_mib == pytest.approx(measured, rel=0.05), predicted.describe()
    assert predicted.curvature == pytest.approx(2 * cost.params / MIB)
    assert (predicted.data, predicted.chunks) == (40, 2)


COST = Cost(
    params=25 * MIB,
    forward_flops=1000,
    elementwise_flops=10,
    activation_bytes_per_sample=2 * MIB,
    activation_bytes_fixed=4 * MIB,
    live_bytes_per_sample=MIB,
    weight_bytes=100 * MIB,
    input_bytes_per_sample=MIB // 4,
)


def predicted(batch_size: int = 16, **given) -> Prediction:
    """Predict for a net of 100 MiB that holds 2 MiB a sample, of eight at once, and 1/4 MiB of inputs."""
    return predict_peak_mib(COST, batch_size=batch_size, **given)


def test_the_terms_add_up_and_are_told():
    """The total is the sum of the terms, and the line names those that are not nothing."""
    prediction = predicted(curvature_bytes_per_param=4)

    assert prediction.total_mib == pytest.approx(sum(prediction.terms.values()))
    assert set(prediction.terms) == {
        *("imports", "session", "weights", "curvature", "activations", "batch", "data", "chunks"),
        *("threads", "start"),
    }
    assert "weights 100.0, curvature 100.0, activations 21.0, batch 9.0" in prediction.describe()
    assert "data" not in prediction.describe()


@pytest.mark.parametrize("allowed", [160, 162, 169, 171, 300, 1000])
def test_the_largest_batch_fits_and_one_more_does_not(allowed):
    """At every budget that holds one sample."""
    batch = predicted().largest_batch(allowed)

    assert batch >= 1
    assert predicted(batch).total_mib <= allowed + 1e-6
    assert predicted(batch + 1).total_mib > allowed


def test_no_batch_fits_where_the_net_does_not():
    """With less than the weights need, the answer is 0 and never negative."""
    assert predicted().largest_batch(100) == 0


@pytest.mark.parametrize("allowed", [80, 100, 150, 168])
def test_the_density_that_fits_fits(allowed):
    """A net of that density, widths scaled by its root, is within the budget; a hundredth more is not."""
    density = predicted(curvature_bytes_per_param=4).largest_density(allowed)

    def pruned(share: float) -> float:
        prediction = predicted(curvature_bytes_per_param=4)
        scaled = {"weights": share, "curvature": share, "activations": share**0.5}
        return replace(prediction, **{k: prediction.terms[k] * f for k, f in scaled.items()}).total_mib

    assert 0 < density < 1
    assert pruned(density) <= allowed < pruned(density + 0.011)


def test_density_is_one_where_everything_fits_and_zero_where_nothing_does():
    """The ends of the range."""
    assert predicted().largest_density(1e4) == 1
    assert predicted().largest_density(48) == 0


def test_what_fits_is_let_through():
    """check_memory says nothing at exactly the predicted peak."""
    check_memory(predicted(), predicted().total_mib, model="net", device="pi-4-1gb")


def test_a_refusal_has_both_numbers_and_both_ways_out():
    """Predicted and allowed MiB, every term, the density and the batch size that would fit."""
    with pytest.raises(BudgetError) as caught:
        check_memory(predicted(), 162, model="lenet", device="pi-zero-2w")
    text, hint = str(caught.value), caught.value.hint
    density = predicted().largest_density(162)

    needed, batch = predicted().total_mib, predicted().largest_batch(162)
    assert text.startswith(f"Training `lenet` needs {needed:.0f} MiB on the device; `pi-zero-2w` allows 162")
    assert "weights 100.0" in text
    assert hint == f"Prune to `--density {density:g}` or lower, or set `batch_size = {batch}`."


def test_the_hint_counts_from_the_dense_net():
    """A net that kept half of its parameters, and may keep half of those, is a density of a quarter."""
    share = predicted().largest_density(162)
    with pytest.raises(BudgetError) as caught:
        check_memory(predicted(), 162, model="lenet", device="pi-zero-2w", density=0.5)

    assert f"`--density {int(50 * share) / 100:g}`" in caught.value.hint


def test_where_nothing_would_fit_the_hint_says_so():
    """A budget below the libraries leaves no density and no batch size to offer."""
    with pytest.raises(BudgetError) as caught:
        check_memory(predicted(), 48, model="lenet", device="toaster")

    assert caught.value.hint.startswith("Leave the device out: 51 MiB are needed before any net")


@pytest.mark.parametrize(
    ("difference", "perturbations", "forwards"), [("central", 8, 16), ("forward", 8, 9), ("forward", 1, 2)]
)
def test_forwards_of_a_step(difference, perturbations, forwards):
    """2P forwards for central differences, P + 1 for forward ones."""
    assert forwards_per_step(perturbations=perturbations, difference=difference) == forwards


def test_flops_of_a_step_are_its_forwards_and_its_passes():
    """P = 2, central, 10 samples: 4 forwards; 4 perturbs, 1 undo and 2 updates of 2 FLOPs a weight."""
    flops = flops_per_step(COST, batch_size=10, perturbations=2, difference="central", size=500)

    assert flops == 4 * 10 * 1000 + 2 * 500 * (4 + 1 + 2)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: predicted(0),
        lambda: predicted(threads=0),
        lambda: predicted(data_bytes=-1),
        lambda: forwards_per_step(perturbations=0, difference="central"),
        lambda: forwards_per_step(perturbations=2, difference="centrl"),
    ],
)
def test_impossible_counts_are_programming_mistakes(wrong):
    """A ValueError, since the configuration has checked them."""
    with pytest.raises(ValueError, match=r"batch_size|sizes|difference"):
        wrong()


def test_what_is_exceeded_is_named_with_both_numbers():
    """One sentence for each limit; what has no limit is never exceeded."""
    budget = Budget(memory_mib=64, flops_per_day=10**9)
    spent = Spent(peak_memory_mib=65.5, flops_in_round=10**12, flops_today=2 * 10**9, bytes_today=10**12)

    assert budget.exceeded(spent) == [
        "peak memory in MiB: 65.5 of 64 allowed",
        "FLOPs today: 2,000,000,000 of 1,000,000,000 allowed",
    ]
    assert Budget().exceeded(spent) == []
    assert budget.exceeded(Spent(peak_memory_mib=64, flops_today=10**9)) == []


def test_an_account_grows_by_rounds():
    """FLOPs and bytes add up, memory keeps its peak, and the round's FLOPs are the last round's."""
    spent = Spent().after(flops=5, wire_bytes=64, peak_memory_mib=60).after(flops=7, wire_bytes=64)

    assert spent == Spent(peak_memory_mib=60, flops_in_round=7, flops_today=12, bytes_today=128)
