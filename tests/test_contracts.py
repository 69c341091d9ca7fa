"""DESIGN's contracts, each tested once for every model that opts in (tests/contracts.py)."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tests.contracts import CACHES, CASES, Case, changed_at, drawn, same, start, true_latents
from varkit.canvases.base import gather_positions
from varkit.decode.guidance import Guidance
from varkit.decode.loop import Model, advance, run
from varkit.decode.state import State
from varkit.errors import UserError
from varkit.hub.pipeline import Pipeline, Settings
from varkit.nn.attention import Packed
from varkit.plans.join import pack
from varkit.plans.step import Step
from varkit.train.objective import NextStepLoss
from varkit.train.optim import in_block

BATCH = 3


@pytest.fixture(params=sorted(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(params=sorted(name for name, case in CASES.items() if case.static))
def static(request: pytest.FixtureRequest) -> Case:
    """A case whose steps are all known beforehand."""
    return CASES[request.param]


def forced(model: Model, state: State, latents: dict[str, Tensor]) -> Iterator[tuple[Step, Tensor]]:
    """Take every step with the true latents in place of samples; each with its hidden states (N, L, C).

    What a step does not commit is a draft that later steps may see, so it is not the truth, but zeros."""
    while (step := model.plan.next_step(state)) is not None:
        window = state.cache.open(step, state.cursor)
        with torch.no_grad():
            prepared = state.prepared if step.guided else {k: v[:1] for k, v in state.prepared.items()}
            h = model.generator(state.canvas.feed(step.feed), step, prepared, window)
        state.cache.close()
        state.canvas.reveal(step, {k: _committed(step, v) for k, v in latents.items()}, state.cursor)
        state.cursor = state.cursor + 1
        yield step, h


def _committed(step: Step, latents: Tensor) -> Tensor:
    """The true values (B, T, ...) at a step's targets, and zeros where it commits nothing."""
    values = gather_positions(latents, step.target)
    keep = step.reveal.expand(values.shape[:2])
    return torch.where(keep.view(*keep.shape, *([1] * (values.ndim - 2))), values, torch.zeros_like(values))


def force(model: Model, state: State, latents: dict[str, Tensor]) -> list[Tensor]:
    """The hidden states of each forced step."""
    return [h for _, h in forced(model, state, latents)]


def filled(tokenizer, latents: dict[str, Tensor]):
    canvas = tokenizer.canvas(len(next(iter(latents.values()))))
    canvas.fill(latents)
    return canvas


def test_a_canvas_takes_latents_of_its_own_length_alone(case: Case):
    """Another schedule's latents would be wrong tokens in silence."""
    tokenizer, model = case.build()
    latents = true_latents(tokenizer, model, BATCH)
    for others in (
        {k: torch.cat([v, v[:, :1]], dim=1) for k, v in latents.items()},
        {k: v[:, 1:] for k, v in latents.items()},
    ):
        with pytest.raises(UserError, match="do not fill a canvas of"):
            filled(tokenizer, others)


def test_decoding_feeds_exactly_the_training_inputs(static: Case):
    tokenizer, model = static.build()
    latents = true_latents(tokenizer, model, BATCH)
    whole = model.plan.training_step()
    (name, inputs), *_ = filled(tokenizer, latents).feed(whole.feed).items()
    state, at = start(tokenizer, model, static.conditions(BATCH)), 0
    for step in model.plan.steps:
        fed = state.canvas.feed(step.feed)[name]
        assert torch.equal(fed, inputs[:, at : at + len(step.feed)])
        state.canvas.reveal(
            step, {k: gather_positions(v, step.target) for k, v in latents.items()}, state.cursor
        )
        at += len(step.feed)
    assert at == len(whole.feed)


