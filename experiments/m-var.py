"""M-VAR (arXiv 2411.10433): attention within scales and a scan across them, against VAR's attention to everything.

Small digits stand in for ImageNet: the same tokens, steps and, within 1 %, parameters, since the paper's gain is
confounded with the parameters that the scan adds. What grows with the picture is measured on random weights of the same
sizes, since how long a layer takes does not depend on what it has learnt.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean

import torch

from varkit.catalog.costs import Work, exponent, peak_memory, seconds
from varkit.catalog.experiment import (
    All,
    Arm,
    AtMost,
    Experiment,
    Metric,
    Part,
    Subject,
    Values,
    Verdict,
    spread,
)
from varkit.catalog.measures import LOSS, PARAMETERS, digits_read, fid_to
from varkit.catalog.models import Trained
from varkit.decode.cache.full import FullCache
from varkit.generators.base import Generator
from varkit.nn.attention import Packed, SelfAttention, attend
from varkit.nn.scan_block import ScanBlock
from varkit.plans import visibility
from varkit.plans.scales import ScalePlan, ScalesConfig
from varkit.plans.step import Step
from varkit.train.recipes import digit_scales, m_var_digits

PICTURES, ROUNDS, BRANCHES = 600, 5, 2
PUBLISHED = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
GROWTH = (1, 2, 3)
"""Factors on the published sides: 680, 2720 and 6120 slots, as of 256, 512 and 768 pixels."""


def schedules(factors: Sequence[int]) -> list[tuple[int, ...]]:
    """The published schedule, and finer ones of as many scales."""
    return [tuple(factor * side for side in PUBLISHED) for factor in factors]


def grown(subject: Subject, schedule: tuple[int, ...]) -> tuple[Generator, ScalePlan]:
    """The subject's generator with fresh weights, and its plan, over another schedule."""
    config, plan = (subject.pipeline.configs[name] for name in ("generator", "plan"))
    assert isinstance(plan, ScalesConfig)
    torch.manual_seed(subject.seed)
    return replace(config, schedule=schedule).build().eval(), replace(plan, schedule=schedule).build()


def attention(layer: SelfAttention, step: Step) -> Callable[[], torch.Tensor]:
    """A layer's attention among a step's own slots."""
    window = Packed.of(step)
    q, k, v = torch.randn(3, 1, layer.heads, len(step.feed), layer.head_width)
    return lambda: attend(q, window.views(0, q, k, v), layer.scale)


@torch.no_grad()
def growth_across_scales(subject: Subject, factors: Sequence[int] = GROWTH) -> float:
    """The exponent in the slots of the time of what tells a scale of earlier ones, in one layer over all slots.

    That is the scan with its projections, or attention, where it sees earlier scales, without them.
    """
    runs, slots = [], []
    for schedule in schedules(factors):
        generator, plan = grown(subject, schedule)
        step = plan.training_step()
        block = generator.blocks[0]  # type: ignore[index]
        if isinstance(block, ScanBlock):
            runs.append(partial(block.scan, torch.randn(1, len(step.feed), generator.width)))
        else:
            runs.append(attention(block.attention, step))
        slots.append(len(step.feed))
    return exponent(slots, seconds(runs, ROUNDS))


@torch.no_grad()
def drawing(subject: Subject, factor: int) -> Callable[[], int]:
    """What goes through all scales of one picture, with and without condition, and says what the cache then holds, in
    bytes.
    """
    generator, plan = grown(subject, schedules([factor])[0])
    prepared = generator.prepare({"label": torch.zeros(BRANCHES, 1, dtype=torch.int64)})
    channels = generator.config.code_width  # type: ignore[union-attr]

    @torch.no_grad()
    def draw() -> int:
        cache = FullCache(1, BRANCHES, plan.slots)
        for k, step in enumerate(plan.steps):
            fed = {"vectors": torch.zeros(1, len(step.feed), channels)}  # type: ignore[arg-type]
            generator(fed, step, prepared, cache.open(step, torch.tensor([k])))
            cache.close()
        return cache.nbytes

    return draw


def megabytes(subject: Subject, factor: int) -> float:
    """What decoding one picture with guidance keeps of earlier scales."""
    return drawing(subject, factor)() / 1e6


