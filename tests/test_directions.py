"""Shared curvature and directions beside plain noise, against references in float64."""

from dataclasses import replace

import numpy as np
import pytest

from edge_agent.bundle import Tensor
from edge_agent.curvature import Shared, groups_of
from edge_agent.directions import LowRank
from edge_agent.estimator import estimate
from edge_agent.grid import Segment, Term, bf16_to_float, inverse_root, move, perturb, plan_segments, snap
from edge_agent.noise import NoiseKey, values
from edge_agent.optimizer import METHODS
from edge_agent.plan import RoundPlan
from edge_agent.replay import Replica, apply_record
from edge_agent.state import load_replica, save_replica
from edge_agent.tally import add_runs
from edge_agent.wire import RoundRecord

SIZE = 1280
TENSORS = ((0, 640), (640, 1000), (1008, 1280))  # two matrices, a gap, a vector
WIDTHS = (64, 36, 272)
SHARING = ("hiso-row", "hiso-tensor", "hiso-block")
NEW = (*SHARING, "zo-scaled", "zo-lowrank", "zo-guided", "zo-average")
RATE = 0.01


def replica(seed: int = 5) -> Replica:
    """Two grids, and tensors whose weights differ tenfold in size."""
    weights = np.random.default_rng(seed).normal(0, 0.1, SIZE).astype(np.float32)
    weights[640:1000] *= 10
    segments = plan_segments(weights, [(0, 640), (640, 1008), (1008, SIZE)])
    snap(weights, segments)
    assert len(segments) > 1
    return Replica(weights, segments, tensors=TENSORS, widths=WIDTHS)


def plan(method: str, round_: int = 0, *, perturbations: int = 5, steps: int = 1, **constants) -> RoundPlan:
    rule = METHODS[method]
    return RoundPlan(round_, 7, rule.code, steps, perturbations, 1e-3, RATE, rule.values(constants))


def record(asked: RoundPlan, scalars: np.ndarray) -> RoundRecord:
    return RoundRecord(asked, 1, False, scalars.astype(np.float32).reshape(asked.steps, -1), 0)


def losses(here: Replica, slopes: np.ndarray):
    """For every batch the same loss: a slope from where the weights are now."""
    start = here.weights.astype(np.float64)

    def loss() -> float:
        return float(slopes @ (here.weights.astype(np.float64) - start))

    return lambda batch: loss


def group_of_each(method: str) -> np.ndarray:
    """The number of each weight's group, counted here once more; the gap goes with what is before it."""
    rows = {"hiso-row": WIDTHS}.get(method, (640, 360, 272))
    groups, number = np.zeros(SIZE, int), -1
    for (start, stop), width in zip(TENSORS, rows, strict=True):
        for first in range(start, stop, width):
            number += 1
            groups[first:] = number
    return groups


def directions(method: str, asked: RoundPlan, memory: np.ndarray) -> np.ndarray:
    """A round's directions in float64, without curvature."""
    keys = asked.keys(0)
    z = np.stack([values(key, 0, SIZE) for key in keys]).astype(np.float64)
    if method == "zo-guided":
        z[0] = np.where(memory == 0, z[0], np.sign(memory))
    if method == "zo-lowrank":
        rank = int(METHODS[method].named(asked.constants)["rank"])
        made = LowRank(rank, TENSORS, WIDTHS)
        z = np.stack([made(key, 0, SIZE) for key in keys]) / np.sqrt(rank)
    return z


