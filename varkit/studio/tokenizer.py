"""The page that takes a picture apart: its reconstruction scale by scale, the codes it uses, and where it errs.

Legend: B = 1 picture, L positions of all scales, n positions of one, H W pixels.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from PIL import Image, ImageOps
from torch import Tensor

from varkit.data.images import fit, open_image
from varkit.errors import UserError
from varkit.evaluate.reconstruction import psnr
from varkit.hub.pipeline import Pipeline
from varkit.pictures import to_pil, to_tensor
from varkit.studio.controls import Models, captioned, model_field, pictures_field, runs, status_field, told
from varkit.studio.drawing import enlarged
from varkit.tokenizers.base import Latents
from varkit.tokenizers.residual import QuantizedTokenizer

LARGEST_ERROR = 0.5
"""What the brightest colour of the error map stands for, as a part of the range from black to white."""


@dataclass(frozen=True)
class Level:
    """A scale, reconstructed with all before it: `chosen` (n, ...) are its ids or bits, None without codes."""

    grid: tuple[int, int]
    image: Tensor
    chosen: Tensor | None
    psnr: float


def take_apart(models: Models, name: str, file: str | None) -> Iterator[tuple[Any, ...]]:
    """The picture with its reconstructions so far, the error map, the table of scales, and the status."""
    yield None, None, "", told("Starting.", busy=True)
    if file is None:
        raise UserError("there is no picture; drop one into the field")
    pipeline = models[name]
    pixels = to_tensor(fit(open_image(Path(file).read_bytes()), pipeline.size, zoom=1.0)[None])
    levels: list[Level] = []
    for level in rebuilt(pipeline, pixels):
        levels.append(level)
        images = [*to_pil(pixels), *(image for each in levels for image in to_pil(each.image))]
        captions = ["the picture", *(_size(each.grid) for each in levels)]
        line = summary(pipeline, levels)
        yield captioned(images, captions), error_map(pixels, level.image), table(levels), told(line)


@torch.no_grad()
def rebuilt(pipeline: Pipeline, pixels: Tensor) -> Iterator[Level]:
    """The levels of a picture (1, 3, H, W), coarse to fine; a tokenizer that has no scales gives one."""
    tokenizer = pipeline.tokenizer
    schedule = pipeline.schedule or tokenizer.schedule
    latents: Latents = tokenizer.encode(pixels.to(pipeline.device), schedule)
    scaled = isinstance(tokenizer, QuantizedTokenizer)
    for k in range(len(schedule)) if scaled else [len(schedule) - 1]:
        image = tokenizer.decode(latents, schedule, k + 1 if scaled else None).float().cpu()
        chosen = latents[tokenizer.quantizer.latent][0] if scaled else None
        if chosen is not None:
            chosen = chosen[schedule.offsets[k] : schedule.offsets[k + 1]]
        yield Level(schedule.sides[k], image, chosen, psnr(float((image - pixels).square().mean())))


def summary(pipeline: Pipeline, levels: Sequence[Level]) -> str:
    """How good the picture is so far, and how much of the codebook it uses."""
    quality = f"{levels[-1].psnr:.1f} dB PSNR"
    parts = [level.chosen for level in levels if level.chosen is not None]
    if not parts:
        return f"{quality}; this tokenizer has no codes."
    chosen, codebook = torch.cat(parts), getattr(pipeline.tokenizer.quantizer, "codebook", None)
    used = f"{quality}; {len(chosen)} positions use {_different(chosen)} different codes"
    if codebook is None:
        return f"{used} of {chosen.shape[-1]} bits."
    return f"{used} of {len(codebook)} ({_different(chosen) / len(codebook):.1%} of the codebook)."


def error_map(pixels: Tensor, image: Tensor) -> Image.Image:
    """Mean absolute error over the channels of two pictures (1, 3, H, W): black is none, yellow much."""
    error = (image - pixels).abs().mean(dim=1)[0] / 2 / LARGEST_ERROR
    grey = Image.fromarray((error.clamp(max=1) * 255).round().byte().numpy())
    return enlarged(ImageOps.colorize(grey, black="black", mid="red", white="yellow"))


def table(levels: Sequence[Level]) -> str:
    """The scales as an HTML table."""
    rows = [(_size(level.grid), *_counts(level), f"{level.psnr:.1f}") for level in levels]
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    head = "<tr><th>Scale</th><th>Positions</th><th>Different codes</th><th>PSNR, dB</th></tr>"
    return f"<table><thead>{head}</thead><tbody>{body}</tbody></table>"


def page(models: Models) -> None:
    """Build the page."""
    with gr.Row():
        with gr.Column(min_width=280):
            model = model_field(models)
            # Not `gr.Image`, which opens the file itself and fails without a word where it is no picture.
            picture = gr.File(label="Picture", file_types=["image"], elem_id="tokenizer-picture")
            with gr.Row():
                start = gr.Button("Take apart", variant="primary", min_width=100)
                cancel = gr.Button("Cancel", min_width=100)
        with gr.Column(min_width=280):
            status = status_field("tokenizer-status")
            scales = pictures_field("Scale by scale", "tokenizer-scales", small=True)
            errors = gr.Image(
                label=f"Error: black is none, yellow {LARGEST_ERROR:.0%} of the range",
                format="png",
                interactive=False,
                buttons=["fullscreen"],
                elem_id="tokenizer-errors",
            )
            codes = gr.HTML(elem_id="tokenizer-codes")
    outputs = [scales, errors, codes, status]
    runs([start.click, picture.upload], partial(take_apart, models), [model, picture], outputs, cancel)


def _size(grid: tuple[int, int]) -> str:
    return f"{grid[0]} x {grid[1]}"


def _counts(level: Level) -> tuple[str, str]:
    """Positions and different codes, empty without codes."""
    return ("", "") if level.chosen is None else (str(len(level.chosen)), str(_different(level.chosen)))


def _different(chosen: Tensor) -> int:
    return len(chosen.unique(dim=0))
