"""A board's own samples, and which of them a local step uses.

Knows the ``.npz`` layout (``x_train, y_train, x_test, y_test``; rows of numbers or images) and how a
step's batch follows from a key. Values stay as they are in the file: standardisation is part of the
graph.
"""

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_agent.noise import NoiseKey, hash_words
from profiles.errors import DataError

__all__ = ["Samples", "batch_indices", "load_samples", "to_inputs"]

_DATA = 0xDA7A << 32  # beyond every perturbation number, so that no noise has this key


@dataclass(frozen=True)
class Samples:
    """Inputs as stored, of shape (n, features), (n, H, W), (n, H, W, C) or (n, C, H, W), and labels.

    Attributes:
        x: Inputs, in the dtype of the file, so that images of bytes stay bytes.
        y: Labels from 0, int64 of shape (n,).
    """

    x: NDArray[np.generic]
    y: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.y)

    def pick(self, indices: NDArray[np.int64] | Sequence[int] | slice) -> "Samples":
        """Return the named samples."""
        return Samples(self.x[indices], self.y[indices])


def to_inputs(x: NDArray[np.generic]) -> NDArray[np.float32]:
    """Return inputs as the graph takes them: float32 (n, features) or (n, C, H, W), values unchanged.

    An image array's channels are its last axis if that has 1, 3 or 4 entries and the second has not.
    """
    if x.ndim == 3:
        x = x[:, None]
    elif x.ndim == 4 and x.shape[3] in (1, 3, 4) and x.shape[1] not in (1, 3, 4):
        x = x.transpose(0, 3, 1, 2)
    return np.ascontiguousarray(x, np.float32)


def batch_indices(seed: int, agent: int, step: int, batch_size: int, samples: int) -> NDArray[np.int64]:
    """Return which samples the ``step``-th local step of a run uses: int64 of shape (batch_size,).

    All samples are gone through in a shuffled order before the first comes again; the order of each
    pass follows from the key alone, so that an agent needs to remember nothing.

    Args:
        seed: Of the run.
        agent: The agent's number.
        step: Count of local steps since the start of the run, round * K + k.
        batch_size: At least 1; more than ``samples`` means that some come twice.
        samples: At least 1.
    """
    positions = np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.int64)
    passes = positions // samples
    chosen = np.empty(batch_size, np.int64)
    for number in np.unique(passes):
        words = hash_words(NoiseKey(seed, int(number), agent, _DATA), 0, samples)
        order = np.argsort(words, kind="stable")
        chosen[passes == number] = order[positions[passes == number] % samples]
    return chosen


def load_samples(path: Path, part: str, *, classes: int | None = None) -> Samples:
    """Read ``x_<part>`` and ``y_<part>`` of an ``.npz`` file.

    Args:
        path: The file.
        part: "train" or "test".
        classes: Labels must lie below it; None takes any label from 0.

    Raises:
        DataError: The file or the arrays are missing, malformed, of different length, empty, not
            finite, or a label is out of range.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = [name for name in (f"x_{part}", f"y_{part}") if name not in archive.files]
            if missing:
                raise DataError(
                    f"{path} holds {', '.join(archive.files) or 'nothing'}; {missing[0]} is missing"
                )
            x, y = archive[f"x_{part}"], archive[f"y_{part}"]
    except FileNotFoundError:
        raise DataError(
            f"there is no data file {path}", hint="Set data.path to an existing .npz file."
        ) from None
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        # To a file of any other kind numpy says that it holds pickles, and how to load these all the same.
        reason = "it is of another kind" if "contains pickled" in str(error) else str(error)
        raise DataError(f"{path} cannot be read as an .npz file: {reason}") from None
    return _checked(x, y, f"{path} ({part})", classes)


def _checked(x: NDArray[np.generic], y: NDArray[np.generic], where: str, classes: int | None) -> Samples:
    if x.ndim not in (2, 3, 4) or 0 in x.shape:
        raise DataError(
            f"{where}: x has shape {x.shape}; rows (n, features) or images (n, H, W[, C]) are needed"
        )
    if not (np.issubdtype(x.dtype, np.number) or x.dtype == bool) or np.iscomplexobj(x):
        raise DataError(f"{where}: x has dtype {x.dtype}; numbers are needed")
    if np.issubdtype(x.dtype, np.floating) and not np.isfinite(x).all():
        bad = int(np.size(x) - np.isfinite(x).sum())
        raise DataError(f"{where}: {bad} values of x are not finite", hint="Remove or fill in these samples.")
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.shape != (len(x),):
        raise DataError(
            f"{where}: y has shape {y.shape}; one label for each of the {len(x)} samples is needed"
        )
    labels = _labels(y, where)
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or (classes is not None and high >= classes):
        top = "" if classes is None else f" to {classes - 1}"
        raise DataError(
            f"{where}: labels run from {low} to {high}; they must lie in 0{top}",
            hint="Number the classes from 0; every class of the test part must occur in the training part.",
        )
    return Samples(x, labels)


def _labels(y: NDArray[np.generic], where: str) -> NDArray[np.int64]:
    if not (np.issubdtype(y.dtype, np.number) or y.dtype == bool) or np.iscomplexobj(y):
        raise DataError(f"{where}: y has dtype {y.dtype}; whole numbers from 0 are needed")
    labels = y.astype(np.int64)
    if not np.array_equal(labels, y):
        raise DataError(f"{where}: y holds numbers that are not whole; labels are whole numbers from 0")
    return labels
