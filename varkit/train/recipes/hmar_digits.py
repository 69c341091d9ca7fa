"""HMAR on digits over six scales: first guesses with weighed scales, then a branch that refines them.

Both stages together take the steps of `digit_scales`, shared two to one as published for depth 16 (200 and 100 epochs).
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from varkit.generators.hmar import HMAR, HMARConfig
from varkit.generators.var import VARConfig
from varkit.train.masked_scales import FirstGuesses, MaskedScales
from varkit.train.recipes.digit_scales import digit_scales
from varkit.train.recipes.recipe import FurtherRecipe, Recipe


@torch.no_grad()
def branch_off(generator: HMAR, head: nn.Module, mask_head: nn.Module) -> list[Tensor]:
    """The refining branch starts as the other, and is what is trained of the generator."""
    mask_head.load_state_dict(head.state_dict())
    return list(generator.branch_off())


def hmar_digits() -> Recipe:
    """The base's data, tokens and blocks; the last two of four blocks are there once more to refine."""
    base = digit_scales()
    config, train = base.generator.config, base.generator.train
    assert isinstance(config, VARConfig) and train.steps is not None
    refining = replace(train, steps=train.steps // 3)
    further = FurtherRecipe(
        "refinement", "mask", branch_off, MaskedScales, refining, base.generator.batch_size, share=1 / 3
    )
    generator = replace(
        base.generator,
        config=HMARConfig(**vars(config), mask_depth=2),
        train=replace(train, steps=train.steps - train.steps // 3),
        teach=FirstGuesses,
        further=further,
    )
    return replace(base, name="hmar-digits", generator=generator)
