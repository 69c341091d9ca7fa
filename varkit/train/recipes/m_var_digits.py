"""M-VAR on the digits of `digit-scales`: the same tokens, steps and, within 1 %, parameters."""

from dataclasses import replace

from varkit.generators.m_var import MVarConfig
from varkit.generators.var import VARConfig
from varkit.nn.mamba import Mamba2Config
from varkit.train.recipes.digit_scales import digit_scales
from varkit.train.recipes.recipe import Recipe


def m_var_digits() -> Recipe:
    """A block has 27 C^2 weights where VAR's has 18, so at the same depth it is narrower."""
    base = digit_scales()
    own = base.generator.config
    assert isinstance(own, VARConfig)
    scan = Mamba2Config(state=32, head_width=52)
    config = MVarConfig(**(vars(own) | {"width": 104, "scan": scan}))
    return replace(base, name="m-var-digits", generator=replace(base.generator, config=config))
