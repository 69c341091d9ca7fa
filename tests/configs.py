"""A small configuration of every kind of part that a model folder may hold."""

from dataclasses import replace

from varkit.generators.conditioning import ClassConfig
from varkit.generators.flexvar import FlexVARConfig
from varkit.generators.hmar import HMARConfig
from varkit.generators.infinity import InfinityConfig
from varkit.generators.llamagen import LlamaGenConfig
from varkit.generators.m_var import MVarConfig
from varkit.generators.mar import MARConfig
from varkit.generators.pixelcnn import PixelCNNConfig
from varkit.generators.text import TextConfig, TextFeaturesConfig
from varkit.generators.var import VARConfig
from varkit.heads.bits import BitsConfig
from varkit.heads.categorical import CategoricalConfig
from varkit.heads.diffusion import DiffusionConfig
from varkit.heads.logistic_mixture import LogisticMixtureConfig
from varkit.nn.mamba import Mamba2Config
from varkit.plans.flexible import FlexibleScalesConfig
from varkit.plans.masked import MaskedConfig
from varkit.plans.raster import RasterConfig
from varkit.plans.refined import RefinedConfig
from varkit.plans.scales import ScalesConfig, Windows
from varkit.tokenizers.bitwise import BitwiseConfig
from varkit.tokenizers.conv import ConvConfig
from varkit.tokenizers.frequency import FrequencyVQConfig
from varkit.tokenizers.kl import KLConfig
from varkit.tokenizers.map_vq import MapVQConfig
from varkit.tokenizers.multiscale_vq import MultiScaleVQConfig
from varkit.tokenizers.pixels import PixelsConfig
from varkit.tokenizers.vq import VQConfig

SCHEDULE = (1, 2, 3)
CONV = ConvConfig(channels=8, multipliers=(1, 2), res_blocks=1, latent_channels=8)
TOKENIZER = MultiScaleVQConfig(CONV, vocab_size=16, code_channels=4, schedule=SCHEDULE)
GENERATOR = VARConfig(2, 32, 4, SCHEDULE, 4, ClassConfig(5, ("a", "b", "c", "d", "e")), drop_path=0.1)
HEAD = CategoricalConfig(32, 16)
CONFIGS = {
    "tokenizer": TOKENIZER,
    "grid": VQConfig(CONV, vocab_size=16, code_channels=4, grid=(2, 3)),
    "generator": GENERATOR,
    "text": VARConfig(
        1, 32, 4, (1, (2, 3)), 4, TextConfig(("red", "blue"), width=16), shared_modulation=True
    ),
    "llama": LlamaGenConfig(1, 32, 4, 16, ClassConfig(5), kv_heads=2, multiple_of=32, zero_prefix=True),
    "head": HEAD,
    "scales": ScalesConfig((1, (2, 3))),
    "raster": RasterConfig((2, 3)),
    "pixels": PixelsConfig((2, 4)),
    "pixelcnn": PixelCNNConfig(ClassConfig(2), (2, 4), width=8, levels=2),
    "mixture": LogisticMixtureConfig(8, 2),
    "bitwise": BitwiseConfig(CONV, schedule=(1, (2, 3)), patch=2),
    "infinity": InfinityConfig(1, 32, 4, 16, TextConfig(("red", "blue"), width=16)),
    "features": InfinityConfig(1, 32, 4, 16, TextFeaturesConfig(16, 4)),
    "bits": BitsConfig(32, 16),
    "framed": ScalesConfig((1, (2, 3)), frame=(4, 6), ratios=True),
    "kl": KLConfig(replace(CONV, latent_channels=4), grid=(2, 3), patch=2),
    "mar": MARConfig(1, 32, 4, ClassConfig(5), (2, 3), 16, buffer=4),
    "diffusion": DiffusionConfig(32, 16, 8, 1),
    "masked": MaskedConfig((2, 3), 4, prefix=4),
    "bands": FrequencyVQConfig(CONV, vocab_size=16, code_channels=4, schedule=SCHEDULE, bands="radial"),
    "maps": MapVQConfig(replace(CONV, groups=4), vocab_size=16, code_channels=4, schedule=(1, (2, 3))),
    "m_var": MVarConfig(1, 32, 4, SCHEDULE, 4, ClassConfig(5), scan=Mamba2Config(state=4, head_width=16)),
    "hmar": HMARConfig(2, 32, 4, SCHEDULE, 4, ClassConfig(5), mask_depth=1),
    "flexvar": FlexVARConfig(1, 32, 4, 4, ClassConfig(5), table=4),
    "windows": ScalesConfig(SCHEDULE, history=0, windows=Windows(3, least=3)),
    "refined": RefinedConfig(SCHEDULE, counts=((1,), (1, 3)), noise=1.0),
    "flexible": FlexibleScalesConfig((1, (2, 3)), seen=(1, 2)),
}
