"""The page that compares: the same prompt and seed through two models or settings, with time and passes.

One after the other, so that neither slows the other down.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import gradio as gr

from varkit.decode.state import State
from varkit.hub.pipeline import Pipeline
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
from varkit.studio.drawing import asked, frames

SIDES = ("A", "B")


def compare(
    models: Models, prompt: str, seed: int | None, n: int | None, *both: Any
) -> Iterator[tuple[Any, ...]]:
    """For each side its pictures and what they cost so far, then the status. `both`: of each side its model's name
    and the arguments of `chosen`.
    """
    shown: list[Any] = [None, told(""), None, told("")]
    yield *shown, told("Starting.", busy=True)
    half = len(both) // 2
    starts = [
        _start(models[side[0]], side[1:], prompt, seed or 0, n or 1) for side in (both[:half], both[half:])
    ]
    for i, (pipeline, state) in enumerate(starts):
        for frame in frames(pipeline, state):
            shown[2 * i : 2 * i + 2] = captioned(frame.images), told(frame)
            yield *shown, told(f"Drawing {SIDES[i]}.", busy=True)
    yield *shown, told("Done.")


def page(models: Models) -> None:
    """Build the page."""
    # The prompt comes first on the page, and its hint depends on A's model, which comes below.
    first = model_field(models, f"Model {SIDES[0]}", render=False)
    prompt = prompt_field(models, first)
    seed, many = seed_and_number()
    with gr.Row():
        start = gr.Button("Compare", variant="primary", min_width=100)
        cancel = gr.Button("Cancel", min_width=100)
    status = status_field("compare-status")
    both: list[gr.components.Component] = []
    outputs: list[gr.components.Component] = []
    with gr.Row():
        for side in SIDES:
            with gr.Column(min_width=280):
                model = first.render() if side == SIDES[0] else model_field(models, f"Model {side}")
                with gr.Accordion(f"Settings of {side}", open=False):
                    both += [model, *sampling_fields(models, model)]
                cost = status_field(f"compare-cost-{side.lower()}")
                outputs += [pictures_field(side, f"compare-{side.lower()}"), cost]
    inputs = [prompt, seed, many, *both]
    runs([start.click, prompt.submit], partial(compare, models), inputs, [*outputs, status], cancel)


def _start(
    pipeline: Pipeline, sampling: Sequence[Any], prompt: str, seed: int, n: int
) -> tuple[Pipeline, State]:
    settings = replace(pipeline.settings, **chosen(*sampling))
    return pipeline, pipeline.start(pipeline.jobs(asked(prompt), n), seed, settings=settings)