class Reference:
    """What a method says, in float64 and as plainly as can be."""

    def __init__(self, method: str, weights: np.ndarray) -> None:
        self.method = method
        self.w = weights.astype(np.float64)
        self.average = self.w.copy()
        self.memory = np.zeros(SIZE)
        self.groups = group_of_each(method)
        self.h = np.ones(self.groups.max() + 1)

    def step(self, asked: RoundPlan, g: np.ndarray) -> None:
        c = METHODS[self.method].named(asked.constants)
        z = directions(self.method, asked, self.memory)
        if self.method == "zo-scaled":
            squares = np.array([(self.w[self.groups == n] ** 2).mean() for n in range(3)])
            z *= np.sqrt(np.maximum(squares / (self.w**2).mean(), c["floor"]))[self.groups]
        elif self.method in SHARING:
            z /= np.sqrt(self.h)[self.groups]
        if self.method == "hiso-block":
            moves = np.zeros(SIZE)
            for block in range(3):
                place = (asked.round * len(g) + block) % 3
                start, stop = TENSORS[place]
                own = range(block, len(g), 3)
                moves[start:stop] = g[own] @ z[own][:, start:stop] / len(own)
            seen = [(moves[start:stop] ** 2).mean() for start, stop in TENSORS]
        else:
            moves = g @ z / len(g)
            seen = [(moves[self.groups == n] ** 2).mean() for n in range(len(self.h))]
        self.w -= RATE * moves
        self.memory = c.get("memory", 0) * self.memory + moves
        self.average = c.get("average", 0) * self.average + (1 - c.get("average", 0)) * self.w
        if self.method in SHARING:
            self.h = np.maximum((1 - c["nu"]) * self.h + c["nu"] * np.array(seen), c["floor"])


@pytest.mark.parametrize("method", NEW)
def test_replay_agrees_with_the_rule_in_float64(method):
    """Twelve rounds stay within the grid's rounding and bfloat16's of a reference."""
    here, rng = replica(), np.random.default_rng(3)
    reference = Reference(method, here.weights)
    for round_ in range(12):
        asked = plan(method, round_)
        g = rng.normal(0, 2, 5).astype(np.float32)
        apply_record(here, record(asked, g), check=False)
        reference.step(asked, g.astype(np.float64))

    moved = np.abs(reference.w - replica().weights).max()
    assert moved > 0.02
    # A curvature is rounded to bfloat16's 0.4 % where it divides; a guide's sign may differ where the
    # memory is near 0.
    rounded = METHODS[method].curvature != ""
    off = np.abs(here.weights - reference.w)
    if method == "zo-guided":
        assert (off > 3e-5).mean() < 0.005
    else:
        assert off.max() < (0.005 * moved if rounded else 3e-5)
    if method in SHARING:
        assert np.allclose(here.shared.values, reference.h, rtol=0.02)
        assert len(reference.h) == (21 if method == "hiso-row" else 3)
        assert np.ptp(reference.h) > 0.01
    if method == "zo-average":
        assert np.abs(here.evaluated() - reference.average).max() < 3e-5
    assert (here.evaluated() is here.weights) == (method != "zo-average")


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("method", NEW)
def test_the_compiled_kernel_gives_the_bits_of_numpy(method, steps, monkeypatch):
    """Estimates and replay of four rounds end with one digest whether the library computes or numpy."""
    if METHODS[method].stateful_steps and steps > 1:
        pytest.skip("one step a round")
    slopes = np.random.default_rng(1).normal(0, 3, SIZE)
    digests = []
    for kernel in ("numpy", ""):
        monkeypatch.setenv("SCALARFED_KERNEL", kernel)
        here = replica()
        for round_ in range(4):
            asked = plan(method, round_, steps=steps)
            before = here.digest()
            made = estimate(here, asked, losses(here, slopes), central=True)
            assert here.digest() == before
            apply_record(here, record(asked, made.scalars), check=False)
        digests.append((here.digest(), made.scalars.tobytes()))

    assert digests[0] == digests[1]


