"""Tests of edge_agent.grid: exact undo, rounding, headroom."""

import numpy as np
import pytest

from edge_agent.grid import (
    RESERVE_STEPS,
    WEIGHT_STEPS,
    Segment,
    Term,
    move,
    perturb,
    plan_segments,
    round_update,
    rounding_words,
    snap,
    step_scale,
    whole_scalars,
)
from edge_agent.noise import NoiseKey, values

SIZE = 5000


def key(number: int) -> NoiseKey:
    return NoiseKey(1, number, 0, 0)


@pytest.fixture
def curvature():
    rng = np.random.default_rng(3)
    values = rng.uniform(1e-4, 50, SIZE).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


@pytest.fixture
def flat():
    """Weights on three grids, with a border inside a noise block."""
    rng = np.random.default_rng(2)
    weights = rng.normal(0, 0.1, SIZE).astype(np.float32)
    weights[1616:3216] *= 300
    weights[0] = -0.0
    segments = plan_segments(weights, [(0, 1616), (1616, 3216), (3216, SIZE)])
    snap(weights, segments)
    return weights, segments


def bits(weights):
    return weights.view(np.uint32).copy()


@pytest.mark.parametrize("curved", [False, True])
def test_undo_restores_every_bit(flat, curvature, curved):
    """A thousand cycles of +1, -2, +1 perturbations leave all bits as they were."""
    weights, segments = flat
    before = bits(weights)
    options = {"epsilon": 1e-3, "curvature": curvature if curved else None}
    for number in range(1000):
        for times in (1, -2, 1):
            perturb(weights, segments, [Term(key(number), times)], **options)
    assert np.array_equal(bits(weights), before)


def test_a_perturbation_moves_weights_by_epsilon_z(flat):
    """The displacement is epsilon times the noise, to half a grid step."""
    weights, segments = flat
    before = weights.copy()
    perturb(weights, segments, [Term(key(0), 1)], epsilon=1e-3)
    expected = 1e-3 * values(key(0), 0, SIZE)
    half_step = 0.5 / np.array([step_scale(s.exponent) for s in segments for _ in range(s.stop - s.start)])
    assert np.all(np.abs(weights - before - expected) <= half_step * 1.001)


def test_undo_and_next_in_one_pass_equal_two_passes(flat, curvature):
    """Fused terms end with the bits of separate passes."""
    weights, segments = flat
    twin = weights.copy()
    perturb(weights, segments, [Term(key(0), 1)], epsilon=1e-2, curvature=curvature)
    perturb(weights, segments, [Term(key(0), -1), Term(key(1), 1)], epsilon=1e-2, curvature=curvature)
    perturb(twin, segments, [Term(key(1), 1)], epsilon=1e-2, curvature=curvature)
    assert np.array_equal(bits(weights), bits(twin))


def test_undo_is_exact_at_the_edge_of_the_headroom():
    """Weights at 3/4 of the limit with the largest perturbation come back."""
    segments = [Segment(0, 64, 2)]
    weights = np.full(64, WEIGHT_STEPS / step_scale(2), np.float32)
    weights[::2] *= -1
    before = bits(weights)
    tiny = np.full(64, 0x0080, np.uint16)  # the smallest normal h: every perturbation saturates
    for times in (1, -2, 1):
        perturb(weights, segments, [Term(key(0), times)], epsilon=1.0, curvature=tiny)
    assert np.array_equal(bits(weights), before)
    perturb(weights, segments, [Term(key(0), 1)], epsilon=1.0, curvature=tiny)
    moved = np.abs(weights - before.view(np.float32)) * step_scale(2)
    assert moved.max() == RESERVE_STEPS


def test_private_moves_are_taken_back_exactly(flat, curvature):
    """Moves made in order and taken back in reverse leave all bits as they were."""
    weights, segments = flat
    before = bits(weights)
    scalars = [np.float32(30.0), np.float32(-7.0)]
    options = {"rate": 0.05, "limit": RESERVE_STEPS // 4, "curvature": curvature}
    steps = [[NoiseKey(1, 0, step, p) for p in range(2)] for step in range(4)]
    for keys in steps:
        move(weights, segments, keys, scalars, direction=1, **options)
    assert not np.array_equal(bits(weights), before)
    for keys in reversed(steps):
        move(weights, segments, keys, scalars, direction=-1, **options)
    assert np.array_equal(bits(weights), before)


def test_update_rounding_keeps_the_mean():
    """An update of 0.01 grid steps moves weights by 0.01 steps in the mean, five standard errors wide."""
    size = 1 << 20
    moved = round_update(np.full(size, 0.01, np.float32), rounding_words(key(0), 0, size), RESERVE_STEPS)
    assert set(np.unique(moved)) == {0.0, 1.0}
    assert abs(moved.mean(dtype=np.float64) - 0.01) < 5 * np.sqrt(0.01 / size)


def test_update_rounding_does_not_follow_the_noise():
    """The random words by which weights and curvature are rounded correlate with nothing."""
    size = 1 << 20
    noise, words = values(key(0), 0, size), rounding_words(key(0), 0, size)
    dither = (words >> 9).astype(np.float64)
    curved = (words & 0xFFFF).astype(np.float64)
    for other in (noise, np.abs(noise)):
        assert abs(np.corrcoef(dither, other)[0, 1]) < 5 / np.sqrt(size)
        assert abs(np.corrcoef(curved, other)[0, 1]) < 5 / np.sqrt(size)
    for plane in range(1, 8):  # eight elements share a hash word
        assert abs(np.corrcoef(dither[16 * plane :], dither[: -16 * plane])[0, 1]) < 5 / np.sqrt(size)


def test_scalars_become_whole_numbers_to_a_thirty_thousandth():
    """The whole numbers times their unit are the scalars, to half a unit; the largest is exact."""
    scalars = np.array([3.0, -7.5, 0.001, 0.0], np.float32)
    wholes, unit = whole_scalars(scalars)
    assert np.abs(wholes).max() == 16256
    assert np.abs(np.array(wholes) * unit - scalars).max() <= unit / 2 * 1.001


def test_neighbours_with_one_grid_are_joined():
    """Spans of alike weights become one segment, so that a pass is not cut up."""
    weights = np.full(96, 0.5, np.float32)
    weights[64:] = 100
    assert plan_segments(weights, [(0, 32), (32, 64), (64, 96)]) == [Segment(0, 64, 2), Segment(64, 96, 9)]


def test_spans_with_a_gap_are_refused():
    """A span that does not begin where the last ended is a programming error."""
    with pytest.raises(ValueError, match="in order"):
        plan_segments(np.ones(64, np.float32), [(0, 16), (32, 64)])


def test_snapping_moves_weights_by_half_a_step_at_most(flat):
    """Snapping twice changes nothing: the first time put every weight on the grid."""
    weights, segments = flat
    again = weights.copy()
    snap(again, segments)
    assert np.array_equal(bits(again), bits(weights))
