"""Infinity: schedules for every ratio, positions, prompts, guidance: the sheet's checks 3 and 4."""

import math
from dataclasses import replace

import pytest
import torch

from tests.contracts import CASES, start, true_latents
from varkit.decode.guidance import Conditional, Guidance, GuidedLayer
from varkit.decode.loop import run
from varkit.errors import UserError
from varkit.generators.conditioning import drop_condition
from varkit.generators.infinity import SIZES, Infinity, InfinityConfig
from varkit.generators.text import TextConfig, TextFeaturesConfig
from varkit.heads.bits import BitsConfig, BitsHead
from varkit.hub.pipeline import Pipeline, Settings
from varkit.hub.states import build_empty
from varkit.nn.attention import Packed
from varkit.plans.ratios import BUDGETS, SCHEDULES, nearest_ratio, scales, sized
from varkit.plans.scales import ScalePlan, framed
from varkit.plans.schedule import Schedule
from varkit.tokenizers.bitwise import BitwiseConfig
from varkit.tokenizers.conv import ConvConfig
from varkit.train.lessons import WholePlan
from varkit.train.objective import NextStepLoss

# Schedules and positions


def test_the_table_of_schedules():
    sums = [Schedule.parse(scales(1.0, budget).schedule).total for budget in BUDGETS]
    assert sums == [521, 2521, 6425, 10521]
    assert len(SCHEDULES) == 15
    assert sorted(r for r in SCHEDULES if r < 1) == [0.333, 0.4, 0.5, 0.571, 0.666, 0.75, 0.8]
    for ratio, sides in SCHEDULES.items():
        assert len(sides) == 13 and abs(sides[-1][0] / sides[-1][1] - ratio) < 0.03
        for budget, side in (("0.06M", 16), ("0.25M", 32), ("0.60M", 48), ("1M", 64)):
            h, w = Schedule.parse(scales(ratio, budget).schedule).last
            assert abs(h * w / side**2 - 1) < 0.26, (ratio, budget)
    assert SCHEDULES[0.571] == tuple((w, h) for h, w in SCHEDULES[1.75])


def test_the_nearest_ratio_and_sizes():
    assert [nearest_ratio(r) for r in (1.0, 1.1, 1.13, 0.56, 9.0, 0.1)] == [1.0, 1.0, 1.25, 0.571, 3.0, 0.333]
    plan = sized(320, 256)
    assert plan.schedule[-1] == (20, 16) and plan.frame == (70, 56)
    assert sized(1024, 1024).schedule == SCHEDULES[1.0]
    with pytest.raises(UserError, match="size 500x510 is none of this model's; the nearest is 512x512"):
        sized(500, 510)
    with pytest.raises(UserError, match="'2M'"):
        scales(1.0, "2M")


def test_positions_lie_on_the_finest_grid_of_the_largest_schedule():
    plan = scales(1.0, "0.06M").build()
    rows = plan.steps[6].feed.coords.view(16, 16, 2)
    assert rows[:, 3, 0].tolist() == list(range(0, 64, 4)) and rows[5, :, 1].tolist() == list(range(0, 64, 4))
    assert plan.steps[3].feed.coords[:6, 1].tolist() == [0, 11, 21, 32, 43, 53]
    # halves go to the even row: 64 / 128
    assert framed(Schedule.of((1, 128)), (1, 64))[:4, 1].tolist() == [0, 0, 1, 2]
    own = ScalePlan(Schedule.of(1, 2)).training_step().feed.coords
    assert own.tolist() == [[0, 0], [0, 0], [0, 1], [1, 0], [1, 1]]


