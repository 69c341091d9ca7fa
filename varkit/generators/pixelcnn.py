"""PixelCNN++: gated convolutions that see only earlier pixels (Salimans et al., arXiv 1701.05517).

Two streams go through levels of falling and again rising resolution: u has seen the rows above a pixel, ul also what is
left of it. Every kernel reaches up and left only; the first layer's outputs are shifted by a pixel, so that a place
never sees its own. There is no attention, so the window serves as memory: where pixels were shown are its keys, what
they are its values, and a step computes the picture anew from all that its slots see.
Legend: R branches, B samples, N = R x B, L slots, H W picture, P = H W places row after row, F width.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varkit.canvases.base import gather_positions, scatter_positions
from varkit.devices import sent_once
from varkit.errors import UserError
from varkit.generators.base import (
    Condition,
    Generator,
    Prepared,
    branches_and_batch,
    check_tokenizer,
    per_row,
    rows,
)
from varkit.generators.conditioning import ClassCondition, ClassConfig
from varkit.generators.sizes import check_least
from varkit.heads.logistic_mixture import LogisticMixtureConfig
from varkit.nn.attention import Window
from varkit.nn.linear import Linear
from varkit.nn.ports import Ports, through
from varkit.plans.raster import RasterConfig
from varkit.plans.schedule import Schedule
from varkit.plans.step import Step
from varkit.tokenizers.pixels import PixelsConfig

_Streams = tuple[Tensor, Tensor]
"""u and ul, (N, F, h, w) each."""

ABOVE, CORNER = (2, 3), (2, 2)
"""Kernels of u, which reaches as far to the right as to the left, and of ul, which ends at its own column."""


@dataclass(frozen=True)
class PixelCNNConfig:
    """blocks: of each stream at a level. levels: resolutions. mixtures: components of the head that `fitted` adds.

    The defaults are for 16 x 16; published for 32 x 32: width 160, 5 blocks, 10 mixtures, dropout 0.5. A model of one
    class is unconditional. The order must be raster, which is the one that the network's kernels follow.
    """

    condition: ClassConfig
    grid: tuple[int, int] = (16, 16)
    width: int = 32
    blocks: int = 1
    levels: int = 3
    dropout: float = 0.1
    mixtures: int = 5

    def __post_init__(self) -> None:
        check_least(self, 1, "width", "blocks", "levels", "mixtures")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout {self.dropout} is outside 0 to 1; use e.g. 0.1")
        if min(self.grid) < 1 or any(side % self.unit for side in self.grid):
            raise UserError(
                f"grid {self.grid} cannot be halved {self.levels - 1} times; its sides must be multiples of "
                f"{self.unit}, or levels fewer"
            )

    @property
    def unit(self) -> int:
        """Pixels that become one at the lowest resolution, in each direction."""
        return 2 ** (self.levels - 1)

    def fitted(self, tokenizer: PixelsConfig) -> dict[str, Any]:
        """Generator, and the head and plan beside it, for pictures of a size."""
        check_tokenizer(self, tokenizer, "size")
        config = replace(self, grid=Schedule.of(tokenizer.size).last)
        head = LogisticMixtureConfig(config.width, config.mixtures)
        return {"generator": config, "head": head, "plan": RasterConfig(config.grid)}

    def build(self) -> "PixelCNN":
        """The network, freshly initialised."""
        return PixelCNN(self)


class PixelCNN(Generator):
    """`forward` takes {"pixels": (B, L, 3)}; a slot's hidden state is that of the place predicted from it.

    Ports: ("block", i) gets ul after block i, (N, places of its level, F); ("output", 0) the hidden states.
    """

    recordable = False

    def __init__(self, config: PixelCNNConfig) -> None:
        super().__init__()
        self.config, self.width = config, config.width
        width, changes = config.width, config.levels - 1
        up, down = config.levels * config.blocks, config.levels * config.blocks + changes
        self.depth = up + down
        self.conditioner = ClassCondition(config.condition, width)
        self.condition = Linear(width, self.depth * 2 * 2 * width, bias=False)
        self.first = _First(width)
        self.blocks = nn.ModuleList(
            _Block(width, config.dropout, skip) for skip in [False] * up + [True] * down
        )
        self.shrink = nn.ModuleList(_Resize(width, _Convolution) for _ in range(changes))
        self.grow = nn.ModuleList(_Resize(width, _Upsampling) for _ in range(changes))
        nn.init.normal_(self.condition.weight, std=0.05)

    def prepare(self, condition: Condition) -> Prepared:
        branches, batch = branches_and_batch(condition)
        vector, _, _ = self.conditioner({k: v.flatten(0, 1) for k, v in condition.items()})
        moved = self.condition(vector).unflatten(-1, (self.depth, 2, -1))
        return {"condition": moved.unflatten(0, (branches, batch))}

    def forward(
        self,
        fed: dict[str, Tensor],
        step: Step,
        prepared: Prepared,
        window: Window,
        ports: Ports | None = None,
    ) -> Tensor:
        branches, batch = branches_and_batch(prepared)
        places, pixels = _seen(fed["pixels"], step, window, branches, self.config.grid[1])
        shape = (self._height(step), self.config.grid[1])
        picture = _lay_out(places, pixels, shape).to(self.condition.weight.dtype)
        h = self.features(picture, step, prepared, ports).flatten(2).mT
        predicted = _predicted(step, batch)
        h = gather_positions(h, rows(predicted, branches) if predicted.ndim == 2 else predicted)
        return through(ports, "output", 0, h, step, prepared)

    def features(self, picture: Tensor, step: Step, prepared: Prepared, ports: Ports | None = None) -> Tensor:
        """Pixels (N, 3, H, W) -> hidden states (N, F, H, W); each place's come from the places before it."""
        moved, layers = prepared["condition"].flatten(0, 1), iter(range(self.depth))

        def block(streams: _Streams, kept: _Streams | None = None) -> _Streams:
            layer = next(layers)
            u, ul = self.blocks[layer](*streams, moved[:, layer], kept)
            return u, _through_grid(ports, layer, ul, step, prepared)

        kept: list[_Streams] = [self.first(picture)]
        for level in range(self.config.levels):
            if level:
                kept.append(self.shrink[level - 1](*kept[-1]))
            for _ in range(self.config.blocks):
                kept.append(block(kept[-1]))
        streams = kept.pop()
        for level in range(self.config.levels):
            if level:
                streams = self.grow[level - 1](*streams)
            for _ in range(self.config.blocks + (level > 0)):
                streams = block(streams, kept.pop())
        return F.elu(streams[1])

    def _height(self, step: Step) -> int:
        """Rows down to the last place predicted: later ones change nothing, so they need not be computed."""
        last = max(0, int(step.target.max())) if step.target.numel() else 0
        row = last // self.config.grid[1]
        return (row // self.config.unit + 1) * self.config.unit


def _seen(pixels: Tensor, step: Step, window: Window, branches: int, width: int) -> tuple[Tensor, Tensor]:
    """All that the step's slots see, their own pixels (B, L, 3) included: places (N, S), -1 for none, and pixels
    (N, S, 3).

    A pixel seen by any slot counts for all: kernels tell earlier from later by place.
    """
    values = rows(pixels, branches)
    coords, shows = (sent_once(t, values.device) for t in (step.feed.coords, step.feed.shows))
    coords = per_row(coords, 2, branches).to(values)
    shown = per_row(shows >= 0, 1, branches).to(values)
    where = torch.cat(
        [coords.expand(*values.shape[:2], 2), shown.expand(values.shape[:2])[..., None]], dim=-1
    )
    where, values = where[:, None], values[:, None]  # one head
    (view,) = window.views(0, where, where, values)
    there = view.k[..., 2] > 0
    assert view.mask is None or isinstance(view.mask, Tensor), (
        "what earlier pixels are seen is told by a mask"
    )
    if view.mask is not None:
        there = there & view.mask.any(dim=-2)
    places = view.k[..., 0].long() * width + view.k[..., 1].long()
    return torch.where(there, places, -1)[:, 0], view.v[:, 0]


def _lay_out(places: Tensor, pixels: Tensor, shape: tuple[int, int]) -> Tensor:
    """Pixels (N, S, 3) at places (N, S) -> (N, 3, H, W), zero where none was seen; places beyond it are left out."""
    size = shape[0] * shape[1]
    index = torch.where((places < 0) | (places >= size), size, places)
    flat = pixels.new_zeros(len(pixels), size + 1, 3).scatter(1, index[..., None].expand(-1, -1, 3), pixels)
    return flat[:, :size].mT.unflatten(2, shape)


def _predicted(step: Step, batch: int) -> Tensor:
    """The place predicted from each slot, (L,) or (B, L); -1 where none is."""
    shared = step.target.ndim == step.read.ndim == 1
    size = 1 if shared else batch
    places = torch.full((size, len(step.feed)), -1)
    scatter_positions(places, step.read, step.target.expand(size, -1))
    return places[0] if shared else places


def _through_grid(ports: Ports | None, layer: int, ul: Tensor, step: Step, prepared: Prepared) -> Tensor:
    if not ports or ("block", layer) not in ports:
        return ul
    return through(ports, "block", layer, ul.flatten(2).mT, step, prepared).mT.unflatten(2, ul.shape[2:])


class _Filters(nn.Module):
    """A convolution's parameters, each filter's length apart from its direction (weight norm, arXiv 1602.07868).

    Filters of length 1 keep the variance of their inputs, so that they need no data to start from.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: tuple[int, int], gain: float, out_dim: int = 0
    ) -> None:
        super().__init__()
        sizes = (outputs, inputs) if out_dim == 0 else (inputs, outputs)
        self.out_dim = out_dim
        self.direction = nn.Parameter(torch.empty(*sizes, *kernel))
        self.gain = nn.Parameter(torch.full((outputs,), gain))
        self.bias = nn.Parameter(torch.zeros(outputs))
        nn.init.normal_(self.direction, std=0.05)

    @property
    def weight(self) -> Tensor:
        """The filters."""
        length = torch.linalg.vector_norm(self.direction, dim=(1 - self.out_dim, 2, 3), keepdim=True)
        return self.direction * (self.gain.view_as(length) / length)


class _Convolution(_Filters):
    """(N, I, h, w) -> (N, O, h / stride, w / stride), looking up and, unless `corner`, to both sides, else left."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: tuple[int, int],
        corner: bool = False,
        stride: int = 1,
        gain: float = 1.0,
    ) -> None:
        super().__init__(inputs, outputs, kernel, gain)
        reach = kernel[1] - 1
        self.stride, self.padding = stride, (reach, 0) if corner else (reach // 2, reach // 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (*self.padding, self.direction.shape[2] - 1, 0))
        return F.conv2d(x, self.weight, self.bias, self.stride)


class _Upsampling(_Filters):
    """(N, I, h, w) -> (N, O, 2 h, 2 w): a place goes to itself and those below and, by its kernel, beside it."""

    def __init__(
        self, inputs: int, outputs: int, kernel: tuple[int, int], corner: bool = False, stride: int = 2
    ) -> None:
        super().__init__(inputs, outputs, kernel, gain=2.0, out_dim=1)  # a place gets a quarter of the taps
        self.stride, self.beside = stride, (0, 0 if corner else 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(x, self.weight, self.bias, self.stride, self.beside, self.beside)


class _First(nn.Module):
    """Pixels and a channel of ones, which tells the picture from its surroundings, to the two streams.

    (N, 3, h, w) -> (N, F, h, w) twice; here places lose sight of themselves.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.u = _Convolution(4, width, (2, 3))
        self.above = _Convolution(4, width, (1, 3))
        self.left = _Convolution(4, width, (2, 1))

    def forward(self, picture: Tensor) -> _Streams:
        x = F.pad(picture, (0, 0, 0, 0, 0, 1), value=1.0)
        return _down(self.u(x)), _down(self.above(x)) + _right(self.left(x))


def _down(x: Tensor) -> Tensor:
    return F.pad(x[:, :, :-1], (0, 0, 1, 0))


def _right(x: Tensor) -> Tensor:
    return F.pad(x[:, :, :, :-1], (1, 0))


class _Resize(nn.Module):
    """Both streams to half or twice the resolution, by a convolution of `kind` each."""

    def __init__(self, width: int, kind: type[_Convolution] | type[_Upsampling]) -> None:
        super().__init__()
        self.u = kind(width, width, ABOVE, stride=2)
        self.ul = kind(width, width, CORNER, corner=True, stride=2)

    def forward(self, u: Tensor, ul: Tensor) -> _Streams:
        return self.u(u), self.ul(ul)


class _Block(nn.Module):
    """A gated layer of each stream; ul sees u, and on the way down both see what was kept on the way up."""

    def __init__(self, width: int, dropout: float, skip: bool) -> None:
        super().__init__()
        self.u = _Gated(width, width if skip else 0, ABOVE, False, dropout)
        self.ul = _Gated(width, 2 * width if skip else width, CORNER, True, dropout)

    def forward(self, u: Tensor, ul: Tensor, moved: Tensor, kept: _Streams | None) -> _Streams:
        """Streams, the condition (N, 2, 2 F) and the streams kept -> streams."""
        u = self.u(u, moved[:, 0], None if kept is None else kept[0])
        beside = u if kept is None else torch.cat([u, kept[1]], dim=1)
        return u, self.ul(ul, moved[:, 1], beside)


class _Gated(nn.Module):
    """x + a sigmoid(b), with a and b two convolutions away from x; a stream beside it enters by a 1 x 1 shortcut."""

    def __init__(
        self, width: int, beside: int, kernel: tuple[int, int], corner: bool, dropout: float
    ) -> None:
        super().__init__()
        self.inner = _Convolution(2 * width, width, kernel, corner)
        self.shortcut = _Convolution(2 * beside, width, (1, 1)) if beside else None
        self.dropout = nn.Dropout(dropout)
        self.outer = _Convolution(2 * width, 2 * width, kernel, corner, gain=0.1)

    def forward(self, x: Tensor, moved: Tensor, beside: Tensor | None) -> Tensor:
        h = self.inner(_both_elu(x))
        if self.shortcut is not None and beside is not None:
            h = h + self.shortcut(_both_elu(beside))
        h = self.outer(self.dropout(_both_elu(h))) + moved[..., None, None]
        a, b = h.chunk(2, dim=1)
        return x + a * torch.sigmoid(b)


def _both_elu(x: Tensor) -> Tensor:
    """ELU of x and of -x, side by side (the published code's concat_elu)."""
    return F.elu(torch.cat([x, -x], dim=1))
