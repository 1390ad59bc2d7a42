"""Make examples/digits.npz from scikit-learn's copy of the UCI optical digits: ``examples/make_digits.py``.

Needs scikit-learn, which scalarfed itself does not. The split is stratified by class and seeded, so that the
same file comes out again.
"""

from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

TEST_SAMPLES = 360


def make_digits(path: Path) -> None:
    """Write x_train (1437, 64), y_train, x_test (360, 64) and y_test, all uint8, values 0 to 16."""
    x, y = load_digits(return_X_y=True)
    parts = train_test_split(
        x.astype(np.uint8), y.astype(np.uint8), test_size=TEST_SAMPLES, stratify=y, random_state=0
    )
    np.savez_compressed(path, **dict(zip(("x_train", "x_test", "y_train", "y_test"), parts, strict=True)))


if __name__ == "__main__":
    make_digits(Path(__file__).with_name("digits.npz"))
