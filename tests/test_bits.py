"""The bits that every release must keep: noise, grid, replay and digest on fixed inputs."""

import numpy as np
import pytest

from edge_agent.grid import Segment, Term, bf16_to_float, inverse_root, perturb, rounding_words, whole_scalars
from edge_agent.noise import NoiseKey, hash_words, values
from edge_agent.plan import RoundPlan
from edge_agent.replay import Replica, apply_record
from edge_agent.wire import RoundRecord

KEY = NoiseKey(1, 2, 3, 4)


def reference_value(key: NoiseKey, element: int) -> int:
    """Return one value of a perturbation straight from the layout's definition."""
    chunk, rest = divmod(element, 128)
    plane, lane = divmod(rest, 16)
    word = int(hash_words(key, 16 * chunk + lane, 1)[0])
    return ((word >> (4 * plane)) & 15).bit_count() - 2


def test_hash_words_are_golden():
    """The raw words of a key never change."""
    assert hash_words(KEY, 0, 2).tolist() == [0x69D59DB1, 0x2B29F5DC]


def test_values_are_golden():
    """The noise of a key never changes, across the border of a word block too."""
    assert values(KEY, 0, 16).tolist() == [-1, 0, 0, 1, 1, -2, 1, -1, -1, -1, -1, 1, 1, 1, 0, -2]
    assert values(KEY, 8190, 6).tolist() == [0, -1, 0, 0, 0, -1]


def test_values_follow_the_definition():
    """The vectorised noise agrees with one nibble at a time, and pieces equal the whole."""
    elements = [0, 1, 15, 16, 127, 128, 255, 1000, 8191, 8192, 20_000]

    assert [int(values(KEY, element, 1)[0]) for element in elements] == [
        reference_value(KEY, element) for element in elements
    ]
    assert (values(KEY, 77, 9000) == values(KEY, 0, 9077)[77:]).all()


def test_values_have_zero_mean_unit_variance_and_kurtosis_2_5():
    """2**22 values have the binomial's moments within five standard errors."""
    z = values(KEY, 0, 1 << 22).astype(float)
    error = 1 / np.sqrt(z.size)

    assert abs(z.mean()) < 5 * error
    assert abs((z**2).mean() - 1) < 5 * np.sqrt(1.5) * error
    assert abs((z**4).mean() - 2.5) < 5 * np.sqrt(15.25) * error


@pytest.mark.parametrize("field", NoiseKey._fields)
def test_neighbouring_keys_are_uncorrelated(field: str):
    """The top Gram eigenvalue of 512 perturbations with successive keys is that of independent ones.

    The Marchenko-Pastur edge for a square matrix is 4; raw sequential keys gave 840.
    """
    keys = [KEY._replace(**{field: number}) for number in range(512)]
    z = np.stack([values(key, 0, 512) for key in keys]).astype(np.float64)

    assert np.linalg.eigvalsh(z @ z.T / 512)[-1] < 4.3


def test_rounding_words_are_uniform_and_their_halves_unrelated():
    """Updates are rounded by the upper bits and curvature by the lower: both uniform, not correlated."""
    words = rounding_words(KEY, 0, 1 << 20)
    upper, lower = words >> np.uint32(16), words & np.uint32(0xFFFF)
    error = 2**16 / np.sqrt(12 * words.size)

    assert abs(upper.mean() - 32767.5) < 5 * error
    assert abs(lower.mean() - 32767.5) < 5 * error
    assert abs(np.corrcoef(upper, lower)[0, 1]) < 5 / np.sqrt(words.size)


def test_inverse_root_is_as_good_as_bfloat16_can_tell():
    """1 / sqrt(h) is within 0.066 % for every normal bfloat16."""
    curvature = np.arange(0x0080, 0x7F80, dtype=np.uint16)
    exact = 1 / np.sqrt(bf16_to_float(curvature).astype(np.float64))

    assert np.abs(inverse_root(curvature) / exact - 1).max() < 6.6e-4


def test_whole_scalars_stay_within_half_a_unit():
    """Scalars become whole numbers of a unit, the largest 16256, none off by more than half of one."""
    scalars = np.array([3.0, -1.0, 1e-3, 0.0], np.float32)
    wholes, unit = whole_scalars(scalars)

    assert np.abs(wholes).max() == 16256
    assert np.abs(np.array(wholes) * unit - scalars).max() <= unit / 2
    assert whole_scalars(np.zeros(3, np.float32))[1] == 0.0


def test_perturb_rounds_to_whole_steps_of_each_segment():
    """A perturbation is epsilon * z rounded to the segment's grid, and clamped to an eighth of its range."""
    segments = [Segment(0, 48, 2), Segment(48, 160, 12)]
    weights = np.zeros(160, np.float32)
    perturb(weights, segments, [Term(KEY, 1)], epsilon=1e-2)
    z = values(KEY, 0, 160)

    assert np.array_equal(weights[:48], np.rint(z[:48] * np.float32(1e-2 * 2**22)) * np.float32(2**-22))
    assert np.array_equal(weights[48:], np.rint(z[48:] * np.float32(1e-2 * 2**12)) * np.float32(2**-12))
    perturb(weights, segments, [Term(KEY, -1), Term(KEY, 1)], epsilon=1e-2)
    perturb(weights, segments, [Term(KEY, -1)], epsilon=1e-2)
    perturb(weights, segments, [Term(KEY, 1)], epsilon=1e6)
    assert np.abs(weights).max() == 2.0 ** (12 - 3)


def test_replay_is_golden():
    """Three records of two local steps with learned curvature end in fixed digests."""
    replica = Replica(np.zeros(3000, np.float32), [Segment(0, 1008, 2), Segment(1008, 3000, 4)])
    digests = []
    for number in range(3):
        plan = RoundPlan(number, 99, 2, 2, 3, 1e-3, 1e-2, (0.05, 1e-4, 0.0))
        scalars = np.array([[0.5, -1.25, 3], [2, 0, -0.125]], np.float32) * (number + 1)
        apply_record(replica, RoundRecord(plan, 0, False, scalars, 0), check=False)
        digests.append(replica.digest())

    assert digests == [0xF8209205A4FDC094, 0xAF8BADC4526140D3, 0x9E2A9FF899357A4C]
