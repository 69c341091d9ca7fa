"""The LlamaGen family's reference cases: a tokenizer, or a generator's training pass and guided greedy decoding.

Legend: B samples, L positions, D code channels, P prefix slots.
"""

import math

import torch
from torch import Tensor

from varkit.canvases.base import gather_positions
from varkit.canvases.grid import GridCanvas
from varkit.decode.guidance import Guidance
from varkit.decode.loop import Model
from varkit.decode.state import Options
from varkit.generators.base import Condition
from varkit.generators.llamagen import LlamaGen
from varkit.heads.categorical import CategoricalHead
from varkit.hub.fill import image_array
from varkit.hub.llamagen import (
    generator_configs,
    generator_from_published,
    tokenizer_config,
    tokenizer_from_published,
)
from varkit.hub.states import build_empty, load_state
from varkit.hub.verify import Case
from varkit.hub.verify_decoding import compare_greedy
from varkit.nn.attention import Packed
from varkit.plans.raster import RasterPlan
from varkit.tokenizers.residual import QuantizedTokenizer
from varkit.tokenizers.vq import VQ


def verify(case: Case) -> None:
    """Compare all arrays of a `llamagen` case."""
    if "codebook_size" in case.entry("config"):
        _compare_tokenizer(case)
        return
    generator, head = _generator(case)
    side = math.isqrt(case.entry("config", "block_size"))
    plan = RasterPlan((side, side), generator.config.prefix)
    tokens, (taught, steered) = case.input("input_tokens"), _conditions(case)
    _compare_training(case, plan, generator, head, taught)
    null = generator.conditioner.null(steered)
    both = {name: torch.cat([value, null[name]]) for name, value in steered.items()}
    model, options = Model(plan, generator, {"main": head}), Options(Guidance(case.entry("cfg")))
    compare_greedy(case, model, _canvas(tokens), both, options)


def _compare_tokenizer(case: Case) -> None:
    published = case.state("state")
    batch, _, pixels, _ = case.entry("image_shape")
    theirs = case.reference("tokens")
    config = tokenizer_config(published, theirs.shape[1])
    tokenizer = build_empty(config.build)
    load_state(tokenizer, tokenizer_from_published(published, config), "the tokenizer")
    tokenizer.eval()
    assert tokenizer.image_size() == (pixels, pixels), "the case's pictures fill its grid"
    images = torch.from_numpy(image_array(tuple(case.entry("image_shape")), case.entry("seed")))
    f = QuantizedTokenizer.encode_features(tokenizer, images)  # published before normalisation
    case.compare("latent", f)
    case.compare_tokens("tokens", *_nearest(tokenizer, f, theirs))
    pictures = tokenizer.reconstruct(tokenizer.quantizer.features(theirs.view(batch, -1), tokenizer.schedule))
    case.compare("reconstruction", pictures[:, :, ::4, ::4])


def _nearest(tokenizer: VQ, f: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """Our ids of features (B, D, h, w), and by how much the reference's codes are farther (squared distance)."""
    ids = tokenizer.quantizer.encode(f, tokenizer.schedule).view(theirs.shape)
    wanted = torch.nn.functional.normalize(f, dim=1).permute(0, 2, 3, 1)
    near, far = ((tokenizer.quantizer.lookup(i) - wanted).square().sum(dim=-1) for i in (ids, theirs))
    return ids, far - near


def _generator(case: Case) -> tuple[LlamaGen, CategoricalHead]:
    published = case.state("state")
    config, head_config = generator_configs(published, heads=case.entry("config", "n_head"))
    generator, head = build_empty(config.build), build_empty(head_config.build)
    state, head_state = generator_from_published(published, (config, head_config))
    load_state(generator, state, "the generator")
    load_state(head, head_state, "the head")
    return generator.eval(), head.eval()


def _conditions(case: Case) -> tuple[Condition, Condition]:
    """What steers the training pass and decoding, (1, B, ...): prompts are padded only in decoding."""
    if case.entry("config", "model_type") == "c2i":
        labels = {"label": case.input("labels")[None]}
        return labels, labels
    features, mask = case.input("caption_embeddings")[None], case.input("caption_mask")[None].bool()
    return {"features": features, "mask": torch.ones_like(mask)}, {"features": features, "mask": mask}


def _canvas(tokens: Tensor) -> GridCanvas:
    batch, positions = tokens.shape
    return GridCanvas.empty(batch, positions, {"ids": ((), torch.int64)})


def _compare_training(
    case: Case, plan: RasterPlan, generator: LlamaGen, head: CategoricalHead, condition: Condition
) -> None:
    """Teacher forcing in one packed pass: the logits read at slot i predict token i."""
    tokens = case.reference("input_tokens")
    canvas = _canvas(tokens)
    canvas.fill({"ids": tokens})
    step = plan.training_step()
    window = Packed(step.sees.own_mask(len(step.feed)))
    h = generator(canvas.feed(step.feed), step, generator.prepare(condition), window)
    logits = head.logits(gather_positions(h, step.read))
    case.compare("logits", logits if case.entry("strides") == "full" else logits[:, ::7, ::61])
