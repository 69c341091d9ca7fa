"""What the trainer does for a tokenizer: reconstruct pictures, keep a codebook alive, optionally against a critic."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from varkit.data.base import Dataset
from varkit.devices import device_of
from varkit.errors import UserError
from varkit.evaluate.reconstruction import psnr
from varkit.pictures import grid, to_pil, to_tensor
from varkit.tokenizers.codebook import CodebookKeeper
from varkit.tokenizers.kl import KL
from varkit.tokenizers.residual import QuantizedTokenizer
from varkit.train.task import Phase, Task
from varkit.train.tokenizer_loss import MovingCodesConfig, TokenizerLoss, TokenizerLossConfig

ADVERSARIAL_BETAS = (0.5, 0.9)
"""AdamW's moments when a critic plays along (vaex); without one the run's own are used."""


class ReconstructionTask(Task):
    """Train `tokenizer` on `dataset` in batches of `batch_size`; validation on the held-out part (first 256 items).

    Codes, if there are any, that are unused for `patience` steps move onto current residuals. With a loss of the kind
    `MovingCodesConfig` the others are moving averages; `UserError` for a tokenizer without codes.
    """

    def __init__(
        self, tokenizer: QuantizedTokenizer | KL, dataset: Dataset, loss: TokenizerLossConfig, batch_size: int,
        recipe: dict, seed: int = 0, patience: int = 100,
    ) -> None:  # fmt: skip
        self.tokenizer, self.batch_size, self.seed, self.recipe = tokenizer, batch_size, seed, recipe
        self.train, self.held_out = dataset.split("train"), dataset.split("validation")
        self.losses = TokenizerLoss(loss)
        self.quantizer = tokenizer.quantizer if isinstance(tokenizer, QuantizedTokenizer) else None
        self.modules: dict[str, nn.Module] = {"tokenizer": tokenizer}
        self.phases: tuple[Phase, ...] = (Phase("tokenizer", ("tokenizer",)),)
        if self.losses.discriminator is not None:
            self.modules["discriminator"] = self.losses.discriminator
            self.phases = (
                Phase("tokenizer", ("tokenizer",), betas=ADVERSARIAL_BETAS),
                Phase("discriminator", ("discriminator",), betas=ADVERSARIAL_BETAS, weight_decay=0.0),
            )
        self._outputs: dict[str, Tensor] = {}
        if isinstance(tokenizer, QuantizedTokenizer):
            first = self.batch(0, 0).to(device_of(tokenizer))
            tokenizer.initialize_codebook(first, torch.Generator().manual_seed(seed))
        codes = None if self.quantizer is None else self.quantizer.embedding
        decay = loss.codebook_decay if isinstance(loss, MovingCodesConfig) else None
        if codes is None and decay is not None:
            raise UserError(
                f"codebook_decay {decay} averages codes, and {type(tokenizer).__name__} has none; use "
                "TokenizerLossConfig"
            )
        self.keeper = None if codes is None else CodebookKeeper(codes, decay, patience)

    @property
    def side(self) -> tuple[int, int]:
        """Pixels the tokenizer works at, (H, W)."""
        return self.tokenizer.image_size()

    def batch(self, step: int, micro: int) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1], a pure function of (seed, step, micro)."""
        rng = np.random.default_rng([self.seed, step, micro])
        size = 2**40 if self.train.size is None else self.train.size
        rows = rng.integers(0, size, self.batch_size).tolist()
        return to_tensor(self.train.batch(rows, self.side, rng.random((self.batch_size, 2))).images)

    def loss(self, phase: str, batch: Tensor, step: int) -> tuple[Tensor, dict[str, float | Tensor]]:
        """One phase of the two-player game, or the only one."""
        if phase == "discriminator":
            return self.losses.discriminate(self._outputs, batch)
        self._outputs = self.tokenizer.training_forward(batch)
        return self.losses.generator(self._outputs, batch, step, self.tokenizer.decoder.conv_out.weight)

    def keeps_float32(self, name: str) -> bool:
        """Codes, and the convolutions beside them, are exact whatever the run's dtype; so is the critic."""
        return ".quantizer." in name or name.startswith("discriminator.")

    def after_step(self, step: int) -> dict[str, float]:
        """Average and move codes; the number of dead ones that moved is logged."""
        if self.quantizer is None or self.keeper is None:
            return {}
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        chosen = self._outputs[self.quantizer.latent]
        return {"revived": float(self.keeper.update(self._outputs["residuals"], chosen, generator))}

    def moved(self) -> list[Tensor]:
        """The codes."""
        codes = None if self.quantizer is None else self.quantizer.embedding
        return [] if codes is None else [codes.weight]

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs beside the modules."""
        return {} if self.keeper is None else self.keeper.state_dict()

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Inverse of `state`."""
        if self.keeper is not None:
            self.keeper.load_state_dict(state)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """PSNR over held-out pictures (mean of squared errors first), and figures of what was chosen."""
        quantizer = self.quantizer
        statistics = None if quantizer is None else quantizer.statistics(self.tokenizer.schedule)
        errors = []
        for images in self._held_out(256):
            latents = self.tokenizer.encode(images)
            if statistics is not None and quantizer is not None:
                statistics.update(latents[quantizer.latent])
            errors.append((self.tokenizer.decode(latents) - images).square().mean(dim=(1, 2, 3)))
        metrics = {} if statistics is None else statistics.metrics()
        return {"psnr": psnr(torch.cat(errors).mean().item()), **metrics}

    @torch.no_grad()
    def samples(self) -> Image.Image:
        """Held-out pictures above their reconstructions."""
        images = next(iter(self._held_out(8)))
        rebuilt = self.tokenizer.decode(self.tokenizer.encode(images))
        return grid([*to_pil(images), *to_pil(rebuilt)], columns=len(images))

    def _held_out(self, count: int):
        source = self.held_out if self.held_out.size != 0 else self.train
        count = count if source.size is None else min(count, source.size)
        for start in range(0, count, 32):
            rows = list(range(start, min(count, start + 32)))
            yield to_tensor(source.batch(rows, self.side).images).to(device_of(self.tokenizer))


