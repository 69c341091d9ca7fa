"""The decoding state that a pipeline begins a run with: `Pipeline.start_from`."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from varkit.canvases.base import Canvas
from varkit.decode.guidance import Conditional, Guidance, GuidedLayer
from varkit.decode.sampling import SmoothSampler
from varkit.decode.settings import Settings
from varkit.decode.state import Options, State
from varkit.draws import Draws
from varkit.errors import UserError
from varkit.generators.base import Condition
from varkit.nn.ports import Ports

if TYPE_CHECKING:
    from varkit.hub.pipeline import Pipeline


@torch.no_grad()
def state_of(
    pipeline: "Pipeline",
    condition: Condition,
    seed: int,
    samples: Sequence[int],
    settings: Settings,
    negative: Condition | None,
) -> State:
    """What `Pipeline.start_from` gives."""
    settings, how = pipeline.sampling(settings), pipeline.how
    combine, pick, batch = settings.combine(), settings.sampler(), len(samples)
    if not combine.off:
        away = negative or pipeline.generator.conditioner.null(condition)
        condition = {k: torch.cat([v, away[k]]) for k, v in condition.items()}
    elif negative is not None:
        raise UserError(f"a negative prompt needs guidance, which is {settings.guidance}; set it above 1")
    canvas = pipeline.tokenizer.canvas(batch, pipeline.schedule)
    sampler = SmoothSampler(pick, _codebook(pipeline, canvas)) if settings.smooth else pick
    cache = how.cache(batch, 1 if combine.off else 2, pipeline.model.plan.slots)
    options = Options(combine, how.wrap(sampler), how.ports, how.override, settings.temperature)
    if settings.guidance_layer:
        options = _guided_at(settings.guidance_layer, pipeline.generator.depth, combine, options)
    prepared = pipeline.generator.prepare(condition)
    return State.start(canvas, cache, prepared, Draws.start(seed, samples), options)


def _guided_at(layer: int, depth: int, guidance: Guidance, options: Options) -> Options:
    """The options with guidance after a block, counted back from the last, in place of the head's output."""
    if not -depth <= layer < 0:
        raise UserError(
            f"guidance_layer {layer} is no block of this model; use -{depth} to -1, or 0 for the head"
        )
    site = ("block", depth + layer)
    assert site not in (options.ports or {}), f"{site} has a port already"
    ports: Ports = {**(options.ports or {}), site: GuidedLayer(guidance)}
    return replace(options, combine=Conditional(), ports=ports)


def _codebook(pipeline: "Pipeline", canvas: Canvas) -> Tensor:
    codebook = getattr(getattr(pipeline.tokenizer, "quantizer", None), "codebook", None)
    if codebook is None:
        raise UserError("smooth mixes codes, and this model has none; leave it out")
    if "codes" not in canvas.tensors():
        raise UserError("smooth adds up mixed codes, and this model takes each code whole; leave it out")
    return codebook
