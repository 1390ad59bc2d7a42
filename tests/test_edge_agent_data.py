"""Tests of edge_agent.data: what is taken, what is refused, and which samples a step uses."""

import numpy as np
import pytest

from edge_agent.data import batch_indices, load_samples, to_inputs
from profiles.errors import DataError


def save(tmp_path, **arrays):
    path = tmp_path / "data.npz"
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((5, 7), (5, 7)),
        ((5, 8, 9), (5, 1, 8, 9)),
        ((5, 8, 9, 3), (5, 3, 8, 9)),
        ((5, 3, 8, 9), (5, 3, 8, 9)),
        ((5, 8, 9, 1), (5, 1, 8, 9)),
    ],
)
def test_rows_and_images_become_inputs(shape, expected):
    """Rows stay rows; images get their channels first, wherever those were."""
    assert to_inputs(np.zeros(shape, np.uint8)).shape == expected


def test_values_stay_as_they_are(tmp_path):
    """Bytes 0 to 255 become the floats 0 to 255: standardisation is the graph's."""
    x = np.arange(256, dtype=np.uint8).reshape(2, 128)
    samples = load_samples(save(tmp_path, x_train=x, y_train=np.array([0, 1])), "train")
    assert np.array_equal(to_inputs(samples.x), x.astype(np.float32))


@pytest.mark.parametrize("y", [[0.0, 1.0], [[0], [1]], [False, True]], ids=["floats", "column", "booleans"])
def test_labels_in_other_forms_are_understood(tmp_path, y):
    """Whole numbers are labels, whatever type they come in."""
    path = save(tmp_path, x_train=np.zeros((2, 3)), y_train=np.array(y))
    assert load_samples(path, "train").y.tolist() == [0, 1]


X = np.zeros((4, 3))
Y = np.array([0, 1, 2, 1])
REFUSED = {
    "a missing array": ({"x_train": X}, "y_train is missing|lacks y_train"),
    "labels below 0": ({"x_train": X, "y_train": Y - 1}, "labels run from -1 to 1"),
    "labels above the classes": ({"x_train": X, "y_train": Y + 9}, "labels run from 9 to 11"),
    "labels that are not whole": ({"x_train": X, "y_train": Y + 0.5}, "not whole"),
    "labels of text": ({"x_train": X, "y_train": np.array(list("abcd"))}, "dtype"),
    "too few labels": ({"x_train": X, "y_train": Y[:3]}, "each of the 4 samples"),
    "values that are not finite": ({"x_train": X + np.nan, "y_train": Y}, "12 values of x are not finite"),
    "one axis": ({"x_train": np.zeros(4), "y_train": Y}, "shape"),
    "no samples": ({"x_train": X[:0], "y_train": Y[:0]}, "shape"),
    "objects": ({"x_train": np.array([None] * 4), "y_train": Y}, "cannot be read"),
}


@pytest.mark.parametrize(("arrays", "text"), REFUSED.values(), ids=REFUSED.keys())
def test_malformed_data_is_refused(tmp_path, arrays, text):
    """The message names the file, the values and the rule."""
    with pytest.raises(DataError, match=text) as raised:
        load_samples(save(tmp_path, **arrays), "train", classes=3)
    assert "data.npz" in str(raised.value)


def test_a_file_that_is_no_archive_is_refused(tmp_path):
    """So is a file cut short."""
    path = save(tmp_path, x_train=X, y_train=Y)
    for data in (b"no archive", path.read_bytes()[:-40]):
        path.write_bytes(data)
        with pytest.raises(DataError, match="cannot be read"):
            load_samples(path, "train")


def test_a_missing_file_is_named(tmp_path):
    """The message has the path."""
    with pytest.raises(DataError, match=r"no data file .*nothing\.npz"):
        load_samples(tmp_path / "nothing.npz", "train")


def test_every_sample_comes_once_a_pass():
    """Five steps of four of twenty samples use each sample once, and the next five again, in other order."""
    passes = [
        np.concatenate([batch_indices(7, 2, step, 4, 20) for step in range(start, start + 5)])
        for start in (0, 5)
    ]
    for indices in passes:
        assert sorted(indices.tolist()) == list(range(20))
    assert passes[0].tolist() != passes[1].tolist()


def test_batches_follow_from_the_key_alone():
    """The same step gives the same batch again; another agent, seed or step another one."""
    again = [batch_indices(7, 2, 3, 4, 100).tolist() for _ in range(2)]
    assert again[0] == again[1]
    others = [batch_indices(*key, 4, 100).tolist() for key in ((8, 2, 3), (7, 3, 3), (7, 2, 4))]
    assert again[0] not in others


def test_a_batch_beyond_the_samples_wraps_around():
    """Ten of three samples: each comes three or four times."""
    counts = np.bincount(batch_indices(7, 0, 0, 10, 3), minlength=3)
    assert sorted(counts.tolist()) == [3, 3, 4]
