"""What a VQ tokenizer is trained to minimise: reconstruction and quantizer losses and, optionally, a critic.

The recipe is VQGAN's (arXiv 2012.09841) as LlamaGen and VAR use it: L1 and L2, a perceptual distance where a
network for one is at hand, and a patch discriminator with the hinge loss, whose weight follows the ratio of
the gradients that both terms send into the decoder's last layer. VAR's recipe is unreleased; the default L1
and L2 are those of its authors' single-scale successor (vaex).
Legend: B batch, H W image.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varkit.errors import UserError
from varkit.evaluate.reconstruction import psnr
from varkit.tokenizers.codebook import check_decay

Perceptual = Callable[[Tensor, Tensor], Tensor]
"""(reconstruction, images), both (B, 3, H, W) -> a distance, any shape; its mean is used."""

MAX_ADAPTIVE_WEIGHT = 1e4


@dataclass(frozen=True)
class TokenizerLossConfig:
    """Weights of the terms. `edges` compares differences of neighbouring pixels, which keeps outlines crisp.

    The discriminator trains from step 0 and counts from `adversarial_start` on; `adversarial` 0 does without
    it.
    """

    l1: float = 0.2
    l2: float = 1.0
    edges: float = 0.0
    vq: float = 1.0
    perceptual: float = 0.0
    adversarial: float = 0.0
    adversarial_start: int = 0
    adaptive: bool = True
    discriminator_channels: int = 64
    discriminator_layers: int = 3

    def __post_init__(self) -> None:
        for name in ("l1", "l2", "edges", "vq", "perceptual", "adversarial", "adversarial_start"):
            if getattr(self, name) < 0:
                raise UserError(
                    f"loss weight {name} is {getattr(self, name)}; it must be >= 0 (0 switches it off)"
                )
        if self.discriminator_channels < 1 or self.discriminator_layers < 1:
            raise UserError(
                f"discriminator_channels {self.discriminator_channels} and discriminator_layers "
                f"{self.discriminator_layers} must both be at least 1; 64 and 3 are usual"
            )


@dataclass(frozen=True)
class MovingCodesConfig(TokenizerLossConfig):
    """The same for a codebook whose codes are the moving average of the vectors they were chosen for (VQ-VAE, arXiv
    1711.00937, appendix A.1) and get no gradient: `vq` weighs what pulls vectors towards them alone.

    A kind of its own, since every field of a recipe is part of the address of a model that an experiment has trained.
    """

    codebook_decay: float = 0.99

    def __post_init__(self) -> None:
        super().__post_init__()
        check_decay(self.codebook_decay)


class PatchDiscriminator(nn.Sequential):
    """PatchGAN (arXiv 1611.07004): images (B, 3, H, W) -> one logit a patch, (B, 1, h, w)."""

    def __init__(self, channels: int = 64, layers: int = 3) -> None:
        modules: list[nn.Module] = [nn.Conv2d(3, channels, 4, 2, 1), nn.LeakyReLU(0.2)]
        width = channels
        for i in range(1, layers + 1):
            inputs, width = width, channels * min(2**i, 8)
            stride = 2 if i < layers else 1
            modules += [
                nn.Conv2d(inputs, width, 4, stride, 1, bias=False),
                nn.BatchNorm2d(width),
                nn.LeakyReLU(0.2),
            ]
        super().__init__(*modules, nn.Conv2d(width, 1, 4, 1, 1))
        for module in self:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss: push logits of real patches above 1 and of reconstructed ones below -1."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def edge_loss(reconstruction: Tensor, images: Tensor) -> Tensor:
    """Mean absolute error of horizontal and vertical pixel differences."""
    error = reconstruction - images
    return error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()


def adaptive_weight(reconstruction_loss: Tensor, adversarial_loss: Tensor, last_layer: Tensor) -> Tensor:
    """|d reconstruction| / |d adversarial| at the decoder's last layer: both pull equally (VQGAN, eq. 7)."""
    (toward_pixels,) = torch.autograd.grad(reconstruction_loss, last_layer, retain_graph=True)
    (toward_critic,) = torch.autograd.grad(adversarial_loss, last_layer, retain_graph=True)
    return (toward_pixels.norm() / (toward_critic.norm() + 1e-4)).clamp(max=MAX_ADAPTIVE_WEIGHT).detach()


class TokenizerLoss(nn.Module):
    """Both phases of tokenizer training over `training_forward`'s outputs; each returns (loss, metrics).

    Its parameters are the discriminator's, and want an optimizer of their own.
    """

    def __init__(self, config: TokenizerLossConfig, perceptual: Perceptual | None = None) -> None:
        super().__init__()
        if config.perceptual > 0 and perceptual is None:
            raise UserError(
                f"perceptual weight {config.perceptual} needs a distance; pass perceptual=, or weight 0"
            )
        self.config = config
        self.perceptual = perceptual
        self.discriminator = (
            PatchDiscriminator(config.discriminator_channels, config.discriminator_layers)
            if config.adversarial > 0
            else None
        )

    def generator(
        self, outputs: dict[str, Tensor], images: Tensor, step: int = 0, last_layer: Tensor | None = None
    ) -> tuple[Tensor, dict[str, float | Tensor]]:
        """Loss of the tokenizer; the adaptive weight needs `last_layer` = `decoder.conv_out.weight`."""
        config, reconstruction = self.config, outputs["reconstruction"]
        terms = {"l1": F.l1_loss(reconstruction, images), "l2": F.mse_loss(reconstruction, images)}
        if config.edges:
            terms["edges"] = edge_loss(reconstruction, images)
        if config.perceptual and self.perceptual is not None:
            terms["perceptual"] = self.perceptual(reconstruction, images).mean()
        pixels = torch.stack([getattr(config, name) * term for name, term in terms.items()]).sum()
        loss: Tensor = pixels
        for name, weight in (("vq", config.vq), ("kl", 1.0)):  # a KL tokenizer weighs its own
            if f"{name}_loss" in outputs:
                terms[name] = outputs[f"{name}_loss"]
                loss = loss + weight * terms[name]
        if self.discriminator is not None and step >= config.adversarial_start:
            terms["adversarial"] = -self.discriminator(reconstruction).mean()
            adversarial = torch.tensor(config.adversarial)
            if config.adaptive:
                assert last_layer is not None, (
                    "the adaptive weight reads gradients at the decoder's last layer"
                )
                adversarial = config.adversarial * adaptive_weight(pixels, terms["adversarial"], last_layer)
            terms["adversarial_weight"] = adversarial
            loss = loss + adversarial * terms["adversarial"]
        metrics = {name: term.item() for name, term in {"loss": loss, **terms}.items()}
        clamped = F.mse_loss(reconstruction.detach().clamp(-1, 1), images).item()
        return loss, {**metrics, "psnr": psnr(clamped)}

    def discriminate(
        self, outputs: dict[str, Tensor], images: Tensor
    ) -> tuple[Tensor, dict[str, float | Tensor]]:
        """Loss of the discriminator; gradients stop at the reconstruction."""
        assert self.discriminator is not None, (
            "there is a discriminator only with an adversarial weight above 0"
        )
        real = self.discriminator(images)
        fake = self.discriminator(outputs["reconstruction"].detach())
        loss = hinge_loss(real, fake)
        return loss, {"discriminator": loss.item(), "real": real.mean().item(), "fake": fake.mean().item()}
