"""A schedule as a choice at run time: steps, sizes and shapes from one model, in Python and on the command line."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import varkit
from varkit.cli.main import main
from varkit.decode.loop import run, take
from varkit.edit.inpaint import box_mask, inpaint
from varkit.edit.refine import expand, refine, start_refine, surrounded
from varkit.errors import UserError
from varkit.generators.conditioning import ClassConfig
from varkit.generators.flexvar import FlexVARConfig
from varkit.heads.categorical import CategoricalConfig
from varkit.hub.pipeline import Pipeline, Settings
from varkit.pictures import to_tensor
from varkit.plans.flexible import PUBLISHED, PUBLISHED_512, FlexibleScalesConfig
from varkit.plans.schedule import Schedule
from varkit.tokenizers.conv import ConvConfig
from varkit.tokenizers.map_vq import MapVQConfig

SCHEDULE = (1, 2, 3, 4, 6, 8)


def pipeline_of(schedule: tuple[int, ...], seen: tuple[int, ...] = ()) -> Pipeline:
    """Random weights; a token is 2 x 2 pixels."""
    conv = ConvConfig(8, (1, 2), res_blocks=1, latent_channels=8, attention=False, groups=4)
    configs = {
        "tokenizer": MapVQConfig(conv, 24, 6, schedule),
        "generator": FlexVARConfig(2, 24, 2, 6, ClassConfig(3, ("cat", "dog", "owl")), table=8, adaln_init=1.0),
        "head": CategoricalConfig(24, 24, init_scale=5.0),
        "plan": FlexibleScalesConfig(schedule, seen=seen),
    }  # fmt: skip
    torch.manual_seed(0)
    parts = {name: config.build() for name, config in configs.items()}
    torch.nn.init.normal_(parts["tokenizer"].quantizer.embedding.weight)
    return Pipeline(parts, configs, Settings(guidance=2.0, ramp=True, temperature=0.8))


@pytest.fixture(scope="module")
def model() -> Pipeline:
    """Pictures of 16 x 16 pixels."""
    return pipeline_of(SCHEDULE)


@pytest.fixture(scope="module")
def folder(model: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("flexvar") / "model"
    model.save(place)
    return place


def evaluations(pipeline: Pipeline) -> int:
    return int(run(pipeline.model, pipeline.start([1])).evaluations)


def test_any_number_of_steps_from_one_model(model: Pipeline):
    for steps in (4, 5, 6, 8):
        other = model.scheduled(steps)
        assert evaluations(other) == steps and other.size == (16, 16)
        assert other.parts["generator"] is model.parts["generator"]
    again = model.scheduled(4).scheduled(SCHEDULE)
    assert again.generate(1)[0].tobytes() == model.generate(1)[0].tobytes()


def test_sizes_and_shapes_never_trained_on(model: Pipeline):
    for size in ((24, 24), (16, 8), (10, 24)):
        picture = model.sized(size).generate(1, seed=1)[0]
        assert (picture.height, picture.width) == size
    with pytest.raises(
        UserError, match="size 17x16 is no multiple of the 2 pixels of a token; the nearest is 16x16"
    ):
        model.sized((17, 16))


def test_one_model_of_a_grid_of_16_draws_in_the_published_numbers_of_steps():
    """6, 8, 10 and 13 steps, and 15 for twice the size, over the same weights."""
    large = pipeline_of(PUBLISHED[10], seen=PUBLISHED[10])
    pictures = {}
    for steps in (6, 8, 10, 13):
        other = large.scheduled(steps)
        assert other.parts["generator"] is large.parts["generator"]
        assert [h for h, _ in other.schedule.sides] == list(PUBLISHED[steps])
        state = run(other.model, other.start([1]))
        assert int(state.evaluations) == steps
        (picture,) = other.pictures(state)
        assert picture.size == (32, 32)
        pictures[steps] = picture.tobytes()
    assert len(set(pictures.values())) == 4
    assert pictures[10] == large.generate(1)[0].tobytes()
    twice = large.sized((64, 64))
    assert [h for h, _ in twice.schedule.sides] == list(PUBLISHED_512)
    assert evaluations(twice) == 15 and twice.size == (64, 64)


def test_guidance_and_temperature_follow_the_schedule(model: Pipeline):
    other = model.scheduled((1, 2, 8, 12))
    assert other.settings == model.settings
    settings = other.sampling()
    assert settings.temperature == (0.8, 0.8, 0.8, 0.0)
    assert settings.ramp == (0.0, 1 / 3, 2 / 3, 1.0)
    assert model.scheduled((1, 2, 8, 12), greedy_unseen=False).sampling().temperature == 0.8
    assert model.sized((24, 24)).scheduled(4).sized((16, 16)).sampling().temperature == 0.8
    long = model.sized((64, 64)).scheduled(range(1, 13))
    assert max(long.sampling().ramp) == 1.0  # beyond the trained side guidance has risen
    small = model.scheduled(8).sampling()
    assert small.ramp == tuple(k / 7 for k in range(8))
    digits = varkit.load("digits")
    assert digits.sampling() == digits.settings


def test_sizes_take_what_schedules_take_and_it_stays(model: Pipeline):
    free = model.sized((24, 24), greedy_unseen=False)
    assert free.sampling().temperature == 0.8 and 0.0 in model.sized((24, 24)).sampling().temperature
    assert free.scheduled(5).sampling().temperature == 0.8
    assert 0.0 in free.scheduled(5, greedy_unseen=True).sampling().temperature
    large = pipeline_of(PUBLISHED[10])
    assert max(large.scheduled(13).sampling().ramp) == 12 / 9
    assert max(large.sized((32, 32), clamp=True).scheduled(13).sampling().ramp) == 1.0
    assert model.sized(model.size) is model and model.sized(None) is model
    with pytest.raises(UserError, match="one order that it was trained with"):
        varkit.load("digits").sized(None, clamp=True)


def test_what_replaces_settings_follows_the_schedule_too(model: Pipeline, tmp_path: Path):
    """A user's temperature or ramp is that of the scales that are drawn at random, whoever passes it on."""
    other = model.scheduled((1, 2, 8, 12))
    told: list[dict] = [
        {"temperature": (0.5, 0.5, 0.5, 0.0), "ramp": (0.0, 1 / 3, 2 / 3, 1.0)},
        {"temperature": 0.5, "ramp": True},
    ]
    listed, plain = (other.generate(1, seed=1, **settings)[0].tobytes() for settings in told)
    assert listed == plain
    assert (
        plain
        != other.scheduled((1, 2, 8, 12), greedy_unseen=False)
        .generate(1, seed=1, temperature=0.5)[0]
        .tobytes()
    )
    *_, streamed = other.stream([1], seed=1, **told[1])
    assert streamed[0].tobytes() == plain
    state = start_refine(other, picture((5, 5)), 1, **told[1])
    assert (
        state.options.temperature == told[0]["temperature"] and state.options.combine.ramp == told[0]["ramp"]
    )
    other.save(tmp_path / "model")
    again = varkit.load(tmp_path / "model")
    assert again.settings == model.settings and again.sampling() == other.sampling()
    assert again.generate(1, seed=1, temperature=0.5)[0].tobytes() == plain
    out = tmp_path / "one.png"
    words = [
        "--schedule",
        "1,2,8,12",
        "--temperature",
        "0.5",
        "--ramp",
        "on",
        "--seed",
        "1",
        "--out",
        str(out),
    ]
    model.save(tmp_path / "own")
    assert main(["generate", "--model", str(tmp_path / "own"), "--label", "1", *words]) == 0
    assert Image.open(out).tobytes() == plain


