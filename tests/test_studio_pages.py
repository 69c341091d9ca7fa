"""The studio's pages as plain functions: what they show is what the library makes, and failures are one sentence."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import pytest
import torch
from PIL import Image

from tests.contracts import CASES
from tests.models import CLASSES, WORDS, tiny_pipeline
from varkit.catalog.registry import systems as all_systems
from varkit.edit.inpaint import inpaint, paste
from varkit.errors import UserError
from varkit.generators.conditioning import ClassConfig
from varkit.generators.text import TextConfig
from varkit.hub.pipeline import Pipeline, Settings
from varkit.pictures import to_tensor
from varkit.plans.ratios import BUDGETS, SCHEDULES, scales
from varkit.studio import compare, edit, generate, systems, tokenizer
from varkit.studio.controls import BUSY, CANCELLING, ended, in_one_sentence, prompt_hint, told
from varkit.studio.drawing import MOST_PREVIEWS, OWN_SIZE, enlarged, frames, sized, sizes

OWN = ("", "", "", "", False)
"""Sampling as the model has it: no field filled in."""


@pytest.fixture(scope="module")
def models() -> dict[str, Pipeline]:
    return {
        "text": tiny_pipeline(TextConfig(WORDS, length=8, width=16, depth=1)),
        "class": tiny_pipeline(ClassConfig(len(CLASSES), CLASSES)),
        "raster": CASES["llamagen-class"].pipeline(Settings()),
        "masked": CASES["mar-class"].pipeline(Settings()),
    }


def draw(models: dict[str, Pipeline], name: str = "text", prompt: str = "a red circle", **changes: Any):
    """What the page yields after each step, without the first time, when there is nothing yet."""
    fields = {"negative": "", "seed": 3, "n": 2, "size": OWN_SIZE, "sampling": OWN} | changes
    sampling = fields.pop("sampling")
    nothing, *steps = generate.draw(models, name, prompt, *fields.values(), *sampling)
    assert nothing[:2] == (None, None)
    return steps


def same(shown: Any, images: list[Image.Image]) -> bool:
    return [image.tobytes() for image, _ in shown] == [image.tobytes() for image in images]


def sentence(handler: Any, *values: Any) -> str:
    """What a visitor is told when a handler fails."""
    with pytest.raises(gr.Error) as caught:
        list(in_one_sentence(handler)(*values))
    message = str(caught.value.message)
    assert "\n" not in message and message.endswith(".") and message[0].isupper()
    assert caught.value.print_exception is False
    return message


def test_pictures_are_the_pipelines_own_and_every_scale_is_shown(models):
    steps = draw(models)
    assert len(steps) == 3
    pictures, grown, status = steps[-1]
    assert same(pictures, models["text"].generate("a red circle", n=2, seed=3))
    assert [caption for _, caption in grown] == ["1 x 1", "2 x 2", "3 x 3"]
    assert grown[-1][0].tobytes() == pictures[0][0].tobytes() != grown[0][0].tobytes()
    assert [BUSY in line for _, _, line in steps] == [True, True, False]
    assert "Step 2 of 3" in steps[1][2] and "Done" in status and "3 passes" in status


@pytest.mark.parametrize(
    ("name", "prompt"), [("class", "dog"), ("class", "1"), ("raster", "4"), ("masked", "4")]
)
def test_models_of_every_order_and_condition_are_drawn(models, name: str, prompt: str):
    *_, (pictures, _, _) = draw(models, name, prompt)
    asked: Any = "dog" if prompt == "1" else prompt
    assert same(pictures, models[name].generate(asked, n=2, seed=3))


@pytest.mark.parametrize(
    ("sampling", "settings"),
    [
        (("5", "", "", "", False), {"guidance": 5}),
        (("", "0", "", "", False), {"temperature": 0}),
        (("", "", "2", " 0.5 ", False), {"top_k": 2, "top_p": 0.5}),
        (("1.0", "", "", "", True), {"guidance": 1, "smooth": True}),
    ],
)
def test_fields_that_are_filled_in_replace_the_models_settings(models, sampling, settings):
    *_, (pictures, _, _) = draw(models, sampling=sampling)
    assert same(pictures, models["text"].generate("a red circle", n=2, seed=3, **settings))
    assert not same(pictures, models["text"].generate("a red circle", n=2, seed=3))


def test_a_negative_prompt_leads_away(models):
    *_, (pictures, _, _) = draw(models, negative=" a blue square ")
    assert same(pictures, models["text"].generate("a red circle", n=2, seed=3, negative="a blue square"))
    assert not same(pictures, models["text"].generate("a red circle", n=2, seed=3))


def test_emptied_seed_and_number_mean_the_first_and_one(models):
    *_, (pictures, _, _) = draw(models, seed=None, n=None)
    assert same(pictures, models["text"].generate("a red circle", seed=0))


def test_two_visitors_at_once_get_the_pictures_they_would_get_alone(models):
    prompts = ("a red circle", "a blue square")
    runs = [generate.draw(models, "text", p, "", i, 1, OWN_SIZE, *OWN) for i, p in enumerate(prompts)]
    *_, last = zip(*runs, strict=True)
    for i, (prompt, (pictures, _, _)) in enumerate(zip(prompts, last, strict=True)):
        assert same(pictures, models["text"].generate(prompt, seed=i))


def test_long_orders_are_shown_now_and_then_and_at_their_end(models):
    steps = 4 * MOST_PREVIEWS
    long = CASES["llamagen-class"].pipeline(Settings())
    long.model.plan.steps *= -(-steps // len(long.model.plan.steps))
    shown = [frame for frame in frames(long, long.start([1]))]
    assert MOST_PREVIEWS / 2 <= len(shown) <= MOST_PREVIEWS + 1
    assert shown[-1].finished and not any(frame.finished for frame in shown[:-1])
    assert shown[-1].step == shown[-1].passes == len(long.model.plan.steps)


def test_sizes_are_those_that_the_model_makes(models):
    assert sizes(models["text"]) == [OWN_SIZE]
    any_size = sizes(models["text"].over(scales(1.0, "0.06M")))
    assert any_size[0] == OWN_SIZE and {"256x256", "1024x1024", "1440x720"} <= set(any_size)
    assert len(set(any_size)) == len(any_size) == 1 + len(SCHEDULES) * len(BUDGETS)
    assert sized(models["text"], OWN_SIZE) is models["text"]
    with pytest.raises(UserError, match="64x64"):
        sized(models["text"], "64x64")


def test_hints_name_what_can_be_asked_for(models):
    assert "cat, dog, owl" in prompt_hint(models["class"])
    assert "0 to 4" in prompt_hint(models["raster"])
    assert "caption" in prompt_hint(models["text"])


def test_failures_are_one_sentence(models, capsys: pytest.CaptureFixture[str]):
    ask = partial(generate.draw, models, "text")
    assert "'red'" in sentence(ask, "a rad circle", "", 0, 1, OWN_SIZE, *OWN)
    assert "empty" in sentence(ask, "  ", "", 0, 1, OWN_SIZE, *OWN)
    assert "guidance" in sentence(ask, "red", "blue", 0, 1, OWN_SIZE, "1", *OWN[1:])
    assert "Top-k -1" in sentence(ask, "red", "", 0, 1, OWN_SIZE, "", "", "-1", "", False)
    assert "'much' is not a number" in sentence(ask, "red", "", 0, 1, OWN_SIZE, "much", *OWN[1:])
    assert "'2.5' is not a whole number" in sentence(ask, "red", "", 0, 1, OWN_SIZE, "", "", "2.5", "", False)
    assert capsys.readouterr().err == ""


def test_a_run_that_came_to_no_end_was_cancelled_or_failed():
    assert ended(told(CANCELLING)) == told("Cancelled.")
    assert ended(told("Step 2 of 3", busy=True)) == told("Not done.")


def test_what_was_unforeseen_is_told_to_the_terminal_alone(capsys: pytest.CaptureFixture[str]):
    def broken() -> Iterator[Any]:
        yield 1
        raise RuntimeError("secret")

    assert "secret" not in sentence(broken)
    assert "RuntimeError: secret" in capsys.readouterr().err


def canvas(picture: Image.Image, *boxes: tuple[int, int, int, int]) -> dict[str, Any]:
    """What the editor sends: a layer for each box (x0, y0, x1, y1) that was brushed."""
    layers = []
    for box in boxes:
        layer = Image.new("RGBA", picture.size)
        layer.paste((255, 0, 200, 255), box)
        layers.append(layer)
    return {"background": picture.convert("RGBA"), "layers": layers, "composite": None}


def picture(side: int = 12) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))


@pytest.mark.parametrize("where", [edit.INSIDE, edit.OUTSIDE])
@pytest.mark.parametrize("keep", [True, False])
def test_what_is_brushed_or_all_the_rest_is_drawn_anew(models, where: str, keep: bool):
    brushed = canvas(picture(), (0, 0, 6, 6), (6, 6, 12, 12))
    *_, (versions, status) = edit.redraw(models, "class", brushed, where, "dog", keep, 1, 2, *OWN)
    mask = np.kron(np.eye(2, dtype=bool), np.ones((6, 6), dtype=bool))
    mask = mask if where == edit.INSIDE else ~mask
    expected = inpaint(models["class"], picture(), mask, "dog", 2, 1)
    assert same(versions, paste(expected, picture(), mask) if keep else expected)
    assert "Done" in status


def test_an_editor_with_nothing_to_do_is_told_apart(models):
    ask = partial(edit.redraw, models, "class")
    rest = (edit.INSIDE, "", True, 0, 1, *OWN)
    assert "no picture" in sentence(ask, None, *rest)
    assert "no picture" in sentence(ask, {"background": None, "layers": [], "composite": None}, *rest)
    assert "nothing is brushed" in sentence(ask, canvas(picture()), *rest).lower()
    with_model = partial(edit.redraw, models, "raster")
    assert "scale by scale" in sentence(with_model, canvas(picture(), (0, 0, 6, 6)), *rest)


def test_small_pictures_are_enlarged_to_be_brushed_on():
    assert enlarged(picture(12)).size == (504, 504)
    assert enlarged(Image.new("RGB", (800, 600))).size == (800, 600)
    with pytest.raises(UserError, match="draw one first"):
        generate.first_of([])


@pytest.fixture
def photo(tmp_path: Path) -> str:
    picture(40).save(tmp_path / "photo.png")
    return str(tmp_path / "photo.png")


def test_a_picture_is_taken_apart_scale_by_scale(models, photo: str):
    nothing, *steps = tokenizer.take_apart(models, "class", photo)
    assert len(steps) == 3
    shown, errors, codes, status = steps[-1]
    assert [caption for _, caption in shown] == ["the picture", "1 x 1", "2 x 2", "3 x 3"]
    seen = to_tensor(np.asarray(shown[0][0])[None])
    tok = models["class"].tokenizer
    ids = tok.encode(seen)["ids"]
    rebuilt = tok.decode({"ids": ids})
    assert (to_tensor(np.asarray(shown[-1][0])[None]) - rebuilt).abs().max() <= 1 / 127
    assert f"{tokenizer.psnr(float((rebuilt - seen).square().mean())):.1f} dB" in status
    assert f"14 positions use {len(ids.unique())} different codes of 16" in status
    assert f"<td>{len(ids[0, 5:].unique())}</td>" in codes.split("3 x 3")[1]
    assert errors.size == (510, 510)


def test_the_error_map_is_brightest_where_the_error_is():
    pixels, image = torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4)
    image[..., 2] = 2 * tokenizer.LARGEST_ERROR
    errors = np.asarray(tokenizer.error_map(pixels, image).resize((4, 4), Image.Resampling.NEAREST))
    assert errors[:, 0].max() == 0 and errors[0, 2, 0] > 200 and errors[0, 2, 1] > 150


def test_a_tokenizer_without_scales_or_codes_is_taken_apart_at_once(models, photo: str):
    _, (shown, _, _, status) = tokenizer.take_apart(models, "masked", photo)
    assert len(shown) == 2 and "no codes" in status
    _, (shown, _, _, status) = tokenizer.take_apart(models, "raster", photo)
    assert len(shown) == 2 and "12 positions" in status


def test_files_that_are_no_pictures_are_refused_without_their_path(models, tmp_path: Path):
    (tmp_path / "note.png").write_text("not a picture")
    ask = partial(tokenizer.take_apart, models, "class")
    said = sentence(ask, str(tmp_path / "note.png"))
    assert "not a picture" in said and str(tmp_path) not in said
    assert "no picture" in sentence(ask, None)


def test_systems_are_listed_by_words_state_family_and_task():
    everything = systems.listed("", "any", "any", "any")
    assert everything.count("<details") == len(all_systems())
    scales = [s for s in all_systems() if s.family == "scale"]
    assert systems.listed("", "any", "scale", "any").count("<details") == len(scales) < len(all_systems())
    assert 'id="system-flexvar"' in systems.listed("flexvar flexible", "any", "any", "any")
    assert "<details" not in systems.listed("no such words", "any", "any", "any")
    assert "0 of" in systems.listed("", "works", "pixel", "robotics")


def test_a_system_shows_its_claim_what_was_measured_and_pictures(tmp_path, monkeypatch):
    results = tmp_path / "results"
    results.mkdir()
    (tmp_path / "var.py").touch()
    (results / "var.json").write_text('{"measured": "FID <7 & better", "holds": false}')
    Image.new("RGB", (4, 4)).save(results / "var.png")
    monkeypatch.setattr("varkit.catalog.standing.experiments_folder", lambda: tmp_path)
    monkeypatch.setattr("varkit.studio.systems.experiments_folder", lambda: tmp_path)
    card = systems.listed("visual autoregressive modeling scalable", "works", "any", "any")
    assert "FID &lt;7 &amp; better" in card and "<dt>Holds</dt><dd>no</dd>" in card
    assert 'src="pictures/var.png"' in card
    assert systems.picture_of("var") == results / "var.png"
    for name in ("flexvar", "../results/var", "no-such", ""):
        assert systems.picture_of(name) is None


def test_a_comparison_draws_both_sides_alike(models):
    nothing, *steps = compare.compare(models, "a red circle", 2, 2, "text", *OWN, "text", "1", *OWN[1:])
    a, cost_a, b, cost_b, status = steps[-1]
    assert same(a, models["text"].generate("a red circle", n=2, seed=2))
    assert same(b, models["text"].generate("a red circle", n=2, seed=2, guidance=1))
    assert "3 passes" in cost_a and "3 passes" in cost_b and "Done" in status
    assert steps[2][2] is None, "B begins when A is done"
    ask = partial(compare.compare, models, "a red circle", 2, 2)
    assert "class" in sentence(ask, "text", *OWN, "class", *OWN)
