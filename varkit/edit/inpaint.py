"""Zero-shot in-painting, out-painting and class editing with a next-scale model (VAR, arXiv 2404.02905, Sec. 5).

The picture is encoded to tokens; at each scale the true tokens replace the sampled ones wherever the mask, resized to
that scale, says keep. Nothing is trained, and the model's decoding loop is used as it is.
Legend: B samples, H W pixels, h w grid of a scale, L positions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from varkit.canvases.base import gather_positions
from varkit.decode.loop import run
from varkit.decode.state import State
from varkit.errors import UserError
from varkit.hub.pipeline import Pipeline, Prompt
from varkit.pictures import to_tensor
from varkit.plans.base import CONFIDENCE
from varkit.plans.schedule import Schedule
from varkit.plans.step import Step
from varkit.tokenizers.residual import ScaleQuantizer

ALWAYS_KEPT = 3
"""Scales of at most this many positions keep the picture's own tokens: they hold its overall tone (published rule)."""


def keep_masks(redraw: Tensor, schedule: Schedule) -> Tensor:
    """Where tokens are kept at every scale: redraw (H, W) in [0, 1], 1 = draw anew -> (L,) bool.

    A position of the finest grid is redrawn when any of its pixels is; coarser scales follow by bilinear resizing and a
    threshold of one half, as published.
    """
    keep = 1 - F.adaptive_max_pool2d(redraw.float()[None, None], schedule.last)
    levels = []
    for (h, w), n in zip(schedule.sides, schedule.lengths, strict=True):
        if n <= ALWAYS_KEPT:
            levels.append(torch.ones(n, dtype=torch.bool))
        else:
            levels.append((F.interpolate(keep, (h, w), mode="bilinear") > 0.5).flatten())
    return torch.cat(levels)


@dataclass(frozen=True)
class Keeping:
    """An override that puts the true ids, or bits, in place of sampled ones where they are kept.

    Both travel in the state's extras: `true` (B, L, ...), in the form that the quantizer chooses, and `keep` (B, L)
    bool. Runs of one model have equal ones, so that they can be merged.
    """

    quantizer: ScaleQuantizer

    def __call__(self, step: Step, values: dict[str, Tensor], state: State) -> dict[str, Tensor]:
        true, held = (gather_positions(state.extras[name], step.target) for name in ("true", "keep"))
        name = self.quantizer.latent
        every = held.view(*held.shape, *([1] * (true.ndim - 2)))
        mixed = {**values, name: torch.where(every, true, values[name])}
        if CONFIDENCE in values:  # what is kept is never in doubt, so an order by confidence commits it first
            mixed[CONFIDENCE] = torch.where(held, torch.inf, values[CONFIDENCE])
        if "codes" in values:
            mixed["codes"] = torch.where(held[..., None], self.quantizer.lookup(true), values["codes"])
        return mixed


def inpaint(
    pipeline: Pipeline,
    image: Image.Image,
    redraw: np.ndarray,
    prompt: Prompt | None = None,
    n: int = 1,
    seed: int = 0,
    **settings: Any,
) -> list[Image.Image]:
    """Draw `n` versions of a picture anew where redraw (H, W) is True; without a prompt the model is not told what.

    The picture is brought to the model's size. Everything, also what is kept, comes out of the tokenizer; `paste` puts
    the original pixels back. Raises `UserError` for a model of another order, or a mask of another size.
    """
    state = start_inpaint(pipeline, image, redraw, prompt, n, seed, **settings)
    return pipeline.pictures(run(pipeline.model, state))


@torch.no_grad()
def start_inpaint(
    pipeline: Pipeline,
    image: Image.Image,
    redraw: np.ndarray,
    prompt: Prompt | None = None,
    n: int = 1,
    seed: int = 0,
    first: int = 0,
    negative: Prompt | None = None,
    **settings: Any,
) -> State:
    """The state that `inpaint` decodes, for whoever wants to see it grow.

    first: the number of the first version in the seed's stream. negative: a prompt that guidance leads away from.
    """
    if pipeline.schedule is None:
        kind = type(pipeline.model.plan).__name__
        raise UserError(
            f"editing needs a model that draws scale by scale, and this one follows a {kind}; try 'scenes'"
        )
    if redraw.shape != (image.height, image.width):
        raise UserError(
            f"the mask is {redraw.shape[0]}x{redraw.shape[1]} and the picture {image.height}x{image.width}; "
            "they must have one size"
        )
    tokenizer, schedule = pipeline.tokenizer, pipeline.schedule
    pixels = to_tensor(np.asarray(fitted(image, pipeline.size))[None]).to(pipeline.device)
    true = tokenizer.encode(pixels, schedule)[tokenizer.quantizer.latent]
    keep = keep_masks(torch.from_numpy(redraw), schedule)
    return start_kept(pipeline, true, keep, prompt, seed, range(first, first + n), settings, negative)


def start_kept(
    pipeline: Pipeline,
    true: Tensor,
    keep: Tensor,
    prompt: Prompt | None,
    seed: int,
    numbers: Sequence[int],
    settings: Mapping[str, Any],
    negative: Prompt | None = None,
) -> State:
    """A state for each number of the seed's stream, in which tokens `true` (1, L, ...) stand where keep (L,) is True.

    Without a prompt the model is not told what. Settings are changes to the pipeline's, and follow its schedule.
    """  # fmt: skip
    n, chosen = len(numbers), pipeline.chosen(settings)
    if prompt is None:
        empty = pipeline.unconditional(n)
        state = pipeline.start_from(empty, seed, numbers, replace(chosen, guidance=1.0))
    else:
        state = pipeline.start(pipeline.jobs(prompt, n), seed, numbers, chosen, negative)
    state.options = replace(state.options, override=Keeping(pipeline.tokenizer.quantizer))
    state.extras = {"true": torch.cat([true] * n), "keep": keep.to(true.device).repeat(n, 1)}
    return state


def fitted(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """RGB at (height, width), by Lanczos when it has another size."""
    rgb = image.convert("RGB")
    return rgb if rgb.size == (size[1], size[0]) else rgb.resize((size[1], size[0]), Image.Resampling.LANCZOS)


def paste(edited: Sequence[Image.Image], original: Image.Image, redraw: np.ndarray) -> list[Image.Image]:
    """The edited pictures at the original's size, with its own pixels wherever nothing was to be redrawn."""
    mask = Image.fromarray(redraw.astype(np.uint8) * 255)
    base = original.convert("RGB")
    return [Image.composite(fitted(e, (base.height, base.width)), base, mask) for e in edited]


def box_mask(size: tuple[int, int], box: Sequence[float], inside: bool = True) -> np.ndarray:
    """(H, W) bool: True inside the box (y0, x0, y1, x1), given as fractions of the picture; outside with inside=False.

    Raises `UserError` unless 0 <= y0 < y1 <= 1 and 0 <= x0 < x1 <= 1.
    """
    y0, x0, y1, x1 = box
    if not (0 <= y0 < y1 <= 1 and 0 <= x0 < x1 <= 1):
        raise UserError(
            f"box {tuple(box)} is not Y0 X0 Y1 X1 in fractions of the picture; try 0.25 0.25 0.75 0.75"
        )
    height, width = size
    mask = np.zeros(size, dtype=bool)
    mask[round(y0 * height) : round(y1 * height), round(x0 * width) : round(x1 * width)] = True
    return mask if inside else ~mask
