"""The VAR family's reference cases: tokenizer, training pass and guided greedy decoding.

Legend: B samples, L positions, D code channels, V codes.
"""

import torch
from torch import Tensor

from varkit.decode.guidance import Guidance
from varkit.decode.loop import Model
from varkit.decode.state import Options
from varkit.generators.var import VAR
from varkit.heads.categorical import CategoricalHead
from varkit.hub.fill import image_array
from varkit.hub.states import build_empty, load_state
from varkit.hub.var import (
    generator_configs,
    generator_from_published,
    tokenizer_config,
    tokenizer_from_published,
)
from varkit.hub.verify import Case
from varkit.hub.verify_decoding import compare_greedy, labels_and_null
from varkit.nn.attention import Packed
from varkit.plans.scales import ScalePlan
from varkit.plans.schedule import Schedule
from varkit.tokenizers.multiscale_vq import MultiScaleVQ


def verify(case: Case) -> None:
    """Compare all arrays of a `var` case."""
    schedule = Schedule.parse(case.entry("tokenizer", "v_patch_nums"))
    tokenizer = tokenizer_of(case, schedule)
    generator, head = _generator(case, schedule)
    _compare_tokenizer(case, tokenizer, schedule)
    labels = case.input("labels")
    _compare_training(case, tokenizer, generator, head, labels)
    # Published: (1 + t) c - t u with t rising from 0 to cfg, which is u + s (c - u) with s up to 1 + cfg.
    guidance = Guidance(1 + case.entry("cfg"), ramp=True)
    model = Model(ScalePlan(schedule), generator, {"main": head})
    canvas = tokenizer.canvas(len(labels), schedule)
    condition = labels_and_null(labels, case.entry("generator", "num_classes"))
    compare_greedy(case, model, canvas, condition, Options(guidance))
    case.compare("greedy_image", every(case, (canvas.preview() + 1) / 2, (2, 4), (3, 4)))


def tokenizer_of(case: Case, schedule: Schedule) -> MultiScaleVQ:
    """The case's tokenizer, from its published state."""
    published = case.state("tokenizer_state")
    config = tokenizer_config(published, schedule.sides)
    tokenizer = build_empty(config.build)
    load_state(tokenizer, tokenizer_from_published(published, config), "the tokenizer")
    return tokenizer.eval()


def _generator(case: Case, schedule: Schedule) -> tuple[VAR, CategoricalHead]:
    published = case.state("generator_state")
    config, head_config = generator_configs(published, schedule.sides)
    generator, head = build_empty(config.build), build_empty(head_config.build)
    state, head_state = generator_from_published(published, schedule.sides)
    load_state(generator, state, "the generator")
    load_state(head, head_state, "the head")
    return generator.eval(), head.eval()


def _compare_tokenizer(case: Case, tokenizer: MultiScaleVQ, schedule: Schedule) -> None:
    images = torch.from_numpy(image_array(tuple(case.entry("image_shape")), case.entry("seed")))
    f = tokenizer.encode_features(images, schedule)
    case.compare("latent", every(case, f, (2, 2), (3, 2)))
    theirs = case.reference("tokens")
    case.compare_tokens("tokens", *forced_encoding(tokenizer, f, theirs, schedule))
    case.compare("reconstruction", every(case, tokenizer.decode({"ids": theirs}, schedule), (2, 4), (3, 4)))


def forced_encoding(
    tokenizer: MultiScaleVQ, f: Tensor, theirs: Tensor, schedule: Schedule
) -> tuple[Tensor, Tensor]:
    """Encode f (B, D, h, w), each level going on from the reference's ids (B, L) of the levels before it.

    Returns our ids (B, L), and by how much the reference's code is farther than the nearest (B, L, squared distance).
    """
    quantizer = tokenizer.quantizer
    ours, gap = torch.full_like(theirs, -1), torch.full(theirs.shape, torch.inf)

    def force(level: int, chosen: Tensor) -> Tensor:
        positions = schedule.positions(level)
        given = theirs[:, positions]
        before = quantizer.features(theirs, schedule, levels=level)
        wanted = quantizer.next_input(f - before, level, schedule)
        near, far = ((quantizer.lookup(ids) - wanted).square().sum(dim=-1) for ids in (chosen, given))
        ours[:, positions], gap[:, positions] = chosen, far - near
        return given

    quantizer.encode(f, schedule, override=force)
    return ours, gap


def _compare_training(
    case: Case, tokenizer: MultiScaleVQ, generator: VAR, head: CategoricalHead, labels: Tensor
) -> None:
    """Teacher forcing on the reference's tokens, as in training: one packed pass under the block-causal mask."""
    schedule = Schedule.parse(generator.config.schedule)
    canvas = tokenizer.canvas(len(labels), schedule)
    canvas.fill({"ids": case.reference("tokens")})
    step = ScalePlan(schedule).training_step()
    fed = canvas.feed(step.feed)
    shown = fed["vectors"][:, step.feed.shows >= 0]
    case.compare("teacher_input", every(case, shown, (1, 5)))
    prepared = generator.prepare({"label": labels[None]})
    window = Packed(step.sees.own_mask(len(step.feed)))
    logits = head.logits(generator(fed, step, prepared, window))
    case.compare("logits", every(case, logits, (1, 7), (2, 5)))


def every(case: Case, x: Tensor, *strides: tuple[int, int]) -> Tensor:
    """What a case with strides "big" stores of x: every n-th entry along each (dimension, n)."""
    if case.entry("strides") == "full":
        return x
    for dimension, n in strides:
        x = x[(slice(None),) * dimension + (slice(None, None, n),)]
    return x
