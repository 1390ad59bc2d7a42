"""The compiled kernel has numpy's bits on every path, at odd sizes, borders and thread counts."""

import itertools
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_agent import digest, grid
from edge_agent.grid import RESERVE_STEPS, Segment
from edge_agent.native.build import SOURCES, build
from edge_agent.native.kernel import Kernel, find_kernel, kernel_name, load_kernels
from edge_agent.native.library import library_name
from edge_agent.noise import NoiseKey
from edge_agent.plan import RoundPlan
from edge_agent.replay import Replica, apply_record
from edge_agent.wire import RoundRecord
from profiles.errors import ConfigError

PATHS = ["scalar", "neon", "dotprod"]
if platform.machine().lower() in ("x86_64", "amd64"):
    PATHS = ["scalar", "sse2", "avx2", "avx512", "avx512vnni"]
SIZES = [16, 112, 128, 144, 8192, 8208, 70_000]


@pytest.fixture(scope="session")
def library() -> Path:
    """The checkout's kernel, compiled anew where a source is younger."""
    target = SOURCES / library_name()
    newest = max(
        source.stat().st_mtime for source in SOURCES.iterdir() if source.suffix in (".c", ".h", ".py")
    )
    if not target.exists() or target.stat().st_mtime < newest:
        try:
            build(target)
        except FileNotFoundError as error:
            pytest.skip(str(error))
        load_kernels.cache_clear()
    return target


@pytest.fixture(params=PATHS)
def kernel(library: Path, request: pytest.FixtureRequest) -> Kernel:
    """Each path in turn."""
    found = load_kernels(library)
    if request.param not in found:
        pytest.skip(f"this processor has no {request.param}")
    return found[request.param]


