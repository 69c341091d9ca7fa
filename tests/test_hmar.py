"""HMAR (arXiv 2506.04421): the sheet's exact checks, and what refinement promises."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from tests.contracts import CASES, PYRAMID, Case, drawn, start, true_latents
from tests.test_contracts import filled, force
from varkit.canvases.grid import GridCanvas
from varkit.cli.main import main
from varkit.decode.cache.full import FullCache
from varkit.decode.loop import Model, advance, decode, run
from varkit.decode.sampling import Sampler
from varkit.decode.state import State
from varkit.draws import Draws
from varkit.edit.inpaint import start_inpaint
from varkit.errors import UserError
from varkit.generators.base import Generator
from varkit.heads.base import Head
from varkit.hub.pipeline import Settings
from varkit.nn.attention import Packed
from varkit.plans.base import CONFIDENCE
from varkit.plans.refined import MASK, RefinedConfig, RefinedPlan, coarse_counts
from varkit.plans.scales import ScalesConfig, Windows
from varkit.plans.schedule import Schedule
from varkit.train.masked_scales import MaskedScales

REFINED = CASES["hmar-refined"]
BATCH = 3
PUBLISHED = Schedule.of(1, 2, 3, 4, 5, 6, 8, 10, 13, 16)


def with_plan(case: Case, **plan) -> tuple[nn.Module, Model]:
    """The case's tokenizer and model over another plan."""
    tokenizer, model = case.build()
    return tokenizer, replace(model, plan=RefinedConfig(PYRAMID, **plan).build())


def test_block_diagonal_training_equals_steps_without_a_cache():
    tokenizer, model = REFINED.build()
    scales = model.plan.scales
    latents = true_latents(tokenizer, model, BATCH)
    state = start(tokenizer, model, REFINED.conditions(BATCH))
    each = force(replace(model, plan=scales), state, latents)
    whole = scales.training_step()
    with torch.no_grad():
        fed = filled(tokenizer, latents).feed(whole.feed)
        h = model.generator(fed, whole, state.prepared, Packed.of(whole, branches=2))
    assert torch.allclose(h, torch.cat(each, dim=1), atol=1e-5) and state.cache.nbytes == 0


def test_masked_training_equals_the_refining_steps_of_decoding():
    """The same drafts, masks and true context through one packed step, and scale by scale as decoding takes them."""
    tokenizer, model = with_plan(REFINED, counts=((1,), (1, 3), (2, 2, 2)), guided=True)
    plan, schedule = model.plan, model.plan.schedule
    latents = true_latents(tokenizer, model, BATCH)
    masked = MaskedScales(tokenizer, plan).masked(BATCH, 0.4, torch.Generator().manual_seed(3))
    state = start(tokenizer, model, REFINED.conditions(BATCH))
    canvas, packed = filled(tokenizer, latents), plan.masked(masked)
    with torch.no_grad():
        window = Packed.of(packed, branches=2)
        at_once = model.generator(canvas.feed(packed.feed), packed, state.prepared, window)
        known = torch.ones(BATCH, schedule.total, dtype=torch.bool).scatter(1, masked, False)
        for level in range(1, len(schedule)):
            here = slice(schedule.offsets[level], schedule.offsets[level + 1])
            left = int((~known[0, here]).sum())
            step = plan.refining(plan.scales.steps[level], known[:, here], left, 1)
            inside = masked[(masked >= here.start) & (masked < here.stop)].view(BATCH, -1)
            assert torch.equal(step.target.sort().values, inside.sort().values)
            h = model.generator(canvas.feed(step.feed), step, state.prepared, Packed.of(step, branches=2))
            assert torch.allclose(h, at_once[:, here], atol=1e-5)


def test_counts_of_whole_scales_draw_what_next_scale_prediction_draws():
    tokenizer, model = with_plan(REFINED)
    assert isinstance(model.plan, RefinedPlan) and model.plan.evaluations == len(PYRAMID)
    ours = run(model, start(tokenizer, model, REFINED.conditions(BATCH)))
    plain = replace(model, plan=ScalesConfig(PYRAMID, history=0).build())
    theirs = run(plain, start(tokenizer, plain, REFINED.conditions(BATCH)))
    assert torch.equal(drawn(ours), drawn(theirs)) and torch.equal(ours.canvas.f_hat, theirs.canvas.f_hat)


