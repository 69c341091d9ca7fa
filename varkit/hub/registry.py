"""Names that a pipeline folder may use, each with the configuration that builds the part.

Only what is listed here can be loaded. Modules are imported when their name comes up, so the table costs nothing.
"""

import importlib
from typing import Any

from varkit.errors import unknown_name

PARTS: dict[str, str] = {
    "MultiScaleVQ": "varkit.tokenizers.multiscale_vq:MultiScaleVQConfig",
    "Bitwise": "varkit.tokenizers.bitwise:BitwiseConfig",
    "MapVQ": "varkit.tokenizers.map_vq:MapVQConfig",
    "VQ": "varkit.tokenizers.vq:VQConfig",
    "Pixels": "varkit.tokenizers.pixels:PixelsConfig",
    "KL": "varkit.tokenizers.kl:KLConfig",
    "VAR": "varkit.generators.var:VARConfig",
    "FlexVAR": "varkit.generators.flexvar:FlexVARConfig",
    "Infinity": "varkit.generators.infinity:InfinityConfig",
    "LlamaGen": "varkit.generators.llamagen:LlamaGenConfig",
    "MAR": "varkit.generators.mar:MARConfig",
    "PixelCNN": "varkit.generators.pixelcnn:PixelCNNConfig",
    "BitsHead": "varkit.heads.bits:BitsConfig",
    "CategoricalHead": "varkit.heads.categorical:CategoricalConfig",
    "DiffusionHead": "varkit.heads.diffusion:DiffusionConfig",
    "LogisticMixtureHead": "varkit.heads.logistic_mixture:LogisticMixtureConfig",
    "scales": "varkit.plans.scales:ScalesConfig",
    "flexible-scales": "varkit.plans.flexible:FlexibleScalesConfig",
    "raster": "varkit.plans.raster:RasterConfig",
    "masked": "varkit.plans.masked:MaskedConfig",
}


def config_type(name: str) -> Any:
    """The configuration class of a part's name. Raises `UserError` with the nearest names for an unknown one."""
    if name not in PARTS:
        raise unknown_name("part type", name, PARTS)
    module, _, attribute = PARTS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def type_name(config: Any) -> str:
    """The name under which a configuration is registered."""
    path = f"{type(config).__module__}:{type(config).__qualname__}"
    found = [name for name, target in PARTS.items() if target == path]
    assert found, f"{path} is not in PARTS"
    return found[0]