def test_one_model_draws_every_shape_asked_for():
    conv = ConvConfig(4, (1, 1, 1, 1, 1), res_blocks=1, latent_channels=4, attention=False)
    tokenizer = BitwiseConfig(conv, scales(1.0, "0.06M").schedule)
    text = TextConfig(("a",), length=4, width=8, depth=1, heads=2)
    generator = InfinityConfig(1, 16, 2, 4, text)
    configs = {
        "tokenizer": tokenizer, "generator": generator, "head": BitsConfig(16, 4), "plan": scales(1.0, "0.06M"),
    }  # fmt: skip
    pipeline = Pipeline({name: c.build() for name, c in configs.items()}, configs, Settings())
    assert pipeline.size == (256, 256) and pipeline.sized((256, 256)) is pipeline
    tall = pipeline.sized((320, 256))
    assert tall.size == (320, 256) and tall.generator is pipeline.generator
    assert tall.generate("a")[0].size == (256, 320)
    with pytest.raises(UserError, match="nearest is 320x256"):
        pipeline.sized((330, 256))


@pytest.mark.parametrize("name", sorted(SIZES))
def test_released_sizes(name: str):
    millions = {
        "layer12": 125, "layer16": 362, "layer24": 941, "2b": 2205, "layer32": 2257, "layer40": 4716, "layer48": 8767,
        "8b": 8376, "20b": 19952,
    }  # fmt: skip
    config = InfinityConfig.published(name)
    count = sum(
        p.numel()
        for part in (config, BitsConfig(config.width, config.code_width))
        for p in build_empty(part.build).parameters()
    )
    assert abs(count / 1e6 / millions[name] - 1) < 0.005


# Prompts and guidance


def features_model(levels: int = 3) -> tuple[ScalePlan, Infinity, BitsHead]:
    torch.manual_seed(0)
    plan = ScalePlan(Schedule.of(1, 2, 4), frame=(8, 8))
    config = InfinityConfig(3, 24, 2, 8, TextFeaturesConfig(16, 6), gate_init=1.0, modulation_init=0.5)
    generator, head = config.build().eval(), BitsConfig(24, 8, init_scale=1.0).build().eval()
    torch.nn.init.normal_(generator.conditioner.pool.out.weight, std=0.5)
    return plan, generator, head


def prompts(lengths: tuple[int, ...] = (2, 5), padding: float = 9.0) -> dict[str, torch.Tensor]:
    features = torch.randn(1, len(lengths), max(lengths), 16, generator=torch.Generator().manual_seed(2))
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return {"features": torch.where(mask[None, ..., None], features, padding), "mask": mask[None]}


def hidden(plan: ScalePlan, generator: Infinity, condition: dict[str, torch.Tensor]) -> torch.Tensor:
    step = plan.training_step()
    batch = condition["mask"].shape[1]
    vectors = torch.randn(1, len(step.feed), 8, generator=torch.Generator().manual_seed(3)).expand(
        batch, -1, -1
    )
    with torch.no_grad():
        window = Packed(step.sees.own_mask(len(step.feed)))
        return generator({"vectors": vectors}, step, generator.prepare(condition), window)


def test_padded_prompts_are_read_as_they_are_alone():
    plan, generator, _ = features_model()
    together = hidden(plan, generator, prompts())
    for i, n in enumerate((2, 5)):
        alone = {k: v[:, i : i + 1, :n] for k, v in prompts().items()}
        assert torch.allclose(hidden(plan, generator, alone)[0], together[i], atol=1e-5)
    assert torch.allclose(hidden(plan, generator, prompts(padding=-3.0)), together, atol=1e-6)
    assert (together[0] - together[1]).abs().max() > 1e-3


def test_the_null_prompt_is_learned_and_as_long_as_the_prompt():
    _, generator, _ = features_model()
    conditioner = generator.conditioner
    null = conditioner.null(prompts())
    assert torch.equal(null["mask"], prompts()["mask"])
    assert torch.equal(null["features"][0, 1], conditioner.null_features[:5])
    torch.manual_seed(0)
    flat = {k: v[0].repeat(8, *([1] * (v.ndim - 2))) for k, v in prompts().items()}
    dropped = drop_condition(conditioner, flat, rate=0.5)
    generator.prepare({k: v[None] for k, v in dropped.items()})["start"].sum().backward()
    assert conditioner.null_features.grad is not None and bool(conditioner.null_features.grad.abs().sum() > 0)
    with pytest.raises(UserError, match="7 tokens is too long; this model reads up to 6"):
        conditioner.null(prompts((7,)))


