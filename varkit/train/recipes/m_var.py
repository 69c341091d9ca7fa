"""M-VAR: attention within a scale and a scan over all of them, at the width that gives the base's parameters."""

from dataclasses import replace

from varkit.generators.base import GeneratorConfig
from varkit.generators.m_var import MVarConfig
from varkit.generators.var import VARConfig
from varkit.hub.states import build_empty
from varkit.nn.mamba import Mamba2Config
from varkit.train.recipes.digit_scales import digit_scales
from varkit.train.recipes.recipe import Recipe, next_scale


def m_var(base: Recipe) -> Recipe:
    """The base's tokens and steps. A block has 27 C^2 weights and VAR's 18, so at the same depth it is narrower."""
    _, own = next_scale(base)
    wanted = parameters(own)
    widths = range(2 * own.heads, own.width + 1, 2 * own.heads)
    config = min((_at(own, width) for width in widths), key=lambda c: abs(parameters(c) - wanted))
    return replace(base, generator=replace(base.generator, config=config))


def _at(own: VARConfig, width: int) -> MVarConfig:
    """A scan has as many heads as the attention, over twice the width."""
    scan = Mamba2Config(state=32, head_width=2 * width // own.heads)
    return MVarConfig(**(vars(own) | {"width": width, "shared_modulation": False, "scan": scan}))


def parameters(config: GeneratorConfig) -> int:
    """Of the generator that a configuration makes."""
    return sum(p.numel() for p in build_empty(config.build).parameters())


def m_var_digits() -> Recipe:
    """M-VAR on the digits of `digit-scales`, with its parameters within 1 %."""
    return replace(m_var(digit_scales()), name="m-var-digits")
