"""FlexVAR's tokenizer (arXiv 2502.20313): every scale's map quantises the whole picture, and decodes by itself.

LlamaGen's VQ (`varkit/tokenizers/vq.py`), with codes and features on the unit sphere, at each scale:

    ids_k = nearest(area(f, side_k)),    input of scale k+1 = bicubic(codes[ids_k], side_k+1)

so scales do not depend on each other, any schedule will do, and the last map alone is the picture. The training of the
tokenizer is unreleased; from the paper: some random scales a step, each decoded to a picture of its own size.
Legend: B batch, H W image, h w grid of a map, D code channels, V codes, K maps, L positions, n positions of a map.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from varkit.errors import UserError
from varkit.plans.flexible import PUBLISHED, proportional
from varkit.plans.schedule import Schedule, Side
from varkit.tokenizers.base import Latents
from varkit.tokenizers.codebook import Codebook
from varkit.tokenizers.conv import ConvConfig
from varkit.tokenizers.residual import IdsQuantizer, Quantized, QuantizedTokenizer

if TYPE_CHECKING:
    from varkit.canvases.base import Canvas


class MapQuantizer(IdsQuantizer):
    """Features (B, D, h, w) of any grid <-> ids (B, L), each map by itself.

    f_hat is the last map drawn, (B, N, D) over the N positions of the finest grid: its own n come first, then zeros.
    """

    def __init__(self, codebook: Codebook, beta: float = 0.25) -> None:
        super().__init__()
        self.embedding = codebook
        self.beta = beta

    def zeros(self, batch: int, schedule: Schedule) -> Tensor:
        """No map, (B, N, D)."""
        return self.codebook.new_zeros(batch, schedule.lengths[-1], self.codebook.shape[1])

    def accumulate(self, f_hat: Tensor, level: int, codes: Tensor, schedule: Schedule) -> Tensor:
        """A map's codes (B, n, D) take the place of the one before."""
        return F.pad(codes, (0, 0, 0, schedule.lengths[-1] - codes.shape[1]))

    def next_input(self, f_hat: Tensor, level: int, schedule: Schedule) -> Tensor:
        """What a generator is fed at `level`: the map before it, resized (B, n, D)."""
        before = laid_out(f_hat[:, : schedule.lengths[level - 1]], schedule.sides[level - 1])
        if schedule.sides[level] != schedule.sides[level - 1]:
            before = F.interpolate(before, schedule.sides[level], mode="bicubic")
        return before.flatten(2).mT

    def encode(self, f: Tensor, schedule: Schedule) -> Tensor:
        """Features (B, D, h, w), not normalised -> ids (B, L)."""
        f = self.check(f, schedule)
        return torch.cat([self.embedding.nearest(resized(f, side)) for side in schedule.sides], dim=1)

    def features(self, chosen: Tensor, schedule: Schedule, levels: int | None = None) -> Tensor:
        """The codes of the last of `levels` maps at its own grid, (B, D, h, w); with none of them zeros."""
        levels = len(schedule) if levels is None else levels
        self.check_prefix(chosen, schedule, levels)
        if levels == 0:
            return laid_out(self.zeros(len(chosen), schedule), schedule.last)
        part = chosen[:, schedule.offsets[levels - 1] : schedule.offsets[levels]]
        return laid_out(self.lookup(part), schedule.sides[levels - 1])

    def check(self, f: Tensor, schedule: Schedule) -> Tensor:
        """f in the quantizer's dtype; any grid fits."""
        return f.to(self.codebook.dtype)

    def maps(self, f: Tensor, schedule: Schedule) -> list[Quantized]:
        """Quantise each map for training; gradients pass straight through to f."""
        return [self._map(self.check(f, schedule), side) for side in schedule.sides]

    def _map(self, f: Tensor, side: tuple[int, int]) -> Quantized:
        vectors = F.normalize(resized(f, side), dim=-1) if self.embedding.normalize else resized(f, side)
        ids = self.embedding.nearest(vectors)
        codes = self.lookup(ids)
        loss = F.mse_loss(codes, vectors.detach()) + self.beta * F.mse_loss(vectors, codes.detach())
        return Quantized(laid_out(vectors + (codes - vectors).detach(), side), loss, ids, vectors)

    def forward(self, f: Tensor, schedule: Schedule) -> Quantized:
        """Quantise all maps for training; the features are the last one's, the loss the mean over maps."""
        return joined(self.maps(f, schedule))

    @torch.no_grad()
    def initialize_codebook(self, f: Tensor, schedule: Schedule, generator: torch.Generator) -> None:
        """Replace the codes by vectors of all maps of f (B, D, h, w), each once before any comes again."""
        f = self.check(f, schedule)
        rows = torch.cat([resized(f, side).flatten(0, 1) for side in schedule.sides])
        order = torch.randperm(len(rows), generator=generator)
        chosen = order[torch.arange(len(self.embedding.weight)) % len(rows)].to(rows.device)
        self.embedding.weight.copy_(rows[chosen])