@pytest.fixture(autouse=True)
def _numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the package itself computes here is the reference."""
    monkeypatch.setenv("SCALARFED_KERNEL", "numpy")


def borders(size: int) -> list[Segment]:
    """Return segments of different grids whose borders lie on multiples of 16, not of chunks."""
    cuts = sorted({0, size} | {cut for cut in (16, 48, 160, 8208, 20_000) if cut < size})
    return [Segment(a, b, 2 + 3 * (number % 3)) for number, (a, b) in enumerate(itertools.pairwise(cuts))]


def random_weights(size: int, segments: list[Segment]) -> NDArray[np.float32]:
    """Return weights on their grids, of which some lie at the very edge."""
    weights = np.random.default_rng(size).normal(0, 0.5, size).astype(np.float32)
    weights[::7] *= 20
    grid.snap(weights, segments)
    return weights


def random_curvature(size: int) -> NDArray[np.uint16]:
    """Return bfloat16 bits from 1e-4 to 1e4, with extreme ones among them."""
    h = 10.0 ** np.random.default_rng(1).uniform(-4, 4, size).astype(np.float32)
    h[::11], h[5::13] = 1e-30, 1e30
    return (h.view(np.uint32) >> np.uint32(16)).astype(np.uint16)


def same_bits(a: NDArray[np.generic], b: NDArray[np.generic]) -> bool:
    """Tell whether two arrays are equal bit for bit, signs of zero included."""
    return a.tobytes() == b.tobytes()


@pytest.mark.parametrize("curved", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_perturb_has_numpys_bits(kernel: Kernel, size: int, curved: bool):
    """One pass of one or two directions, clamped ones among them, gives what numpy gives."""
    segments = borders(size)
    curvature = random_curvature(size) if curved else None
    keys = [NoiseKey(2**64 - 1, 7, 0, number) for number in range(3, 6)]
    for asked in [(0, 1), (2, -2), (0, -1, 1), (1, 1, -3)]:
        ours, theirs = random_weights(size, segments), random_weights(size, segments)
        for epsilon in (1e-3, 0.7):
            how = {"epsilon": epsilon, "curvature": curvature}
            kernel.displacer(ours, segments, keys, **how)(*asked)
            grid.displacer(theirs, segments, keys, **how)(*asked)

        assert same_bits(ours, theirs)


@pytest.mark.parametrize("curved", [False, True])
@pytest.mark.parametrize("perturbations", [1, 2, 5])
@pytest.mark.parametrize("size", SIZES)
def test_move_has_numpys_bits(kernel: Kernel, size: int, perturbations: int, curved: bool):
    """A private move and its undoing give what numpy gives, and end where they began."""
    segments = borders(size)
    curvature = random_curvature(size) if curved else None
    start = random_weights(size, segments)
    ours, theirs = start.copy(), start.copy()
    keys = [NoiseKey(5, 1, 2, number) for number in range(perturbations)]
    scalars = np.linspace(-3, 2, perturbations).astype(np.float32)
    wholes, unit = grid.whole_scalars(scalars)
    for direction in (1, -1):
        amount = grid.finite(1e-2 * unit / perturbations)
        kernel.update(
            ours,
            segments,
            [keys],
            [wholes],
            [amount],
            largest_move=RESERVE_STEPS // 3,
            largest_weight=1 << 26,
            direction=direction,
            curvature=curvature,
        )
        grid.move(
            theirs,
            segments,
            keys,
            list(scalars),
            rate=1e-2,
            limit=RESERVE_STEPS // 3,
            direction=direction,
            curvature=curvature,
        )

        assert same_bits(ours, theirs)
        assert same_bits(ours, start) == (direction == -1)


def replay(
    size: int, *, method: int, steps: int, perturbations: int, rounds: int
) -> tuple[Replica, list[int]]:
    """Return a replica after some records of random scalars, with its digests."""
    segments = borders(size)
    replica = Replica(random_weights(size, segments), segments)
    rng = np.random.default_rng(3)
    digests = []
    for number in range(rounds):
        constants = (0.05, 1e-4, 0.0) if method == 2 else (0.9,)
        plan = RoundPlan(number, 11, method, steps, perturbations, 1e-3, 0.3, constants)
        scalars = rng.normal(0, 3, (steps, perturbations)).astype(np.float32) * (number != 1)
        apply_record(replica, RoundRecord(plan, 0, False, scalars, 0), check=False)
        digests.append(replica.digest())
    return replica, digests


@pytest.mark.parametrize(("method", "steps", "perturbations"), [(1, 1, 1), (1, 3, 4), (2, 1, 16), (2, 3, 5)])
@pytest.mark.parametrize("size", [16, 144, 30_000])
def test_replay_has_numpys_bits(
    kernel: Kernel,
    monkeypatch: pytest.MonkeyPatch,
    size: int,
    method: int,
    steps: int,
    perturbations: int,
):
    """Ten records, one of zeros, end in numpy's weights and curvature."""
    how = {"method": method, "steps": steps, "perturbations": perturbations, "rounds": 10}
    theirs, expected = replay(size, **how)
    monkeypatch.setenv("SCALARFED_KERNEL", kernel.name)
    ours, digests = replay(size, **how)

    assert digests == expected
    assert same_bits(ours.weights, theirs.weights)
    assert ours.curvature is None or same_bits(ours.curvature, theirs.curvature)


def test_fold_has_numpys_bits(kernel: Kernel):
    """The digest's sum agrees at lengths below, at and beyond blocks, and over threads."""
    words = np.random.default_rng(0).integers(0, 2**32, 1_200_001, dtype=np.uint32)

    for size in (1, 16, 1023, 1024, 1025, 70_000, words.size):
        assert kernel.fold(words[:size]) == digest.fold(words[:size])
    assert kernel.fold(words, threads=3) == digest.fold(words)


def test_threads_change_no_bit(kernel: Kernel):
    """Two and three threads give the bits of one, at a size that they really share."""
    size = 1_200_016
    segments = [Segment(0, 500_000, 2), Segment(500_000, size, 5)]
    keys = [NoiseKey(1, 1, 1, number) for number in range(2)]
    wholes = [[5, -16256]]
    results = []
    for threads in (1, 2, 3):
        weights, curvature = random_weights(size, segments), random_curvature(size)
        how = {"epsilon": 1e-3, "curvature": curvature, "threads": threads}
        kernel.displacer(weights, segments, keys, **how)(0, 1, -1)
        limits = {"largest_move": 1 << 21, "largest_weight": 3 << 22, "direction": 1}
        kernel.update(
            weights,
            segments,
            [keys],
            wholes,
            [np.float32(1e-6)],
            curvature=curvature,
            threads=threads,
            **limits,
        )
        results.append(weights)

    assert same_bits(results[0], results[1])
    assert same_bits(results[0], results[2])


