"""FlexVAR (arXiv 2502.20313): steps, size and shape chosen at run time, from one model; VAR out of its schedule.

Small digits stand in for ImageNet: pyramids of six scales up to 8 x 8 in place of ten up to 16 x 16, and 4, 5, 6 and 8
steps in place of 6, 8, 10 and 13 (training draws 4 to 6). Both arms get the same pictures, steps and generator; each
has its own tokenizer, since FlexVAR's maps are no residuals.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from varkit.catalog.experiment import All, Arm, AtLeast, AtMost, Experiment, Metric, Part, Subject
from varkit.catalog.harness import PICTURES
from varkit.catalog.measures import EVALUATIONS, PARAMETERS, SECONDS, digits_read, fid_to
from varkit.catalog.models import Trained
from varkit.generators.var import VAR
from varkit.hub.pipeline import Pipeline
from varkit.plans.base import StaticPlan
from varkit.plans.flexible import FlexibleScalesConfig
from varkit.plans.scales import ScalesConfig
from varkit.plans.schedule import Schedule, Side
from varkit.train.recipes import digit_scales, flexvar_digits
from varkit.train.recipes.flexvar import VALIDATED
from varkit.train.recipes.recipe import PYRAMID

PICTURES_JUDGED = 600
HELD_OUT = 252
"""All held-out digits."""

MINUTES = 6.0
FEW: tuple[Side, ...] = VALIDATED[0]
"""Four steps, whose sides VAR was trained with, one by one, but never in this schedule."""

BASE = "VAR, 6 steps"
SIZES_UNSEEN = ((48, 48), (32, 24))
STRIDE = 4
"""Pixels a position."""


def var(seed: int) -> Trained:
    """The base, in the schedule that it was trained in."""
    return Trained(digit_scales(), seed, expected=MINUTES)


def flexvar(seed: int) -> Trained:
    """FlexVAR over the same pictures."""
    return Trained(flexvar_digits(), seed, expected=MINUTES + 1)


def in_steps(steps: int) -> Callable[[Pipeline], Pipeline]:
    """FlexVAR in so many steps."""
    return lambda pipeline: pipeline.scheduled((1, 2, 3, 4, 6, 8) if steps == 6 else steps)


def in_size(height: int, width: int) -> Callable[[Pipeline], Pipeline]:
    """FlexVAR at another size or shape."""
    return lambda pipeline: pipeline.sized((height, width))


def schedule_for(height: int, width: int) -> tuple[Side, ...]:
    """The scales in which FlexVAR draws pictures of a size."""
    plan = FlexibleScalesConfig(PYRAMID).to_grid((height // STRIDE, width // STRIDE))
    return plan.schedule


@torch.no_grad()
def out_of_schedule(pipeline: Pipeline, schedule: tuple[Side, ...] = FEW) -> Pipeline:
    """VAR in a schedule that it was not trained in: each scale takes the positions and the level of the scale of its
    size, or of the nearest, resized.
    """
    trained = pipeline.generator
    assert isinstance(trained, VAR)
    own, other = Schedule.parse(trained.config.schedule), Schedule.parse(schedule)
    moved = replace(trained.config, schedule=schedule).build().to(pipeline.device).eval()
    nearest = [min(range(len(own)), key=lambda k: abs(own.lengths[k] - n)) for n in other.lengths]
    tables = (
        _resized(trained.position[own.offsets[k] : own.offsets[k + 1]], own.sides[k], side)
        for k, side in zip(nearest, other.sides, strict=True)
    )
    state = trained.state_dict() | {
        "position": torch.cat(list(tables)),
        "level.weight": trained.level.weight[nearest],
    }
    moved.load_state_dict(state)
    plan = ScalesConfig(schedule)
    parts = pipeline.parts | {"generator": moved, "plan": plan.build()}
    return Pipeline(parts, pipeline.configs | {"generator": moved.config, "plan": plan}, pipeline.settings)


def _resized(table: Tensor, before: tuple[int, int], after: tuple[int, int]) -> Tensor:
    """Positions (h w, C) of one grid at another."""
    grid = table.mT.reshape(1, -1, *before)
    return F.interpolate(grid, after, mode="bilinear").flatten(2)[0].mT


def last_scale(n: int) -> tuple[Metric, Metric]:
    """Of n held-out digits in the arm's schedule: the loss at the last scale, true scales before it, in nats a token;
    and the mean squared error of the tokenizer's reconstruction. FlexVAR's is that of the last map alone: no schedule
    changes it, and no rule asks for it.
    """

    def measured(subject: Subject) -> tuple[float, float]:
        if "last scale" not in subject.kept:
            subject.kept["last scale"] = _last_scale(subject.pipeline, n)
        return subject.kept["last scale"]

    return (
        Metric("last scale's loss", lambda subject: measured(subject)[0], "nats a token"),
        Metric("reconstruction error", lambda subject: measured(subject)[1]),
    )


@torch.no_grad()
def _last_scale(pipeline: Pipeline, n: int) -> tuple[float, float]:
    from varkit.data.real import Digits
    from varkit.pictures import to_tensor
    from varkit.train.lessons import Lesson
    from varkit.train.objective import NextStepLoss

    batch = Digits().split("validation").batch(range(n), pipeline.size)
    assert batch.labels is not None and pipeline.schedule is not None
    assert isinstance(pipeline.model.plan, StaticPlan)
    images, schedule = to_tensor(batch.images), pipeline.schedule
    latents = pipeline.tokenizer.encode(images, schedule)
    canvas = pipeline.tokenizer.canvas(len(images), schedule)
    canvas.fill(latents)
    step = pipeline.model.plan.training_step()
    lesson = Lesson(canvas, step, canvas.latents(), schedule.total)
    objective = NextStepLoss(pipeline.generator, pipeline.model.heads["main"], condition_drop=0.0).eval()
    losses = objective.losses(lesson, {"label": torch.from_numpy(batch.labels)})
    error = (pipeline.tokenizer.decode(latents, schedule) - images).square().mean()
    return float(losses[:, -schedule.lengths[-1] :].mean()), float(error)


def whole_digits_read(n: int) -> Metric:
    """Share of 10 n drawn digits read as asked, whatever their size and shape, once brought to 32 x 32."""

    def measure(subject: Subject) -> float:
        from PIL import Image

        from varkit.evaluate.digits import classifier
        from varkit.evaluate.drawing import BATCH, draw, padded

        asked = [i % 10 for i in range(padded(10 * n))]
        drawn = list(draw(subject.pipeline, asked, subject.seed))
        images = np.stack(
            [np.asarray(Image.fromarray(one).resize((32, 32), Image.Resampling.BOX)) for one in drawn]
        )
        subject.kept[PICTURES] = images[:BATCH]
        read = classifier((32, 32))[0](images)
        return float((read == np.array(asked)).mean())

    return Metric("digits read", measure, key=str(n))


STEPS = Part(
    name="steps",
    paper="FID 3.05 against VAR's 3.55 (d16, 10 steps); 2.08 in 13 steps never trained on, 2.21 in 10 (d24)",
    arms=(
        Arm(BASE, var),
        *(Arm(f"FlexVAR, {steps} steps", flexvar, in_steps(steps)) for steps in (4, 5, 6, 8)),
        *(
            Arm(f"VAR, {len(sides)} steps", var, partial(out_of_schedule, schedule=sides))
            for sides in VALIDATED
        ),
    ),
    metrics=(PARAMETERS, EVALUATIONS, SECONDS, fid_to("digits", PICTURES_JUDGED), digits_read(30)),
    rule=All(
        (
            AtMost("FID", "FlexVAR, 6 steps", BASE, 1.0),
            AtMost("FID", "FlexVAR, 8 steps", "FlexVAR, 6 steps", 1.0),
            AtMost("FID", "FlexVAR, 6 steps", "FlexVAR, 4 steps", 1.0),
        )
    ),
)

OUT_OF_SCHEDULE = Part(
    name="schedules never trained in",
    paper="any number of steps without loss (no figure for VAR out of its schedule)",
    arms=(
        Arm(BASE, var),
        Arm("VAR, 4 steps", var, out_of_schedule),
        *(Arm(f"FlexVAR, {steps} steps", flexvar, in_steps(steps)) for steps in (4, 6, 8)),
    ),
    metrics=(*last_scale(HELD_OUT), fid_to("digits", PICTURES_JUDGED)),
    rule=All(
        (
            AtMost("last scale's loss", "FlexVAR, 4 steps", "FlexVAR, 6 steps", 1.1),
            AtMost("last scale's loss", "FlexVAR, 8 steps", "FlexVAR, 6 steps", 1.1),
            AtMost("FID", "FlexVAR, 4 steps", "VAR, 4 steps", 1.0),
            AtLeast("last scale's loss", "VAR, 4 steps", BASE, 1.5),
        )
    ),
)

SIZES = Part(
    name="sizes never trained on",
    paper="512 x 512 from a model of 256 x 256 (FID 4.43, against 2.63 of VAR trained there); shapes shown in pictures",
    arms=(
        Arm("32x32", flexvar),
        *(Arm(f"{h}x{w}", flexvar, in_size(h, w)) for h, w in SIZES_UNSEEN),
        *(
            Arm(f"VAR, {h}x{w}", var, partial(out_of_schedule, schedule=schedule_for(h, w)))
            for h, w in SIZES_UNSEEN
        ),
    ),
    metrics=(EVALUATIONS, whole_digits_read(30)),
    rule=All(
        (
            AtLeast("digits read", "48x48", "32x32", 0.8),
            AtLeast("digits read", "32x24", "32x32", 0.8),
        )
    ),
)

EXPERIMENT = Experiment(
    "flexvar",
    "Class-conditional digits at 32 x 32, the same steps of training for both; sides up to 8 in place of 16.",
    (STEPS, OUT_OF_SCHEDULE, SIZES),
)
