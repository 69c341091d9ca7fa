"""Models of released sizes with random weights: as fast as the real ones, and nothing has to be fetched."""

from collections.abc import Callable
from typing import Any

import torch

from varkit.generators import infinity
from varkit.generators.infinity import InfinityConfig
from varkit.generators.llamagen import LlamaGenConfig
from varkit.generators.mar import MARConfig
from varkit.generators.var import VARConfig
from varkit.hub import published_infinity, published_llamagen, published_mar, published_var
from varkit.hub.pipeline import Pipeline, Settings
from varkit.plans.masked import MaskedConfig
from varkit.plans.ratios import scales
from varkit.tokenizers.bitwise import BitwiseConfig
from varkit.tokenizers.kl import KLConfig
from varkit.tokenizers.multiscale_vq import MultiScaleVQConfig
from varkit.tokenizers.vq import VQConfig

Configs = dict[str, Any]


def random_model(name: str) -> Pipeline:
    """A model of SIZES, at the sampling settings that its authors publish."""
    configs, settings = SIZES[name]()
    torch.manual_seed(0)
    return Pipeline({part: config.build() for part, config in configs.items()}, configs, settings)


def _var(depth: int) -> tuple[Configs, Settings]:
    tokenizer = MultiScaleVQConfig()
    generator = VARConfig.published(depth, tokenizer.schedule)
    return {"tokenizer": tokenizer, **generator.fitted(tokenizer)}, published_var.SETTINGS


def _llamagen(size: str) -> tuple[Configs, Settings]:
    tokenizer, generator = VQConfig(), LlamaGenConfig.published(size)
    return {"tokenizer": tokenizer, **generator.fitted(tokenizer)}, published_llamagen.SETTINGS["c2i"]


def _mar(size: str) -> tuple[Configs, Settings]:
    tokenizer, generator = KLConfig(), MARConfig.published(size)
    plan = MaskedConfig((16, 16), published_mar.ITERATIONS, generator.buffer)
    settings = Settings(guidance=published_mar.GUIDANCE[generator.width], ramp=True)
    return {"tokenizer": tokenizer, **generator.fitted(tokenizer), "plan": plan}, settings


def _infinity(size: str, pixels: str) -> tuple[Configs, Settings]:
    plan = scales(1.0, pixels)
    tokenizer = BitwiseConfig.published(infinity.SIZES[size][3], plan.schedule)
    generator = InfinityConfig.published(size)
    return {"tokenizer": tokenizer, **generator.fitted(tokenizer), "plan": plan}, published_infinity.SETTINGS


SIZES: dict[str, Callable[[], tuple[Configs, Settings]]] = {
    "var-d16": lambda: _var(16),
    "var-d20": lambda: _var(20),
    "llamagen-b": lambda: _llamagen("B"),
    "mar-base": lambda: _mar("base"),
    "infinity-125m": lambda: _infinity("layer12", "0.06M"),
}
"""By name; others are measured from their folders."""
