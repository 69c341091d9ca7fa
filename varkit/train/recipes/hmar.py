"""HMAR: first guesses with weighed scales, then a branch that refines them.

Both stages together take the base's training, shared two to one as published for depth 16 (200 and 100 epochs).
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from varkit.generators.hmar import HMAR, HMARConfig
from varkit.train.masked_scales import FirstGuesses, MaskedScales
from varkit.train.recipes.digit_scales import digit_scales
from varkit.train.recipes.recipe import FurtherRecipe, Recipe, next_scale, part_of


@torch.no_grad()
def branch_off(generator: HMAR, head: nn.Module, mask_head: nn.Module) -> list[Tensor]:
    """The refining branch starts as the other, and is what is trained of the generator."""
    mask_head.load_state_dict(head.state_dict())
    return list(generator.branch_off())


def hmar(base: Recipe) -> Recipe:
    """The base's data, tokens and blocks; the second half of the blocks is there once more to refine."""
    _, config = next_scale(base)
    part, share = base.generator, 1 / 3
    further = FurtherRecipe(
        "refinement", "mask", branch_off, MaskedScales, part_of(part.train, share), part.batch_size, share
    )
    generator = replace(
        part,
        config=HMARConfig(**vars(config) | {"reach": 0}, mask_depth=max(1, config.depth // 2)),
        train=part_of(part.train, 1 - share),
        teach=FirstGuesses,
        further=further,
    )
    return replace(base, generator=generator)


def hmar_digits() -> Recipe:
    """HMAR on the digits of `digit-scales`."""
    return replace(hmar(digit_scales()), name="hmar-digits")
