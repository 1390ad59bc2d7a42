"""Predicted peaks against those of processes that train, on nets to which nothing was fitted."""

import sys

import pytest

from benchmarks.memory_prediction import NETS, find_block, measure, predict, write

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the constants were fitted on Linux")
slow = pytest.mark.slow

CASES = [
    ("lenet", 1000, "numpy", 1),
    ("lenet", 1000, "native", 1),
    ("resnet20", 48, "numpy", 1),
    ("resnet20", 64, "native", 2),
    ("pools", 400, "numpy", 1),
    ("transformer", 64, "numpy", 2),
    *(
        pytest.param(net, batch, kernel, threads, marks=slow)
        for net in NETS
        for batch, threads in ((8, 2), (48, 1), (256, 2), (700, 1), (1000, 2))
        for kernel in ("numpy", "native")
    ),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return a function that writes a net's bundle once and returns its folder."""
    root, made = tmp_path_factory.mktemp("nets"), {}

    def get(name):
        if name not in made:
            made.update(write(root, [name]))
        return made[name]

    return get


@pytest.mark.parametrize(("net", "batch", "kernel", "threads"), CASES)
def test_a_training_process_peaks_where_it_was_predicted(net, batch, kernel, threads, folders):
    """Within 5 %, over three rounds on samples of its own, with and without the compiled kernel."""
    if kernel == "native" and not find_block():
        pytest.skip("needs the compiled kernel")
    folder = folders(net)
    measured = measure(folder, batch, kernel=kernel, threads=threads, dtype=NETS[net][1])
    predicted = predict(
        folder,
        batch,
        kernel=kernel == "native",
        block=find_block(),
        threads=threads,
        data_bytes=measured["data_bytes"],
    )

    assert predicted.total_mib == pytest.approx(measured["peak"], rel=0.05), predicted.describe()