@pytest.mark.parametrize("cache", sorted(CACHES))
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_cached_steps_equal_the_same_steps_recomputed(
    static: Case, cache: str, dtype: torch.dtype, bound: float
):
    tokenizer, model = static.build(dtype)
    latents = true_latents(tokenizer, model, BATCH)
    made = CACHES[cache](BATCH, 2, model.plan.slots)
    state = start(tokenizer, model, static.conditions(BATCH), cache=made)
    cached = force(model, state, latents)
    canvas = filled(tokenizer, latents)
    for k in range(len(model.plan.steps)):
        prefix = pack(model.plan.steps[: k + 1])
        with torch.no_grad():
            h = model.generator(
                canvas.feed(prefix.feed), prefix, state.prepared, Packed(prefix.sees.own, branches=2)
            )
        twin = h[:, -len(model.plan.steps[k].feed) :]
        assert (cached[k] - twin).abs().max() <= bound * twin.std()


def test_training_sequence_equals_cached_decoding(static: Case):
    tokenizer, model = static.build(torch.float64)
    latents = true_latents(tokenizer, model, BATCH)
    state = start(tokenizer, model, static.conditions(BATCH))
    cached = torch.cat(force(model, state, latents), dim=1)
    whole = model.plan.training_step()
    with torch.no_grad():
        fed = filled(tokenizer, latents).feed(whole.feed)
        h = model.generator(fed, whole, state.prepared, Packed(whole.sees.own, branches=2))
    assert torch.allclose(h, cached, rtol=1e-9, atol=1e-9)


def test_later_latents_never_change_earlier_steps(case: Case):
    tokenizer, model = case.build()
    latents = true_latents(tokenizer, model, BATCH)
    before = list(forced(model, start(tokenizer, model, case.conditions(BATCH)), latents))
    for k, (step, _) in enumerate(before):
        changed = changed_at(latents, step.target)
        after = force(model, start(tokenizer, model, case.conditions(BATCH)), changed)
        for j in range(k + 1):
            assert torch.equal(before[j][1], after[j])
        if k + 1 < len(after):
            assert not torch.equal(before[k + 1][1], after[k + 1]), "the next step should notice"


def test_a_batch_equals_its_samples_alone(case: Case):
    tokenizer, model = case.build()
    latents = true_latents(tokenizer, model, BATCH)
    together = force(model, start(tokenizer, model, case.conditions(BATCH)), latents)
    for b in range(BATCH):
        one = {k: v[b : b + 1] for k, v in latents.items()}
        alone = force(model, start(tokenizer, model, case.conditions(BATCH)).select([b]), one)
        for whole, part in zip(together, alone, strict=True):
            assert (whole[b::BATCH] - part).abs().max() <= 1e-4 * whole.std()


def test_sampled_latents_do_not_depend_on_the_batch(case: Case):
    tokenizer, model = case.build()
    together = drawn(run(model, start(tokenizer, model, case.conditions(BATCH))))
    for order in ([2], [1, 0], [2, 2, 0]):
        chosen = drawn(run(model, start(tokenizer, model, case.conditions(BATCH)).select(order)))
        assert same(chosen, together[order])


def test_pictures_are_identical_twice_and_differ_by_seed(case: Case):
    tokenizer, model = case.build()
    with torch.no_grad():
        pictures = [
            run(model, start(tokenizer, model, case.conditions(BATCH), seed=s)).canvas.preview()
            for s in (5, 5, 6)
        ]
    assert torch.equal(pictures[0], pictures[1]) and not torch.equal(pictures[0], pictures[2])


def test_rollback_fork_and_merge_at_different_steps(case: Case):
    tokenizer, model = case.build()
    straight = drawn(run(model, start(tokenizer, model, case.conditions(BATCH))))
    last = model.plan.evaluations
    early, late = (
        start(tokenizer, model, case.conditions(BATCH)),
        start(tokenizer, model, case.conditions(BATCH)),
    )
    advance(model, early)
    run(model, late)
    late.rollback(torch.tensor([1, last - 1, last]))
    merged = run(model, State.concat([early.select([1, 0]), late]))
    assert same(drawn(merged), straight[[1, 0, 0, 1, 2]])


