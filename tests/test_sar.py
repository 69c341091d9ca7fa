"""SAR: the sheet's checks 1 to 4, what a rollout draws, and which scales the student is taught."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.contracts import CASES, true_latents
from varkit.adapt.finetune import Finetune
from varkit.adapt.method import Material
from varkit.adapt.registry import REFERENCES
from varkit.adapt.sar import SAR, RefinementLoss, Rollout, redrawn, without_start
from varkit.canvases.base import gather_positions
from varkit.cli.main import main
from varkit.errors import UserError
from varkit.hub.verify import FAMILIES, Case, verify_case
from varkit.nn.attention import Packed
from varkit.plans.flexible import FlexibleScalesConfig
from varkit.plans.join import pack
from varkit.plans.schedule import Schedule
from varkit.train.generator_task import Forced, NextStepTask
from varkit.train.lessons import Lesson, WholePlan
from varkit.train.mixed_scales import MixedScales
from varkit.train.objective import teacher_forced
from varkit.train.schedule_lessons import ScheduleLessons
from varkit.train.tokens import Tokens

REFERENCE = Path(__file__).parent / "reference"
BATCH = 3
SCALED = (
    "var-class", "var-text", "var-markov", "m-var-class", "nfig-class", "infinity-text", "infinity-patches",
    "flexvar-class", "flexvar-text",
)  # fmt: skip


def parts_of(name: str, dtype: torch.dtype = torch.float32):
    """Model, a lesson of true latents, and the condition (B, ...) of a contract's case."""
    case = CASES[name]
    tokenizer, model = case.build(dtype)
    tokenizer.requires_grad_(False)
    lesson = WholePlan(tokenizer, model.plan).lesson(true_latents(tokenizer, model, BATCH))
    return tokenizer, model, lesson, {k: v[0] for k, v in case.conditions(BATCH).items()}


def refinement(model, drop: float = 0.0, **settings) -> RefinementLoss:
    return RefinementLoss(model.generator, model.heads["main"], drop, SAR(**settings))


def material(name: str, drop: float = 0.0, schedules: bool = False) -> Material:
    """With `schedules`, another schedule of squares for each step, over maps of all grids."""
    case = CASES[name]
    tokenizer, model = case.build()
    latents = {k: v.numpy() for k, v in true_latents(tokenizer, model, 8).items()}
    plan, lessons = model.plan, None
    if schedules:
        tokenizer.schedule, plan = Schedule.of(1, 2, 3, 5), FlexibleScalesConfig((1, 2, 3, 5)).build()
        lessons = ScheduleLessons(tokenizer, plan)
        rng = np.random.default_rng(0)
        latents = {"ids": rng.integers(0, tokenizer.config.vocab_size, (8, tokenizer.every.total))}
    tokens = Tokens(latents, torch.arange(8).numpy() % 3)
    parts = Forced(tokenizer, model.generator, model.heads["main"], plan, lessons)
    return Material(parts, tokens, tokens, 4, {"method": "sar"}, condition_drop=drop)


def gradients(loss: Tensor, module: torch.nn.Module) -> dict[str, Tensor]:
    wanted = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, [p for _, p in wanted], retain_graph=True, allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(wanted, found, strict=True)}


def task_gradients(task: NextStepTask) -> dict[str, Tensor]:
    """Gradients of one training step under a seed, with labels dropped and, in training, all else that is random."""
    modules = torch.nn.ModuleDict(dict(task.modules))
    task.objective.train()
    batch = task.batch(0, 0)
    torch.manual_seed(5)
    return gradients(task.loss("generator", batch, 0)[0], modules)


@pytest.mark.parametrize("scales", ["all", "last"])
@pytest.mark.parametrize(("name", "schedules"), [("var-class", False), ("flexvar-class", True)])
def test_without_weight_it_is_teacher_forcing_bit_for_bit(name: str, schedules: bool, scales: str):
    """Check 1, with labels dropped, blocks skipped and, for FlexVAR, schedules drawn at random."""
    made = material(name, drop=0.5, schedules=schedules)
    made.parts.generator.blocks[-1].drop_path = 0.5
    plain = task_gradients(Finetune().task(made))
    if schedules:
        torch.manual_seed(5)
        drawn = made.parts.lessons.lesson({"ids": torch.from_numpy(made.tokens.latents["ids"])}, 0)
        assert drawn.canvas.schedule != made.parts.plan.schedule
    refined = task_gradients(SAR(scales=scales, gamma=0.0).task(made))
    weighed = task_gradients(SAR(scales=scales, gamma=0.5).task(made))
    assert all(torch.equal(plain[name], refined[name]) for name in plain)
    assert any(not torch.equal(plain[name], weighed[name]) for name in plain)


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("target", ["tf_hard", "tf_soft", "gt"])
def test_no_gradient_flows_into_what_was_drawn(name: str, target: str):
    """Check 2: the student's loss does not know the teacher's pass, and the gradient of the sum is the sum."""
    _, model, lesson, condition = parts_of(name, torch.float64)
    loss = refinement(model, target=target, gamma=0.25)
    reached: list[Tensor] = []
    hidden = type(loss).hidden

    def kept(self, lesson, condition):
        reached.append(hidden(self, lesson, condition))
        return reached[-1]

    torch.manual_seed(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RefinementLoss, "hidden", kept)
        teacher, student = loss.terms(lesson, condition)
    of_teacher, of_student = reached
    assert torch.autograd.grad(student, of_teacher, retain_graph=True, allow_unused=True) == (None,)
    assert torch.autograd.grad(student, of_student, retain_graph=True)[0].abs().sum() > 0
    torch.manual_seed(1)
    whole = gradients(loss(lesson, condition), loss)
    one, other = gradients(teacher, loss), gradients(student, loss)
    for key, value in whole.items():
        assert torch.allclose(value, one[key] + 0.25 * other[key], rtol=1e-9, atol=1e-12), key


