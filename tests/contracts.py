"""The contract every model keeps, written once. A generator opts in with a tiny `Case` in `CASES`; the suite is
tests/test_contracts.py. Legend: R branches, B samples."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from varkit.decode.cache.base import Cache
from varkit.decode.cache.full import FullCache
from varkit.decode.guidance import Guidance
from varkit.decode.loop import Model
from varkit.decode.state import Options, State
from varkit.draws import Draws
from varkit.generators.base import Condition
from varkit.generators.conditioning import ClassConfig
from varkit.generators.flexvar import FlexVARConfig
from varkit.generators.infinity import InfinityConfig
from varkit.generators.llamagen import LlamaGenConfig
from varkit.generators.mar import MARConfig
from varkit.generators.pixelcnn import PixelCNNConfig
from varkit.generators.text import TextConfig
from varkit.generators.var import VARConfig
from varkit.heads.bits import BitsConfig
from varkit.heads.categorical import CategoricalConfig
from varkit.heads.diffusion import DiffusionConfig
from varkit.heads.logistic_mixture import LogisticMixtureConfig
from varkit.hub.pipeline import Pipeline, Settings
from varkit.plans.base import StaticPlan
from varkit.plans.flexible import FlexibleScalesConfig
from varkit.plans.masked import MaskedConfig
from varkit.plans.raster import RasterConfig
from varkit.plans.scales import ScalesConfig
from varkit.tokenizers.bitwise import BitwiseConfig
from varkit.tokenizers.conv import ConvConfig
from varkit.tokenizers.kl import KLConfig
from varkit.tokenizers.map_vq import MapVQConfig
from varkit.tokenizers.multiscale_vq import MultiScaleVQConfig
from varkit.tokenizers.pixels import PixelsConfig, from_levels, to_levels
from varkit.tokenizers.vq import VQConfig
from varkit.train.lessons import Lessons, WholePlan
from varkit.train.masked_lessons import MaskedLessons

PYRAMID = (1, 2, (2, 3), (4, 6))


@dataclass(frozen=True)
class Case:
    """A tiny configuration of each part, conditions for B samples, two sites of the generator's ports, and what its
    training is taught."""

    tokenizer: object
    generator: object
    head: object
    plan: object
    conditions: Callable[[int], Condition]
    sites: tuple[tuple[str, int], ...] = (("block", 0), ("attention", 1))
    teach: Callable[[Any, Any], Lessons] = WholePlan

    @property
    def static(self) -> bool:
        """Whether all steps are known beforehand."""
        return isinstance(self.plan.build(), StaticPlan)

    def build(self, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Model]:
        """Tokenizer and model with random weights that make every parameter matter (no zero gates)."""
        torch.manual_seed(0)
        tokenizer = self.tokenizer.build().eval()
        generator, head = self.generator.build().eval(), self.head.build().eval()
        for module in (tokenizer, generator, head):
            for name, p in module.named_parameters():
                if p.ndim < 2 or "modulation" in name:
                    nn.init.normal_(p, mean=1.0 if name.endswith("gain") else 0.0, std=0.2)
        if getattr(getattr(tokenizer, "quantizer", None), "embedding", None) is not None:
            nn.init.normal_(tokenizer.quantizer.embedding.weight)
        out = head.out if hasattr(head, "out") else head.net.out
        nn.init.normal_(out.weight, std=0.3)
        return tokenizer.to(dtype), Model(self.plan.build(), generator.to(dtype), {"main": head.to(dtype)})

    def pipeline(self, settings: Settings, dtype: torch.dtype = torch.float32) -> Pipeline:
        """The parts as users hold them."""
        tokenizer, model = self.build(dtype)
        parts = {
            "tokenizer": tokenizer,
            "generator": model.generator,
            "plan": model.plan,
            "head": model.heads["main"],
        }
        names = ("tokenizer", "generator", "head", "plan")
        return Pipeline(parts, {name: getattr(self, name) for name in names}, settings)


def start(
    tokenizer,
    model: Model,
    condition: Condition,
    guidance: float = 2.0,
    cache: Cache | None = None,
    seed: int = 0,
) -> State:
    """A state for conditions (1, B, ...), with a null branch when guided."""
    batch = next(iter(condition.values())).shape[1]
    if guidance != 1.0:
        null = model.generator.conditioner.null(condition)
        condition = {k: torch.cat([v, null[k]]) for k, v in condition.items()}
    with torch.no_grad():
        prepared = model.generator.prepare(condition)
    branches = next(iter(condition.values())).shape[0]
    cache = cache or FullCache(batch, branches, model.plan.slots)
    options = Options(combine=Guidance(guidance, ramp=True))
    return State.start(tokenizer.canvas(batch), cache, prepared, Draws.start(seed, batch), options)


def labels(batch: int) -> Condition:
    """Class labels (1, B)."""
    return {"label": (torch.arange(batch) % 5)[None]}


def words(batch: int) -> Condition:
    """Prompts of different lengths (1, B, T)."""
    text = TextConfig(vocabulary=("a", "red", "ring"), length=8, width=16, depth=1, heads=2)
    return {"text": text.encode([("a red ring " * (1 + i % 2)).strip() for i in range(batch)])[None]}


_PYRAMID_TOKENIZER = MultiScaleVQConfig(
    ConvConfig(channels=8, multipliers=(1, 2), res_blocks=1, latent_channels=8, attention=False),
    vocab_size=24, code_channels=6, schedule=PYRAMID,
)  # fmt: skip
_BITS = BitwiseConfig(_PYRAMID_TOKENIZER.conv, PYRAMID)
_GRID_TOKENIZER = VQConfig(
    ConvConfig(channels=8, multipliers=(1, 2), res_blocks=1, latent_channels=8, attention=False),
    vocab_size=24, code_channels=6, grid=(3, 4),
)  # fmt: skip


def _var(**options) -> VARConfig:
    base = {
        "depth": 2,
        "width": 24,
        "heads": 2,
        "schedule": PYRAMID,
        "code_width": 6,
        "condition": ClassConfig(5),
        "adaln_init": 1.0,
    }
    return VARConfig(**(base | options))


def _scales(generator: VARConfig, conditions: Callable[[int], Condition]) -> Case:
    return Case(_PYRAMID_TOKENIZER, generator, CategoricalConfig(24, 24), ScalesConfig(PYRAMID), conditions)


_KL_TOKENIZER = KLConfig(
    ConvConfig(channels=8, multipliers=(1, 2), res_blocks=1, latent_channels=2), grid=(3, 4), patch=2
)


def _mar(condition: ClassConfig | TextConfig, conditions: Callable[[int], Condition]) -> Case:
    generator = MARConfig(1, 24, 2, condition, (3, 4), channels=8, buffer=8)
    head = DiffusionConfig(24, 8, mlp_width=16, depth=2, repeats=2, sampling_steps=4)
    return Case(
        _KL_TOKENIZER, generator, head, MaskedConfig((3, 4), 5, prefix=8), conditions, teach=MaskedLessons
    )


def _flexvar(
    condition: ClassConfig | TextConfig, conditions: Callable[[int], Condition], **options: Any
) -> Case:
    conv = replace(
        _PYRAMID_TOKENIZER.conv, groups=4
    )  # a map of 1 x 1 has nothing but its channels to normalise over
    tokenizer = MapVQConfig(conv, vocab_size=24, code_channels=6, schedule=PYRAMID)
    generator = FlexVARConfig(2, 24, 2, 6, condition, table=8, adaln_init=1.0, **options)
    return Case(tokenizer, generator, CategoricalConfig(24, 24), FlexibleScalesConfig(PYRAMID), conditions)


def _infinity(tokenizer: BitwiseConfig) -> Case:
    text = TextConfig(("a", "red", "ring"), length=8, width=16, depth=1, heads=2)
    generator = InfinityConfig(2, 24, 2, tokenizer.token_bits, text, gate_init=1.0, modulation_init=0.5)
    plan = ScalesConfig(tokenizer.schedule, frame=(8, 12))
    return Case(tokenizer, generator, BitsConfig(24, tokenizer.token_bits), plan, words)


CASES: dict[str, Case] = {
    "var-class": _scales(_var(), labels),
    "var-shared-modulation": _scales(_var(shared_modulation=True), labels),
    "var-plain-attention": _scales(_var(cosine=False), labels),
    "var-surroundings": _scales(_var(reach=1), labels),
    "var-text": _scales(_var(condition=TextConfig(("a", "red", "ring"), length=8, width=16, depth=1, heads=2)), words),
    "flexvar-class": _flexvar(ClassConfig(5), labels),
    "flexvar-text": _flexvar(
        TextConfig(("a", "red", "ring"), length=8, width=16, depth=1, heads=2), words, shared_modulation=True
    ),
    "infinity-text": _infinity(_BITS),
    "infinity-patches": _infinity(replace(_BITS, patch=2)),
    "llamagen-class": Case(
        _GRID_TOKENIZER,
        LlamaGenConfig(2, 24, 2, 24, ClassConfig(5), multiple_of=16),
        CategoricalConfig(24, 24, bias=False),
        RasterConfig((3, 4)), labels,
    ),
    "llamagen-zero-prefix": Case(
        _GRID_TOKENIZER, LlamaGenConfig(2, 24, 2, 24, ClassConfig(5), kv_heads=1, multiple_of=16, zero_prefix=True),
        CategoricalConfig(24, 24, bias=False), RasterConfig((3, 4)), labels,
    ),
    "llamagen-text": Case(
        _GRID_TOKENIZER,
        LlamaGenConfig(
            2, 24, 2, 24, TextConfig(("a", "red", "ring"), length=8, width=16, depth=1, heads=2), multiple_of=16
        ),
        CategoricalConfig(24, 24, bias=False), RasterConfig((3, 4), prefix=8), words,
    ),
    "pixelcnn-class": Case(
        PixelsConfig((2, 4)), PixelCNNConfig(ClassConfig(5), (2, 4), width=8, levels=2), LogisticMixtureConfig(8, 3),
        RasterConfig((2, 4)), labels, sites=(("block", 0), ("output", 0)),
    ),
    "mar-class": _mar(ClassConfig(5), labels),
    "mar-text": _mar(TextConfig(("a", "red", "ring"), length=8, width=16, depth=1, heads=2), words),
}  # fmt: skip

CACHES: dict[str, Callable[[int, int, int], Cache]] = {"full": FullCache}


def true_latents(tokenizer, model: Model, batch: int) -> dict[str, Tensor]:
    """Random latents of the tokenizer's layout, by their one name."""
    generator = torch.Generator().manual_seed(7)
    canvas = tokenizer.canvas(1)
    (name,) = canvas.latents()
    positions = canvas.revealed_at.shape[1]
    if name == "ids":
        return {"ids": torch.randint(0, 24, (batch, positions), generator=generator)}
    if name == "bits":
        bits = canvas.latents()["bits"].shape[2]
        return {"bits": torch.randint(0, 2, (batch, positions, bits), generator=generator)}
    if name == "latents":
        return {
            "latents": torch.randn(batch, positions, tokenizer.config.token_channels, generator=generator)
        }
    return {"pixels": from_levels(torch.randint(0, 256, (batch, positions, 3), generator=generator))}


def changed_at(latents: dict[str, Tensor], positions: Tensor) -> dict[str, Tensor]:
    """A copy with the next code, the other bits, the next level of each channel, or another vector at some positions
    (T,) or (B, T)."""
    change: dict[str, Callable[[Tensor], Tensor]] = {
        "ids": lambda now: (now + 1) % 24,
        "bits": lambda now: 1 - now,
        "latents": lambda now: now + 1,
        "pixels": lambda now: from_levels((to_levels(now) + 1) % 256),
    }
    changed = {name: value.clone() for name, value in latents.items()}
    for name, value in changed.items():
        rows = torch.arange(len(value))[:, None]
        value[rows, positions] = change[name](value[rows, positions])
    return changed


def same(a: Tensor, b: Tensor) -> bool:
    """Whether latents are equal: codes exactly, real numbers but for rounding (which no level of a pixel survives)."""
    if not a.is_floating_point():
        return torch.equal(a, b)
    return bool((a - b).abs().max() <= 1e-4 * b.std())


def drawn(state: State) -> Tensor:
    """The latents of a run, (B, L, ...)."""
    (values,) = state.canvas.latents().values()
    return values
