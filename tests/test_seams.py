"""The seams hold for orders other than VAR's: toy networks on the one loop, cache and canvas."""

from dataclasses import replace

import pytest
import torch

from tests.toys.heads import EulerHead, GaussianHead
from tests.toys.network import ToyGenerator
from tests.toys.plans import ChunkPlan, MaskedPlan, WanderPlan
from varkit.canvases.grid import GridCanvas
from varkit.decode.cache.full import FullCache
from varkit.decode.guidance import Guidance
from varkit.decode.loop import Model, advance, decode, run, take
from varkit.decode.sampling import Sampler
from varkit.decode.state import Options, State
from varkit.draws import Draws
from varkit.heads.categorical import CategoricalHead
from varkit.nn.attention import Packed, View, attend
from varkit.plans.join import pack
from varkit.plans.raster import RasterPlan


def start(
    model: Model, fields, positions: int, batch: int, guidance: float = 1.0, canvas=None, seed: int = 0
) -> State:
    """A state at its first step; sample b asks for label b % 4."""
    labels = torch.arange(batch) % 4
    condition = torch.stack([labels, torch.full_like(labels, 4)]) if guidance != 1 else labels[None]
    with torch.no_grad():
        prepared = model.generator.prepare({"label": condition})
    canvas = canvas or GridCanvas.empty(batch, positions, fields)
    cache = FullCache(batch, len(condition), model.plan.slots)
    return State.start(canvas, cache, prepared, Draws.start(seed, batch), Options(combine=Guidance(guidance)))


def masked_model() -> Model:
    torch.manual_seed(0)
    return Model(MaskedPlan(4, 4), ToyGenerator(channels=3), {"main": GaussianHead(16, 3)})


VECTORS = {"vectors": ((3,), torch.float32)}
IDS = {"ids": ((), torch.int64)}


def test_random_masked_order_with_a_continuous_head():
    model = masked_model()
    state = start(model, VECTORS, 16, batch=3, guidance=2.0)
    seen = [state.canvas.known.sum(1).tolist() for state in decode(model, state)]
    assert seen == [[4] * 3, [8] * 3, [12] * 3, [16] * 3]
    orders = model.plan.orders(state)
    assert not torch.equal(orders[0], orders[1])
    first = state.canvas.revealed_at == 0
    assert torch.equal(first.nonzero()[:, 1].view(3, 4), orders[:, :4].sort(dim=1).values)


def test_masked_order_is_the_same_alone_and_in_a_batch():
    model = masked_model()
    together = run(model, start(model, VECTORS, 16, batch=3))
    for b in range(3):
        alone = start(model, VECTORS, 16, batch=3).select([b])
        assert torch.allclose(
            run(model, alone).canvas.values["vectors"][0], together.canvas.values["vectors"][b], atol=1e-5
        )


def chunk_model() -> tuple[Model, GridCanvas]:
    torch.manual_seed(0)
    model = Model(ChunkPlan(3, 4, 2), ToyGenerator(channels=3), {"main": EulerHead(16, 3, steps=2)})
    canvas = GridCanvas.empty(2, 12, VECTORS)
    canvas.values["vectors"] = Draws.start(0, 2).normal("start", 0, torch.arange(12), 3)
    return model, canvas


def test_chunks_times_denoising_with_a_pass_that_only_writes():
    model, canvas = chunk_model()
    noise = canvas.values["vectors"].clone()
    state = start(model, VECTORS, 12, batch=2, canvas=canvas)
    assert [int((s.cache.written_at[0] >= 0).sum()) for s in decode(model, state)] == [
        0,
        0,
        4,
        4,
        4,
        8,
        8,
        8,
        12,
    ]
    assert bool(state.canvas.known.all()) and state.evaluations.tolist() == [9, 9]
    assert not torch.allclose(state.canvas.values["vectors"], noise)


def test_cache_never_saw_noise():
    """Cached K/V after a clean pass equal those of a run whose chunk started at its final value."""
    model, canvas = chunk_model()
    state = start(model, VECTORS, 12, batch=2, canvas=canvas)
    for _ in range(3):
        advance(model, state)
    final = state.canvas.values["vectors"].clone()
    _, other = chunk_model()
    other.values["vectors"] = final
    clean = start(model, VECTORS, 12, batch=2, canvas=other)
    clean.cursor += 2
    advance(model, clean)
    for layer in (0, 1):
        for a, b in zip(state.cache.layers[layer], clean.cache.layers[layer], strict=True):
            assert torch.equal(a, b)


