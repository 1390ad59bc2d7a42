"""The reference nets, each built at any widths.

Knows the nets' layers, their width groups and how fresh weights are drawn. Does not know which widths are
good, and nothing of data beyond the shape of a sample and the constants that standardise it.

Every net follows BAFFLE's advice for forward-only training (Feng et al., arXiv 2301.12195): Hardswish in
place of ReLU, GroupNorm in place of BatchNorm. Its first layer standardises the raw input; its constants are
buffers, never trained.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from profiles.errors import ModelError
from pruning.structure import Structure, WidthGroup, infer_structure
from pruning.weights import Moments, initialise

__all__ = [
    "MODELS",
    "Net",
    "Standardise",
    "build_model",
    "choose_model",
    "model_structure",
    "moments",
    "standardisation",
]

MODELS = ("auto", "mlp", "lenet", "resnet20", "wrn10_2", "dscnn")
"""The names that :func:`build_model` knows."""


class Standardise(nn.Module):
    """Return ``(x - offset) * scale``: per feature for rows, per channel for images."""

    offset: Tensor
    scale: Tensor

    def __init__(self, sample_shape: tuple[int, ...]) -> None:
        super().__init__()
        shape = (sample_shape[0], *(1 for _ in sample_shape[1:]))
        self.register_buffer("offset", torch.zeros(shape))
        self.register_buffer("scale", torch.ones(shape))

    def forward(self, x: Tensor) -> Tensor:
        """Standardise a batch (n, *sample_shape)."""
        return (x - self.offset) * self.scale


class Net(nn.Module):
    """A net that knows its widths; ``standardise`` runs first, then the layers of the subclass.

    Attributes:
        sample_shape: Shape of one input, without the batch axis.
        classes: Number of logits.
        widths: Width of every group, in forward order.
    """

    def __init__(self, sample_shape: tuple[int, ...], classes: int, widths: Mapping[str, int]) -> None:
        super().__init__()
        self.sample_shape = sample_shape
        self.classes = classes
        self.widths = dict(widths)
        self.standardise = Standardise(sample_shape)


class _Mlp(Net):
    # Hardswish here too: under zeroth-order steps on digits it ended at 93.5 %, ReLU at 92.7 % (8 seeds).
    def __init__(self, sample_shape: tuple[int, ...], classes: int, widths: Mapping[str, int]) -> None:
        super().__init__(sample_shape, classes, widths)
        sizes = [math.prod(sample_shape), *widths.values()]
        self.hidden = nn.ModuleList(nn.Linear(i, o) for i, o in itertools.pairwise(sizes))
        self.act = nn.Hardswish()
        self.head = nn.Linear(sizes[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.standardise(x).flatten(1)
        for layer in self.hidden:
            x = self.act(layer(x))
        output: Tensor = self.head(x)
        return output


class _LeNet(Net):
    def __init__(self, sample_shape: tuple[int, ...], classes: int, widths: Mapping[str, int]) -> None:
        super().__init__(sample_shape, classes, widths)
        channels, height, width = sample_shape
        one, two, three = widths["conv1"], widths["conv2"], widths["fc1"]
        cells = -(-height // 4) * -(-width // 4)  # two strides of 2, each rounded up
        self.conv1 = nn.Conv2d(channels, one, 5, 2, 2)
        self.norm1 = nn.GroupNorm(_norm_groups(8), one)
        self.conv2 = nn.Conv2d(one, two, 3, 2, 1)
        self.norm2 = nn.GroupNorm(_norm_groups(16), two)
        self.fc1 = nn.Linear(two * cells, three)
        self.head = nn.Linear(three, classes)
        self.act = nn.Hardswish()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm1(self.conv1(self.standardise(x))))
        x = self.act(self.norm2(self.conv2(x)))
        output: Tensor = self.head(self.act(self.fc1(x.flatten(1))))
        return output


class _Residual(nn.Module):
    """A block of ResNet-20: two 3x3 convolutions beside a shortcut."""

    def __init__(self, source: int, inner: int, target: int, stride: int, dense: int) -> None:
        super().__init__()
        groups = _norm_groups(dense)
        self.conv1 = nn.Conv2d(source, inner, 3, stride, 1, bias=False)
        self.norm1 = nn.GroupNorm(groups, inner)
        self.conv2 = nn.Conv2d(inner, target, 3, 1, 1, bias=False)
        self.norm2 = nn.GroupNorm(groups, target)
        self.shortcut = nn.Conv2d(source, target, 1, stride, bias=False) if stride > 1 else nn.Identity()
        self.act = nn.Hardswish()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.act(self.norm1(self.conv1(x)))))
        output: Tensor = self.act(y + self.shortcut(x))
        return output


class _ResNet20(Net):
    # He et al., arXiv 1512.03385, section 4.2; the shortcut is a 1x1 convolution where the stride is 2.
    def __init__(self, sample_shape: tuple[int, ...], classes: int, widths: Mapping[str, int]) -> None:
        super().__init__(sample_shape, classes, widths)
        source = widths["stage1"]
        self.conv = nn.Conv2d(sample_shape[0], source, 3, 1, 1, bias=False)
        self.norm = nn.GroupNorm(_norm_groups(16), source)
        self.act = nn.Hardswish()
        blocks = []
        for stage, dense in ((1, 16), (2, 32), (3, 64)):
            target = widths[f"stage{stage}"]
            for block in (1, 2, 3):
                stride = 2 if stage > 1 and block == 1 else 1
                blocks.append(_Residual(source, widths[f"inner{stage}{block}"], target, stride, dense))
                source = target
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(source, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.conv(self.standardise(x))))
        output: Tensor = self.head(self.blocks(x).mean((2, 3)))
        return output


class _WideBlock(nn.Module):
    """A pre-activation block of a wide residual net, always with a projected shortcut."""

    def __init__(self, source: int, inner: int, target: int, stride: int, dense: tuple[int, int]) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(_norm_groups(dense[0]), source)
        self.conv1 = nn.Conv2d(source, inner, 3, stride, 1, bias=False)
        self.norm2 = nn.GroupNorm(_norm_groups(dense[1]), inner)
        self.conv2 = nn.Conv2d(inner, target, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(source, target, 1, stride, bias=False)
        self.act = nn.Hardswish()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm1(x))
        output: Tensor = self.conv2(self.act(self.norm2(self.conv1(x)))) + self.shortcut(x)
        return output


class _WideResNet(Net):
    # Zagoruyko and Komodakis, arXiv 1605.07146: depth 10, widening factor 2.
    def __init__(self, sample_shape: tuple[int, ...], classes: int, widths: Mapping[str, int]) -> None:
        super().__init__(sample_shape, classes, widths)
        dense = [16, 32, 64, 128]
        streams = [widths["stem"], *(widths[f"stage{i}"] for i in (1, 2, 3))]
        self.conv = nn.Conv2d(sample_shape[0], streams[0], 3, 1, 1, bias=False)
        self.blocks = nn.Sequential(
            *(
                _WideBlock(
                    streams[i],
                    widths[f"inner{i + 1}"],
                    streams[i + 1],
                    min(i + 1, 2),
                    (dense[i], dense[i + 1]),
                )
                for i in range(3)
            )
        )
        self.norm = nn.GroupNorm(_norm_groups(128), streams[3])
        self.act = nn.Hardswish()
        self.head = nn.Linear(streams[3], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.conv(self.standardise(x)))
        output: Tensor = self.head(self.act(self.norm(x)).mean((2, 3)))
        return output


class _DsCnn(Net):
    # Zhang et al., "Hello Edge", arXiv 1711.07128 (small), as in MLPerf Tiny: 49 x 10 MFCC images.
    def __init__(self, sample_shape: tuple[int, ...], classes: int, widths: Mapping[str, int]) -> None:
        super().__init__(sample_shape, classes, widths)
        groups = _norm_groups(64)
        source = widths["stem"]
        self.conv = nn.Conv2d(sample_shape[0], source, (10, 4), 2, (5, 1), bias=False)
        self.norm = nn.GroupNorm(groups, source)
        self.act = nn.Hardswish()
        layers: list[nn.Module] = []
        for block in (1, 2, 3, 4):
            target = widths[f"point{block}"]
            layers += [
                nn.Conv2d(source, source, 3, 1, 1, groups=source, bias=False),
                nn.GroupNorm(groups, source),
                nn.Hardswish(),
                nn.Conv2d(source, target, 1, bias=False),
                nn.GroupNorm(groups, target),
                nn.Hardswish(),
            ]
            source = target
        self.blocks = nn.Sequential(*layers)
        self.head = nn.Linear(source, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.conv(self.standardise(x))))
        output: Tensor = self.head(self.blocks(x).mean((2, 3)))
        return output


_NETS: dict[str, Callable[[tuple[int, ...], int, Mapping[str, int]], Net]] = {
    "mlp": _Mlp,
    "lenet": _LeNet,
    "resnet20": _ResNet20,
    "wrn10_2": _WideResNet,
    "dscnn": _DsCnn,
}
_RESNET_STAGES = {1: 16, 2: 32, 3: 64}


def choose_model(name: str, *, sample_shape: tuple[int, ...]) -> str:
    """Return ``name``, or for ``auto`` the net that suits the sample: ``mlp`` for rows, ``lenet`` for images.

    Raises:
        ModelError: The name is unknown, or the net needs images and gets rows.
    """
    if name == "auto":
        return "lenet" if len(sample_shape) == 3 else "mlp"
    if name not in _NETS:
        raise ModelError(f"model {name!r} is unknown", hint=f"Known models: {', '.join(MODELS)}.")
    if name != "mlp" and len(sample_shape) != 3:
        raise ModelError(
            f"{name} takes images (channels, height, width), and a sample has the shape {sample_shape}",
            hint="Choose `mlp`, which takes any shape, or give the data as images.",
        )
    return name


def model_structure(
    name: str, *, sample_shape: tuple[int, ...], classes: int, hidden: Sequence[int] | None = None
) -> Structure:
    """Return the width groups and tensor shapes of the dense net.

    Args:
        name: One of MODELS.
        sample_shape: (features,) or (channels, height, width); ``mlp`` takes any shape.
        classes: Number of logits, at least 2.
        hidden: Dense widths of the hidden layers of ``mlp``; (64, 32) if None.

    Raises:
        ModelError: The net cannot be built for this input or output.
    """
    sample_shape = tuple(int(size) for size in sample_shape)
    name = choose_model(name, sample_shape=sample_shape)
    if not sample_shape or min(sample_shape) < 1:
        raise ModelError(f"a sample of the shape {sample_shape} holds no values")
    if classes < 2:
        raise ModelError(f"a classifier needs at least 2 classes, got {classes}")
    if hidden is not None and name != "mlp":
        raise ModelError(f"hidden = {tuple(hidden)} is an option of `mlp`, and the model is `{name}`")
    groups = _groups(name, (64, 32) if hidden is None else tuple(hidden))
    try:
        return infer_structure(
            lambda widths: _NETS[name](sample_shape, classes, widths), groups, sample_shape=sample_shape
        )
    except RuntimeError as error:  # torch: an image smaller than a kernel
        raise ModelError(
            f"{name} cannot take samples of the shape {sample_shape}: {error}",
            hint="Choose `mlp` or `lenet`, or give larger images.",
        ) from error


def build_model(
    name: str,
    *,
    sample_shape: tuple[int, ...],
    classes: int,
    widths: Mapping[str, int] | None = None,
    hidden: Sequence[int] | None = None,
    standardise: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None,
    seed: int = 0,
) -> Net:
    """Build a reference net with fresh weights.

    Args:
        name: One of MODELS.
        sample_shape: (features,) or (channels, height, width); ``mlp`` takes any shape.
        classes: Number of logits, at least 2.
        widths: Width of every group; the dense ones if None.
        hidden: Dense widths of the hidden layers of ``mlp``; (64, 32) if None.
        standardise: Offset and scale of :class:`Standardise`, one value per feature or channel;
            the identity if None.
        seed: Names the fresh weights, see :func:`pruning.weights.initialise`.

    Raises:
        ModelError: The net cannot be built for this input, output or these widths.
    """
    sample_shape = tuple(int(size) for size in sample_shape)
    structure = model_structure(name, sample_shape=sample_shape, classes=classes, hidden=hidden)
    chosen = structure.dense if widths is None else dict(widths)
    structure.check(chosen)
    chosen = {group.name: int(chosen[group.name]) for group in structure.groups}
    with torch.device("meta"):
        net = _NETS[choose_model(name, sample_shape=sample_shape)](sample_shape, classes, chosen)
    net = net.to_empty(device="cpu")
    offset, scale = (0.0, 1.0) if standardise is None else standardise
    for buffer, values in ((net.standardise.offset, offset), (net.standardise.scale, scale)):
        constants = torch.as_tensor(np.asarray(values, dtype=np.float32))
        if constants.numel() not in (1, buffer.numel()):
            raise ValueError(f"standardise needs {buffer.numel()} values, got {constants.numel()}")
        buffer.copy_(constants.reshape(-1, *(1,) * (buffer.dim() - 1)).expand_as(buffer))
    initialise(net, seed=seed)
    return net.eval()


def standardisation(samples: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return offset and scale that give each feature or channel of ``samples`` mean 0 and deviation 1.

    Args:
        samples: (n, features) or (n, channels, height, width).

    Returns:
        Two arrays with one value per feature or channel. The deviation counts as at least a tenth of the
        range, so that a feature that is almost always zero cannot reach more than 10; a constant feature
        gets scale 0.
    """
    axes = (0, *range(2, samples.ndim))
    offset = samples.mean(axis=axes, dtype=np.float64)
    reach = samples.max(axis=axes).astype(np.float64) - samples.min(axis=axes)
    deviation = np.maximum(samples.std(axis=axes, dtype=np.float64), reach / 10)
    scale = np.divide(1.0, deviation, out=np.zeros_like(deviation), where=deviation > 0)
    return offset.astype(np.float32), scale.astype(np.float32)


