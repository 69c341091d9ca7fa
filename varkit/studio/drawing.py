"""A run as a page shows it: the pictures so far, with steps, time and cost, a few dozen times or once a second.

Time is that of decoding alone; making the previews is not counted. Legend: B samples.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image

from varkit.decode.loop import advance
from varkit.decode.state import State
from varkit.errors import UserError
from varkit.hub.pipeline import Pipeline
from varkit.plans.ratios import BUDGETS, SCHEDULES, STRIDE

MOST_PREVIEWS = 32
"""A pyramid shows each of its scales; an order of hundreds of steps about this many of them, if they are quick."""

LONGEST_SILENCE = 1.0
"""Seconds of decoding after which there is a frame in any case: only between frames can a run be cancelled."""

OWN_SIZE = "the model's own"
ENLARGED = 512
"""About how many pixels wide or high `enlarged` makes a picture."""


@dataclass(frozen=True)
class Frame:
    """B pictures after `step` of `steps` (None: not known beforehand), `seconds` of decoding and `passes` of the
    network. name: the step's own, such as that of a scale.
    """

    images: list[Image.Image]
    step: int
    steps: int | None
    name: str
    seconds: float
    passes: int
    finished: bool

    def __str__(self) -> str:
        """How far it has come, in a line."""
        cost = (
            f"{self.seconds:.2f} s, {self.passes} {'pass' if self.passes == 1 else 'passes'} of the network"
        )
        if self.finished:
            return f"Done: {cost}."
        return f"Step {self.step}{f' of {self.steps}' if self.steps else ''}: {cost}."


def frames(pipeline: Pipeline, state: State) -> Iterator[Frame]:
    """Decode a state to its end; a frame after each step, or after several quick ones where there are many."""
    steps: int | None = getattr(pipeline.model.plan, "evaluations", None)
    every = 1 + (steps or 0) // MOST_PREVIEWS
    step, seconds, shown = 0, 0.0, 0.0
    while not bool(state.finished.all()):
        started = time.perf_counter()
        advance(pipeline.model, state)
        seconds += time.perf_counter() - started
        step += 1
        finished = bool(state.finished.all())
        if finished or step % every == 0 or seconds - shown >= LONGEST_SILENCE:
            shown = seconds
            passes, name = int(state.evaluations.max()), _name(pipeline, step)
            yield Frame(pipeline.pictures(state), step, steps, name, seconds, passes, finished)


def _name(pipeline: Pipeline, step: int) -> str:
    if pipeline.schedule is None or step > len(pipeline.schedule):
        return f"step {step}"
    h, w = pipeline.schedule.sides[step - 1]
    return f"{h} x {w}"


def asked(prompt: str) -> str:
    """What was typed. Raises `UserError` where nothing was."""
    words = prompt.strip()
    if not words:
        raise UserError("the prompt is empty; write a caption, the name of a class, or a label")
    return words


def sizes(pipeline: Pipeline) -> list[str]:
    """What a model offers as the size of its pictures: its own first, then HEIGHTxWIDTH where it makes others."""
    if not getattr(pipeline.configs["plan"], "ratios", False):
        return [OWN_SIZE]
    finest = {sides[levels - 1] for sides in SCHEDULES.values() for levels in BUDGETS.values()}
    return [OWN_SIZE, *(f"{h * STRIDE}x{w * STRIDE}" for h, w in sorted(finest))]


def sized(pipeline: Pipeline, size: str) -> Pipeline:
    """The model for one of its `sizes`."""
    if size == OWN_SIZE:
        return pipeline
    h, w = size.split("x")
    return pipeline.sized((int(h), int(w)))


def enlarged(picture: Image.Image) -> Image.Image:
    """A small picture at a size to look at and to brush on."""
    times = max(1, ENLARGED // max(picture.size))
    return picture.resize((picture.width * times, picture.height * times), Image.Resampling.BICUBIC)
