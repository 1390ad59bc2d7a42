"""The self-benchmark measures this machine, and a profile takes over what was measured."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import psutil
import pytest

from profiles import selftest
from profiles.device import format_profile, import_profile, load_profile, read_profile
from profiles.errors import ProfileError
from profiles.selftest import measure, profile_of_this_machine, temperature_c, with_measurements


@pytest.fixture(scope="module")
def measured() -> dict[str, float]:
    """One short measurement of this machine."""
    return measure(seconds=0.6, threads=1)


def test_the_model_that_is_written_out_is_the_one_that_onnx_writes():
    """The bytes are a sound model and compute a matrix product."""
    model = onnx.load_from_string(selftest._MATMUL)
    onnx.checker.check_model(model, full_check=True)
    a, b = np.random.default_rng(0).standard_normal((2, 5, 5), np.float32)
    session = onnxruntime.InferenceSession(selftest._MATMUL, providers=["CPUExecutionProvider"])

    assert [node.op_type for node in model.graph.node] == ["MatMul"]
    np.testing.assert_allclose(session.run(None, {"a": a, "b": b})[0], a @ b, rtol=1e-5, atol=1e-6)


def test_memory_and_cores_are_those_of_the_machine(measured):
    """RAM as psutil sees it, and the cores that this process may use."""
    assert measured["ram_mib"] == pytest.approx(psutil.virtual_memory().total / 2**20)
    if sys.platform == "linux":
        assert measured["cores"] == len(psutil.Process().cpu_affinity())


def test_the_product_is_as_fast_as_numpys(measured):
    """Within a factor of 16 of numpy's product of the same size: others work too, but units must be right."""
    a = np.full((768, 768), 1e-3, np.float32)
    times = []
    for _ in range(10):
        begin = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - begin)
    rate = 2 * 768**3 / min(times) / 1e9

    assert rate / 16 < measured["fp32_gflops"] < rate * 16


def test_a_copy_counts_both_ways(measured):
    """Within a factor of 16 of bytes(), which also reads and writes every byte once."""
    block, times = bytearray(16 * 2**20), []
    for _ in range(10):
        begin = time.perf_counter()
        bytes(block)
        times.append(time.perf_counter() - begin)
    rate = 2 * len(block) / min(times) / 1e9

    assert rate / 16 < measured["bandwidth_gbs"] < rate * 16


def test_it_takes_as_long_as_it_is_told():
    """A second of measuring takes at least a second, and no multiple of it: a join is not held up."""
    begin = time.perf_counter()
    measure(seconds=1.0, threads=1)

    assert 1.0 <= time.perf_counter() - begin < 5.0


def test_what_is_measured_replaces_estimates(measured):
    """The figures that were measured say so; the others stay as they were."""
    old = load_profile("generic-x86-64")
    new = with_measurements(old, {**measured, "temperature_c": 41.0}, date="2026-11-21")

    assert new.fp32_gflops.value == measured["fp32_gflops"]
    assert (new.fp32_gflops.kind, new.fp32_gflops.date) == ("measured", "2026-11-21")
    assert new.memory_mib == old.memory_mib
    assert new.title == old.title


def test_an_implausible_measurement_is_refused():
    """A rate of nothing is a fault of the measurement, not a fact of the board."""
    with pytest.raises(ProfileError, match="`fp32_gflops` is 0"):
        with_measurements(load_profile("pi-4-2gb"), {"fp32_gflops": 0.0}, date="2026-11-21")


def test_the_profile_of_this_machine_can_be_kept(measured, tmp_path):
    """It passes the checks that every profile must pass, and is found by its name afterwards."""
    profile = profile_of_this_machine(measured, name="this-box", date="2026-11-21")
    path = tmp_path / "this-box.toml"
    path.write_text(format_profile(profile), encoding="utf-8")

    assert read_profile(path) == profile
    assert import_profile(path, folder=tmp_path / "kept") == load_profile(
        "this-box", folder=tmp_path / "kept"
    )
    assert profile.memory_mib.value < profile.ram_mib.value
    assert profile.python == (f"3.{sys.version_info.minor}",)


def zone(root: Path, number: int, kind: str, reading: str) -> None:
    """Lay out one thermal zone."""
    folder = root / "sys/class/thermal" / f"thermal_zone{number}"
    folder.mkdir(parents=True)
    (folder / "type").write_text(kind + "\n")
    (folder / "temp").write_text(reading + "\n")


def test_the_processors_zone_is_the_one_that_counts(tmp_path):
    """On a Jetson the zone called CPU-therm comes after others; a Pi has only cpu-thermal."""
    zone(tmp_path, 0, "GPU-therm", "39000")
    zone(tmp_path, 2, "CPU-therm", "44500")
    zone(tmp_path, 10, "cpu-other", "50000")

    assert temperature_c(root=tmp_path) == 44.5


def test_without_a_processors_zone_the_first_counts(tmp_path):
    """A generic box may call its zones as it likes; one that cannot be read is left out."""
    zone(tmp_path, 0, "acpitz", "error")
    zone(tmp_path, 1, "soc", "30000")

    assert temperature_c(root=tmp_path) == 30.0
    assert temperature_c(root=tmp_path / "nowhere") is None


def test_clock_and_temperature_are_told_where_the_system_tells(tmp_path):
    """The fastest core's highest frequency in GHz; without these files the names are left out."""
    zone(tmp_path, 0, "cpu-thermal", "51540")
    for cpu, khz in enumerate((1_500_000, 1_800_000)):
        folder = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/cpufreq"
        folder.mkdir(parents=True)
        (folder / "cpuinfo_max_freq").write_text(f"{khz}\n")
    told = measure(seconds=0.02, threads=1, root=tmp_path)
    silent = measure(seconds=0.02, threads=1, root=tmp_path / "nowhere")

    assert (told["clock_ghz"], told["temperature_c"]) == (1.8, 51.54)
    assert silent.keys() == told.keys() - {"clock_ghz", "temperature_c"}


def test_measuring_fits_into_the_smallest_boards_budget():
    """The peak of a measurement is within the default budget of a Pi Zero 2 W."""
    script = (
        "from profiles.selftest import measure; from profiles.memory import peak_rss_mib\n"
        "measure(seconds=0.2, threads=1); print(peak_rss_mib())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert float(done.stdout) < load_profile("pi-zero-2w").memory_mib.value
