"""FlexVAR's reference cases: maps by themselves, training passes and guided decoding in several schedules.

Legend: B samples, L positions, C width, D code channels, V codes.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from varkit.decode.cache.full import FullCache
from varkit.decode.guidance import Guidance
from varkit.decode.loop import Model, run
from varkit.decode.sampling import keep_top_k, keep_top_p
from varkit.decode.state import Options, State
from varkit.draws import Draws
from varkit.generators.flexvar import FlexVAR, waves
from varkit.heads.base import Ask
from varkit.heads.categorical import CategoricalHead
from varkit.hub.fill import image_array
from varkit.hub.flexvar import (
    generator_configs,
    generator_from_published,
    tokenizer_config,
    tokenizer_from_published,
)
from varkit.hub.states import build_empty, load_state
from varkit.hub.verify import Case
from varkit.hub.verify_decoding import labels_and_null
from varkit.nn.attention import Packed
from varkit.plans.flexible import PUBLISHED, FlexibleScalesConfig, ramp
from varkit.plans.scales import ScalePlan
from varkit.plans.schedule import Schedule
from varkit.tokenizers.map_vq import MapVQ, resized

TRAINED = 16
"""The side beyond which the published sampler guides without a ramp and draws greedily."""


def verify(case: Case) -> None:
    """Compare all arrays of a `flexvar` case."""
    tokenizer, (generator, head) = published_tokenizer(case), published_model(case)
    images = torch.from_numpy(image_array(tuple(case.entry("image_shape")), case.entry("seed")))
    side = images.shape[-1] // tokenizer.stride
    f = tokenizer.encode_features(images, Schedule.of(side))
    case.compare("latent", f)
    _compare_single(case, tokenizer, f, side)
    if "position_table_init_side32" in case.arrays:
        case.compare("position_table_init_side32", waves(generator.width, 32)[:, ::8, ::8])
    labels, asked = case.input("labels"), case.input("infer_labels")
    for sides in case.entry("schedules"):
        plan = FlexibleScalesConfig(tuple(sides)).build()
        name = "_".join(map(str, sides))
        _compare_maps(case, tokenizer, f, plan.schedule, name)
        _compare_training(case, tokenizer, Model(plan, generator, {"main": head}), labels, name)
        guidance = Guidance(1 + case.entry("cfg"), ramp(plan.schedule, TRAINED))
        run = _Run(case, tokenizer, plan, generator, head, asked)
        canvas = run.greedy(guidance, f"greedy_tokens_{name}", f"guided_logits_{name}")
        pictures = tokenizer.reconstruct(canvas)
        case.compare(f"greedy_image_{name}", pictures[:, :, ::4, ::4])
    _compare_variants(case, tokenizer, generator, head, asked)


def published_tokenizer(case: Case) -> MapVQ:
    """The tokenizer of a case's weights."""
    published = case.state("tokenizer_state")
    config = tokenizer_config(published)
    tokenizer = build_empty(config.build)
    load_state(tokenizer, tokenizer_from_published(published, config), "the tokenizer")
    return tokenizer.eval()


def published_model(case: Case) -> tuple[FlexVAR, CategoricalHead]:
    """The generator and head of a case's weights."""
    published = case.state("generator_state")
    configs = generator_configs(published, case.entry("config", "generator", "num_heads"))
    generator, head = build_empty(configs[0].build), build_empty(configs[1].build)
    state, head_state = generator_from_published(published, configs)
    load_state(generator, state, "the generator")
    load_state(head, head_state, "the head")
    return generator.eval(), head.eval()


def _compare_single(case: Case, tokenizer: MapVQ, f: Tensor, side: int) -> None:
    """One map at the grid of the features, and its picture."""
    one, theirs = Schedule.of(side), case.reference("single_scale_tokens")
    case.compare_tokens("single_scale_tokens", *nearest(tokenizer, f, theirs, one))
    pictures = tokenizer.reconstruct(tokenizer.quantizer.features(theirs, one))
    case.compare("single_scale_reconstruction", pictures[:, :, ::4, ::4])