@st.composite
def compositions(draw, schedule: Schedule) -> tuple[tuple[int, ...], ...]:
    """Counts for each level of a schedule."""
    counts = [(schedule.lengths[0],)]
    for n in schedule.lengths[1:]:
        cuts = sorted(draw(st.sets(st.integers(1, n - 1), max_size=4)))
        counts.append(tuple(b - a for a, b in zip([0, *cuts], [*cuts, n], strict=True)))
    return tuple(counts)


@settings(derandomize=True, deadline=None, max_examples=6)
@given(compositions(Schedule.parse(PYRAMID)), st.booleans())
def test_every_schedule_of_counts_settles_each_position_once(counts, guided):
    tokenizer, model = with_plan(REFINED, counts=counts, guided=guided)
    plan, schedule = model.plan, model.plan.schedule
    assert [sum(own) for own in plan.counts] == list(schedule.lengths)
    assert plan.evaluations == sum(map(len, counts))
    state = start(tokenizer, model, REFINED.conditions(2))
    kept, expected = None, 0
    for at, _ in enumerate(decode(model, state)):
        level, turn = plan.order[at]
        expected += counts[level][turn]
        known, ids = state.canvas.known, drawn(state)
        assert known.sum(dim=1).tolist() == [expected] * 2
        assert not bool(known[:, schedule.offsets[level + 1] :].any())
        if kept is not None:
            before, old = kept
            assert bool(known[before].all()) and torch.equal(ids[before], old[before])
        kept = known.clone(), ids.clone()
    assert bool(state.canvas.known.all())
    rebuilt = filled(tokenizer, {"ids": drawn(state)}).f_hat
    assert torch.allclose(state.canvas.f_hat, rebuilt, atol=1e-6)


def test_the_least_confident_are_drawn_again():
    tokenizer, model = with_plan(REFINED, counts=((1,), (1, 3), (2, 4)))
    seen = []

    def watch(step, values, state):
        seen.append((step, values[CONFIDENCE].clone() if CONFIDENCE in values else None))
        return values

    state = start(tokenizer, model, REFINED.conditions(BATCH))
    state.options = replace(state.options, override=watch)
    run(model, state)
    for (first, sure), (again, _) in zip(seen, seen[1:], strict=False):
        if again.route != MASK:
            continue
        target, left = first.target.expand(BATCH, -1), again.target.shape[1]
        least = target.gather(1, sure.argsort(dim=1, stable=True)[:, :left])
        assert torch.equal(least.sort().values, again.target.sort().values)
        masked = again.feed.time.bool()
        assert torch.equal(
            again.feed.ids.expand(BATCH, -1)[masked].view(BATCH, -1), again.target.sort().values
        )


class Watched(Sampler):
    """Counts how often it filters logits, and at how many of its steps it was asked how sure it is."""

    counts = {"filtered": 0, "asked": 0}

    def __call__(self, logits, ask):
        self.counts["asked"] += ask.confidence
        return super().__call__(logits, ask)

    def filtered(self, logits, progress=None):
        self.counts["filtered"] += 1
        return super().filtered(logits, progress)


@pytest.mark.parametrize(
    ("counts", "asked"), [((), 0), (((1,), (1, 3)), 1), (((1,), (1, 3), (2, 2, 2), (12, 12)), 4)]
)
def test_confidence_is_computed_only_where_a_scale_has_tokens_left(monkeypatch, counts, asked):
    """Not for scales drawn at once, nor for a scale's last step; and nowhere are logits filtered twice."""
    monkeypatch.setattr(Watched, "counts", {"filtered": 0, "asked": 0})
    tokenizer, model = with_plan(REFINED, counts=counts)
    state = start(tokenizer, model, REFINED.conditions(BATCH))
    plain = drawn(run(model, state.select(torch.arange(BATCH))))
    state.options = replace(state.options, pick=Watched(top_k=20, top_p=0.9))
    always = state.select(torch.arange(BATCH))
    run(model, state)
    assert Watched.counts == {"filtered": model.plan.evaluations, "asked": asked}

    def sure(logits, ask):
        return Sampler(top_k=20, top_p=0.9)(logits, replace(ask, confidence=True))

    always.options = replace(always.options, pick=sure)
    assert torch.equal(drawn(run(model, always)), drawn(state)), "asking changes nothing that is drawn"
    assert not torch.equal(plain, drawn(state)), "the filters matter here"