def peak(subject: Subject, factor: int, train: bool) -> float:
    """The most megabytes, weights included, that decoding a guided picture, or a training step over one, takes."""
    generator, plan = (subject.pipeline.configs[name] for name in ("generator", "plan"))
    schedule = schedules([factor])[0]
    generator, plan = (replace(config, schedule=schedule) for config in (generator, plan))
    return peak_memory(Work(plan, batch=1, train=train, generator=generator))


def picture_seconds(subject: Subject, factor: int) -> float:
    """The network's time for one picture with guidance, all scales."""
    return seconds([drawing(subject, factor)], ROUNDS)[0]


def pairs(subject: Subject) -> float:
    """Thousands of pairs of slots that attend to one another, over the published schedule."""
    plan = replace(subject.pipeline.configs["plan"], schedule=PUBLISHED).build()
    step = plan.training_step()
    return visibility.pairs(step.sees.own, len(step.feed)) / 1e3


def named(metric: str, unit: str, measure: Callable[..., float], factor: int) -> Metric:
    """A measurement at so many times the published sides."""
    slots = factor**2 * sum(side * side for side in PUBLISHED)
    return Metric(f"{metric} at {slots} slots", partial(measure, factor=factor), unit)


@dataclass(frozen=True)
class Below:
    """Holds when an arm's metric, as the mean over seeds, is at most `limit`."""

    metric: str
    arm: str
    limit: float

    def __call__(self, values: Values) -> Verdict:
        found = values[self.arm][self.metric]
        return Verdict(f"{self.metric} {fmean(found):.3g}{spread(found)}", fmean(found) <= self.limit)

    def __str__(self) -> str:
        return f"{self.metric} of {self.arm} at most {self.limit:g}"


def var(seed: int) -> Trained:
    """The base, which the other next-scale methods share."""
    return Trained(digit_scales(), seed, expected=6.0)


def m_var(seed: int) -> Trained:
    """The variant, over the base's tokenizer."""
    return Trained(m_var_digits(), seed, tokenizer=var(seed), expected=7.0)


ARMS = (Arm("VAR", var), Arm("M-VAR", m_var))
ACROSS = Metric("exponent across scales", growth_across_scales)

QUALITY = Part(
    name="quality at equal parameters",
    paper="FID 1.93 of 1.5B against 1.97 of VAR's 2.0B (ImageNet 256); attention pairs at 38.6 % of VAR's",
    arms=ARMS,
    metrics=(
        PARAMETERS,
        LOSS,
        fid_to("digits", PICTURES),
        digits_read(30),
        Metric("attention pairs", pairs, "K"),
    ),
    rule=All(
        (
            AtMost("held-out loss", "M-VAR", "VAR", 1.03),
            AtMost("FID", "M-VAR", "VAR", 1.0),
            AtMost("attention pairs", "M-VAR", "VAR", 0.387),
        )
    ),
)

COST = Part(
    name="cost over growing pictures",
    paper="linear cost across scales; about 1.2 times as fast as VAR-d30 at 256 pixels (d24; secondary)",
    arms=ARMS,
    metrics=(
        ACROSS,
        *(named("cache", "MB", megabytes, factor) for factor in (GROWTH[0], GROWTH[-1])),
        *(
            named(f"memory in {what}", "MB", partial(peak, train=train), factor)
            for what, train in (("decoding", False), ("training", True))
            for factor in (GROWTH[0], GROWTH[-1])
        ),
        *(named("seconds", "s", picture_seconds, factor) for factor in (GROWTH[0], GROWTH[-1])),
    ),
    rule=All(
        (
            Below("exponent across scales", "M-VAR", 1.2),
            AtMost("exponent across scales", "M-VAR", "VAR", -0.3, difference=True),
            AtMost("cache at 6120 slots", "M-VAR", "VAR", 0.1),
            AtMost("seconds at 6120 slots", "M-VAR", "VAR", 1 / 1.2),
        )
    ),
    sampling=True,
)

EXPERIMENT = Experiment(
    "m-var",
    "Class-conditional digits at 32 x 32 by equal steps and parameters; time and memory of random weights of the same "
    "sizes, up to the slots of 768 pixels.",
    (QUALITY, COST),
)