def test_chunked_decoding_equals_the_packed_steps():
    """The noisy passes inside a pack see the clean slots of earlier chunks and not each other's."""
    model, canvas = chunk_model()
    state = start(model, VECTORS, 12, batch=2, canvas=canvas)
    fed, outputs = [], []
    for step in model.plan.steps:
        fed.append(state.canvas.feed(step.feed)["vectors"].clone())
        window = state.cache.open(step, state.cursor)
        with torch.no_grad():
            outputs.append(model.generator({"vectors": fed[-1]}, step, state.prepared, window))
        state.cache.close()
        _reveal(model, state, step, outputs[-1])
    whole = pack(model.plan.steps)
    with torch.no_grad():
        twin = model.generator({"vectors": torch.cat(fed, 1)}, whole, state.prepared, Packed(whole.sees.own))
    assert torch.allclose(torch.cat(outputs, 1), twin, atol=1e-5)


def _reveal(model: Model, state: State, step, h) -> None:
    if len(step.target):
        values = {
            "vectors": state.canvas.feed(step.feed)["vectors"] - model.heads["main"].velocity(h).detach() / 2
        }
        state.canvas.reveal(step, values, state.cursor)
    state.cursor = state.cursor + 1


def wander_model() -> Model:
    torch.manual_seed(1)
    return Model(WanderPlan(16, 12), ToyGenerator(vocab=5), {"main": CategoricalHead(16, 5)})


def test_an_order_computed_from_the_sample_ends_when_it_ends():
    model = wander_model()
    state = run(model, start(model, IDS, 16, batch=6))
    lengths = state.evaluations.tolist()
    assert len(set(lengths)) > 1, "samples should end at different times"
    assert state.tokens.tolist() == lengths == state.canvas.known.sum(1).tolist()


def test_variable_lengths_do_not_disturb_the_others():
    model = wander_model()
    together = run(model, start(model, IDS, 16, batch=6))
    for b in range(6):
        alone = run(model, start(model, IDS, 16, batch=6).select([b]))
        assert torch.equal(alone.canvas.values["ids"][0], together.canvas.values["ids"][b])


def raster_model() -> Model:
    torch.manual_seed(2)
    return Model(RasterPlan((3, 3)), ToyGenerator(vocab=7), {"main": CategoricalHead(16, 7)})


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_rollback_per_sample_continues_as_if_nothing_had_happened(guidance: float):
    model = raster_model()
    straight = run(model, start(model, IDS, 9, batch=3, guidance=guidance))
    state = start(model, IDS, 9, batch=3, guidance=guidance)
    for _ in range(6):
        advance(model, state)
    state.rollback(torch.tensor([2, 6, 4]))
    assert state.cursor.tolist() == [2, 6, 4]
    assert state.canvas.known.sum(1).tolist() == [2, 6, 4]
    run(model, state)
    assert torch.equal(state.canvas.values["ids"], straight.canvas.values["ids"])
    assert state.evaluations.tolist() == [9 + 4, 9, 9 + 2]


def test_rollback_of_a_finished_sample_wakes_it_up():
    model = raster_model()
    state = run(model, start(model, IDS, 9, batch=2))
    before = state.canvas.values["ids"].clone()
    state.rollback(torch.tensor([9, 5]))
    assert state.finished.tolist() == [True, False]
    assert torch.equal(run(model, state).canvas.values["ids"], before)


def test_fork_select_and_concat_at_different_steps():
    model = raster_model()
    straight = run(model, start(model, IDS, 9, batch=4)).canvas.values["ids"]
    early, late = start(model, IDS, 9, batch=4).select([2, 0]), start(model, IDS, 9, batch=4).select([3, 1])
    for _ in range(2):
        advance(model, early)
    for _ in range(5):
        advance(model, late)
    merged = State.concat([early, late])
    assert merged.cursor.tolist() == [2, 2, 5, 5]
    run(model, merged)
    assert torch.equal(merged.canvas.values["ids"], straight[[2, 0, 3, 1]])


def test_forked_copies_share_the_past_and_draw_their_own_future():
    model = raster_model()
    state = start(model, IDS, 9, batch=2)
    for _ in range(4):
        advance(model, state)
    forked = run(model, state.fork([0, 0, 0, 1]))
    ids = forked.canvas.values["ids"]
    assert torch.equal(ids[0, :4], ids[1, :4]) and torch.equal(ids[1, :4], ids[2, :4])
    assert not torch.equal(ids[0, 4:], ids[1, 4:])
    again = run(model, state.fork([0, 0, 0, 1]))
    assert torch.equal(again.canvas.values["ids"], ids), "a fork is a pure function of its path"


def test_a_state_saved_to_tensors_goes_on_where_it_was():
    model = raster_model()
    straight = run(model, start(model, IDS, 9, batch=3, guidance=2.0)).canvas.values["ids"]
    state = start(model, IDS, 9, batch=3, guidance=2.0)
    for _ in range(3):
        advance(model, state)
    saved = {k: v.clone() for k, v in state.tensors().items()}
    run(model, state)
    fresh = start(model, IDS, 9, batch=3, guidance=2.0).with_tensors(saved)
    assert torch.equal(run(model, fresh).canvas.values["ids"], straight)


