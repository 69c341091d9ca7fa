"""The residual pyramid of next-scale tokenizers: features as a sum over levels, coarse to fine (VAR, arXiv 2404.02905).

With f the encoder's features and f_hat_0 = 0, level k quantises what is still missing:

    chosen_k = choose(area(goal_k(f) - f_hat_k-1)),    f_hat_k = f_hat_k-1 + up(lookup(chosen_k))

with goal_k(f) = f, or a part of f that grows with k (NFIG's bands, varkit/tokenizers/frequency.py),
so any prefix of levels decodes to a coarse picture, and f_hat is the only state there is: `accumulate` advances it and
`next_input` reads from it what a generator is fed. All of it runs in float32 whatever the network around it does. What
is chosen, how a level is brought to the finest grid and what training asks for are a quantizer's own. The maps of
`varkit/tokenizers/map_vq.py`, which do not add up, keep the last one in place of the sum (`ScaleQuantizer`).
Legend: B batch, H W image, h w latent grid, D code channels, K levels, L positions, n positions of a level.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from varkit.errors import UserError
from varkit.plans.schedule import Schedule
from varkit.tokenizers.base import Latents, Tokenizer
from varkit.tokenizers.codebook import Codebook, CodebookStatistics
from varkit.tokenizers.conv import ConvConfig, Decoder, Encoder, initialize
from varkit.tokenizers.patch import PatchEncoder, PatchEncoderConfig

Override = Callable[[int, Tensor], Tensor]
"""(level, chosen (B, n, ...)) -> what to use instead: edits, watermarks, self-correction."""

Goal = Callable[[Tensor, int, Schedule], Tensor]
"""(f (B, D, h, w), level, schedule) -> what the levels up to that one are to add up to, in f's shape."""


def all_of_it(f: Tensor, level: int, schedule: Schedule) -> Tensor:
    """VAR's goal: every level corrects towards the whole of f."""
    return f


@dataclass
class Quantized:
    """The quantizer's training pass: what was `chosen` (B, L, ...) stands for the vectors `residuals` (B, L, D)."""

    features: Tensor
    loss: Tensor
    chosen: Tensor
    residuals: Tensor


class Statistics(Protocol):
    """What validation says of the choices of many pictures."""

    def update(self, chosen: Tensor) -> None:
        """Count (B, L, ...)."""
        ...

    def metrics(self) -> dict[str, float]:
        """Figures by name."""
        ...


class ScaleQuantizer(nn.Module, ABC):
    """Features (B, D, h, w) <-> what is chosen at each position, (B, L, ...), which latents call `latent`.

    What a canvas keeps while levels are drawn is f_hat: the sum over them, or whatever else `next_input` needs.
    """

    latent: str
    embedding: Codebook | None
    """The codes, if they are learned."""

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        """Moves and casts as any module does, but never below float32: codes rounded to bfloat16 are other codes."""

        def at_least_float32(t: Tensor) -> Tensor:
            moved = fn(t)
            return t.to(moved.device) if moved.is_floating_point() and moved.element_size() < 4 else moved

        return super()._apply(at_least_float32, recurse)

    @abstractmethod
    def empty(self, batch: int, positions: int) -> Tensor:
        """Nothing chosen yet, (B, L, ...) of the right dtype."""

    @abstractmethod
    def lookup(self, chosen: Tensor) -> Tensor:
        """(B, n, ...) -> codes (B, n, D)."""

    @abstractmethod
    def zeros(self, batch: int, schedule: Schedule) -> Tensor:
        """f_hat before any level, (B, ...)."""

    @abstractmethod
    def accumulate(self, f_hat: Tensor, level: int, codes: Tensor, schedule: Schedule) -> Tensor:
        """Take one level's codes (B, n, D) into f_hat; returns the new f_hat."""

    @abstractmethod
    def next_input(self, f_hat: Tensor, level: int, schedule: Schedule) -> Tensor:
        """What a generator is fed at `level`, made of f_hat after the levels before it: (B, n, D)."""

    def own_input(self, codes: Tensor, level: int, schedule: Schedule) -> Tensor:
        """What a level adds to the sum, at its own grid: codes (B, n, D) -> (B, n, D), for models that see it."""
        alone = self.accumulate(self.zeros(len(codes), schedule), level, codes, schedule)
        return self.next_input(alone, level, schedule)

    @abstractmethod
    def encode(self, f: Tensor, schedule: Schedule) -> Tensor:
        """Features (B, D, h, w) -> what is chosen, (B, L, ...)."""

    @abstractmethod
    def features(self, chosen: Tensor, schedule: Schedule, levels: int | None = None) -> Tensor:
        """What is chosen (B, L, ...), or a prefix that covers `levels` -> features that decode, (B, D, h, w)."""

    @abstractmethod
    def check(self, f: Tensor, schedule: Schedule) -> Tensor:
        """f in the quantizer's dtype. Raises `UserError` where its grid does not fit the schedule."""

    @abstractmethod
    def forward(self, f: Tensor, schedule: Schedule) -> Quantized:
        """Quantise for training."""

    @abstractmethod
    def statistics(self, schedule: Schedule) -> Statistics:
        """An empty count of choices."""

    def initialize_codebook(self, f: Tensor, schedule: Schedule, generator: torch.Generator) -> None:
        """Start the codes from features (B, D, h, w), where there are codes to learn."""

    def check_prefix(self, chosen: Tensor, schedule: Schedule, levels: int) -> None:
        """Raise `UserError` unless chosen (B, L, ...) fills the first `levels` of a schedule that has them."""
        if not 0 <= levels <= len(schedule):
            raise UserError(f"levels is {levels}; the schedule {schedule.sides} has 0 to {len(schedule)}")
        if chosen.shape[1] < schedule.offsets[levels]:
            raise UserError(
                f"{chosen.shape[1]} {self.latent} do not fill the first {levels} levels of {schedule.sides}, which "
                f"take {schedule.offsets[levels]}; give the schedule they were encoded with, or fewer levels"
            )


