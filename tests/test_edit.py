"""Editing: the sheet's check 5, masks at every scale, and what is kept stays."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.contracts import CASES, PYRAMID
from varkit.decode.loop import decode
from varkit.edit.inpaint import Keeping, box_mask, fitted, inpaint, keep_masks, paste
from varkit.errors import UserError
from varkit.hub.pipeline import Pipeline, Settings
from varkit.pictures import to_pil, to_tensor
from varkit.plans.schedule import Schedule


def pipeline(name: str = "var-class") -> Pipeline:
    return CASES[name].pipeline(Settings(guidance=2.0))


def picture(size: tuple[int, int] = (8, 12)) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.mark.parametrize(
    ("name", "prompt", "settings"),
    [
        ("var-class", 3, {}),
        ("var-class", 3, {"smooth": True}),
        ("infinity-text", "a ring", {}),
        ("hmar-refined", 3, {}),
        ("hmar-refined", 3, {"smooth": True}),
        ("flexvar-class", 3, {}),
        ("m-var-class", 3, {}),
        ("var-markov", 3, {}),
        ("nfig-class", 3, {}),
    ],
)
def test_keeping_everything_returns_the_reconstruction_exactly(name: str, prompt, settings: dict):
    model, image = pipeline(name), picture()
    rebuilt = model.tokenizer.decode(model.tokenizer.encode(to_tensor(np.asarray(image)[None])))
    edited = inpaint(model, image, np.zeros((8, 12), bool), prompt, n=2, **settings)
    for one in edited:
        assert one.tobytes() == to_pil(rebuilt)[0].tobytes()


def test_redrawing_everything_keeps_only_the_smallest_scales():
    model, image = pipeline(), picture()
    everything = np.ones((8, 12), bool)
    pairs = [
        (model.generate(3, seed=s)[0], inpaint(model, image, everything, 3, seed=s)[0]) for s in range(5)
    ]
    assert any(a.tobytes() != b.tobytes() for a, b in pairs), "the 1 x 1 token is the picture's own"
    keep = keep_masks(torch.ones(8, 12), Schedule.of(*PYRAMID))
    assert keep[:1].all() and not keep[1:].any()


def test_masks_of_the_scales_follow_the_picture():
    schedule = Schedule.of(1, 2, 4)
    redraw = torch.zeros(8, 8)
    redraw[:, 4:] = 1
    keep = keep_masks(redraw, schedule)
    assert keep[1:5].view(2, 2).tolist() == [[True, False]] * 2
    assert keep[5:].view(4, 4).tolist() == [[True, True, False, False]] * 4


def test_kept_tokens_are_the_pictures_own_and_versions_differ_elsewhere():
    model, image = pipeline(), picture()
    true = model.tokenizer.encode(to_tensor(np.asarray(image)[None]))["ids"][0]
    redraw = box_mask((8, 12), (0, 0.5, 1, 1))
    keep = keep_masks(torch.from_numpy(redraw), model.model.plan.schedule)
    state = model.start([3, 3], seed=0)
    state.options = replace(state.options, override=Keeping(model.tokenizer.quantizer))
    state.extras = {"true": true.repeat(2, 1), "keep": keep.repeat(2, 1)}
    state = state.select([1, 0])
    for _ in decode(model.model, state):
        pass
    ids = state.canvas.latents()["ids"]
    assert torch.equal(ids[:, keep], true[keep].expand(2, -1))
    assert not torch.equal(ids[0, ~keep], ids[1, ~keep])


def test_paste_leaves_every_other_pixel_as_it_was_at_any_size():
    model, image = pipeline(), picture((40, 30))
    redraw = box_mask((40, 30), (0.25, 0.25, 0.75, 0.75))
    (edited,) = paste(inpaint(model, image, redraw), image, redraw)
    before, after = np.asarray(image), np.asarray(edited)
    assert after.shape == (40, 30, 3)
    assert np.array_equal(before[~redraw], after[~redraw]) and not np.array_equal(
        before[redraw], after[redraw]
    )


def test_out_painting_is_the_complement():
    inside, outside = (box_mask((10, 20), (0.1, 0.2, 0.6, 0.7), inside=side) for side in (True, False))
    assert np.array_equal(inside, ~outside) and inside.sum() == 5 * 10


def test_wrong_input_is_told_in_one_line():
    with pytest.raises(UserError, match="0.25 0.25"):
        box_mask((8, 8), (0.5, 0, 0.2, 1))
    with pytest.raises(UserError, match="the mask is 4x4 and the picture 8x12"):
        inpaint(pipeline(), picture(), np.zeros((4, 4), bool))
    with pytest.raises(UserError, match="scale by scale"):
        inpaint(pipeline("llamagen-class"), picture((6, 8)), np.zeros((6, 8), bool))


def test_fitting_leaves_the_right_size_untouched():
    image = picture()
    assert fitted(image, (8, 12)).tobytes() == image.tobytes() and fitted(image, (4, 6)).size == (6, 4)
