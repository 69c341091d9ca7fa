"""The page that draws: prompt or class to picture, with the scales appearing one after the other."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import gradio as gr
from PIL import Image

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
from varkit.studio.drawing import asked, frames, sized, sizes


def draw(
    models: Models,
    name: str,
    prompt: str,
    negative: str,
    seed: int | None,
    n: int | None,
    size: str,
    *sampling: Any,
) -> Iterator[tuple[Any, ...]]:
    """The pictures so far, how the first one grew, and the status, after each step."""
    yield None, None, told("Starting.", busy=True)
    pipeline = sized(models[name], size)
    settings = replace(pipeline.settings, **chosen(*sampling))
    prompts = pipeline.jobs(asked(prompt), n or 1)
    state = pipeline.start(prompts, seed or 0, settings=settings, negative=negative.strip() or None)
    grown: list[tuple[Image.Image, str]] = []
    for frame in frames(pipeline, state):
        grown.append((frame.images[0], frame.name))
        yield captioned(frame.images), grown, told(frame, not frame.finished)


def first_of(shown: list[tuple[Image.Image, str | None]] | None) -> Image.Image:
    """The first picture that a gallery shows. Raises `UserError` where it shows none."""
    if not shown:
        raise UserError("there is no picture yet; draw one first")
    return shown[0][0]


def page(models: Models) -> tuple[gr.Button, gr.Gallery]:
    """Build the page; returns the button that sends a picture to be edited, and where the pictures are."""
    with gr.Row():
        with gr.Column(min_width=280):
            model = model_field(models)
            prompt = prompt_field(models, model)
            with gr.Row():
                start = gr.Button("Draw", variant="primary", min_width=100)
                cancel = gr.Button("Cancel", min_width=100)
            seed, many = seed_and_number()
            with gr.Accordion("More settings", open=False):
                negative = gr.Textbox(
                    "", label="Negative prompt", info="What guidance leads away from.", max_lines=1
                )
                own = sizes(next(iter(models.values())))
                size = gr.Dropdown(own, value=own[0], label="Size", info="Height x width, in pixels.")
                sampling = sampling_fields(models, model)
        with gr.Column(min_width=280):
            status = status_field("generate-status")
            pictures = pictures_field("Pictures", "generate-pictures")
            grown = pictures_field("How the first one grew", "generate-grown", small=True)
            edit = gr.Button("Edit the first picture")
    model.change(partial(_size_field, models), model, size, api_visibility="private")
    inputs = [model, prompt, negative, seed, many, size, *sampling]
    triggers = [start.click, prompt.submit, negative.submit]
    runs(triggers, partial(draw, models), inputs, [pictures, grown, status], cancel)
    return edit, pictures


def _size_field(models: Models, name: str) -> gr.Dropdown:
    found = sizes(models[name])
    return gr.Dropdown(found, value=found[0])
