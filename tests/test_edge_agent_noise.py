"""Tests of edge_agent.noise."""

import itertools

import numpy as np
import pytest

from edge_agent.noise import BLOCK, NoiseKey, hash_words, mix64, mix64_array, values

KEY = NoiseKey(seed=7, round=3, step=0, perturbation=1)


def test_mix_gives_the_published_values():
    """SplitMix64 from seed 1234567 starts with the well-known five words."""
    gamma, mask = 0x9E3779B97F4A7C15, (1 << 64) - 1
    assert [mix64((1234567 + n * gamma) & mask) for n in range(1, 6)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_arrays_are_mixed_as_integers_are():
    """The array form and the integer form of the mix agree."""
    words = [0, 1, 2**32, 2**63, 2**64 - 1]
    assert mix64_array(np.array(words, np.uint64)).tolist() == [mix64(word) for word in words]


def test_first_words_are_pinned():
    """The words are part of the log's meaning: other words are another noise version."""
    assert hash_words(KEY, 0, 4).tolist() == [336541375, 959142492, 2199339062, 3027238761]


def test_first_values_are_pinned():
    """So are the values made of them."""
    assert values(KEY, 0, 12).tolist() == [2, 0, 0, 0, 1, 2, 1, 0, -2, 0, -1, -1]


def test_a_word_far_out_is_pinned():
    """The block number enters the key: element 5,000,000 has the word it always had."""
    assert hash_words(KEY, 5_000_000, 1).tolist() == hash_words(KEY, 0, 5_000_001)[-1:].tolist()


@pytest.mark.parametrize("cut", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3000])
def test_pieces_equal_the_whole(cut):
    """Noise asked piece by piece equals noise asked at once."""
    whole = hash_words(KEY, 0, 3000)
    pieces = [hash_words(KEY, 0, cut), hash_words(KEY, cut, 3000 - cut)]
    assert np.array_equal(np.concatenate(pieces), whole)


@pytest.mark.parametrize("cut", [0, 1, 127, 128, 129, 8192, 9000])
def test_pieces_of_values_equal_the_whole(cut):
    """So do pieces of values, across chunks and blocks."""
    pieces = [values(KEY, 0, cut), values(KEY, cut, 10_000 - cut)]
    assert np.array_equal(np.concatenate(pieces), values(KEY, 0, 10_000))


def test_different_keys_never_share_a_perturbation():
    """No two of 10,000 neighbouring keys share their first four words."""
    keys = [NoiseKey(*fields) for fields in itertools.product(range(10), repeat=4)]
    assert len({hash_words(key, 0, 4).tobytes() for key in keys}) == 10_000


def test_values_are_counts_of_ones():
    """Element 128 c + 16 k + l is the number of ones among bits 4k to 4k + 3 of word 16 c + l, less 2."""
    words = hash_words(KEY, 0, 64).tolist()
    for element, value in enumerate(values(KEY, 0, 512).tolist()):
        chunk, inside = divmod(element, 128)
        plane, lane = divmod(inside, 16)
        assert value == (words[16 * chunk + lane] >> 4 * plane & 15).bit_count() - 2


def test_moments_are_those_of_four_bits():
    """Mean 0, variance 1 and kurtosis 2.5 within five standard errors over 2**21 values."""
    drawn = values(KEY, 0, 1 << 21).astype(np.float64)
    assert abs(drawn.mean()) < 5 / np.sqrt(drawn.size)
    assert abs(drawn.var() - 1) < 5 * np.sqrt(1.5 / drawn.size)
    assert abs((drawn**4).mean() - 2.5) < 0.02


def test_neighbouring_perturbations_do_not_correlate():
    """The largest Gram eigenvalue of 512 neighbouring keys stays near the Marchenko-Pastur edge of 4.

    Raw sequential keys give 840 in this test.
    """
    keys = [NoiseKey(7, n // 8, n % 8 // 4, n % 4) for n in range(512)]
    rows = np.stack([values(key, 0, 512) for key in keys]).astype(np.float64)
    assert np.linalg.eigvalsh(rows @ rows.T / 512)[-1] < 4.4


def test_negative_size_says_what_it_got():
    """The message names the wrong value."""
    with pytest.raises(ValueError, match="size=-1"):
        hash_words(KEY, 0, -1)


@pytest.mark.parametrize("field", [-1, 2**64])
def test_key_out_of_range_is_refused(field):
    """A key that does not fit 64 bits is an error, not a wrapped-around twin."""
    with pytest.raises(ValueError, match="noise key"):
        hash_words(KEY._replace(seed=field), 0, 8)
