"""Slots that see only some of the others: what attention makes of it, against the dense mask."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from varkit.errors import UserError
from varkit.nn import neighbourhood
from varkit.nn.attention import Packed, View, attend
from varkit.nn.neighbourhood import Strips, Tiles
from varkit.plans.join import collate, pack
from varkit.plans.raster import RasterPlan
from varkit.plans.scales import ScalePlan, ScalesConfig, Windows
from varkit.plans.schedule import Schedule
from varkit.plans.visibility import Apart, Neighbourhood, Own, pairs

PUBLISHED = Schedule.of(1, 2, 3, 4, 5, 6, 8, 10, 13, 16)


def gradients(
    own: Own | None, inputs: list[torch.Tensor], scale: float | None = None
) -> tuple[torch.Tensor, ...]:
    """Attention's output over a packed sequence, and the gradients of q, k and v."""
    q, k, v = (x.clone().requires_grad_() for x in inputs)
    out = attend(q, Packed(own).views(0, q, k, v), scale)
    outer = torch.linspace(-1, 1, out.numel()).view_as(out).to(out.dtype)
    return (out, *torch.autograd.grad(out, (q, k, v), outer))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("strips", [0, neighbourhood.STRIPS])
def test_runs_apart_are_as_exact_as_the_dense_mask(
    dtype: torch.dtype, strips: int, monkeypatch: pytest.MonkeyPatch
):
    """Outputs and gradients, in bfloat16 by the backward pass of our own, against float64 under the mask."""
    monkeypatch.setattr(neighbourhood, "STRIPS", strips)
    torch.manual_seed(0)
    some = (torch.rand(6, 6) < 0.5).fill_diagonal_(True)
    own = Apart.of([(1, "all"), (4, "causal"), (6, some), (5, "all"), (35, Neighbourhood((5, 7), 3))])
    inputs = [torch.randn(2, 3, 51, 8).to(dtype) for _ in range(3)]
    exact = gradients(own.mask(), [x.double() for x in inputs], 1.0)
    for one, twin, true in zip(
        gradients(own, inputs, 1.0), gradients(own.mask(), inputs, 1.0), exact, strict=True
    ):
        assert one.dtype == dtype
        # keys that two strips share have their gradients summed in bfloat16: 1.26 times the twin's error
        assert (one - true).norm() <= (1.4 if strips else 1.2) * (twin - true).norm() + 1e-12


def test_runs_apart_are_views_without_a_mask_and_heads_may_be_shared():
    own = Apart.of([(2, "all"), (3, "all")])
    q, k, v = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    views = Packed(own).views(0, q, k, v)
    assert [(view.queries, view.k.shape[2], view.mask) for view in views] == [(2, 2, None), (3, 3, None)]
    assert torch.allclose(attend(q, views), attend(q, [View(k, v, own.mask())]), atol=1e-6)


def test_padding_and_hidden_slots_fall_back_to_the_mask():
    own, valid = Apart.of([(2, "all"), (2, "all")]), torch.tensor([[True, True, True, False]])
    q, k, v = (torch.randn(2, 1, 4, 8) for _ in range(3))
    (view,) = Packed(own, valid, branches=2).views(0, q, k, v)
    assert torch.equal(view.mask, (own.mask() & valid[0]).expand(2, 1, 4, 4))
    hidden = torch.tensor([[False], [True]])
    (view,) = Packed(own).narrow(hidden, torch.arange(4)).views(0, q, k, v)
    assert view.mask[0, 0, 1].tolist() == [True, True, False, False]
    assert view.mask[1, 0, 1].tolist() == [False, True, False, False]


@pytest.mark.parametrize("history", [None, 0, 1, 2])
def test_history_is_how_many_coarser_levels_are_seen(history: int | None):
    whole = ScalePlan(PUBLISHED, history=history).training_step()
    level = PUBLISHED.level_of
    behind = level[:, None] - level[None, :]
    seen = (behind >= 0) & (behind <= (len(PUBLISHED) if history is None else history))
    assert torch.equal(whole.sees.own_mask(PUBLISHED.total), seen)
    assert isinstance(whole.sees.own, Apart) == (history == 0)
    assert whole.writes == (history != 0) and whole.sees.no_past == (history == 0)


@settings(derandomize=True, deadline=None, max_examples=20)
@given(st.lists(st.integers(1, 3), min_size=1, max_size=5).map(sorted), st.integers(0, 5))
def test_packed_scales_are_the_scales_by_themselves(sides: list[int], history: int):
    schedule = Schedule.of(*sides)
    plan = ScalePlan(schedule, history=history)
    whole = plan.training_step().sees.own_mask(schedule.total)
    for level, step in enumerate(plan.steps):
        rows = slice(schedule.offsets[level], schedule.offsets[level + 1])
        past = step.sees.past_mask(torch.arange(schedule.offsets[level]))
        assert bool(whole[rows, rows].all()) and not whole[rows, schedule.offsets[level + 1] :].any()
        assert torch.equal(whole[rows, : schedule.offsets[level]], past.expand(schedule.lengths[level], -1))