@pytest.mark.parametrize("name", ["var-text", "llamagen-text"])
def test_prompts_of_different_lengths_are_merged(name: str):
    case = CASES[name]
    tokenizer, model = case.build()
    text = case.generator.condition
    prompts = ["a", "a red ring a red ring"]
    alone = [start(tokenizer, model, {"text": text.encode([p])[None]}) for p in prompts]
    straight = [run(model, s.select([0])).canvas.latents()["ids"] for s in alone]
    advance(model, alone[1])
    merged = run(model, State.concat(alone))
    assert torch.equal(merged.canvas.latents()["ids"], torch.cat(straight))


def test_ragged_samples_in_float64():
    tokenizer, model = CASES["var-class"].build(torch.float64)
    condition = CASES["var-class"].conditions(2)
    straight = run(model, start(tokenizer, model, condition)).canvas
    early, late = (
        start(tokenizer, model, condition).select([0]),
        start(tokenizer, model, condition).select([1]),
    )
    advance(model, early)
    merged = run(model, State.concat([early, late])).canvas
    assert merged.f_hat.dtype == torch.float64
    assert (merged.f_hat - straight.f_hat).abs().max() < 1e-9 * straight.f_hat.std()


def test_filling_a_canvas_copies_and_decoding_leaves_the_latents_alone(case: Case):
    tokenizer, model = case.build()
    latents = true_latents(tokenizer, model, BATCH)
    before = {name: value.clone() for name, value in latents.items()}
    state = start(tokenizer, model, case.conditions(BATCH))
    state.canvas.fill(latents)
    advance(model, state)
    assert all(torch.equal(latents[name], before[name]) for name in before)


def test_a_pyramid_takes_several_levels_at_once_and_levels_drawn_anew():
    tokenizer, model = CASES["var-class"].build()
    latents = true_latents(tokenizer, model, 2)
    expected = filled(tokenizer, latents)
    canvas, steps = tokenizer.canvas(2), model.plan.steps
    whole = pack(steps)
    canvas.reveal(whole, {"ids": latents["ids"]}, torch.zeros(2, dtype=torch.int64))
    assert torch.allclose(canvas.f_hat, expected.f_hat, atol=1e-6) and bool(canvas.known.all())
    other = {"ids": torch.zeros_like(latents["ids"][:, steps[1].target])}
    canvas.reveal(steps[1], other, torch.ones(2, dtype=torch.int64))
    changed = {"ids": latents["ids"].clone()}
    changed["ids"][:, steps[1].target] = 0
    assert torch.allclose(canvas.f_hat, filled(tokenizer, changed).f_hat, atol=1e-5)


def test_ports_reach_the_condition_of_each_sample(case: Case):
    tokenizer, model = case.build()
    state = start(tokenizer, model, case.conditions(BATCH))
    shapes = []

    def port(h, step, prepared):
        shapes.append((h.shape[0], next(iter(prepared.values())).shape[:2]))
        return h

    state.options = replace(state.options, ports=dict.fromkeys(case.sites, port))
    advance(model, state)
    assert shapes == [(2 * BATCH, (2, BATCH))] * 2


def test_shared_slots_may_show_each_sample_its_own(static: Case):
    """Positions are shared while what is shown differs by sample (masked orders), with a null branch beside."""
    tokenizer, model = static.build()
    step = model.plan.steps[1]
    shows = step.feed.shows.expand(BATCH, -1).clone()
    shows[0] = -1
    mixed = replace(step, feed=replace(step.feed, shows=shows))
    state = start(tokenizer, model, static.conditions(BATCH))
    state.canvas.fill(true_latents(tokenizer, model, BATCH))
    with torch.no_grad():
        window = Packed(step.sees.own_mask(len(step.feed)), branches=2)
        h = model.generator(state.canvas.feed(mixed.feed), mixed, state.prepared, window)
        plain = model.generator(state.canvas.feed(step.feed), step, state.prepared, window)
    assert torch.allclose(h[[1, 2, 4, 5]], plain[[1, 2, 4, 5]], atol=1e-5)
    assert not torch.allclose(h[[0, 3]], plain[[0, 3]], atol=1e-3)


