"""Properties of schedules, steps, packing and masks, over random schedules."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from varkit.errors import UserError
from varkit.plans.join import collate, only, pack
from varkit.plans.raster import RasterPlan
from varkit.plans.scales import ScalePlan
from varkit.plans.schedule import Schedule
from varkit.plans.step import Sees, Slots, Step


@st.composite
def schedules(draw) -> Schedule:
    """One to five levels, growing in both directions, often not square."""
    sides, h, w = [], 0, 0
    for _ in range(draw(st.integers(1, 5))):
        h, w = h + draw(st.integers(0 if h else 1, 3)), w + draw(st.integers(0 if w else 1, 3))
        sides.append((h, w))
    return Schedule.of(*sides)


grids = st.tuples(st.integers(1, 5), st.integers(1, 5)).filter(lambda g: g[0] * g[1] > 1)


@given(schedules())
def test_schedule_numbers_positions_level_by_level(schedule: Schedule):
    assert sum(schedule.lengths) == schedule.total == len(schedule.level_of) == len(schedule.coords)
    for level, (h, w) in enumerate(schedule.sides):
        ids = schedule.positions(level)
        assert bool((schedule.level_of[ids] == level).all())
        assert torch.equal(schedule.coords[ids, 0] * w + schedule.coords[ids, 1], torch.arange(h * w))


@given(schedules())
def test_scales_reveal_every_position_once_in_order(schedule: Schedule):
    plan = ScalePlan(schedule)
    targets = torch.cat([s.target for s in plan.steps])
    assert torch.equal(targets, torch.arange(schedule.total))
    assert plan.evaluations == len(schedule)


@given(schedules())
def test_scale_mask_is_block_causal(schedule: Schedule):
    own = ScalePlan(schedule).training_step().sees.own
    level = schedule.level_of
    assert torch.equal(own, level[:, None] >= level[None, :])


@given(grids, st.integers(1, 4))
def test_raster_mask_is_causal_and_shows_the_token_before(grid: tuple[int, int], prefix: int):
    plan = RasterPlan(grid, prefix)
    whole = plan.training_step()
    n = grid[0] * grid[1]
    assert torch.equal(whole.sees.own, torch.ones(len(whole.feed), len(whole.feed)).tril().bool())
    assert torch.equal(whole.target, torch.arange(n)) and plan.evaluations == n
    assert torch.equal(whole.feed.shows[whole.read], torch.arange(n) - 1)
    image = whole.feed.shows >= 0
    assert torch.equal(
        whole.feed.coords[image][:, 0] * grid[1] + whole.feed.coords[image][:, 1], torch.arange(n - 1)
    )


@given(schedules(), st.data())
def test_packing_in_two_parts_equals_packing_at_once(schedule: Schedule, data: st.DataObject):
    steps = ScalePlan(schedule).steps
    cut = data.draw(st.integers(1, len(steps)))
    first = pack(steps[:cut])
    joined = pack([first, *steps[cut:]])
    whole = pack(steps)
    assert torch.equal(joined.sees.own, whole.sees.own) and torch.equal(joined.read, whole.read)


@given(schedules(), st.data())
def test_steps_taken_out_of_a_pack_are_those_packed_by_themselves(schedule: Schedule, data: st.DataObject):
    steps = ScalePlan(schedule).steps
    turns = sorted(data.draw(st.sets(st.integers(0, len(steps) - 1), min_size=1)))
    taken, packed = only(pack(steps), turns), pack([steps[t] for t in turns])
    assert taken.turns == packed.turns
    for of_step in ("target", "read", "reveal", "turn"):
        assert torch.equal(getattr(taken, of_step), getattr(packed, of_step))
    for of_slots in ("ids", "shows", "coords", "level", "segment", "turn"):
        assert torch.equal(getattr(taken.feed, of_slots), getattr(packed.feed, of_slots))
    assert torch.equal(taken.sees.own, packed.sees.own)


@given(schedules(), st.data())
def test_collated_steps_keep_each_samples_own(schedule: Schedule, data: st.DataObject):
    steps = ScalePlan(schedule).steps
    chosen = [data.draw(st.sampled_from([*steps, None])) for _ in range(3)]
    if all(s is None for s in chosen):
        return
    together = collate(chosen)
    for b, step in enumerate(chosen):
        ids = together.feed.ids if together.feed.ids.ndim == 1 else together.feed.ids[b]
        target = together.target if together.target.ndim == 1 else together.target[b]
        assert torch.equal(
            ids[ids >= 0], torch.empty(0, dtype=torch.int64) if step is None else step.feed.ids
        )
        assert torch.equal(
            target[target >= 0], torch.empty(0, dtype=torch.int64) if step is None else step.target
        )


def one(slot: int, **sees) -> Step:
    ids = torch.tensor([slot])
    return Step.of(Slots.of(ids, ids, torch.zeros(1, 2)), target=ids, sees=Sees(**sees))


def test_a_narrowed_past_hides_other_steps():
    whole = pack(
        [one(0), one(1), one(2, past=torch.tensor([1])), one(3, past=torch.tensor([], dtype=torch.int64))]
    )
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]]
    assert whole.sees.own.int().tolist() == expected


def test_steps_that_do_not_write_are_seen_by_nobody_later():
    silent = Step.of(one(1).feed, target=torch.tensor([1]), writes=False)
    whole = pack([one(0), silent, one(2)])
    assert whole.sees.own.int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 0, 1]]


def test_an_overwritten_slot_is_seen_only_in_its_newest_form():
    whole = pack([one(0), one(1), one(0), one(2)])
    assert whole.sees.own.int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 1]]


@pytest.mark.parametrize("sides", [(), (0,), (2, 1), ((2, 3), (3, 2))])
def test_bad_schedules_are_refused(sides):
    with pytest.raises(UserError):
        Schedule.of(*sides)


def wide(slots: list[int], **sees) -> Step:
    ids = torch.tensor(slots)
    return Step.of(Slots.of(ids, ids, torch.zeros(len(slots), 2)), target=ids, sees=Sees(**sees))


def test_a_whole_past_stays_whole_beside_a_narrowed_one():
    together = collate([one(0), one(1, past=torch.tensor([1]))])
    seen = together.sees.past_mask(torch.arange(6))
    assert seen.int().tolist() == [[[1, 1, 1, 1, 1, 1]], [[0, 1, 0, 0, 0, 0]]]
    packed = pack([one(0), one(1, past=torch.tensor([1]))])
    assert packed.sees.past_mask(torch.arange(4)).int().tolist() == [[1, 1, 1, 1], [0, 1, 0, 0]]


def test_masks_of_samples_with_shared_slots():
    own = torch.tensor([[[1, 0], [1, 1]], [[1, 1], [1, 1]]]).bool()
    packed = pack([one(0), wide([1, 2], own=own)])
    assert packed.sees.own.shape == (2, 3, 3)
    assert packed.sees.own[0].int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert packed.sees.own[1].int().tolist() == [[1, 0, 0], [1, 1, 1], [1, 1, 1]]


def test_one_sample_overwriting_a_slot_hides_it_from_itself_alone():
    ids = torch.tensor([[0], [1]])
    again = Step.of(Slots.of(ids, ids, torch.zeros(2, 1, 2)), target=ids)
    packed = pack([wide([0, 1]), again, one(2)])
    assert packed.sees.own[0, 3].int().tolist() == [0, 1, 1, 1]
    assert packed.sees.own[1, 3].int().tolist() == [1, 0, 1, 1]


def test_a_pack_remembers_whose_turn_each_slot_and_target_is():
    packed = pack([one(0), pack([one(1), one(2)]), one(3)])
    assert packed.turns == 4 and packed.turn.tolist() == [0, 1, 2, 3] == packed.feed.turn.tolist()


def test_steps_of_two_routes_are_not_packed():
    coarse = Step.of(one(0).feed, target=torch.tensor([0]), route="coarse")
    with pytest.raises(AssertionError, match="routes"):
        pack([coarse, one(1)])