def test_packs_of_packs_stay_apart_and_samples_at_different_steps_keep_theirs():
    plan = ScalePlan(Schedule.of(1, 2, 3), history=0)
    twice = pack([pack(plan.steps[:2]), plan.steps[2]])
    assert twice.sees.own == plan.training_step().sees.own == Apart(((1, "all"), (4, "all"), (9, "all")))
    rows = collate([pack(plan.steps[1:]), pack(plan.steps[:2])])
    mask = rows.sees.own_mask(13)
    assert not rows.writes
    assert torch.equal(mask[0], torch.block_diag(torch.ones(4, 4), torch.ones(9, 9)).bool())
    assert torch.equal(mask[1, :5, :5], torch.block_diag(torch.ones(1, 1), torch.ones(4, 4)).bool())


def test_steps_that_see_each_other_are_not_apart():
    assert not isinstance(RasterPlan((2, 2)).training_step().sees.own, Apart)


def test_a_negative_history_is_refused():
    with pytest.raises(UserError, match="history -1"):
        ScalesConfig((1, 2), history=-1)


def neighbours(grid: tuple[int, int], window: int, slot: int) -> list[int]:
    """By the definition: a window around the slot, moved inwards as far as it must be."""

    def along(at: int, length: int) -> range:
        size = min(window, length)
        first = at - window // 2
        while first > 0 and first + size > length:
            first -= 1
        first = max(first, 0)
        return range(first, first + size)

    y, x = divmod(slot, grid[1])
    return [a * grid[1] + b for a in along(y, grid[0]) for b in along(x, grid[1])]


AREAS = st.builds(
    Neighbourhood, st.tuples(st.integers(1, 9), st.integers(1, 9)), st.sampled_from([1, 3, 5, 7, 9])
)


@settings(derandomize=True, deadline=None, max_examples=50)
@given(AREAS)
def test_a_slot_sees_the_window_around_it_shifted_inwards(area: Neighbourhood):
    (h, w), table = area.grid, area.table()
    assert table.tolist() == [neighbours(area.grid, area.window, slot) for slot in range(h * w)]
    assert {len(set(row)) for row in table.tolist()} == {min(area.window, h) * min(area.window, w)}
    assert area.mask().sum() == pairs(area, h * w) == table.numel()


@settings(derandomize=True, deadline=None, max_examples=60)
@given(AREAS, st.sampled_from([Strips, Tiles]), st.integers(1, 6), st.sampled_from([1, 2]))
def test_strips_and_tiles_attend_as_under_the_dense_mask(
    area: Neighbourhood, kind: type[Strips | Tiles], side: int, shared: int
):
    torch.manual_seed(0)
    length = area.grid[0] * area.grid[1]
    q = torch.randn(2, 2 * shared, length, 4, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, 2, length, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    outer = torch.randn_like(q)
    found = []
    for mask in (kind.of(area, side), area.mask()):
        out = attend(q, [View(k, v, mask)], 1.0)
        found.append((out, *torch.autograd.grad(out, (q, k, v), outer)))
    for one, twin in zip(*found, strict=True):
        assert torch.allclose(one, twin, rtol=1e-9, atol=1e-12)


def test_a_tile_of_one_is_the_index_table_and_larger_ones_skip_work():
    area = Neighbourhood((16, 16), 7)
    alone = Tiles.of(area, 1)
    assert torch.equal(alone.keys, area.table()) and alone.mask is None and alone.pairs == 256 * 49
    (view,) = viewed(Neighbourhood((64, 64), 7))
    assert isinstance(view.mask, Tiles) and view.mask.pairs == 64**2 * (8 + 7 - 1) ** 2


def test_smaller_grids_go_by_strips_whose_keys_are_slices():
    (view,) = viewed(Neighbourhood((16, 16), 7))
    assert isinstance(view.mask, Strips)
    assert [(n, keys) for n, keys, _ in view.mask.each] == [
        (64, slice(16 * a, 16 * b)) for a, b in ((0, 7), (1, 11), (5, 15), (9, 16))
    ]
    assert view.mask.pairs == 64 * 16 * (7 + 10 + 10 + 7) and view.mask.pairs < 0.54 * 256**2
    for side in (13, 24, 32):
        (view,) = viewed(Neighbourhood((side, side), 7))
        assert isinstance(view.mask, Strips) and sum(n for n, *_ in view.mask.each) == side**2
    within = Strips.of(Neighbourhood((5, 3), 7))
    assert [(n, keys, mask) for n, keys, mask in within.each] == [
        (12, slice(0, 15), None),
        (3, slice(0, 15), None),
    ]


@pytest.mark.parametrize(("side", "kind"), [(16, torch.Tensor), (24, Tiles), (64, Tiles)])
def test_elsewhere_than_on_a_cpu_nothing_goes_by_strips(side: int, kind: type):
    assert isinstance(neighbourhood.fastest(Neighbourhood((side, side), 7), torch.device("meta")), kind)


def viewed(area: Neighbourhood):
    """How attention sees the area on the CPU."""
    length = area.grid[0] * area.grid[1]
    return Packed(Apart(((length, area),))).views(0, *torch.zeros(3, 1, 1, length, 2))


def test_fine_levels_see_windows_of_themselves():
    windows = Windows()
    assert [windows.own(grid) for grid in ((10, 10), (12, 40), (13, 13))] == [
        "all",
        "all",
        Neighbourhood((13, 13), 7),
    ]
    assert Windows(9, least=2).own((3, 9)) == "all"
    with pytest.raises(UserError, match="window of 4"):
        Windows(4)
    plan = ScalePlan(PUBLISHED, windows=windows)
    last = plan.training_step().sees.own_mask(PUBLISHED.total)[-256:]
    assert bool(last[:, :-256].all()) and torch.equal(last[:, -256:], Neighbourhood((16, 16), 7).mask())
