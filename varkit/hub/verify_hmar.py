"""The HMAR family's reference cases: both stages under teacher forcing, merging, and decoding with refinement.

Decoding is forced call by call: each forward is compared whole, all positions of its scale, and goes on from the
reference's choices; which of them are masked next is decided by our own confidence.
Legend: B samples, L positions, n positions of a scale, V codes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from varkit.canvases.base import Canvas
from varkit.decode.cache.full import FullCache
from varkit.decode.guidance import Guidance
from varkit.decode.loop import Model, run
from varkit.decode.sampling import Sampler
from varkit.decode.state import Options, State
from varkit.draws import Draws
from varkit.generators.base import Prepared, branches_and_batch
from varkit.generators.var import VAR
from varkit.heads.base import Ask, Head
from varkit.heads.categorical import CategoricalHead
from varkit.hub import hmar, var
from varkit.hub.fill import image_array
from varkit.hub.states import State as Tensors
from varkit.hub.states import build_empty, load_state
from varkit.hub.verify import Case
from varkit.hub.verify_decoding import labels_and_null
from varkit.nn.attention import Packed
from varkit.plans.base import CONFIDENCE, Plan
from varkit.plans.refined import Counts, RefinedPlan
from varkit.plans.scale_weights import token_weights
from varkit.plans.scales import ScalePlan
from varkit.plans.schedule import Schedule
from varkit.plans.step import Step
from varkit.tokenizers.multiscale_vq import MultiScaleVQ

SMOOTHING = 0.1
"""The label smoothing of the second of each pair of losses."""


def verify(case: Case) -> None:
    """Compare all arrays of an `hmar` case."""
    schedule = Schedule.parse(case.entry("config", "generator", "patch_nums"))
    tokenizer = _tokenizer(case, schedule)
    decoding = _Decoding(case, tokenizer, schedule)
    labels = case.input("labels")
    merged = _built(case.state("state"), schedule)
    for i, counts in enumerate(case.entry("schedules")):
        decoding.compare(f"greedy_schedule{i}", merged, _plan(schedule, counts))
    if "nsp_state" not in case.config:
        return
    first, second = case.state("nsp_state"), case.state("mp_state", after=1)
    vae_tokens = _compare_tokens(case, tokenizer, schedule)
    own = case.entry("config", "n_layers_train")
    stage1 = _stage_one(first, schedule)
    _compare_first(case, tokenizer, vae_tokens, stage1, labels)
    alone = {name: t for name, t in second.items() if name not in (hmar.BIAS, hmar.EMBED)}
    stage2 = hmar.merge(alone | {"word_embed.bias": second[hmar.BIAS]}, second, own)
    _compare_masked(case, tokenizer, vae_tokens, _built(stage2, schedule), labels)
    sampled = case.entry("sampled")
    picker = Sampler(1.0, sampled["top_k"], sampled["top_p"])
    decoding.compare(
        "sampled", merged, _plan(schedule, sampled["schedule"]), picker, case.input("sampled_gumbel")
    )
    both = _built(hmar.merge(first, second, own), schedule)
    decoding.compare("merged", both, _plan(schedule, case.entry("schedules")[0]))
    decoding.compare("nsp_greedy", stage1, ScalePlan(schedule, history=0))


@dataclass(frozen=True)
class _Parts:
    """A generator and its heads by route."""

    generator: VAR
    heads: Mapping[str, Head]


def _plan(schedule: Schedule, counts: list[list[int]]) -> RefinedPlan:
    told: Counts = tuple(tuple(own) for own in counts)
    return RefinedPlan(ScalePlan(schedule, history=0), told)


def _tokenizer(case: Case, schedule: Schedule) -> MultiScaleVQ:
    published = case.state("tokenizer_state")
    config = var.tokenizer_config(published, schedule.sides)
    tokenizer = build_empty(config.build)
    load_state(tokenizer, var.tokenizer_from_published(published, config), "the tokenizer")
    return tokenizer.eval()


def _built(published: Tensors, schedule: Schedule) -> _Parts:
    """The model of a merged checkpoint."""
    config, head_config = hmar.generator_configs(published, schedule.sides)
    generator = build_empty(config.build)
    heads = {name: build_empty(head_config.build) for name in ("head", "head_mask")}
    states = hmar.generator_from_published(published, schedule.sides)
    load_state(generator, states["generator"], "the generator")
    for name, head in heads.items():
        load_state(head, states[name], f"the {name}")
    return _Parts(generator.eval(), {"main": heads["head"].eval(), "mask": heads["head_mask"].eval()})


def _stage_one(published: Tensors, schedule: Schedule) -> _Parts:
    """The model of a stage-1 checkpoint, which is a VAR."""
    config, head_config = var.generator_configs(published, schedule.sides)
    generator, head = build_empty(config.build), build_empty(head_config.build)
    state, head_state = var.generator_from_published(published, schedule.sides)
    load_state(generator, state, "the generator")
    load_state(head, head_state, "the head")
    return _Parts(generator.eval(), {"main": head.eval()})


def _compare_tokens(case: Case, tokenizer: MultiScaleVQ, schedule: Schedule) -> Tensor:
    """The reference's own tokens (B, L), after comparing ours."""
    images = torch.from_numpy(image_array(tuple(case.entry("image_shape")), case.entry("seed")))
    ours, theirs = tokenizer.encode(images, schedule)["ids"], case.reference("tokens")
    case.compare_tokens("tokens", ours, _where_unequal(ours, theirs))
    return theirs