def test_a_saved_state_goes_on(case: Case):
    tokenizer, model = case.build()
    straight = drawn(run(model, start(tokenizer, model, case.conditions(BATCH)))).clone()
    state = start(tokenizer, model, case.conditions(BATCH))
    advance(model, state)
    advance(model, state)
    saved = {k: v.clone() for k, v in state.tensors().items()}
    fresh = start(tokenizer, model, case.conditions(BATCH), seed=99).with_tensors(saved)
    assert torch.equal(drawn(run(model, fresh)), straight)


def test_guidance_off_equals_equal_branches(case: Case):
    tokenizer, model = case.build(torch.float64)
    single = run(model, start(tokenizer, model, case.conditions(BATCH), guidance=1.0))
    doubled = start(tokenizer, model, case.conditions(BATCH), guidance=3.0)
    conditional = {k: v[:1].expand(2, *v.shape[1:]).clone() for k, v in doubled.prepared.items()}
    doubled.prepared = conditional
    assert same(drawn(run(model, doubled)), drawn(single))


def test_evaluations_and_tokens_are_counted(case: Case):
    tokenizer, model = case.build()
    state = run(model, start(tokenizer, model, case.conditions(BATCH)))
    assert state.evaluations.tolist() == [model.plan.evaluations] * BATCH
    assert state.tokens.tolist() == [state.canvas.known.shape[1]] * BATCH


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load_give_the_same_picture(case: Case, dtype: torch.dtype, tmp_path):
    pipeline = case.pipeline(Settings(guidance=2.0, top_k=9), dtype)
    pipeline.save(tmp_path / "model")
    loaded = Pipeline.from_folder(tmp_path / "model")
    assert next(loaded.generator.parameters()).dtype == dtype and loaded.settings == pipeline.settings
    prompts: list = ["red ring", "a"] if "text" in case.conditions(1) else [3, 1]
    for a, b in zip(pipeline.generate(prompts, seed=3), loaded.generate(prompts, seed=3), strict=True):
        assert a.tobytes() == b.tobytes()


def test_weights_stored_smaller_compute_in_float32(tmp_path):
    CASES["var-text"].pipeline(Settings()).save(tmp_path / "small", dtype=torch.float16)
    loaded = Pipeline.from_folder(tmp_path / "small")
    assert {p.dtype for p in loaded.generator.parameters()} == {torch.float32}
    loaded.save(tmp_path / "again", dtype=torch.float16)
    for name in ("tokenizer", "generator", "head"):
        file = f"{name}.safetensors"
        assert (tmp_path / "small" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


def test_gradients_reach_every_parameter(case: Case):
    tokenizer, model = case.build()
    condition = {k: v[0] for k, v in case.conditions(6).items()}
    torch.manual_seed(0)
    taught = {"main": case.teach} | {route: teach for route, (_, teach) in case.branches.items()}
    for route, teach in taught.items():
        objective = NextStepLoss(model.generator, model.heads[route], condition_drop=0.5).train()
        lesson = teach(tokenizer, model.plan).lesson(true_latents(tokenizer, model, 6))
        objective(lesson, condition).backward()
    modules = nn.ModuleDict({"generator": model.generator, **model.heads})
    without = [n for n, p in modules.named_parameters() if p.grad is None or not bool(p.grad.abs().sum() > 0)]
    assert without == []


def test_guidance_is_not_applied_at_the_first_scale():
    branches = torch.randn(2, 3, 4)
    assert torch.equal(Guidance(7.0, ramp=True)(branches, torch.zeros(3, 1)), branches[0])


def test_muon_reaches_the_matrices_of_all_blocks_and_tables_of_none(case: Case):
    """Whatever the stack is called; what stands outside, such as embeddings and outputs, is AdamW's."""
    _, model = case.build()
    generator = model.generator
    stacked = {
        f"{stack}.{n}" for stack in generator.stacks for n, _ in getattr(generator, stack).named_parameters()
    }
    for name, parameter in generator.named_parameters():
        if name in stacked and name.endswith("weight") and parameter.ndim == 2:
            assert in_block(name, parameter), name
        elif not any(map(str.isdigit, name.split("."))):
            assert not in_block(name, parameter), name
