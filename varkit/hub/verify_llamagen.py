"""The class-conditional LlamaGen family's reference cases: training pass and guided greedy decoding."""

import math

import torch
from torch import Tensor

from varkit.canvases.base import gather_positions
from varkit.canvases.grid import GridCanvas
from varkit.decode.guidance import Guidance
from varkit.decode.loop import Model
from varkit.errors import UserError
from varkit.hub.llamagen import generator_configs, generator_from_published
from varkit.hub.states import build_empty, load_state
from varkit.hub.verify import Case
from varkit.hub.verify_decoding import compare_greedy
from varkit.nn.attention import Packed
from varkit.plans.raster import RasterPlan


def verify(case: Case) -> None:
    """Compare all arrays of a `llamagen` case."""
    kind = case.entry("config", "model_type")
    if kind != "c2i":
        raise UserError(
            f"case {case.name!r} is a {kind!r} model; of LlamaGen only 'c2i' (class to image) is supported"
        )
    model = _model(case)
    tokens, labels = case.input("input_tokens"), case.input("labels")
    _compare_training(case, model, tokens, labels)
    guidance = Guidance(case.entry("cfg"))
    compare_greedy(case, model, _canvas(tokens), labels, case.entry("config", "num_classes"), guidance)


def _model(case: Case) -> Model:
    published = case.state("state")
    configs = generator_configs(published, heads=case.entry("config", "n_head"))
    generator, head = (build_empty(config.build).eval() for config in configs)
    for module, state in zip((generator, head), generator_from_published(published, configs), strict=True):
        load_state(module, state, "the generator")
    side = math.isqrt(case.entry("config", "block_size"))
    return Model(RasterPlan((side, side)), generator, {"main": head})


def _canvas(tokens: Tensor) -> GridCanvas:
    return GridCanvas.empty(*tokens.shape, {"ids": ((), torch.int64)})


def _compare_training(case: Case, model: Model, tokens: Tensor, labels: Tensor) -> None:
    """Teacher forcing in one packed pass: the logits read at slot i predict token i."""
    canvas = _canvas(tokens)
    canvas.fill({"ids": tokens})
    step = model.plan.training_step()
    prepared = model.generator.prepare({"label": labels[None]})
    h = model.generator(canvas.feed(step.feed), step, prepared, Packed(step.sees.own_mask(len(step.feed))))
    logits = model.heads["main"].logits(gather_positions(h, step.read))
    case.compare("logits", logits if case.entry("strides") == "full" else logits[:, ::7, ::61])
