"""The masked order: its schedule, its samples' own orders, and the masks that training draws."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.contracts import CASES
from varkit.canvases.grid import GridCanvas
from varkit.decode.cache.full import FullCache
from varkit.decode.state import State
from varkit.draws import Draws
from varkit.errors import UserError
from varkit.plans.masked import CONDITION, MaskedConfig, MaskedPlan
from varkit.plans.step import Step
from varkit.train.masked_lessons import MaskedLessons

FIELDS = {"latents": ((1,), torch.float32)}


def start(plan: MaskedPlan, batch: int = 2, seed: int = 0) -> State:
    canvas = GridCanvas.empty(batch, plan.positions, FIELDS)
    cache = FullCache(batch, 1, plan.slots)
    return State.start(canvas, cache, {"none": torch.zeros(1, batch, 1)}, Draws.start(seed, batch))


def walk(plan: MaskedPlan, state: State) -> list[Step]:
    """Take steps to the end, without a network; each value is the number of the step that settled it."""
    steps = []
    while not bool(state.finished.all()):
        step = plan.next_step(state)
        if step is None:
            break
        value = state.cursor[:, None, None].expand(-1, step.target.shape[1], 1).float()
        state.canvas.reveal(step, {"latents": value}, state.cursor)
        state.cursor = state.cursor + ~state.finished
        state.finished = state.finished | plan.finished(state)
        steps.append(step)
    return steps


def counts(grid: tuple[int, int], iterations: int) -> list[int]:
    plan = MaskedPlan(grid, iterations, prefix=1)
    return [step.target.shape[1] for step in walk(plan, start(plan))]


def test_published_schedules():
    assert counts((16, 16), 256) == [1] * 256
    assert counts((16, 16), 4) == [20, 55, 84, 97]
    sixty_four = counts((16, 16), 64)
    assert sixty_four[:3] == [1, 1, 1] and sixty_four[-2:] == [6, 6] and sum(sixty_four) == 256


@given(st.integers(1, 7), st.integers(1, 7), st.data(), st.sampled_from(["random", "raster"]))
def test_every_position_is_settled_once_and_no_step_is_empty(height, width, data, order):
    iterations = data.draw(st.integers(1, height * width))
    plan = MaskedConfig((height, width), iterations, prefix=2, order=order).build()
    state = start(plan, batch=3)
    steps = walk(plan, state)
    assert len(steps) == iterations == plan.evaluations
    targets = torch.cat([step.target for step in steps], dim=1)
    assert torch.equal(targets.sort(dim=1).values, torch.arange(height * width).expand(3, -1))


def order_of(plan: MaskedPlan, state: State) -> Tensor:
    return torch.cat([step.target for step in walk(plan, state)], dim=1)


def test_orders_are_a_pure_function_of_seed_and_sample():
    plan = MaskedPlan((4, 5), 6, prefix=2)
    together = order_of(plan, start(plan, 3))
    assert torch.equal(order_of(plan, start(plan, 3).select([2, 0])), together[[2, 0]])
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(order_of(plan, start(plan, 3, seed=1)), together)
    places = plan.orders(start(plan, 400))[:, -1]
    expected = 400 / 20
    assert (places.bincount(minlength=20) - expected).abs().max() < 5 * math.sqrt(expected)


def test_raster_order_goes_left_to_right():
    plan = MaskedPlan((3, 4), 5, prefix=2, order="raster")
    assert torch.equal(order_of(plan, start(plan)), torch.arange(12).expand(2, -1))


def test_a_step_shows_what_is_known_and_reads_behind_the_prefix():
    plan = MaskedPlan((2, 3), 3, prefix=4)
    state = start(plan)
    first, second = (walk(plan, state), walk(plan, start(plan)))[1][:2]
    assert bool((first.feed.shows == -1).all()) and len(first.feed) == 10 == plan.slots
    assert bool((first.feed.segment[:4] == CONDITION).all()) and not first.writes
    known = second.feed.shows[:, 4:] >= 0
    assert torch.equal(known.nonzero()[:, 1].view(2, -1), first.target.sort(dim=1).values)
    assert torch.equal(second.read, second.target + 4) and not second.sees.whole_past
    assert torch.equal(first.feed.coords[4:], torch.tensor([[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]))


def test_forks_rollbacks_and_merged_samples_settle_the_rest():
    plan = MaskedPlan((4, 4), 8, prefix=2)
    state = start(plan, 2)
    for _ in range(3):
        step = plan.next_step(state)
        assert step is not None
        state.canvas.reveal(step, {"latents": torch.zeros(*step.target.shape, 1)}, state.cursor)
        state.cursor = state.cursor + 1
    forked = state.fork([0, 0, 1])
    forked.rollback(torch.tensor([3, 1, 3]))
    merged = State.concat([forked, start(plan, 1)])
    steps = walk(plan, merged)
    assert bool(merged.canvas.known.all()) and merged.cursor.tolist() == [8, 8, 8, 8]
    assert steps[0].target.shape == (4, int(max((s >= 0).sum() for s in steps[0].target)))
    settled = torch.cat([step.target for step in steps], dim=1)
    for b, held in enumerate((state.canvas.known[0].sum(), 1, state.canvas.known[1].sum(), 0)):
        own = settled[b][settled[b] >= 0]
        assert len(own) == 16 - int(held) == len(own.unique())


def test_positions_given_beforehand_are_not_drawn_again():
    plan = MaskedPlan((4, 4), 8, prefix=2)
    state = start(plan, 2)
    state.canvas.revealed_at[0, :14], state.canvas.revealed_at[1, :1] = 0, 0
    steps = walk(plan, state)
    settled = torch.cat([step.target for step in steps], dim=1)
    assert settled[0][settled[0] >= 0].sort().values.tolist() == [14, 15]
    assert settled[1][settled[1] >= 0].sort().values.tolist() == list(range(1, 16))
    done = start(plan, 1)
    done.canvas.revealed_at[:] = 0
    assert plan.next_step(done) is None


def test_progress_is_what_published_linear_guidance_follows():
    plan = MaskedPlan((16, 16), 4, prefix=1)
    left = [236, 181, 97, 1]  # the last step counts one masked token
    assert torch.allclose(plan.progress(torch.arange(4)), torch.tensor([(256 - m) / 256 for m in left]))
    assert plan.progress(torch.tensor([[7]])).shape == (1, 1)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"grid": (0, 3)}, r"grid \(0, 3\)"),
        ({"grid": (2, 3), "iterations": 7}, "iterations is 7.*1 to 6"),
        ({"grid": (2, 3), "iterations": 0}, "iterations is 0"),
        ({"grid": (2, 3), "iterations": 2, "order": "rastr"}, "rastr.*raster"),
    ],
)
def test_wrong_plans_are_one_clear_line(config, says):
    with pytest.raises(UserError, match=says) as error:
        MaskedConfig(**config)
    assert "\n" not in str(error.value)


def lessons(**options) -> tuple[MaskedLessons, dict[str, Tensor]]:
    tokenizer, model = CASES["mar-class"].build()
    latents = torch.randn(4, 12, 8, generator=torch.Generator().manual_seed(0))
    return MaskedLessons(tokenizer, model.plan, **options), {"latents": latents}


def test_shares_masked_follow_the_cut_normal():
    ratio = lessons()[0].ratio
    assert ratio(0) == pytest.approx(0.7) and ratio(1) == pytest.approx(1.0)
    shares = torch.tensor([ratio((i + 0.5) / 2000) for i in range(2000)], dtype=torch.float64)
    x = torch.linspace(0.7, 1, 20_001, dtype=torch.float64)
    density = torch.exp(-(((x - 1) / 0.25) ** 2) / 2)
    mean, square = ((density * x**n).sum() / density.sum() for n in (1, 2))
    assert shares.mean().item() == pytest.approx(mean.item(), abs=1e-4)
    assert shares.square().mean().item() == pytest.approx(square.item(), abs=2e-4)


def test_a_lesson_masks_its_targets_and_shows_the_rest():
    teach, latents = lessons()
    sizes = set()
    for seed in range(30):
        torch.manual_seed(seed)
        lesson = teach.lesson(latents, step=seed)
        image = lesson.step.feed.shows[:, 8:]
        hidden = (image < 0).nonzero()[:, 1].view(4, -1)
        assert torch.equal(hidden, lesson.step.target.sort(dim=1).values)
        assert lesson.total == lesson.step.target.shape[1] >= math.ceil(12 * 0.7)
        fed = lesson.canvas.feed(lesson.step.feed)["latents"][:, 8:]
        assert torch.equal(fed, torch.where((image >= 0)[..., None], latents["latents"], 0.0))
        assert not torch.equal(lesson.step.target[0], lesson.step.target[1])
        sizes.add(lesson.total)
    assert len(sizes) >= 3 and lesson.draws is None


def test_held_out_lessons_are_always_the_same_and_leave_the_generator_alone():
    teach, latents = lessons()
    torch.manual_seed(1)
    first = teach.lesson(latents)
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), after)
    second = teach.lesson(latents)
    assert first.draws is not None and second.draws is not None
    assert torch.equal(first.step.target, second.step.target)
    assert all(torch.equal(first.draws[name], second.draws[name]) for name in ("times", "noise"))


def test_one_step_masks_everything():
    teach, latents = lessons(least=1.0)
    assert teach.lesson(latents, step=0).total == 12
    with pytest.raises(UserError, match="at least 0"):
        lessons(least=0)
