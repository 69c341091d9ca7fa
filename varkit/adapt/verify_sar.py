"""SAR's reference case: both passes of the released trainer, what it draws, its losses, and their gradients.

Legend: B samples, L positions, V codes.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from varkit.adapt.sar import SAR, RefinementLoss, Rollout, redrawn
from varkit.decode.sampling import keep_top_k, keep_top_p
from varkit.heads.base import Ask
from varkit.heads.categorical import CategoricalHead
from varkit.hub.fill import image_array
from varkit.hub.flexvar import generator_to_published
from varkit.hub.verify import Case
from varkit.hub.verify_flexvar import nearest, published_model, published_tokenizer
from varkit.plans.flexible import FlexibleScalesConfig
from varkit.plans.schedule import Schedule
from varkit.tokenizers.map_vq import MapVQ
from varkit.train.lessons import Lesson
from varkit.train.objective import teacher_forced

STRONG = 2.9
"""The published cfg of the last row of losses."""


def verify(case: Case) -> None:
    """Compare all arrays of a `sar` case: the released mode, which refines the last scale alone."""
    tokenizer, (generator, head) = published_tokenizer(case), published_model(case)
    plan = FlexibleScalesConfig(tuple(case.entry("config", "schedule"))).build()
    _compare_tokens(case, tokenizer, plan.schedule)
    condition = {"label": case.input("labels")}
    canvas = tokenizer.canvas(len(condition["label"]), plan.schedule)
    canvas.fill({"ids": case.reference("tokens")})
    lesson = Lesson(canvas, plan.training_step(), canvas.latents(), plan.schedule.total)
    loss = RefinementLoss(generator, head, 0.0, SAR(scales="last", gamma=case.entry("config", "sigma")))
    _compare_teacher(case, loss, lesson, condition)
    _compare_drawn(case, loss, lesson, condition)
    with torch.enable_grad():
        _compare_gradients(case, loss, lesson, condition, plan.schedule)


def _compare_tokens(case: Case, tokenizer: MapVQ, schedule: Schedule) -> None:
    images = torch.from_numpy(image_array(tuple(case.entry("image_shape")), case.entry("seed")))
    f = tokenizer.encode_features(images, Schedule.of(images.shape[-1] // tokenizer.stride))
    case.compare_tokens("tokens", *nearest(tokenizer, f, case.reference("tokens"), schedule))


def _compare_teacher(case: Case, loss: RefinementLoss, lesson: Lesson, condition: dict[str, Tensor]) -> None:
    """The first pass, for the labels and for none."""
    step, generator, head = lesson.step, loss.generator, loss.head
    assert isinstance(head, CategoricalHead)
    case.compare("teacher_input", lesson.canvas.feed(step.feed)["vectors"][:, step.feed.shows >= 0])
    case.compare("teacher_logits", head.logits(loss.hidden(lesson, condition)))
    null = generator.conditioner.null(condition)
    unlabelled = teacher_forced(generator, lesson.canvas, step, null)
    case.compare("teacher_logits_null", head.logits(unlabelled)[:, ::2])


def _compare_drawn(case: Case, loss: RefinementLoss, lesson: Lesson, condition: dict[str, Tensor]) -> None:
    """What is drawn, the second pass on it, and the rows of losses."""
    cfg = case.entry("config", "sf_cfg_scale")
    usual, strong = (
        _rollout(case, cfg, "rollout_tokens"),
        _rollout(case, STRONG, "strong_guidance_rollout_tokens"),
    )
    greedy = Rollout(guidance=1.0, temperature=0.0)
    rows = [(usual, "tf_hard"), (greedy, "tf_hard"), (usual, "gt"), (strong, "tf_hard")]
    losses = []
    for rollout, target in rows:
        terms = _with(loss, rollout, target).terms(lesson, condition)
        losses.append(torch.stack([*terms, terms[0] + loss.settings.gamma * terms[1]]))
    case.compare("losses", torch.stack(losses))
    case.input("gumbel")
    case.compare("guided_logits", usual.logits[0][:, ::2])
    for picked, name in ((usual, "rollout_tokens"), (strong, "strong_guidance_rollout_tokens")):
        case.compare_tokens(name, picked.chosen[0], picked.gap[0])
    hidden = loss.hidden(lesson, condition)
    best = greedy(loss.generator, loss.head, lesson, condition, hidden)
    _compare_student(case, loss, lesson, condition, {"ids": case.reference("rollout_tokens")}, "", 1)
    _compare_student(case, loss, lesson, condition, best, "argmax_", 2)


def _compare_student(
    case: Case,
    loss: RefinementLoss,
    lesson: Lesson,
    condition: dict[str, Tensor],
    values: dict[str, Tensor],
    prefix: str,
    every: int,
) -> None:
    assert isinstance(loss.head, CategoricalHead)
    drawn = redrawn(lesson, values)
    fed = drawn.canvas.feed(lesson.step.feed)["vectors"]
    case.compare(f"{prefix}student_input", fed[:, loss.taught(lesson.step)])
    logits = loss.head.logits(loss.student(drawn, condition))
    case.compare(f"{prefix}student_logits", logits[:, ::every])


def _compare_gradients(
    case: Case, loss: RefinementLoss, lesson: Lesson, condition: dict[str, Tensor], schedule: Schedule
) -> None:
    """A thousand times the gradients of the first row, by their published names."""
    usual = _rollout(case, case.entry("config", "sf_cfg_scale"), "rollout_tokens")
    refined = _with(loss, usual, "tf_hard")
    teacher, student = refined.terms(lesson, condition)
    for kind, value in (
        ("grad_total", teacher + loss.settings.gamma * student),
        ("grad_teacher_only", teacher),
    ):
        generator, head = (_gradients(value, part) for part in (loss.generator, loss.head))
        published = generator_to_published(generator, head, loss.generator.config, schedule)  # type: ignore[arg-type]
        for name in [n.partition(":")[2] for n in case.arrays if n.startswith(f"{kind}:")]:
            found = 1e3 * published[name]
            strided = found[:, ::4] if found.shape[1] > 16 else found
            case.compare(f"{kind}:{name}", strided, relative=True)


def _gradients(value: Tensor, part: nn.Module) -> dict[str, Tensor]:
    names, parameters = zip(*part.named_parameters(), strict=True)
    found = torch.autograd.grad(value, parameters, retain_graph=True)
    return dict(zip(names, found, strict=True))


def _with(loss: RefinementLoss, rollout: Rollout, target: str) -> RefinementLoss:
    """The same loss with another rollout and target."""
    settings = SAR(scales="last", gamma=loss.settings.gamma, target=target)  # type: ignore[arg-type]
    made = RefinementLoss(loss.generator, loss.head, 0.0, settings).eval()
    made.rollout = rollout
    return made


def _rollout(case: Case, cfg: float, name: str) -> "_Noisy":
    top_k, top_p = (case.entry("config", f"sf_{key}") for key in ("top_k", "top_p"))
    return _Noisy(1 + cfg, 1.0, top_k, top_p, case.reference(name), case.reference("gumbel"))


@dataclass(frozen=True)
class _Noisy(Rollout):
    """A rollout that gives the reference's choices (B, L), and keeps its own, made with Gumbel noise (B, L, V)."""

    tokens: Tensor = field(default_factory=lambda: torch.empty(0))
    noise: Tensor = field(default_factory=lambda: torch.empty(0))
    logits: list[Tensor] = field(default_factory=list)
    chosen: list[Tensor] = field(default_factory=list)
    gap: list[Tensor] = field(default_factory=list)

    def sampler(self):  # type: ignore[no-untyped-def,override]
        """Itself: see `pick`."""
        return self.pick

    def pick(self, logits: Tensor, ask: Ask) -> dict[str, Tensor]:
        """Guided logits (B, L, V) -> {"ids": (B, L)}."""
        kept = keep_top_p(keep_top_k(logits, self.top_k), self.top_p)
        scores = kept.log_softmax(dim=-1) + self.noise
        best, chosen = scores.max(dim=-1)
        self.logits.append(logits)
        self.chosen.append(chosen)
        self.gap.append(best - scores.gather(-1, self.tokens[..., None]).squeeze(-1))
        return {"ids": self.tokens}