@pytest.mark.parametrize("threads", [1, 2])
def test_curvature_by_pieces_moves_as_an_array_of_it_does(threads):
    """600,000 weights on two grids: perturbations and moves have the same bits, kernel or not."""
    size, rng = 600_000, np.random.default_rng(2)
    start = rng.normal(0, 0.1, size).astype(np.float32)
    segments = [Segment(0, 33_333, 2), Segment(33_333, size, 4)]
    snap(start, segments)
    shared = groups_of(((0, size),), (100,), size)
    shared.values[:] = rng.uniform(0.01, 100, size // 100)
    asked = plan("hiso-row")
    ends = []
    for curvature in (shared, np.ascontiguousarray(shared[0:size])):
        weights, keys = start.copy(), asked.keys(0)
        perturb(weights, segments, [Term(keys[0], 1)], epsilon=0.01, curvature=curvature, threads=threads)
        scalars = np.arange(5, dtype=np.float32)
        move(
            weights, segments, keys, scalars, rate=0.01, limit=1 << 20, direction=1, curvature=curvature,
            threads=threads,
        )  # fmt: skip
        ends.append(weights)
    assert np.array_equal(*ends)
    assert np.abs(ends[0] - start).max() > 0.01


@pytest.mark.parametrize("method", ["hiso-row", "hiso-tensor", "zo-average", "zo-guided"])
def test_what_is_remembered_survives_a_power_cut(method, tmp_path):
    """Loaded again, a replica judges the same weights and goes on to the same bits."""
    here = replica()
    for round_ in range(3):
        apply_record(here, record(plan(method, round_), np.arange(1, 6)), check=False)
    path = tmp_path / "replica.state"
    save_replica(path, here, bundle_identity="b" * 64, run="run")
    again = load_replica(path, replica(), bundle_identity="b" * 64, run="run")

    assert np.array_equal(again.evaluated(), here.evaluated())
    for side in (here, again):
        apply_record(side, record(plan(method, 3), np.arange(5)), check=False)
    assert again.digest() == here.digest()
    groups = 0 if here.shared is None else here.shared.values.size
    beyond = METHODS[method].bytes_beyond(SIZE, groups) - 8 * groups  # where they begin is not saved
    assert path.stat().st_size == pytest.approx(4 * SIZE + beyond, abs=160)


def test_a_changed_curvature_of_a_row_is_another_digest():
    """The digest covers shared curvature."""
    here = replica()
    apply_record(here, record(plan("hiso-row"), np.ones(5)), check=False)
    digest = here.digest()
    here.shared.values[13] *= np.float32(1.01)
    assert here.digest() != digest


def test_pieces_of_shared_curvature_equal_the_whole():
    """Any piece holds what stands at that place in the array of all."""
    groups = groups_of(TENSORS, WIDTHS, SIZE)
    groups.values[:] = np.random.default_rng(0).uniform(0.01, 100, 21)
    whole = np.repeat(groups.values, np.diff(np.append(groups.starts, SIZE)))
    assert np.allclose(bf16_to_float(groups[0:SIZE]), whole, rtol=0.004)
    for start, stop in ((0, 1), (63, 65), (640, 1008), (999, 1280), (1100, 1101)):
        assert np.array_equal(groups[start:stop], groups[0:SIZE][start:stop])


def test_probes_of_blocks_measure_what_means_over_blocks_do_not():
    """Where squared slopes differ thirtyfold, h of probed blocks does by its third root; else hardly.

    With Dx = G u / sqrt(h) and G = |slope| / sqrt(h), h settles where it is |slope|^2 / (P h^2).
    """
    slopes = np.zeros(SIZE)
    for (start, stop), size in zip(TENSORS, (1.0, 30.0, 900.0), strict=True):
        slopes[start:stop] = np.sqrt(size / (stop - start))
    found = {}
    for method in ("hiso-block", "hiso-tensor"):
        here = replica()
        for round_ in range(60):
            asked = replace(plan(method, round_, perturbations=6, nu=0.1), learning_rate=0.0)
            here.prepare(asked.method)
            made = estimate(here, asked, losses(here, slopes), central=True)
            apply_record(here, record(asked, made.scalars), check=False)
        found[method] = here.shared.values
    ratios = found["hiso-block"][1:] / found["hiso-block"][:-1]
    assert ratios == pytest.approx(30 ** (1 / 3), rel=0.4)
    assert found["hiso-tensor"].max() < 1.3 * found["hiso-tensor"].min()


def test_noise_of_low_rank_is_what_it_says():
    """Over a matrix the direction has rank 2 exactly, elsewhere it is noise; pieces equal the whole."""
    made = LowRank(2, TENSORS, WIDTHS)
    key = NoiseKey(1, 2, 3, 4)
    whole = made(key, 0, SIZE)
    assert np.linalg.matrix_rank(whole[:640].reshape(10, 64)) == 2
    assert np.linalg.matrix_rank(whole[640:1000].reshape(10, 36)) == 2
    vectors = [made(NoiseKey(1, 2, 3, number), 1008, 272) for number in range(10)]
    assert all(1.5 < vector.var() < 2.5 for vector in vectors)  # a row times one factor has 0 to 8
    for start, size in ((0, 1), (63, 2), (100, 700), (630, 20), (990, 100), (1270, 10)):
        assert np.array_equal(made(key, start, size), whole[start : start + size])
    other = made(key._replace(perturbation=5), 0, SIZE)
    assert abs(np.corrcoef(whole, other)[0, 1]) < 0.2


def test_low_rank_estimates_are_unbiased():
    """Of 20,000 estimates along products u v' the mean lies within four standard errors of the gradient.

    Of eight coordinates the largest is looked at: three would fail by chance once in 46 tests.
    """
    gradient, count = np.linspace(-1, 1, 8), 20_000
    made = LowRank(1, ((0, 8),), (4,))
    z = np.stack([made(NoiseKey(11, n // 20, 0, n % 20), 0, 8) for n in range(count)]).astype(np.float64)
    estimates = (z @ gradient)[:, None] * z
    deviation = np.abs(estimates.mean(0) - gradient) / (estimates.std(0) / np.sqrt(count))

    assert np.linalg.matrix_rank(z[0].reshape(2, 4)) <= 1
    assert np.allclose(z.var(0), 1, atol=0.03)
    assert deviation.max() < 4
    assert np.sqrt((deviation**2).mean()) < 1.6


def test_scaled_noise_is_as_large_as_the_weights():
    """Each tensor is perturbed in proportion to the root mean square of its weights; none stands still."""
    here = replica()
    here.weights[1008:] = 0.0
    before, seen = here.weights.copy(), []

    def loss() -> float:
        seen.append(here.weights - before)
        return 0.0

    estimate(here, replace(plan("zo-scaled"), epsilon=0.01), lambda batch: loss, central=True)
    found = [np.sqrt((np.stack(seen)[:, start:stop] ** 2).mean()) for start, stop in TENSORS]
    sizes = [np.sqrt((before[start:stop] ** 2).mean()) for start, stop in TENSORS]
    overall = np.sqrt((before**2).mean())

    assert found[0] / found[1] == pytest.approx(sizes[0] / sizes[1], rel=0.05)
    assert found[1] == pytest.approx(0.01 * sizes[1] / overall, rel=0.05)
    assert found[2] == pytest.approx(0.01 * 0.1, rel=0.05)  # the root of the floor


def test_the_guide_is_the_way_of_the_past():
    """On a slope that stays, the first direction of later rounds points down it more than noise does."""
    here, slope = replica(), np.random.default_rng(1).normal(size=SIZE)
    shares = []
    for round_ in range(20):
        asked = replace(plan("zo-guided", round_), learning_rate=1e-4)
        made = estimate(here, asked, losses(here, slope), central=True)
        shares.append(np.abs(made.scalars[0]))
        apply_record(here, record(asked, made.scalars), check=False)
    first, others = np.array(shares)[5:, 0], np.array(shares)[5:, 1:]

    assert first.mean() > 3 * others.mean()


def test_runs_of_whole_numbers_are_summed_and_no_others():
    """Each run's sum is added to its total; floats, whose sum depends on the order, are refused."""
    totals = np.array([1, 10], np.int64)
    add_runs(totals, np.array([2, 3, 2**52], np.int64), np.array([0, 2, 3], np.int64))
    assert totals.tolist() == [6, 10 + 2**52]
    with pytest.raises(ValueError, match="float64"):
        add_runs(totals, np.ones(3), np.array([0, 2, 3], np.int64))


def test_rows_of_a_tensor_are_its_first_axis():
    """A matrix has a row a neuron, a convolution one a channel, a vector one in all."""
    assert [Tensor("w", shape, 0).row for shape in ((10, 64), (8, 3, 5, 5), (16,), ())] == [64, 75, 16, 1]


def test_a_curvature_of_one_is_nearly_plain_noise():
    """The approximate root of 1 is 1 to 0.07 %."""
    made: Shared = groups_of((), (), 16)
    assert np.allclose(inverse_root(made[0:16]), 1, rtol=7e-4)
