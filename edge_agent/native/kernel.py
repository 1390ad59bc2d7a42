"""Finds the compiled kernel and calls it.

The library lies beside this file, or nowhere; then, and where ``SCALARFED_KERNEL`` says ``numpy``,
there is no kernel and the callers compute the same bits with numpy. Knows the library's interface
and memory, not what the passes are for.

``SCALARFED_KERNEL``: ``numpy``; ``native``, the best path of the library, an error without one;
``scalar``, ``sse2``, ``avx2``, ``avx512``, ``neon``, one path; unset, the best there is.
"""

import ctypes
import functools
import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_agent.native.library import library_name
from profiles.errors import ConfigError

__all__ = ["Kernel", "Learning", "find_kernel", "kernel_name", "kernels", "load_kernels"]

_ABI = 1
_BLOCK = 8192
_SHARE = 1 << 18  # elements below which a thread costs more than it saves


class _Span(ctypes.Structure):
    _fields_ = (
        ("weights", ctypes.c_void_p),
        ("curvature", ctypes.c_void_p),
        ("segments", ctypes.c_void_p),
        ("segment_count", ctypes.c_int64),
        ("start", ctypes.c_int64),
        ("stop", ctypes.c_int64),
    )


class _PerturbJob(ctypes.Structure):
    _fields_ = (
        ("span", _Span),
        ("keys", ctypes.c_void_p),
        ("times", ctypes.c_void_p),
        ("terms", ctypes.c_int64),
        ("epsilon", ctypes.c_float),
    )


class _UpdateJob(ctypes.Structure):
    _fields_ = (
        ("span", _Span),
        ("keys", ctypes.c_void_p),
        ("wholes", ctypes.c_void_p),
        ("amounts", ctypes.c_void_p),
        ("steps", ctypes.c_int64),
        ("perturbations", ctypes.c_int64),
        ("largest_move", ctypes.c_float),
        ("largest_weight", ctypes.c_float),
        ("direction", ctypes.c_float),
        ("learn", ctypes.c_int32),
        ("descent", ctypes.c_float),
        ("keep", ctypes.c_float),
        ("nu", ctypes.c_float),
        ("floor", ctypes.c_float),
    )


class Learning(NamedTuple):
    """How an update learns curvature: h <- (1 - nu) h + nu (descent * sum_p wholes_p z_p)**2.

    Attributes:
        descent: What a unit of the weighted sum stands for.
        nu: Share of the new observation.
        floor: Smallest curvature.
    """

    descent: float
    nu: float
    floor: float