def test_kernel_refuses_memory_that_it_must_not_write_to(kernel: Kernel):
    """Wrong sizes, types, strides, unaligned and read-only memory are refused before a bit changes."""
    keys, segments = [NoiseKey(0, 0, 0, 0)], [Segment(0, 32, 2)]
    locked = np.zeros(32, np.float32)
    locked.flags.writeable = False
    unaligned = np.zeros(129, np.uint8)[1:].view(np.float32)
    for weights in (np.zeros(32), np.zeros(64, np.float32)[::2], locked, unaligned, np.zeros(16, np.float32)):
        with pytest.raises(ValueError, match=r"weights|segments"):
            kernel.displacer(weights, segments, keys, epsilon=1e-3, curvature=None)
    weights, short = np.zeros(32, np.float32), np.ones(16, np.uint16)
    with pytest.raises(ValueError, match="curvature"):
        kernel.displacer(weights, segments, keys, epsilon=1e-3, curvature=short)


def test_kernel_reads_no_key_beyond_its_keys(kernel: Kernel):
    """A number without a key, or without one to follow it, is refused before a bit changes."""
    keys, weights = [NoiseKey(0, 0, 0, number) for number in range(2)], np.zeros(32, np.float32)
    displace = kernel.displacer(weights, [Segment(0, 32, 2)], keys, epsilon=1e-3, curvature=None)
    for asked in [(2, 1), (-1, 1), (1, 1, 1), (-1, 1, 1)]:
        with pytest.raises(ValueError, match="no number"):
            displace(*asked)

    assert not weights.any()
    displace(1, 1)
    assert weights.any()


def test_variable_chooses_the_path(monkeypatch: pytest.MonkeyPatch):
    """SCALARFED_KERNEL=numpy means no kernel; a name that is not there is an error with a remedy."""
    assert find_kernel() is None
    assert kernel_name() == "numpy"
    monkeypatch.setenv("SCALARFED_KERNEL", "avx1024")
    with pytest.raises(ConfigError, match="avx1024") as caught:
        find_kernel()
    assert "edge_agent.native.build" in caught.value.hint


def test_no_library_means_numpy(tmp_path: Path):
    """A missing or broken library is no error: there are simply no paths."""
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")

    assert load_kernels(tmp_path / "missing.so") == {}
    assert load_kernels(broken) == {}


def test_build_names_the_compilers_complaint(tmp_path: Path):
    """A compiler that fails raises with its words, and leaves no half library behind."""
    with pytest.raises(subprocess.CalledProcessError) as caught:
        build(tmp_path / library_name(), compiler=[sys.executable, "-c", "raise SystemExit('no such flag')"])

    assert "no such flag" in caught.value.stderr
    assert not list(tmp_path.iterdir())


def cycle(kernel: Kernel, size: int, cycles: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Perturb, cross over and undo, with another key each time; return the weights before and after."""
    segments = [Segment(0, size // 32 * 16, 2), Segment(size // 32 * 16, size, 6)]
    before = np.random.default_rng(0).normal(0, 1, size).astype(np.float32)
    before[::100] *= 100
    grid.snap(before, segments)
    weights, curvature = before.copy(), random_curvature(size)
    for number in range(cycles // 2):
        keys = [NoiseKey(0, number, 0, perturbation) for perturbation in range(2)]
        how = {"epsilon": 1e-3, "curvature": curvature if number % 2 else None}
        displace = kernel.displacer(weights, segments, keys, **how)
        displace(0, 1)
        displace(0, -1, 1)
        displace(1, -1)
    return before, weights


def test_perturbations_leave_no_trace(kernel: Kernel):
    """200 perturb and undo cycles leave every bit of 100,000 weights as it was."""
    before, after = cycle(kernel, 100_000, 200)

    assert same_bits(before, after)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ten_thousand_perturbations_leave_no_trace_in_ten_million_weights(library: Path):
    """10,000 perturb and undo cycles on the best path leave every bit of 10 million weights as it was."""
    before, after = cycle(list(load_kernels(library).values())[-1], 10_000_000, 10_000)

    assert same_bits(before, after)