def _where_unequal(ours: Tensor, theirs: Tensor) -> Tensor:
    """A gap that no choice other than the reference's passes."""
    return torch.where(ours == theirs, 0.0, torch.inf)


def _filled(tokenizer: MultiScaleVQ, schedule: Schedule, tokens: Tensor) -> Canvas:
    canvas = tokenizer.canvas(len(tokens), schedule)
    canvas.fill({"ids": tokens})
    return canvas


def _logits(parts: _Parts, canvas: Canvas, step: Step, labels: Tensor) -> Tensor:
    """(B, L, V) of a packed step at all of its slots."""
    prepared = parts.generator.prepare({"label": labels[None]})
    h = parts.generator(canvas.feed(step.feed), step, prepared, Packed.of(step))
    return _head(parts, step.route).logits(h)


def _head(parts: _Parts, route: str) -> CategoricalHead:
    head = parts.heads[route]
    assert isinstance(head, CategoricalHead)
    return head


def _compare_first(
    case: Case, tokenizer: MultiScaleVQ, tokens: Tensor, parts: _Parts, labels: Tensor
) -> None:
    schedule = Schedule.parse(parts.generator.config.schedule)
    step = ScalePlan(schedule, history=0).training_step()
    canvas = _filled(tokenizer, schedule, tokens)
    case.compare("ns_input", canvas.feed(step.feed)["vectors"][:, schedule.lengths[0] :])
    weights = token_weights("lognorm", schedule)
    case.compare("lognorm_token_weight", weights)
    logits = _logits(parts, canvas, step, labels)
    case.compare("ns_logits", logits)
    plain, smooth = (_losses(logits, tokens, s) for s in (0.0, SMOOTHING))
    weighed = [(each.double() * weights).sum(dim=1).mean() for each in (plain, smooth)]
    case.compare("ns_loss", torch.stack([*weighed, plain.double().mean()]))


def _compare_masked(
    case: Case, tokenizer: MultiScaleVQ, tokens: Tensor, parts: _Parts, labels: Tensor
) -> None:
    schedule = Schedule.parse(parts.generator.config.schedule)
    plan = _plan(schedule, [[n] for n in schedule.lengths])
    canvas = _filled(tokenizer, schedule, tokens)
    for i in range(len(case.entry("p_mask"))):
        masked = case.input(f"masked_positions_{i}").expand(len(tokens), -1)
        step = plan.masked(masked)
        if i == 0:
            case.compare("mask_input", canvas.feed(step.feed)["own"][:, schedule.lengths[0] :])
        logits = _logits(parts, canvas, step, labels)
        case.compare(f"mask_logits_{i}", logits)
        losses = [_losses(logits, tokens, s).gather(1, masked).double().mean() for s in (0.0, SMOOTHING)]
        case.compare(f"mask_loss_{i}", torch.stack(losses))