class Kernel:
    """One path of the compiled library; the methods mean what numpy does in their callers.

    Args:
        library: The loaded library.
        path: Number of the path in it.
        file: Where the library lies; ONNX Runtime finds its operators there.

    Attributes:
        name: Of the path.
        file: As given.
        image_block: Channels that ONNX Runtime's convolutions on this processor want side by side, or 0.
    """

    def __init__(self, library: ctypes.CDLL, path: int, file: Path) -> None:
        self._library, self._path = library, path
        self.name: str = library.scalarfed_path_name(path).decode()
        self.file = file
        self.image_block = int(library.scalarfed_image_block())

    def perturb(
        self,
        weights: NDArray[np.float32],
        segments: Sequence[tuple[int, int, int]],
        keys: Sequence[tuple[int, int, int, int]],
        times: Sequence[int],
        *,
        epsilon: float,
        curvature: NDArray[np.uint16] | None,
        threads: int = 1,
    ) -> None:
        """Add ``sum_t times_t * epsilon * z_t``; see :func:`edge_agent.grid.perturb`.

        Raises:
            ValueError: The arrays are not what the kernel may write to, or there are over 4 terms.
        """
        if not 1 <= len(keys) <= 4:
            raise ValueError(f"one pass takes 1 to 4 terms, got {len(keys)}")
        flat = np.array(keys, np.uint64)
        counts = np.array(times, np.int32)
        table = _segment_table(tuple(segments))

        def work(start: int, stop: int) -> int:
            span = _span(weights, curvature, table, start, stop)
            job = _PerturbJob(span, flat.ctypes.data, counts.ctypes.data, len(keys), epsilon)
            return int(self._library.scalarfed_perturb(self._path, ctypes.byref(job)))

        _spread(work, weights.size, threads)

    def update(
        self,
        weights: NDArray[np.float32],
        segments: Sequence[tuple[int, int, int]],
        keys: Sequence[Sequence[tuple[int, int, int, int]]],
        wholes: NDArray[np.int32],
        amounts: Sequence[np.float32],
        *,
        largest_move: int,
        largest_weight: int,
        direction: int,
        curvature: NDArray[np.uint16] | None,
        learning: Learning | None = None,
        threads: int = 1,
    ) -> None:
        """Subtract the rounded updates of K steps with P perturbations each; see :mod:`edge_agent.replay`.

        Args:
            weights: Flat float32 vector on the grid, changed in place.
            segments: Its grids.
            keys: K sequences of P noise keys.
            wholes: Whole scalars, int32 of shape (K, P).
            amounts: K factors from whole scalars to weights.
            largest_move: Grid steps that one update may move a weight.
            largest_weight: Grid steps beyond which no update moves a weight.
            direction: 1, or -1 to take moves back.
            curvature: bfloat16 bits, or None for ones.
            learning: Learn the curvature from the last step.
            threads: Threads that share the work.

        Raises:
            ValueError: The arrays are not what the kernel may write to, or do not fit each other.
        """
        steps, perturbations = wholes.shape
        flat = np.array(keys, np.uint64)
        if flat.shape != (steps, perturbations, 4) or len(amounts) != steps or not perturbations:
            raise ValueError(
                f"{flat.shape} keys and {len(amounts)} amounts do not fit scalars {wholes.shape}"
            )
        wholes = np.ascontiguousarray(wholes, np.int32)
        factors = np.array(amounts, np.float32)
        table = _segment_table(tuple(segments))
        learns = (0, 0.0, 0.0, 0.0, 0.0)
        if learning is not None:
            learns = (1, learning.descent, 1.0 - learning.nu, learning.nu, learning.floor)

        def work(start: int, stop: int) -> int:
            job = _UpdateJob(
                _span(weights, curvature, table, start, stop),
                flat.ctypes.data,
                wholes.ctypes.data,
                factors.ctypes.data,
                steps,
                perturbations,
                largest_move,
                largest_weight,
                direction,
                *learns,
            )
            return int(self._library.scalarfed_update(self._path, ctypes.byref(job)))

        _spread(work, weights.size, threads)

    def fold(self, words: NDArray[np.uint32], *, threads: int = 1) -> int:
        """Return the sum of scrambled block hashes; see :func:`edge_agent.digest.fold`."""
        words = np.ascontiguousarray(words, np.uint32)
        parts: list[int] = []

        def work(start: int, stop: int) -> int:
            pointer = words.ctypes.data + 4 * start
            parts.append(self._library.scalarfed_fold(self._path, pointer, stop - start, start // 1024))
            return 0

        _spread(work, words.size, threads)
        return sum(parts) & ((1 << 64) - 1)


def _span(
    weights: NDArray[np.float32],
    curvature: NDArray[np.uint16] | None,
    table: NDArray[np.int64],
    start: int,
    stop: int,
) -> _Span:
    for name, array, dtype in (("weights", weights, np.float32), ("curvature", curvature, np.uint16)):
        if array is None:
            continue
        if array.dtype != dtype or array.shape != (weights.size,):
            raise ValueError(
                f"{name} must be {weights.size} {np.dtype(dtype)}, got {array.shape} {array.dtype}"
            )
        if not (array.flags.c_contiguous and array.flags.writeable):
            raise ValueError(f"{name} must be contiguous and writeable memory")
    if len(table) and table[-1, 1] > weights.size:
        raise ValueError(f"segments end at {table[-1, 1]}, weights at {weights.size}")
    pointer = None if curvature is None else curvature.ctypes.data
    return _Span(weights.ctypes.data, pointer, table.ctypes.data, len(table), start, stop)


@functools.lru_cache(maxsize=16)
def _segment_table(segments: tuple[tuple[int, int, int], ...]) -> NDArray[np.int64]:
    return np.array(segments, np.int64).reshape(-1, 3)


def _spread(work: Callable[[int, int], int], size: int, threads: int) -> None:
    """Call ``work(start, stop)`` on shares that begin on a block; each thread runs without Python's lock."""
    shares = max(1, min(threads, size // _SHARE))
    borders = [size * share // shares // _BLOCK * _BLOCK for share in range(shares)] + [size]
    if shares == 1:
        failed = work(0, size)
    else:
        with ThreadPoolExecutor(shares - 1) as pool:
            others = [pool.submit(work, *pair) for pair in itertools.pairwise(borders[1:])]
            failed = work(borders[0], borders[1]) + sum(other.result() for other in others)
    if failed:
        raise MemoryError("the kernel got no memory for its keys")


@functools.cache
def load_kernels(library: Path) -> dict[str, Kernel]:
    """Return the paths of a library that this processor can run, by name, the best one last.

    Empty where there is no library, or one of another interface or processor.
    """
    try:
        loaded = ctypes.CDLL(str(library))
        if loaded.scalarfed_abi() != _ABI:
            return {}
    except (OSError, AttributeError):
        return {}
    loaded.scalarfed_path_name.restype = ctypes.c_char_p
    loaded.scalarfed_fold.restype = ctypes.c_uint64
    loaded.scalarfed_fold.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
    numbers = [
        number for number in range(loaded.scalarfed_paths()) if loaded.scalarfed_path_supported(number)
    ]
    return {kernel.name: kernel for kernel in (Kernel(loaded, number, library) for number in numbers)}


def kernels() -> dict[str, Kernel]:
    """Return the paths of the installed library, the best one last; empty where there is none."""
    return load_kernels(Path(__file__).parent / library_name())


def find_kernel() -> Kernel | None:
    """Return the kernel that ``SCALARFED_KERNEL`` names, or the best one; None means numpy.

    Raises:
        ConfigError: The named one is not there.
    """
    return _choose(os.environ.get("SCALARFED_KERNEL", ""))


def kernel_name() -> str:
    """Return the name of the path in use, for people: ``numpy``, ``avx2``, ``neon``, ..."""
    kernel = find_kernel()
    return "numpy" if kernel is None else kernel.name


@functools.cache
def _choose(name: str) -> Kernel | None:
    found = kernels()
    if name == "numpy" or (not name and not found):
        return None
    if name in ("", "native") and found:
        return list(found.values())[-1]
    if name not in found:
        raise ConfigError(
            f"SCALARFED_KERNEL is {name!r}; this machine has {', '.join(['numpy', *found])}",
            hint="Unset SCALARFED_KERNEL, or build the kernel with `python -m edge_agent.native.build`.",
        )
    return found[name]