@pytest.mark.parametrize("name", SCALED)
def test_a_teacher_that_is_always_right_makes_both_passes_equal(name: str):
    """Check 3, bit for bit: what is drawn is the truth, so the student is fed what the teacher was."""
    _, model, lesson, condition = parts_of(name)
    loss = refinement(model)
    truth = {k: gather_positions(v, lesson.step.target) for k, v in lesson.targets.items()}
    drawn = redrawn(lesson, truth)
    feeds = [one.canvas.feed(one.step.feed)["vectors"] for one in (drawn, lesson)]
    assert torch.equal(*feeds)
    taught = loss.taught(lesson.step)
    assert int(taught.sum()) == len(taught) - len(model.plan.steps[0].target)
    assert torch.equal(loss.student(drawn, condition), loss.hidden(lesson, condition)[:, taught])


@pytest.mark.parametrize(("guidance", "passes"), [(1.0, 2), (2.2, 3)])
@pytest.mark.parametrize("scales", ["all", "last"])
def test_a_step_takes_two_passes_and_guidance_a_third(guidance: float, passes: int, scales: str):
    """Check 4."""
    _, model, lesson, condition = parts_of("var-class")
    loss, calls = refinement(model, guidance=guidance, scales=scales), []
    loss.generator.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    loss(lesson, condition).backward()
    assert len(calls) == passes
    assert calls.count(True) == 2  # the null condition's is without gradient


def test_labels_are_dropped_once_for_both_passes():
    _, model, lesson, condition = parts_of("var-class")
    loss, seen = refinement(model, drop=0.5, guidance=1.0).train(), []
    prepare = loss.generator.prepare

    def noted(told):
        seen.append(told["label"].clone())
        return prepare(told)

    loss.generator.prepare = noted  # type: ignore[method-assign]
    torch.manual_seed(0)
    loss(lesson, condition)
    teacher, student = seen
    assert torch.equal(teacher, student) and not torch.equal(teacher[0], condition["label"])


def test_arg_max_draws_the_likeliest_codes():
    _, model, lesson, condition = parts_of("var-class")
    h = teacher_forced(model.generator, lesson.canvas, lesson.step, condition)
    head = model.heads["main"]
    drawn = Rollout(1.0, temperature=0)(model.generator, head, lesson, condition, h)["ids"]
    assert torch.equal(drawn, head.logits(h).argmax(dim=-1))


def test_guidance_rises_from_half_way_to_the_published_cfg():
    _, model, lesson, condition = parts_of("var-class")
    head, generator = model.heads["main"], model.generator
    h = teacher_forced(generator, lesson.canvas, lesson.step, condition)
    null = teacher_forced(generator, lesson.canvas, lesson.step, generator.conditioner.null(condition))
    scales, cfg = len(model.plan.steps), 1.2
    k = lesson.step.turn
    t = cfg * 0.5 * (1 + k / (scales - 1))
    published = (1 + t)[:, None] * head.logits(h) - t[:, None] * head.logits(null)
    drawn = Rollout(1 + cfg, temperature=0)(generator, head, lesson, condition, h)["ids"]
    assert torch.equal(drawn, published.argmax(dim=-1))
    assert not torch.equal(drawn, head.logits(h).argmax(dim=-1))


def test_the_last_scale_alone_sees_the_condition_and_itself():
    """`last`: the published sequence [class, s_K^2], the class without the start's own embedding."""
    _, model, lesson, condition = parts_of("var-class")
    loss = refinement(model, scales="last")
    truth = {k: gather_positions(v, lesson.step.target) for k, v in lesson.targets.items()}
    drawn = redrawn(lesson, {k: (v + 1) % 24 for k, v in truth.items()})
    first, last = model.plan.steps[0], model.plan.steps[-1]
    alone = pack([first, last])
    with torch.no_grad():
        model.generator.start.zero_()
        n = len(first.feed)
        own = alone.sees.own_mask(len(alone.feed))
        assert not own[:n, n:].any() and own[n:].all()
        prepared = model.generator.prepare({k: v[None] for k, v in condition.items()})
        expected = model.generator(drawn.canvas.feed(alone.feed), alone, prepared, Packed(own))[:, n:]
        assert torch.equal(loss.student(drawn, condition), expected)
    torch.nn.init.normal_(model.generator.start)
    assert torch.allclose(loss.student(drawn, condition), expected, atol=1e-4)


