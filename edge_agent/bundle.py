"""The bundle: what is flashed. A graph, the weights, and a manifest that names and hashes them.

Written on the coordinator, read on both sides; every file is checked by SHA-256 before it is used.
This module knows the folder's layout, not how a graph came to be nor how it is run.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_agent.grid import Segment, plan_segments, snap
from edge_agent.replay import Replica
from edge_agent.signature import is_signed
from profiles.errors import BundleError, SecurityError

__all__ = [
    "FORMAT",
    "SIGNATURE",
    "Bundle",
    "Tensor",
    "check_signed",
    "flat_layout",
    "read_bundle",
    "sign_bundle",
    "write_bundle",
]

FORMAT = 1

SIGNATURE = "manifest.sig"
"""The file that holds the signature of the manifest, 64 bytes; only who asks for it needs it."""

_CONTEXT = b"scalarfed bundle 1\0"
_SIGN_AGAIN = "Start the coordinator with its authority, which signs the bundle, and copy it again."
_ALIGNMENT = 16


@dataclass(frozen=True)
class Tensor:
    """A trainable tensor: where it lies in the flat vector.

    Attributes:
        name: Of the graph input.
        shape: Its shape.
        offset: Its first element; a multiple of 16, hence of 64 bytes.
    """

    name: str
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def row(self) -> int:
        """Elements of a row, the weights into one neuron or channel; all of a vector."""
        return prod(self.shape[1:]) if len(self.shape) > 1 else self.size


@dataclass(frozen=True)
class Bundle:
    """A bundle that was read and checked.

    Attributes:
        folder: Where it lies.
        model: Name of the net.
        classes: Number of classes C.
        sample_shape: Shape of one input, (features,) or (channels, height, width).
        tensors: All trainable tensors in the order of the flat vector.
        segments: Grids of the flat vector.
        size: Elements of the flat vector, gaps included.
        cost: ``forward_flops``, ``activation_bytes_per_sample``, ``activation_bytes_fixed``,
            ``weight_bytes`` and what else the exporter knew.
        pruning: How the net was made smaller.
        head: Names of the tensors whose gradient the graph tells as ``head_gradient``; empty if it does not.
        hidden: The same of the linear layer before the last, and ``hidden_gradient``.
        variants: Names of further graphs that compute the same with operators of the compiled kernel.
        identity: SHA-256 of the manifest, hexadecimal: names the bundle.
        stops: Where each width of a family of nets ends in the flat vector; empty without a family.
        family: Identity of the family's widest bundle, which names the run's; empty for that one itself.
        passes: What each graph's forward asks of the allocator, for :mod:`profiles.passes`; empty in bundles
            of earlier releases.
    """

    folder: Path
    model: str
    classes: int
    sample_shape: tuple[int, ...]
    tensors: tuple[Tensor, ...]
    segments: tuple[Segment, ...]
    size: int
    cost: Mapping[str, int]
    pruning: Mapping[str, Any]
    head: tuple[str, ...]
    hidden: tuple[str, ...]
    variants: tuple[str, ...]
    identity: str
    stops: tuple[int, ...] = ()
    family: str = ""
    passes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def params(self) -> int:
        """Trainable parameters, gaps not counted."""
        return sum(tensor.size for tensor in self.tensors)

    @property
    def graph_path(self) -> Path:
        """The ONNX graph."""
        return self.folder / "graph.onnx"

    def variant_path(self, variant: str) -> Path:
        """Return a variant of the graph."""
        return self.folder / _variant_file(variant)

    def mapped_weights(self) -> NDArray[np.float32]:
        """Return the weights of round 0 as a read-only map of their file: for forward passes alone."""
        return np.memmap(self.folder / "weights.f32", "<f4", mode="r")

    def replica(self) -> Replica:
        """Return a fresh replica at round 0, with weights of its own."""
        weights = _aligned(self.size)
        with (self.folder / "weights.f32").open("rb") as file:
            file.readinto(weights.view(np.uint8).data)  # a second copy, however short, would be the peak
        spans = {tensor.name: (tensor.offset, tensor.offset + tensor.size) for tensor in self.tensors}
        return Replica(
            weights,
            self.segments,
            tensors=tuple(spans.values()),
            widths=tuple(tensor.row for tensor in self.tensors),
            head=tuple(spans[name] for name in self.head),
            stops=self.stops,
            hidden=tuple(spans[name] for name in self.hidden),
            layers=tuple(tuple(spans[tensor.name] for tensor in layer) for layer in self.layers),
        )

    def groups(self, kind: str) -> int:
        """Return how many "row"s or "tensor"s there are; 0 for another kind."""
        if kind == "row":
            return sum(tensor.size // tensor.row for tensor in self.tensors)
        return len(self.tensors) if kind == "tensor" else 0

    @property
    def layers(self) -> tuple[tuple[Tensor, ...], ...]:
        """The tensors of each layer, in order: neighbours whose names differ after the last dot alone."""
        named = groupby(self.tensors, key=lambda tensor: tensor.name.rpartition(".")[0])
        return tuple(tuple(tensors) for _, tensors in named)


def flat_layout(shapes: Sequence[tuple[str, tuple[int, ...]]]) -> tuple[list[Tensor], int]:
    """Place tensors one after the other in a flat vector, each on a 64-byte boundary.

    Returns:
        The tensors with their offsets, and the size of the vector, a multiple of 16.
    """
    tensors, offset = [], 0
    for name, shape in shapes:
        tensors.append(Tensor(name, tuple(shape), offset))
        offset += -(-tensors[-1].size // _ALIGNMENT) * _ALIGNMENT
    return tensors, offset


def write_bundle(
    folder: Path,
    *,
    graph: bytes,
    weights: NDArray[np.float32],
    tensors: Sequence[Tensor],
    model: str,
    classes: int,
    sample_shape: tuple[int, ...],
    cost: Mapping[str, int],
    pruning: Mapping[str, Any],
    head: Sequence[str] = (),
    hidden: Sequence[str] = (),
    variants: Mapping[str, bytes] | None = None,
    stops: Sequence[int] = (),
    family: str = "",
    passes: Mapping[str, Any] | None = None,
) -> Bundle:
    """Write a bundle folder; the weights are moved to the nearest points of their grids.

    Args:
        folder: Made if it is not there; files in it are replaced.
        graph: The ONNX file with weights as inputs.
        weights: Flat float32 vector laid out by :func:`flat_layout`, gaps zero.
        tensors: The layout.
        model: As in :class:`Bundle`, and so are the following.
        classes: Number of classes.
        sample_shape: Shape of one input.
        cost: What one forward takes.
        pruning: How the net was made smaller.
        head: Names of the last linear layer's tensors, in the order of the layout, if the graph has the
            output ``head_gradient``: their gradient, row by row and one tensor after the other.
        hidden: The same of the layer before, whose gradient is the output ``hidden_gradient``.
        variants: ONNX files by name that compute the same with operators of the compiled kernel.
        stops: As in :class:`Bundle`, and so is the following.
        family: Identity of the widest bundle.
        passes: As in :class:`Bundle`.

    Raises:
        BundleError: A weight is not finite.
    """
    flat = np.array(weights, np.float32)
    if not np.isfinite(flat).all():
        bad = [t.name for t in tensors if not np.isfinite(flat[t.offset : t.offset + t.size]).all()]
        raise BundleError(f"weights are not finite in {', '.join(bad)}", hint="Start from finite weights.")
    starts = [tensor.offset for tensor in tensors]
    segments = plan_segments(flat, list(zip(starts, [*starts[1:], flat.size], strict=True)))
    snap(flat, segments)
    files = {"graph.onnx": graph, "weights.f32": flat.astype("<f4").tobytes()}
    files |= {_variant_file(name): data for name, data in (variants or {}).items()}
    manifest = {
        "format": FORMAT,
        "model": model,
        "classes": classes,
        "sample_shape": list(sample_shape),
        "tensors": [{"name": t.name, "shape": list(t.shape), "offset": t.offset} for t in tensors],
        "segments": [list(segment) for segment in segments],
        "size": flat.size,
        "params": sum(tensor.size for tensor in tensors),
        "cost": dict(cost),
        "pruning": dict(pruning),
        "head": list(head),
        "hidden": list(hidden),
        "variants": list(variants or ()),
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
    }
    if stops:
        manifest |= {"stops": list(stops), "family": family}
    if passes:
        manifest["passes"] = dict(passes)
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (folder / "manifest.json").write_bytes(json.dumps(manifest, indent=1, sort_keys=True).encode() + b"\n")
    return read_bundle(folder)


def read_bundle(folder: Path) -> Bundle:
    """Read a bundle folder and check every file of it.

    Raises:
        BundleError: A file is missing or altered, or the manifest is of another format.
    """
    try:
        raw = (folder / "manifest.json").read_bytes()
        manifest = json.loads(raw)
        if manifest["format"] != FORMAT:
            raise BundleError(f"{folder} has bundle format {manifest['format']}; this release reads {FORMAT}")
        for name, expected in manifest["files"].items():
            if (found := _sha256(folder / name)) != expected:
                raise BundleError(
                    f"{folder / name} has SHA-256 {found[:16]}..., the manifest says {expected[:16]}..."
                )
        bundle = Bundle(
            folder=folder,
            model=manifest["model"],
            classes=manifest["classes"],
            sample_shape=tuple(manifest["sample_shape"]),
            tensors=tuple(Tensor(t["name"], tuple(t["shape"]), t["offset"]) for t in manifest["tensors"]),
            segments=tuple(Segment(*segment) for segment in manifest["segments"]),
            size=manifest["size"],
            cost=manifest["cost"],
            pruning=manifest["pruning"],
            head=tuple(manifest.get("head", ())),
            hidden=tuple(manifest.get("hidden", ())),
            variants=tuple(manifest.get("variants", ())),
            identity=hashlib.sha256(raw).hexdigest(),
            stops=tuple(manifest.get("stops", ())),
            family=manifest.get("family", ""),
            passes=manifest.get("passes", {}),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"{folder} is not a whole bundle: {type(error).__name__}: {error}") from None
    if (folder / "weights.f32").stat().st_size != 4 * bundle.size:
        raise BundleError(f"{folder / 'weights.f32'} does not hold the {bundle.size} weights of the manifest")
    return bundle


def sign_bundle(folder: Path, sign: Callable[[bytes], bytes]) -> None:
    """Sign a bundle: its manifest, which holds the hash of every other file.

    Args:
        folder: The bundle.
        sign: Ed25519, the coordinator's.
    """
    beside = folder / f"{SIGNATURE}.new"
    beside.write_bytes(sign(_CONTEXT + (folder / "manifest.json").read_bytes()))
    beside.replace(folder / SIGNATURE)


def check_signed(bundle: Bundle, key: bytes) -> None:
    """Refuse a bundle that the owner of ``key`` has not signed as it is.

    Raises:
        SecurityError: The signature is missing or not that of this manifest.
    """
    try:
        manifest = (bundle.folder / "manifest.json").read_bytes()
        signature = (bundle.folder / SIGNATURE).read_bytes()
    except OSError:
        raise SecurityError(
            f"{bundle.folder} is not signed, and this device takes signed bundles alone.", hint=_SIGN_AGAIN
        ) from None
    same = hashlib.sha256(manifest).hexdigest() == bundle.identity
    if not same or not is_signed(_CONTEXT + manifest, signature, key=key):
        raise SecurityError(
            f"{bundle.folder} was not signed as it is by this device's coordinator.", hint=_SIGN_AGAIN
        )


def _variant_file(variant: str) -> str:
    return f"graph.{variant}.onnx"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _aligned(size: int) -> NDArray[np.float32]:
    """Return an uninitialised float32 vector that begins on a 64-byte boundary."""
    raw = np.empty(size + _ALIGNMENT, np.float32)
    skip = -raw.ctypes.data // 4 % _ALIGNMENT
    return raw[skip : skip + size]
