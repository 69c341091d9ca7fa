"""The page that edits: a mask is brushed on a picture, and that part (or all the rest) is drawn anew."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from varkit.edit.inpaint import paste, start_inpaint
from varkit.errors import UserError
from varkit.studio.controls import (
    Models,
    captioned,
    chosen,
    model_field,
    pictures_field,
    prompt_field,
    runs,
    sampling_fields,
    seed_and_number,
    status_field,
    told,
)
from varkit.studio.drawing import ENLARGED, frames

INSIDE, OUTSIDE = "What is brushed", "Everything else"
BRUSH = "#ff00c8"


def redraw(
    models: Models,
    name: str,
    drawn_on: dict[str, Any] | None,
    where: str,
    prompt: str,
    keep_pixels: bool,
    seed: int | None,
    n: int | None,
    *sampling: Any,
) -> Iterator[tuple[Any, ...]]:
    """The versions so far and the status, after each scale."""
    yield None, told("Starting.", busy=True)
    picture, mask = read_editor(drawn_on)
    mask = mask if where == INSIDE else ~mask
    pipeline = models[name]
    state = start_inpaint(
        pipeline, picture, mask, prompt.strip() or None, n or 1, seed or 0, **chosen(*sampling)
    )
    for frame in frames(pipeline, state):
        images: Sequence[Image.Image] = paste(frame.images, picture, mask) if keep_pixels else frame.images
        yield captioned(images), told(frame, not frame.finished)


def read_editor(drawn_on: dict[str, Any] | None) -> tuple[Image.Image, np.ndarray]:
    """What the editor holds: the picture, and where it was brushed, (H, W) bool.

    Raises `UserError` where there is no picture or nothing is brushed.
    """
    if not drawn_on or drawn_on["background"] is None:
        raise UserError("there is no picture; drop one into the editor, or draw one and send it here")
    picture = drawn_on["background"].convert("RGB")
    mask = np.zeros((picture.height, picture.width), dtype=bool)
    for layer in drawn_on["layers"]:
        mask |= np.asarray(layer.convert("RGBA").resize(picture.size))[..., 3] > 127
    if not mask.any():
        raise UserError("nothing is brushed; brush over a part of the picture")
    return picture, mask


def page(models: Models) -> gr.ImageEditor:
    """Build the page; returns the editor, so that pictures can be sent to it."""
    with gr.Row():
        with gr.Column(min_width=280):
            editor = gr.ImageEditor(
                label="Picture",
                type="pil",
                image_mode="RGBA",
                format="png",
                sources=["upload", "clipboard"],
                transforms=(),
                layers=False,
                brush=gr.Brush(default_size=48, colors=[BRUSH], color_mode="fixed"),
                canvas_size=(ENLARGED, ENLARGED),
                buttons=[],
                elem_id="edit-editor",
            )
            where = gr.Radio([INSIDE, OUTSIDE], value=INSIDE, label="Draw anew")
        with gr.Column(min_width=280):
            model = model_field(models)
            prompt = prompt_field(models, model, "Prompt (may stay empty)")
            with gr.Row():
                start = gr.Button("Draw anew", variant="primary", min_width=100)
                cancel = gr.Button("Cancel", min_width=100)
            seed, many = seed_and_number()
            with gr.Accordion("More settings", open=False):
                keep = gr.Checkbox(
                    value=True, label="Keep the other pixels", info="Otherwise the tokenizer's version."
                )
                sampling = sampling_fields(models, model)
            status = status_field("edit-status")
            versions = pictures_field("Versions", "edit-versions")
    inputs = [model, editor, where, prompt, keep, seed, many, *sampling]
    runs([start.click, prompt.submit], partial(redraw, models), inputs, [versions, status], cancel)
    return editor
