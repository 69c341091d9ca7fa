"""MVAR (arXiv 2505.12742): scales that see only themselves, and windows of themselves when fine, against VAR.

Costs are those of random weights at the published schedules; quality is that of digits at equal parameters and steps.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from varkit.catalog.costs import Work, exponent, peak_memory, seconds
from varkit.catalog.experiment import All, Arm, AtMost, Experiment, Metric, Part, Subject
from varkit.catalog.measures import EVALUATIONS, LOSS, PARAMETERS, digits_read, fid_to
from varkit.catalog.models import Trained
from varkit.nn.attention import Packed, attend
from varkit.plans.scales import ScalesConfig, Windows
from varkit.plans.step import Step
from varkit.plans.visibility import pairs
from varkit.train.recipes import Recipe, digit_scales, markov_digits, markov_digits_mixed

PICTURES = 600
TOKENIZER_MINUTES, GENERATOR_MINUTES = 2.0, 4.0
PUBLISHED = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
TIMES_LARGER = (1, 2, 4)
"""Growing pictures: every side of the published schedule for 256 pixels times this."""
FINE_TUNED = 230
"""Steps, less than a fifth of the recipe's 1200."""
HEADS, HEAD_WIDTH, ROUNDS = 4, 64, 5

VAR = {"history": None, "windows": None}
MARKOV = {"history": 0, "windows": Windows()}


def plan(options: dict, times: int = 1) -> ScalesConfig:
    """An arm's plan over the published schedule, or a finer one."""
    return ScalesConfig(tuple(times * side for side in PUBLISHED), **options)


def pairs_seen(subject: Subject, times: int) -> float:
    """Millions of pairs of query and key in all scales."""
    step = plan(subject.options["plan"], times).build().training_step()
    return pairs(step.sees.own, len(step.feed)) / 1e6


def memory(subject: Subject, train: bool) -> float:
    """Of decoding 8 guided pictures, or of the largest training step over 8, at 16 layers of width 256."""
    work = Work(plan(subject.options["plan"]), depth=16, batch=8, train=train)
    return peak_memory(replace(work, mixed=train and work.plan.history == 0))


def kept(subject: Subject) -> float:
    """Keys and values that decoding keeps, MB: 4 guided pictures, 8 layers of width 256."""
    return Work(plan(subject.options["plan"])).carried()


def time_against_var(subject: Subject, times: int) -> float:
    """Seconds of decoding a guided picture by 2 layers over those of VAR, taken in turn; for VAR itself about 1."""
    works = [Work(plan(options, times), depth=2, batch=1) for options in (subject.options["plan"], VAR)]
    own, var = seconds(works, rounds=ROUNDS if times == 1 else 3)
    return own / var


def attention(step: Step) -> Callable[[], torch.Tensor]:
    """One layer's attention among the step's own tokens, projections left out."""
    window, (q, k, v) = Packed.of(step), torch.randn(3, 1, HEADS, len(step.feed), HEAD_WIDTH)
    return lambda: attend(q, window.views(0, q, k, v))


@torch.no_grad()
def growth_of_attention(subject: Subject, times: tuple[int, ...] = TIMES_LARGER) -> float:
    """The exponent in the tokens of the time of attention alone, within the finest scale: 256, 1024, 4096 tokens."""
    finest = [plan(subject.options["plan"], n).build().steps[-1] for n in times]
    return exponent(
        [len(step.feed) for step in finest], seconds([attention(step) for step in finest], ROUNDS)
    )


COSTS = (
    *(Metric(f"pairs, x{n}", partial(pairs_seen, times=n), "M") for n in TIMES_LARGER[:2]),
    Metric("memory in decoding", partial(memory, train=False), "MB"),
    Metric("memory in training", partial(memory, train=True), "MB"),
    Metric("keys and values", kept, "MB"),
    Metric("exponent of attention", growth_of_attention),
    *(Metric(f"time, x{n}", partial(time_against_var, times=n), "VAR's") for n in TIMES_LARGER),
)


def base(seed: int) -> Trained:
    """VAR."""
    return Trained(digit_scales(), seed, expected=TOKENIZER_MINUTES + GENERATOR_MINUTES)


def variant(recipe: Recipe, seed: int) -> Trained:
    """MVAR over the same tokens."""
    return Trained(recipe, seed, base(seed), GENERATOR_MINUTES)


def fine_tuned(seed: int) -> Trained:
    """MVAR from VAR's weights."""
    recipe = markov_digits()
    train = replace(recipe.generator.train, steps=FINE_TUNED)
    short = replace(recipe, name="markov-digits-tuned", generator=replace(recipe.generator, train=train))
    return Trained(short, seed, expected=GENERATOR_MINUTES * FINE_TUNED / 1200, start=base(seed))


EXPERIMENT = Experiment(
    "mvar-markov",
    "Memory, pairs and time at the published schedule for 256 pixels and finer ones, random weights on a CPU; quality "
    "on digits over six scales, windows of 5 x 5 at sides 6 and 8.",
    (
        Part(
            name="costs",
            paper="memory in inference 3.0 times lower; no cache (batch 32, d16 to d24)",
            arms=(
                Arm("var", base, options={"plan": VAR}),
                Arm("markov", partial(variant, markov_digits()), options={"plan": MARKOV}),
            ),
            metrics=COSTS,
            rule=All(
                (
                    AtMost("memory in decoding", "markov", "var", 1 / 3),
                    AtMost("keys and values", "markov", "var", 0.0),
                    AtMost("memory in training", "markov", "var", 0.67),
                    AtMost("exponent of attention", "markov", "var", -0.3, difference=True),
                    AtMost("time, x1", "markov", "var", 1.0),
                    AtMost("time, x4", "markov", "var", 0.67),
                )
            ),
            seeds=(0,),
            sampling=True,
        ),
        Part(
            name="quality at equal parameters and steps",
            paper="FID 3.09 against 3.55 of VAR-d16 (ImageNet 256, 300 epochs)",
            arms=(
                Arm("var", base),
                Arm("markov", partial(variant, markov_digits())),
                Arm("mixed", partial(variant, markov_digits_mixed())),
            ),
            metrics=(PARAMETERS, EVALUATIONS, LOSS, fid_to("digits", PICTURES), digits_read(30)),
            rule=All(
                (
                    AtMost("held-out loss", "markov", "var", 1.03),
                    AtMost("FID", "markov", "var", 1.0),
                    AtMost("FID", "mixed", "var", 1.0),
                )
            ),
        ),
        Part(
            name="from VAR's weights",
            paper="FID 3.40 against 3.55 after 80 epochs from VAR-d16's weights",
            arms=(Arm("var", base), Arm("tuned", fine_tuned)),
            metrics=(PARAMETERS, LOSS, fid_to("digits", PICTURES), digits_read(30)),
            rule=AtMost("held-out loss", "tuned", "var", 1.03),
        ),
    ),
)
