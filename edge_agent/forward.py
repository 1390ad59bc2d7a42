"""The loss of a batch by ONNX Runtime, with the weights as graph inputs.

The session reads the replica's own memory: every tensor is bound once by pointer into the flat
vector, so that a perturbation needs no copy. Weights never become initializers, which ONNX Runtime
would reorder, fuse and bake in. Where the compiled kernel is there, the bundle's variant for this
processor runs in place of the plain graph, after it gave the plain graph's loss.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_agent.bundle import Bundle
from edge_agent.footprint import giving_back
from edge_agent.native.kernel import Kernel, find_kernel
from edge_agent.session import open_session
from profiles.cost import samples_at_once
from profiles.errors import BundleError, EstimateError
from profiles.runtime import ort

__all__ = ["Forward"]

_GRADIENTS = ("head_gradient", "hidden_gradient")
_LOSS_AND_CORRECT = ("loss", "correct")
_LOGITS = ("logits",)
_AGREEMENT = 1e-4  # by which a variant's loss may differ from the plain graph's, relative


class Forward:
    """Runs batches through a bundle's graph with the weights of one flat vector.

    Args:
        bundle: Whose graph it is.
        weights: Flat float32 vector; read at every call, never written and never copied.
        threads: Threads of ONNX Runtime.
        others: Further inputs by name, such as gates: contiguous float32, read at every call.

    Attributes:
        variant: Name of the graph's variant that runs; empty for the plain graph.

    Raises:
        BundleError: The graph's inputs are not the manifest's tensors.
        ValueError: The vector has another size or is not contiguous.
    """

    def __init__(
        self,
        bundle: Bundle,
        weights: NDArray[np.float32],
        *,
        threads: int = 1,
        others: Mapping[str, NDArray[np.float32]] | None = None,
    ) -> None:
        fits = weights.shape == (bundle.size,) and weights.dtype == np.float32
        if not (fits and weights.flags.c_contiguous and weights.flags.aligned):
            raise ValueError(
                f"weights must be an aligned, contiguous float32 vector of {bundle.size}, "
                f"got {weights.shape} {weights.dtype}"
            )
        self._weights = weights
        self._at_once = samples_at_once(bundle.cost.get("activation_bytes_per_sample", 0))
        self._classes, self._sample_shape = bundle.classes, bundle.sample_shape
        self._others = dict(others or {})
        told = [layer for layer in (bundle.head, bundle.hidden) if layer]  # whose gradients the graph has
        self._sizes = [sum(t.size for t in bundle.tensors if t.name in layer) for layer in told]
        self._head_gradient: NDArray[np.float32] | None = None
        self._options = ort.RunOptions()
        self._options.only_execute_path_to_fetches = True  # no gradient where nobody asks for it
        # What a run without a GPU has anyway. ONNX Runtime looks it up at each run, and to say that it is
        # not there takes it 60 us: as long as LeNet's forward.
        self._options.add_run_config_entry("gpu_graph_id", "0")
        self._session: Any
        self._binding: Any
        self.variant = ""
        with giving_back() as give_back:
            self._start(bundle, threads, give_back)

    def _start(self, bundle: Bundle, threads: int, give_back: Callable[[], None]) -> None:
        """Open the graph, check it against the manifest, and go over to its variant if there is one."""
        self._open(bundle, threads)
        give_back()
        names = {node.name for node in self._session.get_inputs()}
        expected = {"x", "y", *self._others, *(tensor.name for tensor in bundle.tensors)}
        if names != expected:
            raise BundleError(
                f"the graph and the manifest differ in {', '.join(sorted(names ^ expected))}: "
                "every trainable tensor is a graph input"
            )
        wrong = [
            f"{node.name} is {node.type} of {node.shape}"
            for node in self._session.get_inputs()
            for tensor in bundle.tensors
            if node.name == tensor.name
            and (node.type != "tensor(float)" or tuple(node.shape) != tensor.shape)
        ]
        if wrong:
            raise BundleError(
                f"the graph's {', '.join(wrong)}: every trainable tensor is float32 of the manifest's shape"
            )
        self._bind(bundle)
        if not self._others and (kernel := find_kernel()) is not None:
            self._take_variant(bundle, kernel, threads, give_back)

    def _open(self, bundle: Bundle, threads: int, variant: str = "", operators: Path | None = None) -> None:
        """Open a graph; first close the one that is open, since two would be the agent's peak of memory."""
        self._session = self._binding = None
        path = bundle.variant_path(variant) if variant else bundle.graph_path
        self._session = open_session(path, threads=threads, operators=operators)

    def _bind(self, bundle: Bundle) -> None:
        """Point the session's inputs at the weights."""
        self._binding = self._session.io_binding()
        for tensor in bundle.tensors:
            pointer = self._weights.ctypes.data + 4 * tensor.offset
            self._binding.bind_input(tensor.name, "cpu", 0, np.float32, tensor.shape, pointer)
        for name, array in self._others.items():
            self._binding.bind_input(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)
        self._x: NDArray[np.float32] | None = None
        self._y: NDArray[np.int64] | None = None
        self._found: dict[str, NDArray[Any]] = {}

    def _take_variant(
        self, bundle: Bundle, kernel: Kernel, threads: int, give_back: Callable[[], None]
    ) -> None:
        """Go over to the first variant for this processor that gives the plain graph's loss."""
        x = np.linspace(-1, 1, 2 * math.prod(bundle.sample_shape), dtype=np.float32)
        x = x.reshape(2, *bundle.sample_shape)
        y = np.array([0, bundle.classes - 1], np.int64)
        names = [name for name in (f"blocked{kernel.image_block}", "fused") if name in bundle.variants]
        if not names:
            return
        expected = self.evaluate(x, y)[0]
        give_back()
        for name in names:
            try:
                self._open(bundle, threads, name, kernel.file)
                give_back()
                self._bind(bundle)
                if abs(self.evaluate(x, y)[0] - expected) <= _AGREEMENT * max(1.0, abs(expected)):
                    self.variant = name
                    return
            except (BundleError, EstimateError):  # another release of ONNX Runtime may lack an operator
                continue
        self._open(bundle, threads)
        self._bind(bundle)

    def loss(self, x: NDArray[np.float32], y: NDArray[np.int64], *, head: int = 0) -> float:
        """Return the mean loss of a batch: x of shape (n, *sample_shape), y of shape (n,).

        Args:
            x: Inputs.
            y: Labels.
            head: Compute the gradients of so many last layers in the same pass, for :meth:`head_gradient`.
        """
        names = _GRADIENTS[: min(head, len(self._sizes))]
        found = self._run(x, y, ("loss", *names))
        if names:
            gradients = [found[name] for name in names]
            self._head_gradient = gradients[0] if len(gradients) == 1 else np.concatenate(gradients)
        return float(found["loss"])

    def head_gradient(self) -> NDArray[np.float32]:
        """Return the gradients of the last layers, the last first, at the latest loss with ``head``.

        Raises:
            ValueError: None was.
        """
        if self._head_gradient is None:
            raise ValueError("no loss was evaluated with head=True")
        return self._head_gradient

    def evaluate(self, x: NDArray[np.float32], y: NDArray[np.int64]) -> tuple[float, int]:
        """Return the mean loss of a batch and how many of it are classified correctly."""
        found = self._run(x, y, _LOSS_AND_CORRECT)
        return float(found["loss"]), int(found["correct"])

    def logits(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the logits of a batch, (n, classes)."""
        return self._run(x, np.zeros(len(x), np.int64), _LOGITS)["logits"].copy()

    def _run(
        self, x: NDArray[np.float32], y: NDArray[np.int64], outputs: tuple[str, ...]
    ) -> dict[str, NDArray[Any]]:
        """Return outputs of a batch; the next call overwrites them.

        A batch that would hold much memory runs in pieces of nearly the same size.
        """
        size = len(y)
        pieces = -(-size // self._at_once)
        if pieces <= 1:
            return self._run_piece(x, y, outputs)
        joined: dict[str, NDArray[Any]] = {}
        for piece in range(pieces):
            start, stop = piece * size // pieces, (piece + 1) * size // pieces
            for name, value in self._run_piece(x[start:stop], y[start:stop], outputs).items():
                if name == "logits":
                    joined.setdefault(name, np.empty((size, self._classes), np.float32))[start:stop] = value
                else:  # means weigh by their samples, counts add up
                    share = value if name == "correct" else value.astype(np.float64) * ((stop - start) / size)
                    joined[name] = joined[name] + share if name in joined else share.copy()
        return joined

    def _run_piece(
        self, x: NDArray[np.float32], y: NDArray[np.int64], outputs: tuple[str, ...]
    ) -> dict[str, NDArray[Any]]:
        if x is not self._x or y is not self._y or tuple(self._found) != outputs:
            self._bind_batch(x, y, outputs)
        try:
            self._session.run_with_iobinding(self._binding, self._options)
        except Exception as error:  # its exceptions derive from no common class
            if "allocate memory" in str(error) or "bad_alloc" in str(error):
                raise MemoryError(f"a forward pass of {len(y)} samples: {error}") from error
            raise EstimateError(
                f"a forward pass of {len(y)} samples failed: {error}",
                hint="If memory ran out, set a smaller batch size or prune to a lower density.",
            ) from error
        return self._found

    def _bind_batch(self, x: NDArray[np.float32], y: NDArray[np.int64], outputs: tuple[str, ...]) -> None:
        """Point the session at a batch and at room for its outputs."""
        if x.shape != (len(y), *self._sample_shape) or y.ndim != 1:
            raise ValueError(
                f"a batch has the shapes (n, *{self._sample_shape}) and (n,), got {x.shape}, {y.shape}"
            )
        if (
            x.dtype != np.float32
            or y.dtype != np.int64
            or not (x.flags.c_contiguous and y.flags.c_contiguous)
        ):
            raise ValueError(f"a batch is contiguous float32 and int64, got {x.dtype} and {y.dtype}")
        self._binding.bind_input("x", "cpu", 0, np.float32, x.shape, x.ctypes.data)
        self._binding.bind_input("y", "cpu", 0, np.int64, y.shape, y.ctypes.data)
        self._x, self._y = x, y  # kept, so that their memory is
        shapes: dict[str, tuple[int, ...]] = {"logits": (len(y), self._classes)}
        for name, size in zip(_GRADIENTS, self._sizes, strict=False):
            shapes[name] = (size,)
        self._found = {
            name: np.empty(shapes.get(name, ()), np.int64 if name == "correct" else np.float32)
            for name in outputs
        }
        self._binding.clear_binding_outputs()
        for name, array in self._found.items():
            self._binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
