"""Another schedule at run time for a model that takes any (FlexVAR, arXiv 2502.20313, Sec. 3.4): `Pipeline.scheduled`.

Guidance and sampling depend on the schedule as in the released sampler: a ramp of guidance rises over nine steps at
most, and scales of sides that training never drew are drawn greedily.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from varkit.errors import UserError
from varkit.plans.flexible import FlexibleScalesConfig, ramp
from varkit.plans.schedule import Schedule, Side

if TYPE_CHECKING:
    from varkit.hub.pipeline import Pipeline, Settings


def scheduled(
    pipeline: "Pipeline", schedule: Sequence[Side] | int, greedy_unseen: bool = True, clamp: bool = False
) -> "Pipeline":
    """What `Pipeline.scheduled` gives."""
    plan = _flexible(pipeline)
    if isinstance(schedule, int):
        return _over(pipeline, plan.stepped(schedule), greedy_unseen, clamp)
    Schedule.parse(schedule)  # raises for what is no schedule
    return _over(pipeline, plan.over(schedule), greedy_unseen, clamp)


def at_size(pipeline: "Pipeline", size: tuple[int, int]) -> "Pipeline":
    """The same for pictures of (height, width) pixels. Raises `UserError` for a size between the tokenizer's steps."""
    stride = pipeline.tokenizer.stride
    if size[0] % stride or size[1] % stride or min(size) < stride:
        near = [max(1, round(n / stride)) * stride for n in size]
        raise UserError(
            f"size {size[0]}x{size[1]} is no multiple of the {stride} pixels of a token; the nearest is "
            f"{near[0]}x{near[1]}"
        )
    plan = _flexible(pipeline).to_grid((size[0] // stride, size[1] // stride))
    return _over(pipeline, plan, greedy_unseen=True, clamp=False)


def _flexible(pipeline: "Pipeline") -> FlexibleScalesConfig:
    plan = pipeline.configs["plan"]
    if not isinstance(plan, FlexibleScalesConfig):
        raise UserError(
            "this model draws in the one order that it was trained with; leave the schedule out, or take a FlexVAR"
        )
    return plan


def _over(pipeline: "Pipeline", plan: FlexibleScalesConfig, greedy_unseen: bool, clamp: bool) -> "Pipeline":
    other = pipeline.over(plan)
    other.settings = adapted(pipeline.settings, plan, greedy_unseen, clamp)
    return other


def adapted(settings: "Settings", plan: FlexibleScalesConfig, greedy_unseen: bool, clamp: bool) -> "Settings":
    """Settings for the plan's schedule: the ramp, if there is one, and temperature 0 at scales drawn greedily."""
    temperature = settings.temperature
    # What an earlier schedule made of it.
    usual = max(temperature) if isinstance(temperature, tuple) else temperature
    unseen = plan.unseen()
    if greedy_unseen and any(unseen):
        temperature = tuple(0.0 if new else usual for new in unseen)
    else:
        temperature = usual
    rising = ramp(Schedule.parse(plan.schedule), plan.trained, clamp) if settings.ramp else False
    return replace(settings, temperature=temperature, ramp=rising)