def test_unseen_scales_are_drawn_greedily(model: Pipeline):
    greedy = model.scheduled((1, 2, 8, 12))
    states = [run(greedy.model, greedy.start([1], seed=seed)) for seed in (0, 1)]
    # All that is drawn before the last scale is forced to be alike; the last then has no chance.
    ids = [state.canvas.latents()["ids"] for state in states]
    assert not torch.equal(ids[0][:, :69], ids[1][:, :69])
    forced = []
    for seed in (0, 1):
        state = greedy.start([1], seed=seed)
        for step in greedy.model.plan.steps[:3]:
            take(greedy.model, state, step)
            state.canvas.reveal(step, {"ids": ids[0][:, step.target]}, state.cursor - 1)
        forced.append(run(greedy.model, state).canvas.latents()["ids"][:, 69:])
    assert torch.equal(*forced)


def test_models_of_one_schedule_refuse_another():
    with pytest.raises(UserError, match="one order that it was trained with"):
        varkit.load("digits").scheduled(4)


def test_the_command_line_takes_schedules_steps_and_sizes(folder: Path, tmp_path: Path, capsys):
    def size(*options: str) -> tuple[int, int]:
        out = tmp_path / "picture.png"
        assert main(["generate", "--model", str(folder), "--label", "1", "--out", str(out), *options]) == 0
        return Image.open(out).size

    assert size("--schedule", "1,2,4,6,8") == (16, 16)
    assert size("--steps", "5") == (16, 16)
    assert size("--schedule", "1,2x3,4x6") == (12, 8)
    assert size("--size", "8x20", "--previews") == (20, 8)
    common = ["generate", "--model", str(folder), "--label", "1", "--out", str(tmp_path / "no.png")]
    for wrong, says in (
        (["--schedule", "1,2", "--steps", "3"], "give one of them"),
        (["--schedule", "1,2", "--size", "8x8"], "the last side of a schedule is the size"),
        (["--schedule", "1,two"], "is not a list of sides"),
        (["--schedule", "4,2"], "is smaller than"),
        (["--steps", "9"], "9 steps cannot reach a grid of 8"),
    ):
        assert main([*common, *wrong]) == 2
        assert says in capsys.readouterr().err