class DecoderTask(ReconstructionTask):
    """Go on with the decoder alone, for the squared error that PSNR measures; encoder and codes (so every token) stay.

    It only needs the codes that were found, so a step costs half of a full one.
    """

    def __init__(
        self,
        tokenizer: QuantizedTokenizer,
        dataset: Dataset,
        batch_size: int,
        recipe: dict[str, Any],
        seed: int = 0,
    ) -> None:
        self.tokenizer, self.batch_size, self.seed, self.recipe = tokenizer, batch_size, seed, recipe
        self.train, self.held_out = dataset.split("train"), dataset.split("validation")
        self.quantizer = tokenizer.quantizer
        self.modules = {"decoder": tokenizer.decoder, "post_quant_conv": tokenizer.post_quant_conv}
        self.phases = (Phase("decoder", ("decoder", "post_quant_conv")),)

    def loss(self, phase: str, batch: Tensor, step: int) -> tuple[Tensor, dict[str, float | Tensor]]:
        """Mean squared error of the reconstruction, not clamped."""
        assert self.quantizer is not None
        with torch.no_grad():
            assert self.quantizer is not None
            latents = self.tokenizer.encode(batch)
            f_hat = self.quantizer.features(latents[self.quantizer.latent], self.tokenizer.schedule)
        loss = F.mse_loss(self.tokenizer.reconstruct(f_hat), batch)
        return loss, {"psnr": psnr(loss.item())}

    def keeps_float32(self, name: str) -> bool:
        """Nothing does."""
        return False

    def after_step(self, step: int) -> dict[str, float]:
        """No code moves."""
        return {}

    def moved(self) -> list[Tensor]:
        """No code."""
        return []

    def state(self) -> dict[str, Tensor]:
        """Nothing beside the modules."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Inverse of `state`."""
