"""Nets of many kinds, small ones, on which tracing, narrowing and masking are held against torch."""

import copy

import torch
from torch import nn
from torch.nn import functional

__all__ = ["IMAGE", "NETS", "Inverted", "Split", "Twice"]

IMAGE = (3, 8, 8)


class Pipe(nn.Module):
    """Layers one after the other, the mean over places, and seven classes."""

    def __init__(self, *layers, features):
        super().__init__()
        self.layers, self.head = nn.Sequential(*layers), nn.Linear(features, 7)

    def forward(self, x):
        """Classify images."""
        return self.head(functional.relu(self.layers(x)).mean((2, 3)))


class Inverted(nn.Module):
    """Two inverted residuals with depthwise convolutions."""

    def __init__(self, norm):
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 16, 3, 2, 1), nn.ModuleList()
        for _ in range(2):
            wide = nn.Sequential(nn.Conv2d(16, 48, 1, bias=False), norm(48), nn.ReLU6())
            deep = nn.Sequential(nn.Conv2d(48, 48, 3, padding=1, groups=48, bias=False), norm(48), nn.ReLU6())
            self.blocks.append(nn.Sequential(wide, deep, nn.Conv2d(48, 16, 1, bias=False), norm(16)))
        self.head = nn.Linear(16, 7)

    def forward(self, x):
        """Classify images."""
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean((2, 3)))


class Split(nn.Module):
    """A ResNeXt block: a convolution of four parts beside a shortcut, a norm of four groups behind it."""

    def __init__(self):
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 1)
        self.split, self.norm = nn.Conv2d(32, 32, 3, padding=1, groups=4), nn.GroupNorm(4, 32)
        self.up, self.head = nn.Conv2d(32, 16, 1), nn.Linear(16, 7)

    def forward(self, x):
        """Classify images."""
        x = functional.relu(self.stem(x))
        x = x + self.up(functional.relu(self.norm(self.split(functional.relu(self.down(x))))))
        return self.head(functional.relu(x).amax((2, 3)))


class Excited(nn.Module):
    """Squeeze and excitation: a gate of the channels from their means."""

    def __init__(self):
        super().__init__()
        self.stem, self.squeeze, self.excite = nn.Conv2d(3, 16, 3), nn.Linear(16, 4), nn.Linear(4, 16)
        self.body, self.head = nn.Conv2d(16, 12, 3), nn.Linear(12, 7)

    def forward(self, x):
        """Classify images."""
        x = functional.silu(self.stem(x))
        gate = torch.sigmoid(self.excite(functional.relu(self.squeeze(x.mean((2, 3))))))
        return self.head(functional.relu(self.body(x * gate[:, :, None, None])).mean((2, 3)))


class Twice(nn.Module):
    """Two convolutions that are used twice, and a flattened image at the end."""

    def __init__(self):
        super().__init__()
        self.stem, self.same = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1)
        self.up, self.down = nn.Conv2d(12, 20, 1), nn.Conv2d(20, 12, 1)
        self.last, self.head = nn.Linear(12 * 16, 18), nn.Linear(18, 7)

    def forward(self, x):
        """Classify images."""
        x = functional.relu(self.same(functional.relu(self.same(self.stem(x)))))
        for _ in range(2):
            x = x + self.down(functional.relu(self.up(x)))
        return self.head(functional.leaky_relu(self.last(functional.max_pool2d(x, 2).flatten(1))))


class Words(nn.Module):
    """An embedding, a LayerNorm and an FFN over six tokens."""

    def __init__(self):
        super().__init__()
        self.embedding, self.norm = nn.Embedding(30, 16), nn.LayerNorm(16)
        self.up, self.down, self.head = nn.Linear(16, 40), nn.Linear(40, 16), nn.Linear(16, 7)

    def forward(self, x):
        """Classify rows of six numbers."""
        x = self.norm(self.embedding(x.abs().long() % 30))
        return self.head((x + self.down(functional.gelu(self.up(x)))).mean(1))


def pipe(*layers, features):
    """Return a function that makes a Pipe."""
    return lambda: Pipe(*copy.deepcopy(layers), features=features), IMAGE


NETS = {
    "depthwise, GroupNorm": (lambda: Inverted(lambda n: nn.GroupNorm(4, n)), IMAGE),
    "depthwise, BatchNorm": (lambda: Inverted(nn.BatchNorm2d), IMAGE),
    "split convolution": (Split, IMAGE),
    "squeeze and excite": (Excited, IMAGE),
    "modules used twice": (Twice, IMAGE),
    "embedding": (Words, (6,)),
    "depthwise multiplier": pipe(
        nn.Conv2d(3, 12, 1), nn.Conv2d(12, 24, 3, groups=12), nn.Conv2d(24, 16, 1), features=16
    ),
    "transposed": pipe(
        *(nn.Conv2d(3, 12, 3, 2, 1), nn.ReLU(), nn.ConvTranspose2d(12, 10, 2, 2), nn.Conv2d(10, 9, 3)),
        features=9,
    ),
    "PReLU of channels": pipe(nn.Conv2d(3, 12, 3), nn.PReLU(12), nn.Conv2d(12, 9, 3), features=9),
    "PReLU of one": pipe(nn.Conv2d(3, 12, 3), nn.PReLU(), nn.Conv2d(12, 9, 3), features=9),
    "InstanceNorm": pipe(
        nn.Conv2d(3, 12, 3, bias=False),
        nn.InstanceNorm2d(12, affine=True),
        nn.Conv2d(12, 9, 3),
        features=9,
    ),
    "a norm group per channel": pipe(
        nn.Conv2d(3, 15, 3, bias=False), nn.GroupNorm(15, 15), nn.Conv2d(15, 9, 3), features=9
    ),
}