# Editing


def picture(size: tuple[int, int]) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(values)


def test_refining_keeps_the_small_pictures_maps_and_draws_the_rest(model: Pipeline):
    small = picture((6, 6))
    state = run(model.model, start_refine(model, small, 1, n=2, seed=5))
    ids = state.canvas.latents()["ids"]
    pixels = to_tensor(np.asarray(small)[None])
    wanted = model.tokenizer.encode(pixels, Schedule.of(1, 2, 3))["ids"]
    assert torch.equal(ids[:, :14], wanted.expand(2, -1))
    assert not torch.equal(ids[0, 14:], ids[1, 14:])
    free = run(model.model, model.start([1, 1], 5)).canvas.latents()["ids"]
    assert not torch.equal(free[:, :14], ids[:, :14])
    again = run(model.model, start_refine(model, small.resize((7, 7)), 1, seed=5))  # brought to 6 x 6
    assert again.canvas.latents()["ids"].shape == (1, model.schedule.total)


def test_refining_refuses_what_it_cannot(model: Pipeline):
    for size in ((1, 6), (16, 16), (20, 40)):
        with pytest.raises(UserError, match="cannot be refined by this model; give one of at least 2x2"):
            refine(model, picture(size), 1)
    with pytest.raises(UserError, match="pictures by themselves"):
        refine(varkit.load("digits"), picture((8, 8)), 1)


def test_expanding_keeps_the_picture_and_fills_around(model: Pipeline):
    original = picture((16, 8))
    larger, redraw = surrounded(original, (16, 16), (0.5, 1.0))
    assert larger.crop((8, 0, 16, 16)).tobytes() == original.tobytes()
    assert redraw.sum() == 16 * 8 and not redraw[:, 8:].any()
    drawn = expand(model, original, (16, 16), 1, place=(0.5, 1.0))[0]
    assert drawn.size == (16, 16)
    wide = expand(model, picture((16, 16)), (16, 24), 1, n=2, seed=1)
    assert [one.size for one in wide] == [(24, 16)] * 2 and wide[0].tobytes() != wide[1].tobytes()
    for wrong in ((16, 8), (8, 16)):
        with pytest.raises(UserError, match="give a larger size"):
            surrounded(original, wrong)


def test_the_command_line_refines_and_expands(folder: Path, tmp_path: Path, capsys):
    picture((4, 4)).save(tmp_path / "small.png")
    picture((16, 16)).save(tmp_path / "whole.png")
    out = tmp_path / "out.png"

    def edit(name: str, *options: str) -> int:
        where = ["--model", str(folder), "--label", "1", "--out", str(out)]
        return main(["edit", str(tmp_path / name), *where, *options])

    assert edit("small.png", "--refine") == 0 and Image.open(out).size == (16, 16)
    assert edit("small.png", "--refine", "--size", "8x16") == 0 and Image.open(out).size == (16, 8)
    assert edit("whole.png", "--size", "16x24") == 0
    kept = Image.open(out).crop((4, 0, 20, 16)).tobytes()
    assert kept == picture((16, 16)).tobytes()
    assert edit("whole.png", "--size", "16x24", "--place", "0", "1", "--steps", "5") == 0
    assert Image.open(out).crop((8, 0, 24, 16)).tobytes() == picture((16, 16)).tobytes()
    assert edit("whole.png", "--box", "0", "0", "1", "0.5", "--schedule", "1,2,4,8", "--raw") == 0
    few, whole = varkit.load(folder).scheduled((1, 2, 4, 8)), picture((16, 16))
    wanted = inpaint(few, whole, box_mask((16, 16), (0, 0, 1, 0.5)), 1)[0]
    assert Image.open(out).tobytes() == wanted.tobytes()
    assert edit("small.png", "--refine", "--schedule", "1,2,4,12") == 0 and Image.open(out).size == (24, 24)
    for wrong, says in (
        (["--refine", "--place", "0", "0"], "--place is for drawing more around a picture"),
        (["--refine", "--steps", "4", "--schedule", "1,2"], "give one of them"),
        (["--size", "16x24", "--schedule", "1,2"], "the last side of a schedule is the size"),
        (["--size", "16x24", "--place", "0", "2"], "is outside 0 to 1"),
    ):
        assert edit("small.png", *wrong) == 2
        assert says in capsys.readouterr().err
    assert edit("whole.png", "--size", "16x24", "--box", "0", "0", "1", "0.5") == 2
    assert "leave --mask and --box out" in capsys.readouterr().err
