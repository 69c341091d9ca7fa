"""HMAR (arXiv 2506.04421): refined scales against VAR's, refinement without training, and what a picture costs.

Small digits stand in for ImageNet. Quality: both stages of HMAR together take the base's steps over its tokens; the
refining branch, two of four blocks and a head, comes on top of the base's parameters. Cost: random weights at the
published schedules of 256, 512 and 1024 pixels, a narrow generator of two blocks, one picture, on the CPU; memory is
all that a run holds between steps, without the weights.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cache, partial

import torch

from varkit.catalog.costs import seconds
from varkit.catalog.experiment import All, Arm, AtMost, Experiment, Metric, Part, Subject
from varkit.catalog.measures import EVALUATIONS, PARAMETERS, digits_read, fid_to
from varkit.catalog.models import Trained
from varkit.decode.loop import decode, run
from varkit.generators.conditioning import ClassConfig
from varkit.generators.hmar import HMARConfig
from varkit.generators.var import VARConfig
from varkit.heads.categorical import CategoricalConfig
from varkit.hub.pipeline import Pipeline, Settings
from varkit.hub.published_hmar import plan
from varkit.plans.refined import RefinedConfig, coarse_counts
from varkit.plans.scales import ScalesConfig
from varkit.plans.schedule import Schedule
from varkit.tokenizers.conv import ConvConfig
from varkit.tokenizers.multiscale_vq import MultiScaleVQConfig
from varkit.train.lessons import WholePlan
from varkit.train.masked_scales import FirstGuesses
from varkit.train.objective import NextStepLoss
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


QUALITY = Part(
    name="quality",
    paper="FID 3.01 against 3.36 of VAR-d16 (ImageNet 256)",
    arms=(Arm("VAR", base), Arm("HMAR", refined)),
    metrics=(PARAMETERS, EVALUATIONS, fid_to("digits", PICTURES), digits_read(30)),
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
WIDTH, HEADS, DEPTH, CODES, CODE_WIDTH = 256, 4, 2, 4096, 32
ROUNDS = 3


@dataclass(frozen=True)
class Cost:
    """Seconds of a training step and of drawing a picture, and bytes that a run holds at most."""

    training: float
    drawing: float
    memory: float


NAMES = tuple(field.name for field in fields(Cost))


def random_model(method: str, schedule: tuple[int, ...]) -> Pipeline:
    """VAR or HMAR with random weights; the tokenizer serves for its codebook."""
    told = (DEPTH, WIDTH, HEADS, schedule, CODE_WIDTH, ClassConfig(1000))
    head, order = CategoricalConfig(WIDTH, CODES), plan(schedule)
    configs = {
        "tokenizer": MultiScaleVQConfig(
            ConvConfig(8, (1, 2), 1, 8, attention=False), CODES, CODE_WIDTH, schedule
        ),
        "generator": VARConfig(*told) if method == "VAR" else HMARConfig(*told, mask_depth=DEPTH // 2),
        "head": head,
        "plan": ScalesConfig(schedule) if method == "VAR" else order,
    } | ({} if method == "VAR" else {"head_mask": head})
    torch.manual_seed(0)
    parts = {name: config.build() for name, config in configs.items()}  # type: ignore[attr-defined]
    return Pipeline(parts, configs, Settings(guidance=2.5, ramp=True))


def train(model: Pipeline) -> None:
    """One step of first guesses, forward and backward, for one picture."""
    teach = FirstGuesses if isinstance(model.configs["plan"], RefinedConfig) else WholePlan
    lessons = teach(model.tokenizer, model.model.plan)
    ids = torch.randint(0, CODES, (1, Schedule.parse(model.configs["plan"].schedule).total))
    objective = NextStepLoss(model.generator, model.model.heads["main"])
    objective(lessons.lesson({"ids": ids}, 0), {"label": torch.tensor([1])}).backward()
    objective.zero_grad(set_to_none=True)


def draw(model: Pipeline, seed: int) -> None:
    """From the prompt to the last token of a guided picture."""
    run(model.model, model.start([1], seed))


def most_held(model: Pipeline, seed: int) -> int:
    """The most bytes that a run holds between steps."""
    held = (state.tensors().values() for state in decode(model.model, model.start([1], seed)))
    return max(sum({t.untyped_storage().data_ptr(): t.nbytes for t in tensors}.values()) for tensors in held)


@cache
def costs(size: int, seed: int) -> dict[str, Cost]:
    """Both methods at a size, what takes time in turn."""
    models = {method: random_model(method, SIDES[size]) for method in ("VAR", "HMAR")}
    works = [
        work for model in models.values() for work in (partial(train, model), partial(draw, model, seed))
    ]
    times = iter(seconds(works, ROUNDS))
    return {
        method: Cost(next(times), next(times), most_held(model, seed)) for method, model in models.items()
    }


def cost(name: str) -> Callable[[Subject], float]:
    """A figure of the subject's options: method and size."""
    return lambda subject: getattr(
        costs(subject.options["size"], subject.seed)[subject.options["method"]], name
    )


COSTS = (
    Metric("training step", cost("training"), "s"),
    Metric("drawing", cost("drawing"), "s"),
    Metric("memory", lambda subject: cost("memory")(subject) / 2**20, "MiB"),
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
            AtMost("memory", "HMAR 1024", "VAR 1024", 1 / 3),
        )
    ),
    sampling=True,
)

EXPERIMENT = Experiment(
    "hmar",
    "Class-conditional digits at 32 x 32 over six scales, equal steps; cost with random weights on a CPU.",
    (QUALITY, REFINEMENT, COST),
)
