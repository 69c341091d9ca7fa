"""The class-conditional LlamaGen family's reference cases: training pass and guided greedy decoding."""

import math

import torch
from torch import Tensor

from varkit.canvases.base import gather_positions
from varkit.canvases.grid import GridCanvas
from varkit.decode.guidance import Guidance
from varkit.decode.loop import Model
from varkit.decode.state import Options
from varkit.errors import UserError
from varkit.generators.llamagen import LlamaGen
from varkit.heads.categorical import CategoricalHead
from varkit.hub.llamagen import generator_configs, generator_from_published
from varkit.hub.states import build_empty, load_state
from varkit.hub.verify import Case
from varkit.hub.verify_decoding import compare_greedy, labels_and_null
from varkit.nn.attention import Packed
from varkit.plans.raster import RasterPlan


def verify(case: Case) -> None:
    """Compare all arrays of a `llamagen` case."""
    kind = case.entry("config", "model_type")
    if kind != "c2i":
        raise UserError(
            f"case {case.name!r} is a {kind!r} model; of LlamaGen only 'c2i' (class to image) is supported"
        )
    generator, head = _generator(case)
    side = math.isqrt(case.entry("config", "block_size"))
    plan = RasterPlan((side, side))
    tokens, labels = case.input("input_tokens"), case.input("labels")
    _compare_training(case, plan, generator, head)
    guidance = Guidance(case.entry("cfg"))
    model = Model(plan, generator, {"main": head})
    condition = labels_and_null(labels, case.entry("config", "num_classes"))
    compare_greedy(case, model, _canvas(tokens), condition, Options(guidance))


def _generator(case: Case) -> tuple[LlamaGen, CategoricalHead]:
    published = case.state("state")
    config, head_config = generator_configs(published, heads=case.entry("config", "n_head"))
    generator, head = build_empty(config.build), build_empty(head_config.build)
    state, head_state = generator_from_published(published, (config, head_config))
    load_state(generator, state, "the generator")
    load_state(head, head_state, "the head")
    return generator.eval(), head.eval()


def _canvas(tokens: Tensor) -> GridCanvas:
    batch, positions = tokens.shape
    return GridCanvas.empty(batch, positions, {"ids": ((), torch.int64)})


def _compare_training(case: Case, plan: RasterPlan, generator: LlamaGen, head: CategoricalHead) -> None:
    """Teacher forcing in one packed pass: the logits read at slot i predict token i."""
    tokens, labels = case.reference("input_tokens"), case.reference("labels")
    canvas = _canvas(tokens)
    canvas.fill({"ids": tokens})
    step = plan.training_step()
    prepared = generator.prepare({"label": labels[None]})
    h = generator(canvas.feed(step.feed), step, prepared, Packed(step.sees.own_mask(len(step.feed))))
    logits = head.logits(gather_positions(h, step.read))
    case.compare("logits", logits if case.entry("strides") == "full" else logits[:, ::7, ::61])