def nearest(tokenizer: MapVQ, f: Tensor, theirs: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """Our ids of features (B, D, h, w), and by how much the reference's codes are farther (squared distance)."""
    ids = tokenizer.quantizer.encode(f, schedule)
    wanted = F.normalize(torch.cat([resized(f, side) for side in schedule.sides], dim=1), dim=-1)
    near, far = ((tokenizer.quantizer.lookup(i) - wanted).square().sum(dim=-1) for i in (ids, theirs))
    return ids, far - near


def _compare_maps(case: Case, tokenizer: MapVQ, f: Tensor, schedule: Schedule, name: str) -> None:
    theirs = case.reference(f"tokens_{name}")
    case.compare_tokens(f"tokens_{name}", *nearest(tokenizer, f, theirs, schedule))
    if schedule.sides != Schedule.of(*case.entry("schedules")[0]).sides:
        return
    for level, (side, _) in enumerate(schedule.sides):
        if f"map_reconstruction_side{side}" in case.arrays:
            map_ = tokenizer.quantizer.features(theirs[:1], schedule, level + 1)
            case.compare(f"map_reconstruction_side{side}", tokenizer.reconstruct(map_)[:, :, ::4, ::4])
    if "vq_and_commit_loss_per_map" in case.arrays:
        # Ours is the sum of both, and their values are equal but for the factor.
        losses = torch.stack([one.loss for one in tokenizer.quantizer.maps(f, schedule)])
        beta = tokenizer.quantizer.beta
        codebook = losses / (1 + beta)
        case.compare("vq_and_commit_loss_per_map", torch.stack([codebook, beta * codebook], dim=1))


def _compare_training(case: Case, tokenizer: MapVQ, model: Model, labels: Tensor, name: str) -> None:
    """Teacher forcing on the reference's tokens in one packed pass under the schedule's mask."""
    plan, generator, head = model.plan, model.generator, model.heads["main"]
    assert (
        isinstance(plan, ScalePlan) and isinstance(generator, FlexVAR) and isinstance(head, CategoricalHead)
    )
    canvas, tokens = tokenizer.canvas(len(labels), plan.schedule), case.reference(f"tokens_{name}")
    canvas.fill({"ids": tokens})
    step = plan.training_step()
    fed = canvas.feed(step.feed)
    case.compare(f"teacher_input_{name}", _every(case, fed["vectors"][:, step.feed.shows >= 0], (1, 5)))
    if f"position_{name}" in case.arrays:
        case.compare(f"position_{name}", generator.stands(step, 1, torch.device("cpu"))[:, ::4])
    window = Packed(step.sees.own_mask(len(step.feed)))
    logits = head.logits(generator(fed, step, generator.prepare({"label": labels[None]}), window))
    case.compare(f"logits_{name}", _every(case, logits, (1, 7), (2, 61)))
    losses = [F.cross_entropy(logits.mT, tokens, label_smoothing=smoothing) for smoothing in (0.0, 0.1)]
    case.compare(f"loss_{name}", torch.stack(losses))


def _every(case: Case, x: Tensor, *strides: tuple[int, int]) -> Tensor:
    """What a case with strides "big" stores of x: every n-th entry along each (dimension, n)."""
    if case.entry("strides") == "full":
        return x
    for dimension, n in strides:
        x = x[(slice(None),) * dimension + (slice(None, None, n),)]
    return x


def _compare_variants(
    case: Case, tokenizer: MapVQ, generator: FlexVAR, head: CategoricalHead, labels: Tensor
) -> None:
    """Constant guidance, a smaller trained side, and draws from given noise, in the cases that have them."""
    parts = (generator, head, labels)
    if "flat_guidance_tokens" in case.arrays:
        plan = FlexibleScalesConfig(tuple(case.entry("flat_schedule"))).build()
        flat = Guidance(float(case.entry("flat_cfg")))
        _Run(case, tokenizer, plan, *parts).greedy(flat, "flat_guidance_tokens", "flat_guidance_logits")
    if "max_pn_tokens" in case.arrays:
        plan = FlexibleScalesConfig(tuple(case.entry("max_pn_schedule"))).build()
        rising = Guidance(1 + case.entry("cfg"), ramp(plan.schedule, case.entry("max_pn")))
        _Run(case, tokenizer, plan, *parts).greedy(rising, "max_pn_tokens", "max_pn_logits")
    if "sampled_tokens" in case.arrays:
        _compare_sampled(case, tokenizer, *parts)


def _compare_sampled(
    case: Case, tokenizer: MapVQ, generator: FlexVAR, head: CategoricalHead, labels: Tensor
) -> None:
    trained, sides = case.entry("sampled_max_pn"), tuple(case.entry("sampled_schedule"))
    seen = tuple(side for side in PUBLISHED[10] if side <= trained)
    config = FlexibleScalesConfig(sides, seen=seen)
    plan, greedy = config.build(), torch.tensor(config.unseen())
    top_k = torch.where(greedy, 1, case.entry("sampled_top_k"))
    case.compare_tokens("sampled_top_k_used", top_k, torch.zeros(top_k.shape))
    picker = _Noisy(
        case.reference("sampled_tokens"), case.input("sampled_gumbel"), greedy[plan.schedule.level_of],
        case.entry("sampled_top_k"), case.entry("sampled_top_p"),
    )  # fmt: skip
    rising = Guidance(1 + case.entry("cfg"), ramp(plan.schedule, trained))
    _Run(case, tokenizer, plan, generator, head, labels).decode(rising, picker)
    case.compare_tokens("sampled_tokens", picker.chosen, picker.gap)


class _Forced:
    """A picker that returns the reference's choices (B, L), and keeps its own logits, choices and gaps."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens, self.chosen = tokens, torch.full_like(tokens, -1)
        self.gap, self.logits = torch.full(tokens.shape, torch.inf), list[Tensor]()

    def scores(self, logits: Tensor, target: Tensor) -> Tensor:
        """What is maximised, (B, T, V)."""
        return logits

    def __call__(self, logits: Tensor, ask: Ask) -> dict[str, Tensor]:
        """Guided logits (B, T, V) -> {"ids": (B, T)}."""
        target, given = ask.step.target, self.tokens[:, ask.step.target]
        scores = self.scores(logits, target)
        best, self.chosen[:, target] = scores.max(dim=-1)
        self.gap[:, target] = best - scores.gather(-1, given[..., None]).squeeze(-1)
        self.logits.append(logits)
        return {"ids": given}


class _Noisy(_Forced):
    """The same for draws: Gumbel noise (B, L, V) is added to what top-k and top-p leave; greedy (L,) bool."""

    def __init__(self, tokens: Tensor, noise: Tensor, greedy: Tensor, top_k: int, top_p: float) -> None:
        super().__init__(tokens)
        self.noise, self.greedy, self.top_k, self.top_p = noise, greedy, top_k, top_p

    def scores(self, logits: Tensor, target: Tensor) -> Tensor:
        kept = keep_top_p(keep_top_k(logits, self.top_k), self.top_p)
        drawn = kept.log_softmax(dim=-1) + self.noise[:, target]
        return torch.where(self.greedy[target][:, None], logits, drawn)


@dataclass(frozen=True)
class _Run:
    """Decoding of labels (B,) in one schedule, through the library's own loop and cache."""

    case: Case
    tokenizer: MapVQ
    plan: ScalePlan
    generator: FlexVAR
    head: CategoricalHead
    labels: Tensor

    def decode(self, guidance: Guidance, pick: Any) -> State:
        """The state at the end."""
        batch, model = len(self.labels), Model(self.plan, self.generator, {"main": self.head})
        canvas = self.tokenizer.canvas(batch, self.plan.schedule)
        null = self.case.entry("config", "generator", "num_classes")
        prepared = self.generator.prepare(labels_and_null(self.labels, null))
        cache = FullCache(batch, branches=2, slots=self.plan.slots)
        return run(
            model, State.start(canvas, cache, prepared, Draws.start(0, batch), Options(guidance, pick=pick))
        )

    def greedy(self, guidance: Guidance, tokens: str, logits: str) -> Tensor:
        """Compare arg-max decoding; returns the last map, (B, D, h, w)."""
        forced = _Forced(self.case.reference(tokens))
        self.decode(guidance, forced)
        self.case.compare_tokens(tokens, forced.chosen, forced.gap)
        self.case.compare(logits, _every(self.case, torch.cat(forced.logits, dim=1), (1, 7), (2, 61)))
        return self.tokenizer.quantizer.features(forced.tokens, self.plan.schedule)
