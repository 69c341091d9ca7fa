"""The Infinity family's reference cases: tokenizer, training pass, and greedy decoding guided in two places.

Legend: B samples, T prompt length, L positions, D bits of a token, d bits of a code.
"""

from functools import partial

import numpy as np
import torch
from torch import Tensor

from varkit.decode.guidance import Conditional, Guidance, GuidedLayer
from varkit.decode.loop import Model
from varkit.decode.state import Options
from varkit.generators.base import Condition
from varkit.generators.infinity import Infinity
from varkit.heads.bits import BitsHead
from varkit.hub.fill import image_array
from varkit.hub.infinity import (
    generator_configs,
    generator_from_published,
    tokenizer_config,
    tokenizer_from_published,
)
from varkit.hub.states import build_empty, load_state
from varkit.hub.verify import Case
from varkit.hub.verify_decoding import compare_greedy
from varkit.nn.attention import Packed
from varkit.plans.ratios import scales
from varkit.plans.scales import ScalePlan
from varkit.tokenizers.bitwise import Bitwise

TEXT_STREAM = 5
"""Second word of the seed of a big case's text features and inputs."""


def verify(case: Case) -> None:
    """Compare all arrays of an `infinity` case."""
    plan = _plan(case)
    tokenizer = _tokenizer(case, plan)
    generator, head = _generator(case)
    if "vae_latent" in case.arrays:
        _compare_tokenizer(case, tokenizer)
    condition = _condition(case)
    _compare_training(case, plan, generator, head, condition)
    _compare_decoding(case, Model(plan, generator, {"main": head}), tokenizer, condition)


def _plan(case: Case) -> ScalePlan:
    plan = scales(case.entry("h_div_w"), case.entry("pn")).build()
    case.compare("scale_schedule", torch.tensor([(1, *side) for side in plan.schedule.sides]))
    return plan


def _tokenizer(case: Case, plan: ScalePlan) -> Bitwise:
    published = case.state("tokenizer_state")
    patch = 1 + case.entry("apply_spatial_patchify")
    config = tokenizer_config(published, plan.schedule.sides, patch)
    tokenizer = build_empty(config.build)
    load_state(tokenizer, tokenizer_from_published(published, config), "the tokenizer")
    return tokenizer.eval()


def _generator(case: Case) -> tuple[Infinity, BitsHead]:
    published = case.state("generator_state")
    config, head_config = generator_configs(published)
    generator, head = build_empty(config.build), build_empty(head_config.build)
    state, head_state = generator_from_published(published)
    load_state(generator, state, "the generator")
    load_state(head, head_state, "the head")
    return generator.eval(), head.eval()


def _compare_tokenizer(case: Case, tokenizer: Bitwise) -> None:
    shape = (1, 3, *tokenizer.image_size())
    f = tokenizer.encode_features(torch.from_numpy(image_array(shape, case.entry("seed"))))
    case.compare("vae_latent", f)
    theirs = case.reference("vae_bits")
    case.compare_tokens("vae_bits", *_forced_encoding(tokenizer, f, theirs))
    f_hat = tokenizer.quantizer.features(theirs, tokenizer.schedule)
    case.compare("vae_quantized", f_hat)
    case.compare("vae_reconstruction", tokenizer.decode_features(f_hat)[:, :, ::4, ::4])


def _forced_encoding(tokenizer: Bitwise, f: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """Encode f (B, d, h, w), each level going on from the reference's bits (B, L, D) of the levels before it.

    Returns our bits, and where they differ from the reference's how far the residual is from a sign change.
    """
    quantizer, schedule = tokenizer.quantizer, tokenizer.schedule
    ours, gap = torch.zeros_like(theirs), torch.zeros(theirs.shape)

    def force(level: int, chosen: Tensor) -> Tensor:
        positions = schedule.positions(level)
        before = quantizer.features(theirs, schedule, levels=level)
        wanted = quantizer.missing(f - before, level, schedule)
        ours[:, positions] = chosen.long()
        gap[:, positions] = torch.where(theirs[:, positions] == chosen, 0.0, wanted.abs())
        return theirs[:, positions]

    quantizer.encode(f, schedule, override=force)
    return ours, gap


def _condition(case: Case) -> Condition:
    """The prompts, padded, (1, B, T, ...)."""
    lengths = case.input("text_lengths").tolist()
    packed = case.input("text_embeddings").split(lengths)
    features = torch.nn.utils.rnn.pad_sequence(list(packed), batch_first=True)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return {"features": features[None], "mask": mask[None]}


def _compare_training(
    case: Case, plan: ScalePlan, generator: Infinity, head: BitsHead, condition: Condition
) -> None:
    """One packed pass over given inputs, under the block-causal mask."""
    every = 1 if "teacher_input" in case.arrays else 5
    inputs = case.input("teacher_input") if every == 1 else _drawn_inputs(case, generator)
    fed = {"vectors": torch.nn.functional.pad(inputs, (0, 0, 1, 0))}
    step = plan.training_step()
    window = Packed(step.sees.own_mask(len(step.feed)))
    logits = head.logits(generator(fed, step, generator.prepare(condition), window)).flatten(-2)
    case.compare("logits", logits[:, ::every])


def _drawn_inputs(case: Case, generator: Infinity) -> Tensor:
    """The inputs (B, L - 1, D) of a case too big to store them; the prompts' features are drawn before them."""
    lengths, plan = case.reference("text_lengths"), case.reference("scale_schedule")
    rng = np.random.default_rng([case.entry("seed"), TEXT_STREAM])
    rng.standard_normal((int(lengths.sum()), case.entry("generator", "text_channels")))
    shape = (len(lengths), int(plan.prod(dim=1).sum()) - 1, generator.config.code_width)
    return torch.from_numpy(rng.standard_normal(shape).astype(np.float32))


def _compare_decoding(case: Case, model: Model, tokenizer: Bitwise, condition: Condition) -> None:
    null = model.generator.conditioner.null(condition)
    both = {name: torch.cat([value, null[name]]) for name, value in condition.items()}
    batch = both["mask"].shape[1]
    guidance = Guidance(case.entry("cfg"))
    decoded = partial(compare_greedy, case, model, condition=both)
    canvas = tokenizer.canvas(batch)
    decoded(canvas=canvas, options=Options(guidance), array="greedy_bits_cfg_logits")
    case.compare_tokens("greedy_image_bgr_uint8", *_official_bytes(case, canvas.preview()))
    ports = {("block", model.generator.depth - 2): GuidedLayer(guidance)}
    options = Options(Conditional(), ports=ports)
    decoded(canvas=tokenizer.canvas(batch), options=options, array="greedy_bits_cfg_layer_minus_2")


def _official_bytes(case: Case, images: Tensor) -> tuple[Tensor, Tensor]:
    """Pictures as the published code gives them: (B, h, w, 3) uint8, blue first, cut down instead of rounded.

    With them, how far our values are from those that are cut to the reference's bytes, of 1.
    """
    theirs = case.reference("greedy_image_bgr_uint8")
    values = ((images[:, :, ::4, ::4] + 1) / 2 * 255).permute(0, 2, 3, 1).flip(-1)
    outside = torch.maximum(theirs - values, values - (theirs + 1)).clamp(min=0)
    outside[(theirs == 255) & (values >= 255)] = 0
    return values.floor().long(), outside / 255
