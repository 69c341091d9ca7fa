"""MVAR (arXiv 2505.12742): the exact checks of scales that see only themselves, and of windows within fine ones."""

from dataclasses import replace

import pytest
import torch

from tests.contracts import CASES, start, true_latents
from tests.test_contracts import filled
from varkit.decode.loop import decode
from varkit.generators.conditioning import ClassConfig
from varkit.generators.var import VARConfig
from varkit.nn import neighbourhood
from varkit.nn.attention import Packed
from varkit.plans.scales import ScalePlan, ScalesConfig, Windows
from varkit.plans.schedule import Schedule
from varkit.plans.step import Step
from varkit.plans.visibility import Neighbourhood, pairs

PUBLISHED = Schedule.of(1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
CASE = CASES["var-markov"]


def hidden(model, canvas, step: Step, prepared, own=None) -> torch.Tensor:
    """Hidden states (N, L, C) of a step by itself, or under another visibility."""
    window = Packed.of(step) if own is None else Packed(own)
    with torch.no_grad():
        return model.generator(canvas.feed(step.feed), step, prepared, window)


@pytest.fixture(params=["strips", "tiles"], autouse=True)
def both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows attended by strips, and by tiles."""
    monkeypatch.setattr(neighbourhood, "STRIPS", 10**6 if request.param == "strips" else 0)


def test_a_window_as_large_as_the_grid_is_dense_attention():
    tokenizer, model = CASE.build()
    latents = true_latents(tokenizer, model, 2)
    canvas, state = filled(tokenizer, latents), start(tokenizer, model, CASE.conditions(2), guidance=1.0)
    step = model.plan.steps[-1]
    windowed = replace(step, sees=replace(step.sees, own=Neighbourhood((4, 6), 7)))
    dense = replace(step, sees=replace(step.sees, own="all"))
    one, twin = (hidden(model, canvas, s, state.prepared) for s in (windowed, dense))
    assert (one - twin).abs().max() <= 1e-6 * twin.abs().max()


def test_scales_packed_are_scales_alone():
    """What justifies training them apart: the packed forward is each scale's own, and so it is under one mask."""
    tokenizer, model = CASE.build(torch.float64)
    latents = true_latents(tokenizer, model, 2)
    canvas, state = filled(tokenizer, latents), start(tokenizer, model, CASE.conditions(2), guidance=1.0)
    whole = model.plan.training_step()
    packed = hidden(model, canvas, whole, state.prepared)
    alone = [hidden(model, canvas, step, state.prepared) for step in model.plan.steps]
    assert torch.allclose(packed, torch.cat(alone, dim=1), rtol=1e-10, atol=1e-12)
    masked = hidden(model, canvas, whole, state.prepared, whole.sees.own_mask(len(whole.feed)))
    assert torch.allclose(packed, masked, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["var-markov", "var-class"])
def test_nothing_but_the_canvas_is_carried_between_steps(name: str):
    tokenizer, model = CASES[name].build()
    state = start(tokenizer, model, CASES[name].conditions(2))
    before = sum(t.numel() for t in state.tensors().values())
    for _ in decode(model, state):
        carried = {
            key for key in state.tensors() if key.startswith("cache.") and not key.endswith("written_at")
        }
        assert bool(carried) == (name == "var-class") == bool(state.cache.nbytes)
        if name == "var-markov":
            assert not bool((state.cache.written_at >= 0).any())
            assert sum(t.numel() for t in state.tensors().values()) == before


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_change_spreads_by_one_window_a_layer(depth: int):
    """Those cells notice a change, at a corner and in the middle, that reach it in `depth` steps of the index table."""
    grid, window = (21, 21), 7
    schedule = (1, grid)
    torch.manual_seed(0)
    config = VARConfig(depth, 24, 2, schedule, 6, ClassConfig(5), adaln_init=1.0)
    generator = config.build().double().eval()
    plan = ScalesConfig(schedule, history=0, windows=Windows(window)).build()
    step = plan.steps[-1]
    prepared = generator.prepare({"label": torch.tensor([[1]])})
    table = Neighbourhood(grid, window).table()
    vectors = torch.randn(1, 441, 6, dtype=torch.float64)
    reached = {}
    for cell in (0, 220):
        changed = vectors.clone()
        changed[0, cell] += 1
        with torch.no_grad():
            before, after = (
                generator({"vectors": x}, step, prepared, Packed.of(step)) for x in (vectors, changed)
            )
        notices = ((before - after).abs().amax(dim=(0, 2)) > 0).nonzero()[:, 0]
        expected = torch.tensor([cell])
        for _ in range(depth):
            expected = torch.isin(table, expected).any(dim=1).nonzero()[:, 0]
        assert torch.equal(notices, expected)
        reached[cell] = notices
    if depth == 1:  # in the middle a radius of 3; the window of a corner is shifted, so 6 away is seen
        assert len(reached[220]) == 49 and int(reached[220].min()) == 220 - 3 * 21 - 3
        assert len(reached[0]) == 16 and 6 in table[0] and 7 not in table[0]


def test_pairs_of_the_published_schedule():
    """286,434 of VAR; 110,468 between levels apart; 37,196 with windows of 7 x 7 on the two largest."""
    counted = []
    for plan in (
        ScalePlan(PUBLISHED),
        ScalePlan(PUBLISHED, history=0),
        ScalePlan(PUBLISHED, history=0, windows=Windows()),
    ):
        own = plan.training_step().sees.own
        counted.append(pairs(own, PUBLISHED.total))
        assert counted[-1] == int(plan.training_step().sees.own_mask(PUBLISHED.total).sum())
    assert counted == [286_434, 110_468, 16_371 + 49 * 425] and counted[-1] == 37_196
    assert [round(100 * n / counted[0], 1) for n in counted[1:]] == [38.6, 13.0]
