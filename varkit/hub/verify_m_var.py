"""The M-VAR family's reference cases: the mixer alone, the training pass, and guided greedy decoding.

Legend: B samples, L positions, C width, V codes.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from varkit.decode.guidance import Guidance
from varkit.decode.loop import Model
from varkit.decode.state import Options
from varkit.generators.m_var import MVar
from varkit.heads.categorical import CategoricalHead
from varkit.hub.fill import image_array
from varkit.hub.m_var import generator_configs, generator_from_published
from varkit.hub.states import State, build_empty, load_state
from varkit.hub.verify import Case
from varkit.hub.verify_decoding import compare_greedy, labels_and_null
from varkit.hub.verify_var import every, forced_encoding, tokenizer_of
from varkit.nn.attention import Packed
from varkit.nn.scan_block import ScanBlock
from varkit.plans.scales import ScalePlan
from varkit.plans.schedule import Schedule
from varkit.tokenizers.multiscale_vq import MultiScaleVQ

NUDGE = "change_per_scale_of_logits_when_first_input_of_scale_2_moves_by_1"
SMOOTHINGS = (0.0, 0.1)


def verify(case: Case) -> None:
    """Compare all arrays of an `m_var` case."""
    schedule = Schedule.parse(case.entry("config", "tokenizer", "v_patch_nums"))
    tokenizer = tokenizer_of(case, schedule)
    generator, head = _generator(case, schedule)
    _compare_mixer(case, generator)
    images = torch.from_numpy(image_array(tuple(case.entry("image_shape")), case.entry("seed")))
    features = tokenizer.encode_features(images, schedule)
    theirs = case.reference("tokens")
    case.compare_tokens("tokens", *forced_encoding(tokenizer, features, theirs, schedule))
    model = Model(ScalePlan(schedule, history=0), generator, {"main": head})
    _compare_training(case, tokenizer, model, schedule)
    if "greedy_tokens" in case.arrays:
        _compare_decoding(case, tokenizer, model, schedule)


def _generator(case: Case, schedule: Schedule) -> tuple[MVar, CategoricalHead]:
    published = _shifted(case.state("generator_state"), case.entry("dt_bias_shift"))
    config, head_config = generator_configs(published, schedule.sides)
    heads = case.entry("config", "generator", "num_heads")  # shapes tell them with cosine attention alone
    config = replace(config, heads=heads)
    generator, head = build_empty(config.build), build_empty(head_config.build)
    state, head_state = generator_from_published(published, schedule.sides)
    load_state(generator, state, "the generator")
    load_state(head, head_state, "the head")
    return generator.eval(), head.eval()  # type: ignore[return-value]


def _shifted(state: State, by: float) -> State:
    """The state with `by` added to the time steps' biases."""
    return {name: tensor + by if name.endswith("dt_bias") else tensor for name, tensor in state.items()}


def _compare_mixer(case: Case, generator: MVar) -> None:
    block = generator.blocks[0]
    assert isinstance(block, ScanBlock)
    out, carried = block.scan(case.input("mamba_input"))
    case.compare("mamba_output", out)
    case.compare("mamba_state", carried["state"][:, :, ::4, ::4])
    case.compare("mamba_conv_state", carried["tail"].mT[:, ::4])


def _compare_training(case: Case, tokenizer: MultiScaleVQ, model: Model, schedule: Schedule) -> None:
    """Teacher forcing on the reference's tokens, and on the same with one input moved."""
    labels, ids, head = case.input("labels"), case.reference("tokens"), model.heads["main"]
    assert isinstance(head, CategoricalHead)
    canvas = tokenizer.canvas(len(labels), schedule)
    canvas.fill({"ids": ids})
    step = ScalePlan(schedule, history=0).training_step()
    fed = canvas.feed(step.feed)["vectors"]
    prepared = model.generator.prepare({"label": labels[None]})

    def logits_of(vectors: Tensor) -> Tensor:
        h = model.generator({"vectors": vectors}, step, prepared, Packed.of(step))
        return head.logits(h)

    case.compare("teacher_input", every(case, fed[:, step.feed.shows >= 0], (1, 5)))
    logits = logits_of(fed)
    case.compare("logits", every(case, logits, (1, 7), (2, 31)))
    losses = [F.cross_entropy(logits.flatten(0, 1), ids.flatten(), label_smoothing=s) for s in SMOOTHINGS]
    case.compare("loss", torch.stack(losses))
    if NUDGE in case.arrays:
        moved = fed.clone()
        moved[:, schedule.offsets[1]] += 1
        change = (logits_of(moved) - logits).abs().split(schedule.lengths, dim=1)
        case.compare(NUDGE, torch.stack([scale.max() for scale in change]))


def _compare_decoding(case: Case, tokenizer: MultiScaleVQ, model: Model, schedule: Schedule) -> None:
    labels = case.input("infer_labels")
    # Published: (1 + t) c - t u with t rising from 0 to cfg, which is u + s (c - u) with s up to 1 + cfg.
    options = Options(Guidance(1 + case.entry("cfg"), ramp=True))
    canvas = tokenizer.canvas(len(labels), schedule)
    condition = labels_and_null(labels, case.entry("config", "generator", "num_classes"))
    guided = compare_greedy(case, model, canvas, condition, options)
    case.compare("guided_logits", guided)
    case.compare("greedy_image", ((canvas.preview() + 1) / 2)[:, :, ::4, ::4])
