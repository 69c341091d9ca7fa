"""Models of released sizes with random weights: as fast as the real ones, and nothing has to be fetched."""

from collections.abc import Callable
from typing import Any

import torch

from varkit.generators.conditioning import ClassConfig
from varkit.generators.infinity import SIZES, InfinityConfig
from varkit.generators.llamagen import LlamaGenConfig
from varkit.generators.mar import MARConfig
from varkit.generators.var import VARConfig
from varkit.hub.pipeline import Pipeline, Settings
from varkit.hub.published_infinity import SETTINGS
from varkit.plans.masked import MaskedConfig
from varkit.plans.ratios import scales
from varkit.tokenizers.bitwise import BitwiseConfig
from varkit.tokenizers.conv import ConvConfig
from varkit.tokenizers.kl import KLConfig
from varkit.tokenizers.multiscale_vq import MultiScaleVQConfig
from varkit.tokenizers.vq import VQConfig

VAR_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
Configs = dict[str, Any]


def released(name: str) -> Pipeline:
    """A model of RELEASED with random weights, at the sampling settings that its authors publish."""
    configs, settings = RELEASED[name]()
    torch.manual_seed(0)
    return Pipeline({part: config.build() for part, config in configs.items()}, configs, settings)


def _var(depth: int) -> tuple[Configs, Settings]:
    tokenizer = MultiScaleVQConfig(ConvConfig(160, latent_channels=32), schedule=VAR_256)
    generator = VARConfig.published(depth, VAR_256)
    settings = Settings(guidance=2.5, ramp=True, top_k=900, top_p=0.96)  # 1 + 1.5, as the demo
    return {"tokenizer": tokenizer, **generator.fitted(tokenizer)}, settings


def _llamagen(depth: int, width: int) -> tuple[Configs, Settings]:
    tokenizer = VQConfig(ConvConfig(128, latent_channels=256), 16384, 8, grid=16)
    condition = ClassConfig(1000)
    generator = LlamaGenConfig(depth, width, width // 64, 16384, condition, zero_prefix=True)
    return {"tokenizer": tokenizer, **generator.fitted(tokenizer)}, Settings(guidance=4.0, top_k=2000)


def _mar(size: str) -> tuple[Configs, Settings]:
    tokenizer, generator = KLConfig(), MARConfig.published(size)
    configs = {"tokenizer": tokenizer, **generator.fitted(tokenizer)}
    return configs | {"plan": MaskedConfig((16, 16), 64, generator.buffer)}, Settings(guidance=2.9, ramp=True)


def _infinity(size: str, pixels: str) -> tuple[Configs, Settings]:
    plan = scales(1.0, pixels)
    tokenizer = BitwiseConfig.published(SIZES[size][3], plan.schedule)
    generator = InfinityConfig.published(size)
    return {"tokenizer": tokenizer, **generator.fitted(tokenizer), "plan": plan}, SETTINGS


RELEASED: dict[str, Callable[[], tuple[Configs, Settings]]] = {
    "var-d16": lambda: _var(16),
    "var-d20": lambda: _var(20),
    "llamagen-b": lambda: _llamagen(12, 768),
    "mar-base": lambda: _mar("base"),
    "infinity-125m": lambda: _infinity("layer12", "0.06M"),
}
"""By name; others are measured from their folders."""