def test_ports_read_and_replace_hidden_states_at_a_step():
    model = raster_model()
    seen: list[int] = []

    def port(h, step, prepared):
        seen.append(int(step.feed.ids[0]))
        return h + 1.0 if int(step.feed.ids[0]) >= 3 else h

    plain = run(model, start(model, IDS, 9, batch=2)).canvas.values["ids"]
    state = start(model, IDS, 9, batch=2)
    state.options = Options(combine=state.options.combine, ports={("block", 0): port})
    ported = run(model, state).canvas.values["ids"]
    assert seen == list(range(9))
    assert torch.equal(ported[:, :3], plain[:, :3])


def test_a_window_of_steps_verified_at_once_equals_one_by_one():
    """Speculation: packing the next three steps over the cache gives the logits of taking them singly."""
    model = raster_model()
    finished = run(model, start(model, IDS, 9, batch=2))
    state = start(model, IDS, 9, batch=2)
    for _ in range(4):
        advance(model, state)
    state.canvas.values["ids"] = finished.canvas.values["ids"].clone()
    window_step = pack(model.plan.steps[4:7])
    with torch.no_grad():
        window = state.cache.open(window_step, state.cursor)
        at_once = model.generator(state.canvas.feed(window_step.feed), window_step, state.prepared, window)
        state.cache.close()
        state.cache.rollback(torch.full((2,), 4))
        singly = []
        for step in model.plan.steps[4:7]:
            window = state.cache.open(step, state.cursor)
            singly.append(model.generator(state.canvas.feed(step.feed), step, state.prepared, window))
            state.cache.close()
    assert torch.allclose(at_once, torch.cat(singly, 1), atol=1e-5)


@pytest.mark.parametrize("kept", [[5, 6], [4, 7]])
def test_part_of_a_verified_window_is_kept(kept: list[int]):
    """Speculation: after a window of three steps, a rollback to the accepted ones leaves the cache of single steps."""
    model = raster_model()
    straight = run(model, start(model, IDS, 9, batch=2)).canvas.values["ids"].clone()
    state = start(model, IDS, 9, batch=2)
    for _ in range(4):
        advance(model, state)
    state.canvas.values["ids"] = straight.clone()  # the drafts, here all right
    take(model, state, pack(model.plan.steps[4:7]))
    assert state.cursor.tolist() == [7, 7] and state.evaluations.tolist() == [5, 5]
    assert torch.equal(state.canvas.values["ids"][:, :7], straight[:, :7]), (
        "a window draws what its steps would"
    )
    state.rollback(torch.tensor(kept))
    assert (state.cache.written_at >= 0).sum(1).tolist() == kept == state.canvas.known.sum(1).tolist()
    assert torch.equal(run(model, state).canvas.values["ids"], straight)


def test_heads_may_be_served_by_views_of_their_own_in_any_order():
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 5, 8, generator=generator)
    whole = attend(q, [View(k, v)])
    late, early = torch.tensor([3, 0]), torch.tensor([1, 2])
    split = attend(q, [View(k[:, late], v[:, late], heads=late), View(k[:, early], v[:, early], heads=early)])
    assert torch.allclose(whole, split, atol=1e-6)


def test_what_an_override_needs_of_each_sample_moves_with_it():
    model = raster_model()

    def override(step, values, state):
        return {"ids": state.extras["forced"][:, None].expand_as(values["ids"])}

    state = start(model, IDS, 9, batch=3)
    state.options, state.extras = (
        replace(state.options, override=override),
        {"forced": torch.tensor([1, 2, 3])},
    )
    advance(model, state)
    mixed = run(model, State.concat([state.select([2, 0]), state.fork([1, 1])]))
    assert (
        mixed.canvas.values["ids"][:, 0].tolist()
        == [3, 1, 2, 2]
        == mixed.canvas.values["ids"][:, -1].tolist()
    )


def test_runs_with_different_options_are_not_merged():
    model = raster_model()
    a, b = start(model, IDS, 9, batch=1), start(model, IDS, 9, batch=1)
    b.options = replace(b.options, pick=Sampler(top_k=2))
    with pytest.raises(AssertionError, match="different options"):
        State.concat([a, b])


def test_an_empty_selection_is_an_empty_state():
    model = raster_model()
    empty = start(model, IDS, 9, batch=2).select([])
    assert empty.batch == 0 and bool(empty.finished.all())


def test_a_loaded_state_shares_nothing_with_what_was_saved():
    model = raster_model()
    state = start(model, IDS, 9, batch=2)
    for _ in range(3):
        advance(model, state)
    saved = {k: v.clone() for k, v in state.tensors().items()}
    template = start(model, IDS, 9, batch=2)
    first = run(model, template.with_tensors(saved)).canvas.values["ids"]
    second = run(model, template.with_tensors(saved)).canvas.values["ids"]
    assert torch.equal(first, second)
