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
import struct
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from edge_agent.native.library import library_name
from profiles.errors import ConfigError

__all__ = ["Bits", "Displace", "Kernel", "Learning", "find_kernel", "kernel_name", "kernels", "load_kernels"]

_ABI = 2
_BLOCK = 8192
_REMEMBERED = 4  # replicas in use at a time, as of a run in one process
_SHARE = 1 << 18  # elements below which a thread costs more than it saves
_PIECE = 1 << 15  # elements whose curvature is made at a time, where there is no array of it; whole blocks


# The fields of jobs.h, as a C compiler lays them out: one packing where structures take dozens of calls.
_SPAN = "PPPqqq"
_PERTURB = struct.Struct(_SPAN + "fi")
_UPDATE = struct.Struct(_SPAN + "qqfffiffff")

_Span: TypeAlias = tuple[int, int, int, int, int, int]
_Key: TypeAlias = tuple[int, int, int, int]


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


class Bits(Protocol):
    """bfloat16 bits of curvature: an array of them, or what makes a piece of one when asked."""

    def __getitem__(self, piece: slice, /) -> NDArray[np.uint16]:
        """Return the bits of the elements ``piece.start`` to ``piece.stop``."""
        ...


class Displace(Protocol):
    """Displaces weights by ``times`` times one direction and ``following`` times the one after it."""

    def __call__(self, number: int, times: int, following: int = 0, /) -> None:
        """Displace them, in one pass."""
        ...


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
        self._seen: dict[tuple[int, int], _Memory] = {}
        self._addresses: dict[int, tuple[weakref.ref[NDArray[Any]], int]] = {}

    def _memory(
        self,
        weights: NDArray[np.float32],
        segments: Sequence[tuple[int, int, int]],
        curvature: NDArray[np.uint16] | None,
    ) -> "_Memory":
        """Return the checked memory of some arrays; the latest few are remembered."""
        name = (id(weights), id(segments))
        found = self._seen.get(name)
        if found is None or not found.is_of(weights, segments, curvature):
            found = self._seen[name] = _Memory(weights, segments, curvature)
            _forget(self._seen)
        return found

    def displacer(
        self,
        weights: NDArray[np.float32],
        segments: Sequence[tuple[int, int, int]],
        keys: Sequence[_Key],
        *,
        epsilon: float,
        curvature: Bits | None,
        threads: int = 1,
    ) -> Displace:
        """Return a function that displaces the weights; see :func:`edge_agent.grid.displacer`.

        Raises:
            ValueError: The arrays are not what the kernel may write to; from the function: there is no key
                of that number, or none after it.
        """
        whole, pieces = _whole(curvature)
        memory = self._memory(weights, segments, whole)
        function, path, size, count = self._library.scalarfed_perturb, self._path, weights.size, len(keys)
        flat = struct.pack(f"{4 * count}Q", *itertools.chain.from_iterable(keys))
        job = _PERTURB.pack(*memory.span(0, size), epsilon, count) + flat
        alone = threads == 1 and pieces is None

        def shared(*asked: int) -> int:
            def run(span: _Span) -> int:
                return int(function(path, _PERTURB.pack(*span, epsilon, count) + flat, *asked))

            return _spread(lambda start, stop: memory.each(start, stop, pieces, run), size, threads)

        def displace(number: int, times: int, following: int = 0, /) -> None:
            if function(path, job, number, times, following) if alone else shared(number, times, following):
                raise ValueError(f"{count} keys have no number {number}, or none to follow it")

        return displace

    def update(
        self,
        weights: NDArray[np.float32],
        segments: Sequence[tuple[int, int, int]],
        keys: Sequence[Sequence[_Key]],
        wholes: Sequence[Sequence[int]],
        amounts: Sequence[np.float32],
        *,
        largest_move: int,
        largest_weight: int,
        direction: int,
        curvature: Bits | None,
        learning: Learning | None = None,
        threads: int = 1,
    ) -> None:
        """Subtract the rounded updates of K steps with P perturbations each; see :mod:`edge_agent.replay`.

        Args:
            weights: Flat float32 vector on the grid, changed in place.
            segments: Its grids.
            keys: K sequences of P noise keys.
            wholes: K sequences of P whole scalars.
            amounts: K factors from whole scalars to weights.
            largest_move: Grid steps that one update may move a weight.
            largest_weight: Grid steps beyond which no update moves a weight.
            direction: 1, or -1 to take moves back.
            curvature: bfloat16 bits, or None for ones.
            learning: Learn the curvature, which is an array then, from the last step.
            threads: Threads that share the work.

        Raises:
            ValueError: The arrays are not what the kernel may write to, or do not fit each other.
        """
        steps, perturbations = len(wholes), len(wholes[0])
        fits = [len(of_step) for of_step in (*keys, *wholes)] == [perturbations] * (2 * steps)
        if not (fits and perturbations and len(amounts) == steps):
            raise ValueError(
                f"{len(keys)} steps of keys and {len(amounts)} amounts do not fit "
                f"{steps} steps of {perturbations} scalars"
            )
        chain, count = itertools.chain.from_iterable, steps * perturbations
        lists = struct.pack(f"{4 * count}Q{count}i{steps}f", *chain(chain(keys)), *chain(wholes), *amounts)
        whole, pieces = _whole(curvature)
        if pieces is not None and learning is not None:
            raise ValueError("a curvature without an array cannot be learned here")
        memory = self._memory(weights, segments, whole)
        learns = (0, 0.0, 0.0, 0.0, 0.0)
        if learning is not None:
            learns = (1, learning.descent, 1.0 - learning.nu, learning.nu, learning.floor)

        function, path = self._library.scalarfed_update, self._path

        def run(span: _Span) -> int:
            sizes = (steps, perturbations, largest_move, largest_weight, direction)
            return int(function(path, _UPDATE.pack(*span, *sizes, *learns) + lists))

        def work(start: int, stop: int) -> int:
            return memory.each(start, stop, pieces, run)

        _check(_spread(work, weights.size, threads))

    def fold(self, memory: NDArray[Any], *, threads: int = 1) -> int:
        """Return the sum of scrambled block hashes; see :func:`edge_agent.digest.fold`."""
        function, path, pointer = self._library.scalarfed_fold, self._path, self._address(memory)

        def work(start: int, stop: int) -> int:
            return int(function(path, pointer + 4 * start, stop - start, start // 1024))

        return _spread(work, memory.nbytes // 4, threads) & ((1 << 64) - 1)

    def _address(self, array: NDArray[Any]) -> int:
        """Return where an array lies; remembered, since numpy takes longer to say it than to look it up."""
        found = self._addresses.get(id(array))
        if found is None or found[0]() is not array:
            if not array.flags.c_contiguous:
                raise ValueError("only a contiguous array has a digest")
            found = self._addresses[id(array)] = (weakref.ref(array), array.ctypes.data)
            _forget(self._addresses)
        return found[1]


class _Memory:
    """Arrays that were found fit for the kernel, and where they lie.

    Args:
        weights: Flat float32 vector.
        segments: Its grids.
        curvature: bfloat16 bits, or None.

    Raises:
        ValueError: The arrays are not what the kernel may write to.
    """

    def __init__(
        self,
        weights: NDArray[np.float32],
        segments: Sequence[tuple[int, int, int]],
        curvature: NDArray[np.uint16] | None,
    ) -> None:
        for name, array, dtype in (("weights", weights, np.float32), ("curvature", curvature, np.uint16)):
            if array is None:
                continue
            if array.dtype != dtype or array.shape != (weights.size,):
                raise ValueError(
                    f"{name} must be {weights.size} {np.dtype(dtype)}, got {array.shape} {array.dtype}"
                )
            if not (array.flags.c_contiguous and array.flags.writeable and array.flags.aligned):
                raise ValueError(f"{name} must be contiguous, aligned and writeable memory")
        table = np.array(segments, np.int64).reshape(-1, 3)
        if len(table) and (table[:, 1].max() > weights.size or table[:, 0].min() < 0):
            raise ValueError(f"segments end at {table[:, 1].max()}, weights at {weights.size}")
        self._table, self._segments = table, tuple(segments)
        self._weights = weakref.ref(weights)
        self._curvature = None if curvature is None else weakref.ref(curvature)
        pointer = 0 if curvature is None else curvature.ctypes.data
        self._span = (weights.ctypes.data, pointer, table.ctypes.data, len(table))

    def is_of(
        self,
        weights: NDArray[np.float32],
        segments: Sequence[tuple[int, int, int]],
        curvature: NDArray[np.uint16] | None,
    ) -> bool:
        """Tell whether this is the memory of these very arrays, still writeable."""
        own = None if self._curvature is None else self._curvature()
        return (
            self._weights() is weights
            and own is curvature
            and (self._segments is segments or self._segments == tuple(segments))
            and weights.flags.writeable
        )

    def span(self, start: int, stop: int) -> _Span:
        """Return a share of the elements as the kernel takes it."""
        return (*self._span, start, stop)

    def each(self, start: int, stop: int, curvature: Bits | None, run: Callable[[_Span], int]) -> int:
        """Run a share of the elements: at once, or piece by piece with curvature made for each.

        Returns:
            The sum of what the runs return.
        """
        if curvature is None:
            return run(self.span(start, stop))
        failed = 0
        weights, _, table, segments = self._span
        for first in range(start, stop, _PIECE):
            last = min(first + _PIECE, stop)
            bits = np.ascontiguousarray(curvature[first:last], np.uint16)
            # The kernel counts from the first weight and reads what the span holds.
            pointer = bits.ctypes.data - 2 * first
            failed += run((weights, pointer, table, segments, first, last))
        return failed


def _whole(curvature: Bits | None) -> tuple[NDArray[np.uint16] | None, Bits | None]:
    """Return curvature as an array, or as what makes pieces of one."""
    return (curvature, None) if curvature is None or isinstance(curvature, np.ndarray) else (None, curvature)


def _spread(work: Callable[[int, int], int], size: int, threads: int) -> int:
    """Call ``work(start, stop)`` on shares that begin on a block; each thread runs without Python's lock.

    Returns:
        The sum of what the calls return.
    """
    shares = min(threads, size // _SHARE)
    if shares <= 1:
        return work(0, size)
    borders = [size * share // shares // _BLOCK * _BLOCK for share in range(shares)] + [size]
    with ThreadPoolExecutor(shares - 1) as pool:
        others = [pool.submit(work, *pair) for pair in itertools.pairwise(borders[1:])]
        return work(borders[0], borders[1]) + sum(other.result() for other in others)


def _forget(seen: dict[Any, Any]) -> None:
    """Drop the oldest of more entries than are worth remembering."""
    while len(seen) > _REMEMBERED:
        seen.pop(next(iter(seen)), None)


def _check(failed: int) -> None:
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
    # The others take C's int and bytes, as ctypes passes them anyway: declared, a call takes 0.4 us longer.
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
