"""Training of a tokenizer whose maps stand alone (FlexVAR, arXiv 2502.20313): some scales a step, each its own picture.

Unreleased; after the paper, K = 5 scales a step, of all sides up to the finest grid, and each map's picture is compared
with the image resized to it. Ours: the finest scale is always among them (it is what is kept, and what a critic
judges), the others are drawn (unconfirmed), and the losses are averaged.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from varkit.data.base import Dataset
from varkit.errors import UserError
from varkit.plans.schedule import Schedule
from varkit.tokenizers.map_vq import MapVQ
from varkit.train.tokenizer_loss import TokenizerLoss, TokenizerLossConfig
from varkit.train.tokenizer_task import ReconstructionTask

SCALES = 5
"""Scales a step (paper), of tokenizers that have as many."""


class MapTask(ReconstructionTask):
    """Train `tokenizer` on `dataset`: pictures of `scales` maps a step. A critic sees the finest alone."""

    def __init__(
        self, tokenizer: MapVQ, dataset: Dataset, loss: TokenizerLossConfig, batch_size: int, recipe: dict[str, Any],
        seed: int = 0, scales: int | None = None,
    ) -> None:  # fmt: skip
        scales = min(SCALES, len(tokenizer.every)) if scales is None else scales
        if not 1 <= scales <= len(tokenizer.every):
            raise UserError(f"{scales} scales a step cannot be drawn; use 1 to {len(tokenizer.every)}")
        self.maps, self.scales = tokenizer, scales
        super().__init__(tokenizer, dataset, loss, batch_size, recipe, seed)
        self.coarse = TokenizerLoss(replace(loss, adversarial=0.0))

    def drawn(self, step: int) -> Schedule:
        """The scales of a step, a pure function of (seed, step): the finest, and others without repetition."""
        *others, last = self.maps.every.sides
        rng = np.random.default_rng([self.seed, step, SCALES])
        chosen = sorted(rng.permutation(len(others))[: self.scales - 1].tolist())
        return Schedule.of(*(others[i] for i in chosen), last)

    def loss(self, phase: str, batch: Tensor, step: int) -> tuple[Tensor, dict[str, float | Tensor]]:
        """The mean over the step's maps; its figures are the finest's, but for the loss."""
        if phase == "discriminator":
            return self.losses.discriminate(self._outputs, batch)
        schedule = self.drawn(step)
        outputs = self.maps.training_maps(batch, schedule)
        *coarse, finest = outputs
        last_layer = self.maps.decoder.conv_out.weight
        terms = [
            self.coarse.generator(out, shrunk(batch, out["reconstruction"]), step, last_layer)[0]
            for out in coarse
        ]
        fine, metrics = self.losses.generator(finest, batch, step, last_layer)
        loss = torch.stack([*terms, fine]).mean()
        joined = {name: torch.cat([out[name] for out in outputs], dim=1) for name in ("ids", "residuals")}
        self._outputs = {"reconstruction": finest["reconstruction"], **joined}
        return loss, {**metrics, "loss": loss.item()}


def shrunk(images: Tensor, like: Tensor) -> Tensor:
    """Images (B, 3, H, W) at another picture's size, by means over areas."""
    return F.interpolate(images, like.shape[2:], mode="area")
