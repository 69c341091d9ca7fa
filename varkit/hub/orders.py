"""Another order at run time: `Pipeline.scheduled`, `sized`, `refined` and `diffused`.

Schedules are for a model that takes any (FlexVAR, arXiv 2502.20313, Sec. 3.4). There guidance and sampling depend on
the schedule as in the released sampler: a ramp of guidance rises over nine steps at most, and scales of sides that
training never drew are drawn greedily. So a pipeline keeps settings that know no schedule, and whatever replaces some
of them, `by_schedule` makes numbers for each step of them as a run starts.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from varkit.errors import UserError
from varkit.heads.diffusion import DiffusionHead
from varkit.plans.flexible import FlexibleScalesConfig, ramp
from varkit.plans.masked import MaskedConfig
from varkit.plans.ratios import sized
from varkit.plans.refined import RefinedConfig, parse_counts
from varkit.plans.scales import ScalesConfig
from varkit.plans.schedule import Schedule, Side

if TYPE_CHECKING:
    from varkit.hub.pipeline import Pipeline, Settings


def scheduled(
    pipeline: "Pipeline",
    schedule: Sequence[Side] | int,
    greedy_unseen: bool | None = None,
    clamp: bool | None = None,
) -> "Pipeline":
    """What `Pipeline.scheduled` gives."""
    own = pipeline.configs["plan"]
    if isinstance(own, MaskedConfig) and isinstance(schedule, int):
        return pipeline.over(replace(own, iterations=schedule))
    plan = _flexible(pipeline)
    if isinstance(schedule, int):
        return _over(pipeline, plan.stepped(schedule), greedy_unseen, clamp)
    Schedule.parse(schedule)  # raises for what is no schedule
    return _over(pipeline, plan.over(schedule), greedy_unseen, clamp)


def at_size(
    pipeline: "Pipeline",
    size: tuple[int, int] | None,
    greedy_unseen: bool | None = None,
    clamp: bool | None = None,
) -> "Pipeline":
    """What `Pipeline.sized` gives: a flexible plan makes any size of whole tokens, Infinity's those of its table."""
    plan = pipeline.configs["plan"]
    if not isinstance(plan, FlexibleScalesConfig) and greedy_unseen is clamp is None:
        if size is not None and size != pipeline.size and isinstance(plan, ScalesConfig) and plan.ratios:
            return pipeline.over(sized(*size))
        pipeline.check_size(size)
        return pipeline
    plan = _flexible(pipeline)
    if size is None or size == pipeline.size:
        return _over(pipeline, plan, greedy_unseen, clamp)
    stride = pipeline.tokenizer.stride
    if size[0] % stride or size[1] % stride or min(size) < stride:
        near = [max(1, round(n / stride)) * stride for n in size]
        raise UserError(
            f"size {size[0]}x{size[1]} is no multiple of the {stride} pixels of a token; the nearest is "
            f"{near[0]}x{near[1]}"
        )
    return _over(pipeline, plan.to_grid((size[0] // stride, size[1] // stride)), greedy_unseen, clamp)


def refined(pipeline: "Pipeline", counts: str) -> "Pipeline":
    """What `Pipeline.refined` gives."""
    plan = pipeline.configs["plan"]
    if not isinstance(plan, RefinedConfig):
        raise UserError("this model does not refine its scales; leave the refinement out, or use an HMAR")
    return pipeline.over(replace(plan, counts=parse_counts(counts, Schedule.parse(plan.schedule))))


def diffused(pipeline: "Pipeline", steps: int) -> "Pipeline":
    """What `Pipeline.diffused` gives."""
    diffusing = {name: part for name, part in pipeline.parts.items() if isinstance(part, DiffusionHead)}
    if not diffusing:
        raise UserError("this model has no diffusion head; leave the diffusion steps out, or take a MAR")
    heads = {name: head.stepped(steps) for name, head in diffusing.items()}
    return pipeline.swapped(heads, {name: head.config for name, head in heads.items()})


def _flexible(pipeline: "Pipeline") -> FlexibleScalesConfig:
    plan = pipeline.configs["plan"]
    if not isinstance(plan, FlexibleScalesConfig):
        raise UserError(
            "this model draws in the one order that it was trained with; leave the schedule and its steps out, or take "
            "a FlexVAR"
        )
    return plan


def _over(
    pipeline: "Pipeline", plan: FlexibleScalesConfig, greedy_unseen: bool | None, clamp: bool | None
) -> "Pipeline":
    if greedy_unseen is not None:
        plan = replace(plan, greedy_unseen=greedy_unseen)
    if clamp is not None:
        plan = replace(plan, clamp=clamp)
    return pipeline if plan == pipeline.configs["plan"] else pipeline.over(plan)


def by_schedule(settings: "Settings", plan: object) -> "Settings":
    """Settings for the steps of a flexible plan, any other plan's as they are.

    A rising guidance takes the schedule's ramp, and a temperature is 0 at scales drawn greedily. What is given for each
    step already is left so.
    """
    if not isinstance(plan, FlexibleScalesConfig):
        return settings
    temperature, rising, unseen = settings.temperature, settings.ramp, plan.unseen()
    if plan.greedy_unseen and any(unseen) and not isinstance(temperature, tuple):
        temperature = tuple(0.0 if new else temperature for new in unseen)
    if rising is True:
        rising = ramp(Schedule.parse(plan.schedule), plan.trained, plan.clamp)
    return replace(settings, temperature=temperature, ramp=rising)