def joined(maps: list[Quantized]) -> Quantized:
    """Several maps' training passes as one: the last one's features, the mean of the losses."""
    return Quantized(
        maps[-1].features,
        torch.stack([m.loss for m in maps]).mean(),
        torch.cat([m.chosen for m in maps], dim=1),
        torch.cat([m.residuals for m in maps], dim=1),
    )


def resized(f: Tensor, side: tuple[int, int]) -> Tensor:
    """f (B, D, h, w) at another grid by means over areas, position by position: (B, n, D)."""
    if tuple(f.shape[2:]) != side:
        f = F.interpolate(f, side, mode="area")
    return f.flatten(2).mT


def laid_out(vectors: Tensor, side: tuple[int, int]) -> Tensor:
    """(B, n, D) -> (B, D, h, w)."""
    return vectors.mT.reshape(len(vectors), -1, *side)


@dataclass(frozen=True)
class MapVQConfig:
    """The defaults are FlexVAR's published tokenizer (stride 16; its codebook has 8912 codes, which is no slip here).

    normalize: codes and features on the unit sphere.
    """

    conv: ConvConfig = ConvConfig(channels=128, latent_channels=256)
    vocab_size: int = 8912
    code_channels: int = 32
    schedule: tuple[Side, ...] = PUBLISHED[10]
    normalize: bool = True
    beta: float = 0.25

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "schedule", tuple(s if isinstance(s, int) else tuple(s) for s in self.schedule)
        )
        Schedule.parse(self.schedule)
        for name, least in (("vocab_size", 2), ("code_channels", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        width = self.conv.widths[-1]
        if self.conv.groups >= width > 0:
            raise UserError(
                f"{self.conv.groups} groups over {width} channels would normalise a map of 1 x 1 to nothing; choose "
                f"groups so that each has several channels, e.g. {max(1, width // 4)}"
            )

    def build(self) -> "MapVQ":
        """Make the tokenizer, freshly initialised."""
        return MapVQ(self)


class MapVQ(QuantizedTokenizer):
    """FlexVAR's tokenizer: images <-> ids (B, L) over the maps of any schedule."""

    quantizer: MapQuantizer

    def __init__(self, config: MapVQConfig) -> None:
        quantizer = MapQuantizer(
            Codebook(config.vocab_size, config.code_channels, config.normalize), config.beta
        )
        super().__init__(
            config.conv, quantizer, Schedule.parse(config.schedule), config.code_channels, kernel=1
        )
        self.config = config

    @property
    def every(self) -> Schedule:
        """A map of each longer side from 1 to the default schedule's, in its shape: what training draws from."""
        last = self.schedule.last
        return Schedule.of(*proportional(range(1, max(last) + 1), last))

    @torch.no_grad()
    def training_latents(self, images: Tensor) -> Latents:
        """Ids (B, L) over all of `every`, since each training step has another schedule."""
        return {"ids": self.quantizer.encode(self.encode_features(images), self.every)}

    @torch.no_grad()
    def decode(self, latents: Latents, schedule: Schedule | None = None, levels: int | None = None) -> Tensor:
        """The picture of the last map, or of the last of the first `levels`, brought to the schedule's size."""
        pictures = super().decode(latents, schedule, levels)
        return to_size(pictures, self.image_size(schedule))

    @torch.no_grad()
    def decode_map(self, ids: Tensor, side: tuple[int, int]) -> Tensor:
        """One map by itself: ids (B, h w) -> images (B, 3, h * stride, w * stride) in [-1, 1]."""
        return super().decode({"ids": ids}, Schedule.of(side))

    def training_maps(self, images: Tensor, schedule: Schedule) -> list[dict[str, Tensor]]:
        """What `training_forward` gives, for each of the schedule's maps: its picture has its own size."""
        quantized = self.quantizer.maps(self.encode_features(images), schedule)
        return [
            {
                "reconstruction": self.reconstruct(one.features),
                "vq_loss": one.loss,
                "ids": one.chosen,
                "residuals": one.residuals,
            }
            for one in quantized
        ]

    def canvas(self, batch: int, schedule: Schedule | None = None) -> "Canvas":
        from varkit.canvases.maps import MapsCanvas

        return MapsCanvas(self.quantizer, batch, schedule or self.schedule, show=self.decode_features)


def to_size(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Images (B, 3, ...) enlarged to (H, W), where they have another size."""
    if tuple(images.shape[2:]) == size:
        return images
    return F.interpolate(images, size, mode="bicubic").clamp(-1, 1)
