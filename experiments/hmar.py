"""HMAR (arXiv 2506.04421): refined scales against VAR's, refinement without training, and what a picture costs.

Small digits stand in for ImageNet. Quality: both stages of HMAR together take the base's steps over its tokens; the
refining branch, two of four blocks and a head, comes on top of the base's parameters; drawn in one shot it is not used,
and the parameters are the base's. Cost: random weights at the published schedules of 256, 512 and 1024 pixels, a narrow
generator of eight blocks (of two, the head and sampling, the same for both, would be most of it), one picture, on the
CPU; memory is the most by which a process grows, weights included.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial

from varkit.catalog.costs import Work, peak_memory, seconds
from varkit.catalog.experiment import All, Arm, AtMost, Experiment, Metric, Part, Subject
from varkit.catalog.measures import EVALUATIONS, PARAMETERS, digits_read, fid_to
from varkit.catalog.models import Trained
from varkit.generators.conditioning import ClassConfig
from varkit.generators.hmar import HMARConfig
from varkit.generators.var import VARConfig
from varkit.hub.pipeline import Pipeline
from varkit.hub.published_hmar import plan
from varkit.plans.refined import MASK, RefinedPlan, coarse_counts
from varkit.plans.scales import ScalesConfig
from varkit.plans.schedule import Schedule
from varkit.train.recipes import digit_scales, hmar_digits

PICTURES = 600
BASE_MINUTES, MINUTES = 6.0, 4.0


def base(seed: int) -> Trained:
    """VAR on digits over six scales."""
    return Trained(digit_scales(), seed, expected=BASE_MINUTES)


def refined(seed: int) -> Trained:
    """HMAR over the base's tokenizer."""
    return Trained(hmar_digits(), seed, base(seed), expected=MINUTES)


def recounted(pipeline: Pipeline, few: Mapping[int, tuple[int, ...]] | None) -> Pipeline:
    """The same weights with the released counts, less or more refined: `few` by a scale's positions, None for none."""
    config = pipeline.configs["plan"]
    counts = () if few is None else coarse_counts(Schedule.parse(config.schedule), few)
    return pipeline.over(replace(config, counts=counts))


def in_use(subject: Subject) -> float:
    """Millions of parameters of generator and heads without the refining branch, where no step refines."""
    parts, plan = subject.pipeline.parts, subject.pipeline.model.plan
    unused = 0
    if isinstance(plan, RefinedPlan) and plan.evaluations == len(plan.schedule):
        branch = [p for name, p in parts["generator"].named_parameters() if name.startswith("mask_")]
        unused = sum(p.numel() for p in [*branch, *subject.pipeline.model.heads[MASK].parameters()])
    return PARAMETERS.measure(subject) - unused / 1e6


USED = Metric("parameters in use", in_use, "M")

QUALITY = Part(
    name="quality",
    paper="FID 3.01 against 3.36 of VAR-d16 (ImageNet 256)",
    arms=(
        Arm("VAR", base),
        Arm("HMAR", refined),
        Arm("HMAR, one shot", refined, partial(recounted, few=None)),
    ),
    metrics=(PARAMETERS, USED, EVALUATIONS, fid_to("digits", PICTURES), digits_read(30)),
    rule=AtMost("FID", "HMAR", "VAR", 1.0),
)

REFINEMENT = Part(
    name="refinement without training",
    paper="masked steps lower FID from 3.42 to 3.01 (ImageNet 256, d16)",
    arms=(
        Arm("one shot", refined, partial(recounted, few=None)),
        Arm("coarse scales", refined, partial(recounted, few={})),
        Arm("up to 4 x 4", refined, partial(recounted, few={16: (1, 3, 5, 7)})),
    ),
    metrics=(EVALUATIONS, fid_to("digits", PICTURES), digits_read(30)),
    rule=AtMost("FID", "coarse scales", "one shot", 1.0),
)

SIDES: dict[int, tuple[int, ...]] = {
    256: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    512: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
    1024: (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64),
}
WIDTH, HEADS, DEPTH, CODES, CODE_WIDTH = 256, 4, 8, 4096, 32
ROUNDS = {256: 5, 512: 3, 1024: 1}
"""Timed after a first, untimed one."""


@dataclass(frozen=True)
class Cost:
    """Seconds of a training step and of drawing a picture, and the most megabytes that either takes."""

    training: float
    drawing: float
    drawing_memory: float
    training_memory: float


def work(method: str, schedule: tuple[int, ...], train: bool) -> Work:
    """One training step, of first guesses, or one guided picture, by VAR or HMAR with random weights."""
    told = (DEPTH, WIDTH, HEADS, schedule, CODE_WIDTH, ClassConfig(1000))
    if method == "VAR":
        order, generator = ScalesConfig(schedule), VARConfig(*told)
    else:
        order, generator = plan(schedule), HMARConfig(*told, mask_depth=DEPTH // 2)
    return Work(order, batch=1, train=train, codes=CODES, generator=generator)


@cache
def costs(size: int) -> dict[str, Cost]:
    """Both methods at a size, what takes time in turn."""
    works = {name: [work(name, SIDES[size], train) for train in (True, False)] for name in ("VAR", "HMAR")}
    memory = {name: [peak_memory(w) for w in reversed(own)] for name, own in works.items()}
    times = iter(seconds([w for own in works.values() for w in own], ROUNDS[size]))
    return {name: Cost(next(times), next(times), *memory[name]) for name in works}


def cost(name: str) -> Callable[[Subject], float]:
    """A figure of the subject's options: method and size."""
    return lambda subject: getattr(costs(subject.options["size"])[subject.options["method"]], name)


COSTS = (
    Metric("training step", cost("training"), "s"),
    Metric("drawing", cost("drawing"), "s"),
    Metric("memory in drawing", cost("drawing_memory"), "MB"),
    Metric("memory in training", cost("training_memory"), "MB"),
)

COST = Part(
    name="cost over growing pictures",
    paper="at 1024 pixels training over 2.5x and drawing over 1.75x as fast as VAR, in less than a third of the memory",
    arms=tuple(
        Arm(f"{method} {size}", base, options={"method": method, "size": size})
        for size in SIDES
        for method in ("VAR", "HMAR")
    ),
    metrics=COSTS,
    rule=All(
        (
            AtMost("training step", "HMAR 1024", "VAR 1024", 1 / 2.5),
            AtMost("drawing", "HMAR 1024", "VAR 1024", 1 / 1.75),
            AtMost("memory in drawing", "HMAR 1024", "VAR 1024", 1 / 3),
        )
    ),
    seeds=(0,),
    sampling=True,
)

EXPERIMENT = Experiment(
    "hmar",
    "Class-conditional digits at 32 x 32 over six scales, equal steps; cost with random weights on a CPU.",
    (QUALITY, REFINEMENT, COST),
)
