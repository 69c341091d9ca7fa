"""M-VAR (arXiv 2411.10433): attention within scales, a Mamba-2 scan across them, and what the scan carries."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.contracts import CASES, drawn, same, start, true_latents
from tests.test_contracts import filled, force
from varkit.decode.cache.full import FullCache
from varkit.decode.loop import Model, advance, run, take
from varkit.decode.state import State
from varkit.errors import UserError
from varkit.generators.m_var import MVarConfig
from varkit.nn.attention import Packed
from varkit.nn.mamba import Mamba2, Mamba2Config, causal_convolution
from varkit.nn.state_space import recurrence
from varkit.plans.join import pack
from varkit.plans.scales import ScalesConfig
from varkit.plans.schedule import Schedule

CASE = CASES["m-var-class"]
PUBLISHED = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)


def mixer(seed: int = 0) -> Mamba2:
    torch.manual_seed(seed)
    return Mamba2(16, Mamba2Config(state=8, head_width=8))


def training_pass(model: Model, canvas, state: State) -> Tensor:
    """Hidden states of all scales at once."""
    whole = model.plan.training_step()
    with torch.no_grad():
        return model.generator(canvas.feed(whole.feed), whole, state.prepared, Packed.of(whole, branches=2))


def test_the_mixer_is_the_published_equation() -> None:
    layer, x = mixer(), torch.randn(2, 11, 16)
    z, u, dt = layer.into(x).split([32, 48, 4], dim=-1)
    u = F.silu(F.conv1d(F.pad(u.mT, (3, 0)), layer.conv.weight, layer.conv.bias, groups=48)).mT
    v, b, c = u.split([32, 8, 8], dim=-1)
    v, dt = v.unflatten(-1, (4, 8)), F.softplus(dt + layer.dt_bias)
    y, state = recurrence(v, dt, -layer.log_a.exp(), b, c, torch.zeros(2, 4, 8, 8))
    y = (y + layer.skip[:, None] * v).flatten(2) * F.silu(z)
    y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.norm.gain
    out, carried = layer(x)
    assert torch.allclose(out, layer.out(y), atol=1e-5)
    assert torch.allclose(carried["state"], state, atol=1e-5)


def test_the_convolution_is_torchs() -> None:
    u, weight, bias = torch.randn(3, 12, 5), torch.randn(5, 4), torch.randn(5)
    twin = F.conv1d(u.mT, weight[:, None], bias, groups=5).mT
    assert torch.allclose(causal_convolution(u, weight, bias), twin, atol=1e-6)


def test_a_mixer_in_pieces_with_padding_is_the_mixer() -> None:
    layer, x = mixer().double(), torch.randn(2, 9, 16, dtype=torch.float64)
    whole, end = layer(x)
    padded = torch.cat([x[:, :5], torch.randn(2, 3, 16, dtype=torch.float64)], dim=1)
    padded[1, 2:] = 7.0
    lengths = torch.tensor([5, 2])
    first, carried = layer(padded, None, lengths)
    assert torch.allclose(first[0, :5], whole[0, :5]) and torch.allclose(first[1, :2], whole[1, :2])
    rest = torch.zeros(2, 7, 16, dtype=torch.float64)
    rest[0, :4], rest[1] = x[0, 5:], x[1, 2:]
    second, last = layer(rest, carried, torch.tensor([4, 7]))
    assert torch.allclose(second[0, :4], whole[0, 5:]) and torch.allclose(second[1], whole[1, 2:])
    assert all(torch.allclose(last[name], end[name]) for name in end)
    _, unmoved = layer(rest, last, torch.zeros(2, dtype=torch.int64))
    assert all(torch.equal(last[name], unmoved[name]) for name in last)


def test_the_state_stays_in_float32_under_smaller_weights() -> None:
    layer = mixer()
    exact = layer(torch.ones(1, 6, 16))[0]
    out, carried = layer.bfloat16()(torch.ones(1, 6, 16, dtype=torch.bfloat16))
    assert out.dtype == carried["tail"].dtype == torch.bfloat16 and carried["state"].dtype == torch.float32
    assert (out.float() - exact).abs().max() < 0.05 * exact.abs().max()


def test_attention_stays_within_a_scale_and_only_the_scan_goes_beyond() -> None:
    """Check 3: what a scale is fed reaches later scales by the scan alone, and never earlier ones."""
    tokenizer, model = CASE.build()
    latents = true_latents(tokenizer, model, 2)
    state, canvas = start(tokenizer, model, CASE.conditions(2)), filled(tokenizer, latents)
    spans = [(int(s.feed.ids[0]), int(s.feed.ids[-1]) + 1) for s in model.plan.steps]

    def changes(j: int) -> list[bool]:
        """Which scales' hidden states differ when the input of scale j does."""
        before = training_pass(model, canvas, state)
        a, b = spans[j]
        kept = canvas._tensors["inputs"][:, a:b].clone()
        canvas._tensors["inputs"][:, a:b] += 1.0
        after = training_pass(model, canvas, state)
        canvas._tensors["inputs"][:, a:b] = kept
        return [not torch.equal(before[:, a:b], after[:, a:b]) for a, b in spans]

    assert changes(1) == [False, True, True, True] and changes(2) == [False, False, True, True]
    width = model.generator.width
    for vectors in (state.prepared["modulation"],):
        assert vectors.shape[-2:] == (9, width)
        vectors[..., 1, :] = 0.0  # the scan's gate
    assert changes(1) == [False, True, False, False] and changes(2) == [False, False, True, False]


