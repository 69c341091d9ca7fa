"""The Inception network of published FIDs, as pytorch-fid (github.com/mseitzer/pytorch-fid) runs it.

Weights: a state dict in that project's layout, `pt_inception-2015-12-05-6726825d.pth` in its releases (TensorFlow's
classifier of 2015-12-05, 91 MB); .pth or .safetensors. Each convolution is `NAME.conv.weight` and `NAME.bn.{weight,
bias, running_mean, running_var}` (`num_batches_tracked` is passed over), and NAME is

    Conv2d_1a_3x3, Conv2d_2a_3x3, Conv2d_2b_3x3, Conv2d_3b_1x1, Conv2d_4a_3x3         the stem, 299 -> 35 pixels
    Mixed_5{b,c,d}, Mixed_6{a..e}, Mixed_7{a,b,c} . branch1x1, branch3x3_1, ...       eleven blocks, tables below
    fc.weight (1008, 2048), fc.bias (1008,)                                           the classifier

What sets it apart from the usual Inception v3, and moves every FID: average pooling does not count the padding, the
last block pools by maximum, the classifier has 1008 classes. Pictures come at 299 x 299 in [-1, 1], resized bilinearly
without antialiasing. The inception score's classes take no bias (as in TensorFlow's evaluators), and sFID's features
are the first 7 channels of Mixed_6d's 1x1 branch, 17 x 17 of them. TensorFlow's own resizing puts pixels elsewhere, so
its figures differ slightly for the same pictures.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Kernel = int | tuple[int, int]
Step = tuple[int, Kernel] | tuple[int, Kernel, Kernel]
"""Channels and kernel of a convolution; with two kernels, two of them side by side, `a` and `b`."""

Branches = dict[str, Sequence[Step]]

SIDE, FEATURES, CLASSES = 299, 2048, 1008
SPATIAL_CHANNELS = 7
ROW, COLUMN = (1, 7), (7, 1)


class Convolution(nn.Module):
    """Convolution without bias, batch normalisation, ReLU."""

    def __init__(self, inside: int, out: int, kernel: Kernel, stride: int = 1, padding: Kernel = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inside, out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Branches side by side, their channels joined; the last is a pooling, through a 1x1 convolution where `pooled`.

    branches: by name, convolutions in a row; a name is followed by _1, _2, ... where there are several. A block that
    halves the grid does so in the last convolution of each branch and in the pooling.
    """

    def __init__(
        self, inside: int, branches: Branches, pooled: int = 0, pool: str = "average", halves: bool = False
    ) -> None:
        super().__init__()
        self.pool, self.halves = pool, halves
        self.chains: list[list[list[str]]] = []
        for name, steps in branches.items():
            chain, width = [], inside
            for i, (out, *kernels) in enumerate(steps, start=1):
                last = halves and i == len(steps)
                stem = name if len(steps) == 1 else f"{name}_{i}"
                names = [stem] if len(kernels) == 1 else [f"{stem}a", f"{stem}b"]
                for conv, kernel in zip(names, kernels, strict=True):
                    padding = 0 if last else _same(kernel)
                    self.add_module(conv, Convolution(width, out, kernel, 2 if last else 1, padding))
                chain.append(names)
                width = out * len(kernels)
            self.chains.append(chain)
        if pooled:
            self.branch_pool = Convolution(inside, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for chain in self.chains:
            h = x
            for names in chain:
                h = torch.cat([self.get_submodule(name)(h) for name in names], dim=1)
            outputs.append(h)
        return torch.cat([*outputs, self._pooled(x)], dim=1)

    def _pooled(self, x: Tensor) -> Tensor:
        if self.halves:
            return F.max_pool2d(x, 3, 2)
        if self.pool == "max":
            return self.branch_pool(F.max_pool2d(x, 3, 1, 1))
        return self.branch_pool(F.avg_pool2d(x, 3, 1, 1, count_include_pad=False))


class InceptionV3(nn.Module):
    """Pictures (B, 3, 299, 299) in [-1, 1] -> features (B, 2048), probabilities (B, 1008), spatial (B, 2023)."""

    size, side, antialias = FEATURES, SIDE, False

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Convolution(32, 32, 3)
        self.Conv2d_2b_3x3 = Convolution(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = Convolution(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _grid_35(192, 32), _grid_35(256, 64), _grid_35(288, 64)
        self.Mixed_6a = _to_grid_17()
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d = _grid_17(128), _grid_17(160), _grid_17(160)
        self.Mixed_6e = _grid_17(192)
        self.Mixed_7a = _to_grid_8()
        self.Mixed_7b, self.Mixed_7c = _grid_8(1280, "average"), _grid_8(2048, "max")
        self.fc = nn.Linear(FEATURES, CLASSES)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(images)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        x = self.Mixed_6d(x)
        spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)  # the 1x1 branch comes first
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))
        features = x.mean(dim=(2, 3))
        return features, F.linear(features, self.fc.weight).softmax(dim=1), spatial


def _grid_35(inside: int, pooled: int) -> Mixed:
    branches: Branches = {
        "branch1x1": [(64, 1)],
        "branch5x5": [(48, 1), (64, 5)],
        "branch3x3dbl": [(64, 1), (96, 3), (96, 3)],
    }
    return Mixed(inside, branches, pooled)


def _to_grid_17() -> Mixed:
    branches: Branches = {"branch3x3": [(384, 3)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3)]}
    return Mixed(288, branches, halves=True)


def _grid_17(width: int) -> Mixed:
    branches: Branches = {
        "branch1x1": [(192, 1)],
        "branch7x7": [(width, 1), (width, ROW), (192, COLUMN)],
        "branch7x7dbl": [(width, 1), (width, COLUMN), (width, ROW), (width, COLUMN), (192, ROW)],
    }
    return Mixed(768, branches, 192)


def _to_grid_8() -> Mixed:
    branches: Branches = {
        "branch3x3": [(192, 1), (320, 3)],
        "branch7x7x3": [(192, 1), (192, ROW), (192, COLUMN), (192, 3)],
    }
    return Mixed(768, branches, halves=True)


def _grid_8(inside: int, pool: str) -> Mixed:
    branches: Branches = {
        "branch1x1": [(320, 1)],
        "branch3x3": [(384, 1), (384, (1, 3), (3, 1))],
        "branch3x3dbl": [(448, 1), (384, 3), (384, (1, 3), (3, 1))],
    }
    return Mixed(inside, branches, 192, pool)


def _same(kernel: Kernel) -> tuple[int, int]:
    """Padding that keeps the grid."""
    height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
    return height // 2, width // 2
