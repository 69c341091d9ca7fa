"""Refinement and expansion with a model of any schedule (FlexVAR, arXiv 2502.20313, Sec. 4.4); nothing is trained.

Refinement: a small picture is the map of the scale that has its size, and the scales after it are drawn. Expansion: a
picture keeps its tokens inside a larger one, whose rest is drawn. No code is published; ours are overrides of sampled
tokens (`varkit.edit.inpaint`), so both are ordinary runs. Legend: B samples, H W pixels, L positions.
"""

from typing import Any

import numpy as np
import torch
from PIL import Image

from varkit.decode.loop import run
from varkit.decode.state import State
from varkit.edit.inpaint import fitted, inpaint, start_kept
from varkit.errors import UserError
from varkit.hub.pipeline import Pipeline, Prompt
from varkit.pictures import to_tensor
from varkit.plans.schedule import Schedule
from varkit.tokenizers.map_vq import MapVQ


def refine(
    pipeline: Pipeline,
    image: Image.Image,
    prompt: Prompt | None = None,
    n: int = 1,
    seed: int = 0,
    **settings: Any,
) -> list[Image.Image]:
    """Draw `n` pictures at the model's size from a smaller one; without a prompt the model is not told what.

    Raises `UserError` for a model whose maps do not stand alone, and for a picture that is too small or not smaller.
    """  # fmt: skip
    state = start_refine(pipeline, image, prompt, n, seed, **settings)
    return pipeline.pictures(run(pipeline.model, state))


@torch.no_grad()
def start_refine(
    pipeline: Pipeline,
    image: Image.Image,
    prompt: Prompt | None = None,
    n: int = 1,
    seed: int = 0,
    first: int = 0,
    **settings: Any,
) -> State:
    """The state that `refine` decodes: tokens of the picture's scale, and of those before it, are its own."""
    tokenizer, schedule = pipeline.tokenizer, pipeline.schedule
    if not isinstance(tokenizer, MapVQ) or schedule is None:
        raise UserError(
            "refining needs a model whose scales are pictures by themselves (FlexVAR); train flexvar-digits"
        )
    level = matching_level(schedule, tokenizer.stride, (image.height, image.width))
    side = schedule.sides[level]
    size = (side[0] * tokenizer.stride, side[1] * tokenizer.stride)
    pixels = to_tensor(np.asarray(fitted(image, size))[None]).to(pipeline.device)
    f = tokenizer.encode_features(pixels, Schedule.of(side))
    known = tokenizer.quantizer.encode(f, Schedule.of(*schedule.sides[: level + 1]))
    true = tokenizer.quantizer.empty(1, schedule.total)
    true[:, : known.shape[1]] = known
    keep = torch.arange(schedule.total) < known.shape[1]
    return start_kept(pipeline, true, keep, prompt, seed, range(first, first + n), settings)


def matching_level(schedule: Schedule, stride: int, size: tuple[int, int]) -> int:
    """The largest level but the last whose picture is not larger than (H, W). Raises `UserError` where none is."""
    fits = [k for k, (h, w) in enumerate(schedule.sides) if h * stride <= size[0] and w * stride <= size[1]]
    if not fits or fits[-1] == len(schedule) - 1:
        (h0, w0), (h1, w1) = schedule.sides[0], schedule.last
        raise UserError(
            f"a picture of {size[0]}x{size[1]} cannot be refined by this model; give one of at least "
            f"{h0 * stride}x{w0 * stride} that is smaller than {h1 * stride}x{w1 * stride}"
        )
    return fits[-1]


def expand(
    pipeline: Pipeline,
    image: Image.Image,
    size: tuple[int, int],
    prompt: Prompt | None = None,
    n: int = 1,
    seed: int = 0,
    place: tuple[float, float] = (0.5, 0.5),
    **settings: Any,
) -> list[Image.Image]:
    """Draw `n` pictures of (height, width) pixels around a smaller one, for a model that makes pictures of this size.

    place: where the picture's free space is split, from top and left; one half centres it. Raises `UserError` for a
    size that the model cannot make, or that the picture does not fit into.
    """  # fmt: skip
    larger, redraw = surrounded(image, size, place)
    return inpaint(pipeline.sized(size), larger, redraw, prompt, n, seed, **settings)


def surrounded(
    image: Image.Image, size: tuple[int, int], place: tuple[float, float] = (0.5, 0.5)
) -> tuple[Image.Image, np.ndarray]:
    """The picture in a larger one of (height, width), its edges repeated outwards; and where that is new, (H, W) bool.

    Raises `UserError` as `expand` does.
    """
    free = (size[0] - image.height, size[1] - image.width)
    if min(free) < 0 or free == (0, 0):
        raise UserError(
            f"a picture of {image.height}x{image.width} cannot be expanded to {size[0]}x{size[1]}; give a larger size"
        )
    if not all(0 <= share <= 1 for share in place):
        raise UserError(f"place {place} is outside 0 to 1; 0.5 0.5 centres the picture")
    before = [round(space * share) for space, share in zip(free, place, strict=True)]
    around = [(b, space - b) for b, space in zip(before, free, strict=True)]
    pixels = np.pad(np.asarray(image.convert("RGB")), (*around, (0, 0)), mode="edge")
    redraw = np.ones(size, dtype=bool)
    redraw[before[0] : before[0] + image.height, before[1] : before[1] + image.width] = False
    return Image.fromarray(pixels), redraw