def test_pairs_within_scales_are_38_6_percent() -> None:
    lengths = Schedule.parse(PUBLISHED).lengths
    within = sum(n * n for n in lengths)
    plans = [ScalesConfig(PUBLISHED, history=h).build().training_step() for h in (0, None)]
    counted = [int(p.sees.own_mask(len(p.feed)).sum()) for p in plans]
    assert counted == [within, 286_434] and within == 110_468
    assert round(within / counted[1], 3) == 0.386 and round(within / 680**2, 3) == 0.239


def test_the_cache_does_not_grow() -> None:
    """Check 4: what is held after the third scale is all that is ever held, and it is no key or value."""
    config = replace(CASE.generator, schedule=PUBLISHED)
    model = Model(ScalesConfig(PUBLISHED, history=0).build(), config.build(), {})
    state = start(CASE.tokenizer.build(), model, CASE.conditions(2))
    sizes = []
    for k, step in enumerate(model.plan.steps):
        window = state.cache.open(step, torch.full((2,), k))
        with torch.no_grad():
            model.generator({"vectors": torch.randn(2, len(step.feed), 6)}, step, state.prepared, window)
        state.cache.close()
        sizes.append(state.cache.nbytes)
    assert len(set(sizes[1:])) == 1 and not state.cache.layers
    inner, rows = 48, 4
    one = config.depth * rows * (inner * config.scan.state + 3 * (inner + 2 * config.scan.state)) * 4
    assert sizes[1:] == [2 * one] * 9  # now, and before the last step


def started(batch: int = 3) -> tuple[Model, State]:
    tokenizer, model = CASE.build()
    return model, start(tokenizer, model, CASE.conditions(batch))


def test_one_step_back_is_exact_and_further_back_is_fed_again() -> None:
    model, straight = started()
    straight = drawn(run(model, straight))
    _, state = started()
    run(model, state)
    state.rollback(torch.tensor([3, 4, 1]))
    assert state.cache.behind(state.cursor).tolist() == [3, 4, 0]
    run(model, state)
    assert same(drawn(state), straight)
    assert state.evaluations.tolist() == [4 + 1, 4, 4 + 1 + 3], "what is fed again is counted"


def test_a_window_of_steps_can_be_kept_in_part() -> None:
    """Speculation: a rollback into the last window finds the states at the ends of its steps."""
    model, whole = started()
    run(model, whole)
    _, state = started()
    advance(model, state)
    state.canvas.fill(whole.canvas.latents())  # the drafts, here all right
    take(model, state, pack(model.plan.steps[1:4]))
    assert same(drawn(state), drawn(whole)), "a window draws what its steps would"
    state.rollback(torch.tensor([2, 3, 1]))
    assert state.cache.behind(state.cursor) is None
    twin = [started()[1] for _ in range(3)]
    for b, steps in enumerate((2, 3, 1)):
        for _ in range(steps):
            advance(model, twin[b])
        for n, carry in twin[b].cache.carried.now.layers.items():
            for name, tensor in carry.items():
                ours = state.cache.carried.now.layers[n][name]
                assert torch.allclose(ours[[b, 3 + b]], tensor[[b, 3 + b]], atol=1e-5)
    assert same(drawn(run(model, state)), drawn(whole))