def test_words_need_an_encoder():
    plan, generator, head = features_model()
    tokenizer = BitwiseConfig(ConvConfig(8, (1, 2), 1, 8, False), (1, 2, 4)).build()
    parts = {"tokenizer": tokenizer, "generator": generator, "head": head, "plan": plan}
    configs = {"plan": None, "generator": generator.config}
    pipeline = Pipeline(parts, configs, Settings(guidance=3.0, temperature=0.5, top_p=0.97))
    with pytest.raises(UserError, match="takes features of 16 channels from a text encoder"):
        pipeline.generate("a cat")
    state = run(pipeline.model, pipeline.start_from(prompts(), 0, [0, 1], pipeline.settings))
    assert state.canvas.preview().shape == (2, 3, 8, 8) and bool(state.canvas.known.all())


def test_guidance_after_an_inner_block_is_the_published_mix():
    plan, generator, _ = features_model()
    null = generator.conditioner.null(prompts())
    both = {k: torch.cat([v, null[k]]) for k, v in prompts().items()}
    step, seen = plan.steps[0], {}
    fed = {"vectors": torch.zeros(2, 1, 8)}

    def watch(h, step, prepared):
        seen["before"] = h
        return GuidedLayer(Guidance(3.0))(h, step, prepared)

    def after(h, step, prepared):
        seen["last"] = h
        return h

    with torch.no_grad():
        prepared = generator.prepare(both)
        h = generator(fed, step, prepared, Packed(None), {("block", 1): watch, ("block", 2): after})
        mixed = 3 * seen["before"][:2] - 2 * seen["before"][2:]
        flat = {k: v.flatten(0, 1) for k, v in prepared.items()}
        memory = (flat["memory_k"][:, 2], flat["memory_v"][:, 2], flat["memory_mask"])
        rotate = generator.rotation(step, 2, h.device)
        expected = generator.blocks[2](
            torch.cat([mixed, mixed]), flat["modulation"][:, 2], Packed(None), 2, memory, rotate
        )
    assert torch.allclose(seen["last"], expected, atol=1e-5)
    assert torch.equal(Conditional()(h.unflatten(0, (2, 2)), torch.zeros(2, 1)), h[:2])
    with pytest.raises(UserError, match="one number"):
        GuidedLayer(Guidance(3.0, ramp=True))


def test_settings_place_the_guidance():
    case = CASES["infinity-text"]
    pipeline = case.pipeline(Settings(guidance=3.0))
    on_head, inner = (pipeline.generate(["a ring"], guidance_layer=n)[0].tobytes() for n in (0, -1))
    assert on_head != inner
    with pytest.raises(UserError, match="guidance_layer -3 is no block of this model; use -2 to -1"):
        pipeline.generate(["a ring"], guidance_layer=-3)


def test_held_out_losses_are_in_nats_a_bit():
    case = CASES["infinity-text"]
    tokenizer, model = case.build()
    torch.nn.init.zeros_(model.heads["main"].out.weight)
    torch.nn.init.zeros_(model.heads["main"].out.bias)
    lesson = WholePlan(tokenizer, model.plan).lesson(true_latents(tokenizer, model, 3))
    condition = {k: v[0] for k, v in case.conditions(3).items()}
    loss = NextStepLoss(model.generator, model.heads["main"], condition_drop=0.0)(lesson, condition)
    assert abs(loss.item() - math.log(2)) < 1e-5


def test_the_first_scales_may_be_forced():
    """The published gt_leak: an override, as editing has it."""
    case = CASES["infinity-text"]
    tokenizer, model = case.build()
    given = true_latents(tokenizer, model, 3)["bits"]
    state = start(tokenizer, model, case.conditions(3))

    def force(step, values, state):
        return {"bits": given[:, step.target]} if int(step.feed.level.max()) < 2 else values

    state.options = replace(state.options, override=force)
    drawn = run(model, state).canvas.latents()["bits"].long()
    assert torch.equal(drawn[:, :5], given[:, :5]) and not torch.equal(drawn[:, 5:], given[:, 5:])