def test_refinement_without_confidence_is_refused():
    tokenizer, model = with_plan(REFINED, counts=((1,), (1, 3)))
    state = start(tokenizer, model, REFINED.conditions(BATCH))
    state.options = replace(state.options, pick=lambda logits, ask: {"ids": logits.argmax(dim=-1)})
    with pytest.raises(UserError, match="commits what is surest, but the step's values are ids"):
        run(model, state)


@pytest.mark.parametrize("guided", [False, True])
def test_refining_without_guidance_skips_the_unconditional_half(guided):
    tokenizer, model = with_plan(REFINED, counts=((1,), (1, 3), (2, 4)), guided=guided)
    rows, progress = set(), {}

    def port(h, step, prepared):
        rows.add((step.route, len(h)))
        return h

    def combine(branches, at):
        progress.setdefault(len(branches), []).append(at.unique().item())
        return branches[0]

    state = start(tokenizer, model, REFINED.conditions(BATCH))
    state.options = replace(state.options, ports={("block", 0): port}, combine=combine)
    run(model, state)
    assert rows == {("main", 2 * BATCH), (MASK, 2 * BATCH if guided else BATCH)}
    thirds = pytest.approx([0, 1 / 3, 1 / 3, 2 / 3, 2 / 3, 1] if guided else [0, 1 / 3, 2 / 3, 1])
    assert progress[2] == thirds, "a refining step has its scale's guidance, or none"


def test_memory_between_steps_does_not_grow_with_scales():
    """Nothing is cached, whatever the number of scales; VAR's cache grows with every one."""
    held = {}
    for name in ("hmar-refined", "var-class"):
        case = CASES[name]
        tokenizer, model = case.build()
        state = start(tokenizer, model, case.conditions(1))
        held[name] = [s.cache.nbytes and int((s.cache.written_at >= 0).sum()) for s in decode(model, state)]
    assert set(held["hmar-refined"]) == {0}
    assert held["var-class"] == sorted(set(held["var-class"])) and held["var-class"][0] > 0


def test_rolled_back_to_the_start_of_a_scale_it_draws_the_same():
    tokenizer, model = REFINED.build()
    straight = drawn(run(model, start(tokenizer, model, REFINED.conditions(BATCH))))
    state = start(tokenizer, model, REFINED.conditions(BATCH))
    for _ in range(5):
        advance(model, state)
    state.rollback(torch.tensor([3, 1, 5]))
    assert torch.equal(drawn(run(model, state)), straight)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"counts": ((1,), (1, 2))}, "do not make up its 4"),
        ({"counts": ((1,), (0, 4))}, "do not make up its 4"),
        ({"counts": ((1,),) * 9}, "9 levels"),
        ({"history": 1}, "history 1"),
        ({"windows": Windows(3, least=4)}, "side=3, least=4.* does not go with refinement"),
        ({"noise": -1.0}, "noise -1"),
    ],
)
def test_schedules_that_cannot_be_are_one_line(changes, says):
    with pytest.raises(UserError, match=says):
        RefinedConfig(PYRAMID, **changes)


def test_the_released_counts():
    assert coarse_counts(PUBLISHED)[:4] == ((1,), (1, 3), (1, 1, 2, 5), (16,))
    assert RefinedConfig(PUBLISHED.sides, counts=coarse_counts(PUBLISHED)).build().evaluations == 14