def test_windows_of_samples_at_different_steps() -> None:
    """Collated packs: a row's slots of a turn stand at other places than its neighbour's."""
    from varkit.plans.join import collate

    model, whole = started(2)
    run(model, whole)
    _, state = started(2)
    late = state.select([1])
    advance(model, late)
    state = State.concat([state.select([0]), late])
    state.canvas.fill(whole.canvas.latents())
    step = collate([pack(model.plan.steps[0:2]), pack(model.plan.steps[1:3])])
    take(model, state, step)
    assert state.cache.carried.now.at.tolist() == [2, 3]
    for b, steps in enumerate((2, 3)):
        twin = started(2)[1]
        for _ in range(steps):
            advance(model, twin)
        for n, carry in twin.cache.carried.now.layers.items():
            for name, tensor in carry.items():
                ours = state.cache.carried.now.layers[n][name]
                assert torch.allclose(ours[[b, 2 + b]], tensor[[b, 2 + b]], atol=1e-5)


def test_states_of_different_ages_are_merged_and_saved() -> None:
    model, straight = started()
    straight = drawn(run(model, straight))
    _, old = started()
    advance(model, old)
    advance(model, old)
    merged = State.concat([started()[1].select([2]), old.select([0])])
    assert merged.cache.carried.now.at.tolist() == [0, 2]
    saved = {name: tensor.clone() for name, tensor in merged.tensors().items()}
    assert same(drawn(run(model, merged)), straight[[2, 0]])
    again = started(2)[1].with_tensors(saved)
    again.rollback(torch.tensor([0, 1]))
    assert again.cache.behind(again.cursor) is None, "the step before is saved too"
    assert same(drawn(run(model, again)), straight[[2, 0]])


def test_a_pass_that_neither_writes_nor_carries_leaves_no_trace() -> None:
    model, state = started()
    advance(model, state)
    before = {k: v.clone() for k, v in state.cache.tensors().items() if not k.endswith(".at")}
    look = replace(model.plan.steps[1], carries=False)
    window = state.cache.open(look, state.cursor)
    with torch.no_grad():
        model.generator(state.canvas.feed(look.feed), look, state.prepared, window)
    state.cache.close()
    after = state.cache.tensors()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert state.cache.behind(state.cursor + 1) is None


def test_prefix_recomputed_equals_carried_in_float32() -> None:
    """Check 1, against the published way: the scan over the whole prefix at every step."""
    tokenizer, model = CASE.build()
    latents = true_latents(tokenizer, model, 2)
    state = start(tokenizer, model, CASE.conditions(2))
    assert isinstance(state.cache, FullCache)
    carried = torch.cat(force(model, state, latents), dim=1)
    whole = training_pass(model, filled(tokenizer, latents), state)
    assert (carried - whole).abs().max() <= 1e-4 * whole.std()


def test_the_published_start_is_vars_rule_for_six_vectors() -> None:
    for published, third in ((True, 0.5), (False, 1e-3)):
        config = MVarConfig(2, 64, 4, (1, 2), 8, CASE.generator.condition, published_start=published)
        torch.manual_seed(0)
        weight = config.build().blocks[1].modulation.weight.unflatten(0, (9, 64))
        std = (1 / (3 * 64)) ** 0.5
        found = (weight.std(dim=(1, 2)) / std).tolist()
        assert found == pytest.approx([1e-3, 1e-3, third, *[0.5] * 6], rel=0.05)


def test_sizes_that_do_not_go_together_are_told() -> None:
    with pytest.raises(UserError, match="width 24 expanded 2 times does not divide into heads of 64"):
        MVarConfig(2, 24, 2, (1, 2), 6, CASE.generator.condition)
    with pytest.raises(UserError, match="shared_modulation"):
        MVarConfig(2, 64, 2, (1, 2), 6, CASE.generator.condition, shared_modulation=True)
    with pytest.raises(UserError, match="kernel 1"):
        Mamba2Config(kernel=1)