class IdsQuantizer(ScaleQuantizer):
    """What is chosen are ids of one codebook."""

    latent = "ids"
    embedding: Codebook

    @property
    def codebook(self) -> Tensor:
        """The codes as they are used, (V, D) float32."""
        return self.embedding.codes

    def empty(self, batch: int, positions: int) -> Tensor:
        """Ids (B, L), all 0."""
        return torch.zeros(batch, positions, dtype=torch.int64, device=self.codebook.device)

    def lookup(self, chosen: Tensor) -> Tensor:
        """Ids (B, n) -> codes (B, n, D)."""
        return self.embedding(chosen)

    def statistics(self, schedule: Schedule) -> CodebookStatistics:
        """An empty count of codes."""
        return CodebookStatistics(len(self.codebook), schedule)


class ResidualQuantizer(ScaleQuantizer):
    """f_hat (B, D, h, w) is the sum of the levels, each of which codes what those before it left over."""

    goal: Goal = staticmethod(all_of_it)
    """What each level corrects towards; `encode` and `forward` ask for it, decoding does not."""

    @abstractmethod
    def choose(self, residual: Tensor, level: int, schedule: Schedule) -> Tensor:
        """What stands for the vectors that are missing at a level: residual (B, n, D) -> (B, n, ...)."""

    @abstractmethod
    def missing(self, rest: Tensor, level: int, schedule: Schedule) -> Tensor:
        """The part of a level's goal that is not yet there, (B, D, h, w), at a level's grid: (B, n, D)."""

    def encode(
        self,
        f: Tensor,
        schedule: Schedule,
        start_level: int = 0,
        f_hat: Tensor | None = None,
        override: Override | None = None,
    ) -> Tensor:
        """Features (B, D, h, w) -> what is chosen, (B, L, ...).

        With `start_level` and the `f_hat` of the levels before it (any f_hat: sampled, edited), the choices of
        the remaining levels, which correct towards f whatever came before.
        """
        f = self.check(f, schedule)
        f_hat = self.zeros(len(f), schedule) if f_hat is None else f_hat
        parts = []
        for level in range(start_level, len(schedule)):
            rest = self.goal(f, level, schedule) - f_hat
            chosen = self.choose(self.missing(rest, level, schedule), level, schedule)
            parts.append(chosen if override is None else override(level, chosen))
            f_hat = self.accumulate(f_hat, level, self.lookup(parts[-1]), schedule)
        return torch.cat(parts, 1)

    def features(self, chosen: Tensor, schedule: Schedule, levels: int | None = None) -> Tensor:
        """What is chosen (B, L, ...), or a prefix that covers `levels` -> f_hat (B, D, h, w)."""
        levels = len(schedule) if levels is None else levels
        self.check_prefix(chosen, schedule, levels)
        f_hat = self.zeros(len(chosen), schedule)
        for level in range(levels):
            part = chosen[:, schedule.offsets[level] : schedule.offsets[level + 1]]
            f_hat = self.accumulate(f_hat, level, self.lookup(part), schedule)
        return f_hat

    def check(self, f: Tensor, schedule: Schedule) -> Tensor:
        """f in the quantizer's dtype. Raises `UserError` where it is not on the schedule's finest grid."""
        like = self.zeros(0, schedule)
        if f.shape[2:] != like.shape[2:]:
            raise UserError(
                f"features on a {tuple(f.shape[2:])} grid do not fit the schedule's finest, {tuple(like.shape[2:])}; "
                f"give a schedule that ends with {tuple(f.shape[2:])}"
            )
        return f.to(like.dtype)