def moments(samples: NDArray[np.float32]) -> Moments:
    """Return mean and deviation of each feature or channel of ``samples``; the deviation as above."""
    offset, scale = standardisation(samples)
    return offset, np.divide(1.0, scale, out=np.zeros_like(scale), where=scale > 0)


def _norm_groups(dense: int) -> int:
    """Return into how many groups a GroupNorm splits a layer of this dense width; narrow nets keep it."""
    return 2 if dense <= 32 else 4


def _groups(name: str, hidden: tuple[int, ...]) -> tuple[WidthGroup, ...]:
    if name == "mlp":
        if not hidden or min(hidden) < 1:
            raise ModelError(f"hidden = {hidden}: every hidden layer needs at least one neuron")
        return tuple(
            WidthGroup(f"hidden{i}", width, minimum=min(2, width)) for i, width in enumerate(hidden, start=1)
        )
    if name == "lenet":
        return _normed("conv1", 8), _normed("conv2", 16), WidthGroup("fc1", 32, minimum=2)
    if name == "resnet20":
        groups = []
        for stage, width in _RESNET_STAGES.items():
            groups.append(_normed(f"stage{stage}", width))
            groups += [_normed(f"inner{stage}{block}", width) for block in (1, 2, 3)]
        return tuple(groups)
    if name == "wrn10_2":
        groups = [_normed("stem", 16)]
        for stage, width in ((1, 32), (2, 64), (3, 128)):
            groups += [_normed(f"inner{stage}", width), _normed(f"stage{stage}", width)]
        return tuple(groups)
    return tuple(_normed(group, 64) for group in ("stem", "point1", "point2", "point3", "point4"))


def _normed(name: str, width: int) -> WidthGroup:
    """Return a group whose channels a GroupNorm splits, with at least two channels in each part."""
    parts = _norm_groups(width)
    return WidthGroup(name, width, multiple=parts, minimum=2 * parts)