class TwoPatterns(Generator):
    """All zeros or all ones, equally likely, known exactly: each token alone is a coin, and follows those committed."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.depth = 2, 1

    def prepare(self, condition):
        return condition

    def forward(self, fed, step, prepared, window, ports=None):
        ones = 2.0 * fed["ids"] - 1
        shown = torch.zeros_like(ones) if step.feed.time is None else ones * (1 - step.feed.time)
        votes = 9 * shown.sum(dim=1, keepdim=True).expand_as(ones)
        return torch.stack([-votes, votes], dim=-1)


class Given(Head):
    """What the network gives are the logits."""

    def loss(self, h, targets, draws=None):
        raise NotImplementedError

    def sample(self, h, ask):
        return ask.pick(ask.combine(h, ask.progress), ask)


def test_refinement_makes_the_tokens_of_a_scale_agree():
    """Two global patterns of equal probability, known exactly: one shot draws every token by itself, refinement sees
    what was committed. Agreement of pairs rises at the same weights."""
    agreement = {}
    for name, counts in (("one shot", ()), ("four steps", ((1,), (1, 5, 5, 5)))):
        plan = RefinedConfig((1, 4), counts=counts).build()
        canvas = GridCanvas.empty(64, 17, {"ids": ((), torch.int64)})
        state = State.start(canvas, FullCache(64), {"none": torch.zeros(1, 64)}, Draws.start(0, 64))
        model = Model(plan, TwoPatterns(), {"main": Given(), MASK: Given()})
        ids = drawn(run(model, state))[:, 1:].float()
        share = ids.mean(dim=1)
        agreement[name] = (share**2 + (1 - share) ** 2).mean().item()
    assert agreement["one shot"] < 0.6 and agreement["four steps"] > 0.9


def test_what_editing_keeps_is_committed_first():
    """Kept tokens are never in doubt: no refining step masks them while others are left to commit."""
    model = REFINED.pipeline(Settings(guidance=2.0))
    image = Image.fromarray(np.zeros((8, 12, 3), np.uint8))
    redraw = np.zeros((8, 12), bool)
    redraw[:, 6:] = True
    state = start_inpaint(model, image, redraw, 3, n=2, seed=1)
    for before in range(model.model.plan.evaluations):
        level, turn = model.model.plan.order[before]
        positions = model.schedule.positions(level)
        advance(model.model, state)
        keep, known = state.extras["keep"][:, positions], state.canvas.known[:, positions]
        committed = sum(model.model.plan.counts[level][: turn + 1])
        assert bool(((known & keep).sum(dim=1) == keep.sum(dim=1).clamp(max=committed)).all())


def test_a_picture_is_edited_from_the_command_line(tmp_path: Path, capsys):
    REFINED.pipeline(Settings(guidance=2.0)).save(tmp_path / "hmar")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8)).save(
        tmp_path / "old.png"
    )
    asked = [
        "edit",
        str(tmp_path / "old.png"),
        "--model",
        str(tmp_path / "hmar"),
        "--box",
        "0",
        "0",
        "1",
        "0.5",
    ]
    drawn = []
    for counts in ("none", "4x6:6,6,6,6 2:1,1,1,1"):
        out = tmp_path / "new.png"
        assert main([*asked, "--label", "3", "--counts", counts, "--out", str(out)]) == 0, capsys.readouterr()
        drawn.append(np.asarray(Image.open(out)))
    assert drawn[0].shape == (8, 12, 3) and not np.array_equal(*drawn)


def test_counts_are_changed_by_a_text_and_without_training():
    model = REFINED.pipeline(Settings(guidance=2.0))
    finer = model.refined("4x6:6,6,6,6 2:1,1,1,1")
    assert finer.configs["plan"].counts[-1] == (6, 6, 6, 6) and finer.model.plan.evaluations == 1 + 4 + 1 + 4
    assert finer.generator is model.generator
    assert model.refined("none").model.plan.evaluations == len(PYRAMID)
    assert finer.generate(2, seed=1)[0].tobytes() != model.generate(2, seed=1)[0].tobytes()
    for text, says in (("2:1,3 x", "'x'"), ("7:49", "no scale is 7x7"), ("4x6:1", "do not make up its 24")):
        with pytest.raises(UserError, match=says):
            model.refined(text)
    with pytest.raises(UserError, match="does not refine"):
        CASES["var-class"].pipeline(Settings()).refined("none")
