"""Tiny models for the server's tests, with random weights that make what is asked for matter."""

import torch

from tests import models
from varkit.generators.conditioning import ClassConfig
from varkit.generators.llamagen import LlamaGenConfig
from varkit.generators.text import TextConfig
from varkit.hub.pipeline import Pipeline, Settings
from varkit.tokenizers.conv import ConvConfig
from varkit.tokenizers.vq import VQConfig


def classes() -> Pipeline:
    """Three scales, pictures of 6 x 6; labels 0 to 2 with names."""
    return _attentive(models.tiny_pipeline(ClassConfig(len(models.CLASSES), models.CLASSES)))


def words() -> Pipeline:
    """Three scales, pictures of 6 x 6; captions."""
    return _attentive(models.tiny_pipeline(TextConfig(models.WORDS, length=8, width=16, depth=1)))


def raster() -> Pipeline:
    """Sixteen steps, one for each code; labels 0 to 2."""
    conv = ConvConfig(8, (1, 2), res_blocks=1, latent_channels=8, attention=False, groups=4)
    tokenizer, generator = VQConfig(conv, 16, 4, 4), LlamaGenConfig(2, 32, 2, 16, ClassConfig(3))
    configs = {"tokenizer": tokenizer, **generator.fitted(tokenizer)}
    torch.manual_seed(0)
    parts = {name: config.build() for name, config in configs.items()}
    return _attentive(Pipeline(parts, configs, Settings(guidance=2.0), {}))


def _attentive(pipeline: Pipeline) -> Pipeline:
    """As published, gates and modulation start at zero, so that the condition does nothing yet."""
    for name in ("generator", "head"):
        for weight in pipeline.parts[name].parameters():
            if weight.ndim > 1:
                torch.nn.init.normal_(weight, std=1.5 * weight.shape[-1] ** -0.5)
    return pipeline