def test_the_start_is_taken_away_where_nothing_is_shown():
    _, model, lesson, _ = parts_of("var-class")
    h = torch.randn(BATCH, len(lesson.step.feed), model.generator.width)
    left = without_start(model.generator)(h, lesson.step, {})
    n = len(model.plan.steps[0].feed)
    assert torch.equal(left[:, n:], h[:, n:])
    assert torch.equal(left[:, :n], h[:, :n] - model.generator.start[:n])


def test_soft_targets_are_the_limit_of_many_hard_ones():
    """The mean over codes drawn without a filter is the cross-entropy to the whole distribution."""
    _, model, lesson, condition = parts_of("var-class", torch.float64)
    loss = refinement(model, target="tf_soft")
    h = loss.hidden(lesson, condition)
    taught = loss.taught(lesson.step)
    truth = {k: gather_positions(v, lesson.step.target) for k, v in lesson.targets.items()}
    student = loss.student(redrawn(lesson, truth), condition)
    soft = loss._led(student, h[:, taught], lesson, lesson)
    rolled = Rollout(1.0, top_k=0, top_p=0)
    hard = []
    for seed in range(60):
        torch.manual_seed(seed)
        ids = rolled(model.generator, loss.head, lesson, condition, h)["ids"][:, taught]
        hard.append(loss.head.loss(student, {"ids": ids}).mean().item())
    spread = torch.tensor(hard).std().item() / len(hard) ** 0.5
    assert abs(sum(hard) / len(hard) - soft.item()) < 4 * spread


def test_what_it_cannot_refine_is_one_line():
    for name in ("llamagen-class", "pixelcnn-class"):
        with pytest.raises(UserError, match="scale by scale"):
            SAR().task(material(name))
    with pytest.raises(UserError, match="gamma is -1"):
        SAR(gamma=-1.0)
    with pytest.raises(UserError, match="target is 'hard'"):
        SAR(target="hard")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="top-p 2"):
        SAR(top_p=2.0)


@pytest.mark.parametrize("name", ["var-class", "infinity-text"])
def test_refining_brings_the_student_nearer_than_teacher_forcing_does(name: str):
    ends = []
    for gamma in (0.0, 1.0):
        _, model, lesson, condition = parts_of(name)
        loss = refinement(model, gamma=gamma, guidance=1.0, temperature=0.0)
        optimizer = torch.optim.Adam(loss.parameters(), lr=3e-3)
        for _ in range(10):
            optimizer.zero_grad()
            loss(lesson, condition).backward()
            optimizer.step()
        ends.append([term.item() for term in loss.terms(lesson, condition)])
    assert ends[1][1] < ends[0][1]


@pytest.mark.parametrize("scales", ["all", "last"])
def test_scales_that_were_trained_apart_are_refined_together(scales: str):
    """Taught by itself a scale would be fed the truth in both passes."""
    given = material("var-markov")
    parts = replace(given.parts, lessons=MixedScales(given.parts.tokenizer, given.parts.plan))
    task = SAR(scales=scales).task(replace(given, parts=parts))
    assert type(task.lessons) is WholePlan
    batch = {"ids": torch.from_numpy(given.tokens.latents["ids"][:2]).long()}, {"label": torch.arange(2)}
    total, metrics = task.loss("generator", batch, 0)
    assert bool(total.isfinite()) and float(metrics["student"]) > 0


def test_weights_of_a_lesson_count_for_the_teacher_alone():
    _, model, lesson, condition = parts_of("var-class")
    loss = refinement(model)
    heavier: Lesson = replace(lesson, weights=torch.full((len(lesson.step.target),), 2.0))
    torch.manual_seed(0)
    teacher, student = loss.terms(lesson, condition)
    torch.manual_seed(0)
    twice, same = loss.terms(heavier, condition)
    assert torch.allclose(twice, 2 * teacher) and torch.equal(student, same)


def test_the_released_trainer_is_reproduced():
    """Both passes, what is drawn, four rows of losses, and gradients of the first."""
    case = Case.open(REFERENCE / "sar_tiny.json", FAMILIES | REFERENCES)
    rows = verify_case(case, FAMILIES | REFERENCES)
    assert all(row.passed for row in rows), rows
    assert {row.array for row in rows if row.role == "input"} == {"labels", "gumbel"}
    assert main(["verify", str(REFERENCE / "sar_tiny.json")]) == 0


def test_wrong_losses_and_gradients_are_noticed(tmp_path: Path):
    shutil.copy(REFERENCE / "sar_tiny.json", tmp_path)
    with np.load(REFERENCE / "sar_tiny.npz") as stored:
        arrays = dict(stored)
    changed = ["losses", "student_logits", "grad_total:head.weight"]
    for array in changed:
        arrays[array].flat[-1] += 0.02 * (1 + 50 * array.startswith("grad"))
    np.savez(tmp_path / "sar_tiny.npz", **arrays)
    rows = verify_case(Case.open(tmp_path / "sar_tiny.json", FAMILIES | REFERENCES), FAMILIES | REFERENCES)
    assert sorted(row.array for row in rows if not row.passed) == sorted(changed)