class QuantizedTokenizer(Tokenizer):
    """Encoder and convolutional decoder around a quantizer.

    codes: channels of a code; kernel: that of the convolutions between features and codes, 0 for none. encoder:
    convolutional by default.
    """

    def __init__(
        self,
        conv: ConvConfig,
        quantizer: ScaleQuantizer,
        schedule: Schedule,
        codes: int,
        kernel: int,
        encoder: PatchEncoderConfig | None = None,
    ) -> None:
        super().__init__()
        self.stride = conv.stride
        self.schedule = schedule
        self.quantizer = quantizer
        self.encoder: Encoder | PatchEncoder = (
            Encoder(conv) if encoder is None else PatchEncoder(encoder, conv.stride, conv.latent_channels)
        )
        looks = (
            kernel if encoder is None else min(kernel, 1)
        )  # past a patch-wise encoder nothing may mix patches
        self.quant_conv = _between(conv.latent_channels, codes, looks)
        self.post_quant_conv = _between(codes, conv.latent_channels, kernel)
        self.decoder = Decoder(conv)
        for part in (self.encoder, self.quant_conv, self.post_quant_conv, self.decoder):
            part.apply(initialize)

    def encode_features(self, images: Tensor, schedule: Schedule | None = None) -> Tensor:
        """Images (B, 3, H, W) -> f (B, D, h, w) float32, not quantised."""
        self.check_images(images, schedule)
        f = self.quant_conv(self.encoder(images.to(_dtype(self.encoder))))
        return self.quantizer.check(f, schedule or self.schedule)

    def decode_features(self, f_hat: Tensor) -> Tensor:
        """f_hat (B, D, h, w) -> images (B, 3, h * stride, w * stride) float32 clamped to [-1, 1]."""
        return self.reconstruct(f_hat).clamp(-1, 1)

    def reconstruct(self, f_hat: Tensor) -> Tensor:
        """`decode_features` before the clamp, which has no gradient outside [-1, 1]."""
        return self.decoder(self.post_quant_conv(f_hat.to(_dtype(self.decoder)))).float()

    @torch.no_grad()
    def encode(self, images: Tensor, schedule: Schedule | None = None) -> Latents:
        f = self.encode_features(images, schedule)
        return {self.quantizer.latent: self.quantizer.encode(f, schedule or self.schedule)}

    @torch.no_grad()
    def decode(self, latents: Latents, schedule: Schedule | None = None, levels: int | None = None) -> Tensor:
        chosen = latents[self.quantizer.latent]
        return self.decode_features(self.quantizer.features(chosen, schedule or self.schedule, levels))

    def training_forward(self, images: Tensor, schedule: Schedule | None = None) -> dict[str, Tensor]:
        """Images -> what the losses and the codebook's keeper need.

        `reconstruction` (B, 3, H, W) not clamped, `vq_loss` (), what was chosen (B, L, ...) under its name, and
        `residuals` (B, L, D), the vectors that it stands for.
        """
        quantized = self.quantizer(self.encode_features(images, schedule), schedule or self.schedule)
        return {
            "reconstruction": self.reconstruct(quantized.features),
            "vq_loss": quantized.loss,
            self.quantizer.latent: quantized.chosen,
            "residuals": quantized.residuals,
        }

    @torch.no_grad()
    def initialize_codebook(self, images: Tensor, generator: torch.Generator) -> None:
        """Start the codes from the features of `images` (B, 3, H, W), before training."""
        self.quantizer.initialize_codebook(self.encode_features(images), self.schedule, generator)


def _dtype(part: nn.Module) -> torch.dtype:
    """What `part` computes in: a run may train one half in bfloat16 beside the other in float32."""
    return next(part.parameters()).dtype


def _between(inputs: int, outputs: int, kernel: int) -> nn.Module:
    """A convolution between features and codes, or nothing."""
    if kernel == 0:
        assert inputs == outputs, f"without a convolution {inputs} channels cannot become {outputs}"
        return nn.Identity()
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)
