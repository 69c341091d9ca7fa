"""What the pages share: fields, the event that runs a handler, and how progress and failures are told."""

import functools
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

import gradio as gr
from PIL import Image

from varkit.errors import UserError
from varkit.generators.conditioning import ClassConfig
from varkit.hub.pipeline import Pipeline

Models = Mapping[str, Pipeline]
"""The models that a studio offers, by name; read only, so that all visitors can share them."""

MOST_PICTURES = 16
LARGEST_SEED = 2**53 - 1
"""The largest whole number that a browser keeps exactly."""

SHOWN_CLASSES = 12
BUSY, CANCELLING = " data-busy", "Cancelling."
SAMPLING = {
    "guidance": ("Guidance", "1 is off"),
    "temperature": ("Temperature", "0 is the likeliest"),
    "top_k": ("Top-k", "0 keeps all codes"),
    "top_p": ("Top-p", "0 keeps all codes"),
}
"""Settings of sampling that can be replaced: the label and the hint of their fields."""


def in_one_sentence(handler: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """A page's handler, whose failures reach the visitor as one sentence; what was unforeseen goes to the terminal."""

    @functools.wraps(handler)
    def handle(*values: Any) -> Iterator[Any]:
        try:
            yield from handler(*values)
        except UserError as error:
            line = " ".join(str(error).split()).rstrip(".")
            raise gr.Error(f"{line[:1].upper()}{line[1:]}.", print_exception=False) from error
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            sentence = "This failed for a reason that only the terminal running varkit studio tells."
            raise gr.Error(sentence, print_exception=False) from error

    return handle


def runs(
    triggers: Sequence[Any],
    handler: Callable[..., Iterator[Any]],
    inputs: Sequence[gr.components.Component],
    outputs: Sequence[gr.components.Component],
    cancel: gr.Button,
) -> None:
    """Run `handler` on any of `triggers`; `cancel` stops it between two steps. The last output is the status line."""
    status = outputs[-1]
    run = gr.on(
        triggers,
        in_one_sentence(handler),
        list(inputs),
        list(outputs),
        concurrency_id="models",
        show_progress="minimal",
        show_progress_on=status,
        api_visibility="private",
    )
    # To gradio a cancelled run is a failed one, which ends after the step it is at; only then can another begin. So the
    # line says in between, and in the browser at once, that it is being cancelled.
    cancel.click(
        None,
        status,
        status,
        js=f"(line) => line.includes('{BUSY}') ? '{told(CANCELLING)}' : line",
        cancels=[run],
        api_visibility="private",
    )
    run.failure(ended, status, status, queue=False, show_progress="hidden", api_visibility="private")


def ended(line: str) -> str:
    """The status line of a run that came to no end, from the line before."""
    return told("Cancelled." if CANCELLING in line else "Not done.")


def chosen(guidance: str, temperature: str, top_k: str, top_p: str, smooth: bool) -> dict[str, Any]:
    """The settings that replace a model's own: those that were filled in. Raises `UserError` for what is no number."""
    typed = zip(SAMPLING, (guidance, temperature, top_k, top_p), strict=True)
    given = {name: _number(name, text.strip()) for name, text in typed if text.strip()}
    return given | ({"smooth": True} if smooth else {})


def sampling_fields(models: Models, model: gr.Dropdown) -> list[gr.components.Component]:
    """Fields for the arguments of `chosen`, in their order; left empty, each shows the chosen model's own setting."""
    first = next(iter(models.values()))
    # Text, since an empty number field comes back as 0.
    with gr.Row():
        fields = [
            gr.Textbox("", label=label, info=f"{hint}.", placeholder=own, max_lines=1, min_width=120)
            for (label, hint), own in zip(SAMPLING.values(), _own_settings(first), strict=True)
        ]
    model.change(
        lambda name: [gr.Textbox(placeholder=own) for own in _own_settings(models[name])],
        model,
        fields,
        api_visibility="private",
    )
    smooth = gr.Checkbox(label="Smooth", info="Mix codes instead of choosing one.")
    return [*fields, smooth]


def _number(name: str, text: str) -> float:
    try:
        return int(text) if name == "top_k" else float(text)
    except ValueError:
        kind = "a whole number" if name == "top_k" else "a number"
        raise UserError(f"{SAMPLING[name][0]} {text!r} is not {kind}; correct it or leave it empty") from None


def _own_settings(pipeline: Pipeline) -> list[str]:
    own = {name: str(getattr(pipeline.settings, name)) for name in SAMPLING}
    if pipeline.settings.ramp:
        own["guidance"] += ", rising"
    return list(own.values())


def seed_and_number() -> tuple[gr.Number, gr.Number]:
    """Fields for the seed and for how many pictures."""
    with gr.Row():
        seed = gr.Number(label="Seed", value=0, precision=0, minimum=0, maximum=LARGEST_SEED, min_width=120)
        many = gr.Number(
            label="Pictures", value=1, precision=0, minimum=1, maximum=MOST_PICTURES, min_width=120
        )
    return seed, many


def model_field(models: Models, label: str = "Model", render: bool = True) -> gr.Dropdown:
    """A field to choose a model; without `render` it is placed later."""
    first = next(iter(models))
    return gr.Dropdown(list(models), value=first, label=label, filterable=False, render=render)


def prompt_field(models: Models, model: gr.Dropdown, label: str = "Prompt") -> gr.Textbox:
    """A field of one line, so that Enter draws; it says what the chosen model can be asked for."""
    first = next(iter(models.values()))
    prompt = gr.Textbox("", label=label, info=prompt_hint(first), lines=1, max_lines=1)
    model.change(
        lambda name: gr.Textbox(info=prompt_hint(models[name])), model, prompt, api_visibility="private"
    )
    return prompt


def prompt_hint(pipeline: Pipeline) -> str:
    """What a model can be asked for."""
    condition = pipeline.condition
    if not isinstance(condition, ClassConfig):
        return "A caption, such as: a red circle."
    if not condition.names:
        return f"A label from 0 to {condition.classes - 1}."
    names = ", ".join(condition.names[:SHOWN_CLASSES])
    return f"A class: {names}{', ...' if len(condition.names) > SHOWN_CLASSES else ''}; or its label."


def pictures_field(label: str, elem_id: str, small: bool = False) -> gr.Gallery:
    """A place for pictures, kept as they are (PNG)."""
    return gr.Gallery(
        label=label,
        format="png",
        type="pil",
        object_fit="contain",
        interactive=False,
        buttons=["download", "fullscreen"],
        elem_id=elem_id,
        elem_classes=["pictures", "small"] if small else ["pictures"],
    )


def captioned(
    images: Sequence[Image.Image], captions: Sequence[object] | None = None
) -> list[tuple[Image.Image, str]]:
    """Pictures as `pictures_field` takes them, with what is written below each: by default its number."""
    captions = captions or [f"picture {i + 1}" for i in range(len(images))]
    return [(image, str(caption)) for image, caption in zip(images, captions, strict=True)]


def status_field(elem_id: str) -> gr.HTML:
    """A line that says how far the work has come; screen readers hear it change."""
    return gr.HTML(value=told(""), elem_id=elem_id, elem_classes="status", padding=False)


def told(text: object, busy: bool = False) -> str:
    """The content of `status_field`; `busy` while there is something to cancel."""
    return f'<p role="status" aria-live="polite"{BUSY if busy else ""}>{escape(str(text))}</p>'