def _losses(logits: Tensor, tokens: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy of each token, (B, L)."""
    return F.cross_entropy(logits.mT, tokens, reduction="none", label_smoothing=smoothing)


@dataclass
class _Calls:
    """What each forward of a run gave, at all positions of its scale; picks the reference's choices.

    theirs (B, calls) are the reference's choices of every forward, one after the other; gumbel, of the same shape with
    V behind, is what a draw adds to log probabilities.
    """

    parts: _Parts
    combine: Guidance
    sampler: Sampler
    theirs: Tensor
    gumbel: Tensor | None
    done: int = 0
    h: Tensor | None = None
    logits: list[Tensor] = field(default_factory=list)
    chosen: list[Tensor] = field(default_factory=list)
    gaps: list[Tensor] = field(default_factory=list)

    def port(self, h: Tensor, step: Step, prepared: Prepared) -> Tensor:
        """Keep the hidden states (N, n, C) of all slots."""
        self.h = h.unflatten(0, branches_and_batch(prepared))
        return h

    def __call__(self, logits: Tensor, ask: Ask) -> dict[str, Tensor]:
        """The reference's choices at the targets, and how probable we think each."""
        assert self.h is not None
        whole = self.combine(_head(self.parts, ask.step.route).logits(self.h), ask.progress)
        n = whole.shape[1]
        here = slice(self.done, self.done + n)
        given = self.theirs[:, here]
        filtered = self.sampler.filtered(whole)
        scores = filtered if self.gumbel is None else filtered.log_softmax(dim=-1) + self.gumbel[:, here]
        best, chosen = scores.max(dim=-1)
        self.logits.append(whole)
        self.chosen.append(chosen)
        self.gaps.append(best - scores.gather(-1, given[..., None]).squeeze(-1))
        self.done += n
        read = ask.step.read.expand(len(given), -1)
        sure = filtered.softmax(dim=-1).gather(-1, given[..., None]).squeeze(-1)
        return {"ids": given.gather(1, read), CONFIDENCE: sure.gather(1, read)}


@dataclass(frozen=True)
class _Decoding:
    """Runs of one case, for the labels and the guidance of its generation."""

    case: Case
    tokenizer: MultiScaleVQ
    schedule: Schedule
    labels: Tensor = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", self.case.input("infer_labels"))

    def compare(
        self,
        tag: str,
        parts: _Parts,
        plan: Plan,
        sampler: Sampler | None = None,
        gumbel: Tensor | None = None,
    ) -> None:
        """Decode forward by forward and compare choices, logits, the tokens left at the end, and the picture."""
        case, model = self.case, Model(plan, parts.generator, parts.heads)
        calls_name = f"{tag}_call_tokens" if isinstance(plan, RefinedPlan) else f"{tag}_tokens"
        # Published: (1 + t) c - t u with t rising from 0 to cfg, which is u + s (c - u) with s up to 1 + cfg.
        guidance = Guidance(1 + case.entry("cfg"), ramp=True)
        calls = _Calls(parts, guidance, sampler or Sampler(0.0), case.reference(calls_name), gumbel)
        canvas = self.tokenizer.canvas(len(self.labels), self.schedule)
        null = case.entry("config", "generator", "num_classes")
        prepared = parts.generator.prepare(labels_and_null(self.labels, null))
        options = Options(guidance, pick=calls, ports={("output", 0): calls.port})
        cache, draws = FullCache(canvas.batch, 2, plan.slots), Draws.start(0, canvas.batch)
        run(model, State.start(canvas, cache, prepared, draws, options))
        assert cache.nbytes == 0, "scales that see only themselves keep nothing"
        case.compare_tokens(calls_name, torch.cat(calls.chosen, dim=1), torch.cat(calls.gaps, dim=1))
        logits = torch.cat(calls.logits, dim=1)
        if not isinstance(plan, RefinedPlan):
            case.compare(f"{tag}_logits", logits)
            return
        case.compare(f"{tag}_call_logits", logits if self._full else logits[:, ::7, ::31])
        ids, theirs = canvas.latents()["ids"], case.reference(f"{tag}_tokens")
        case.compare_tokens(f"{tag}_tokens", ids, _where_unequal(ids, theirs))
        case.compare(f"{tag}_image", ((canvas.preview() + 1) / 2)[:, :, ::4, ::4])

    @property
    def _full(self) -> bool:
        return self.case.entry("strides") == "full"
