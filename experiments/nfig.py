"""NFIG (arXiv 2503.07076): bands of frequencies in place of scales, over the same transformer.

The paper's headline compares NFIG of depth 16 with VAR of depth 20, so its 1.25x in speed is that of a smaller network:
at equal sizes both take the same codes in the same steps. Both comparisons are made here, on small digits, 4 blocks
against 5, a quarter wider; all models draw with the same guidance. Time is also measured with random weights at the
published grids and growing depths, up to 12 against 15, the two taking turns.

Digits hold no high frequencies, so tokenizers are compared on photographs at 32 x 32, one of them held out: VAR's, the
same without phi, and NFIG's by both rules, with equal grids, codes, steps and pictures. The generators beside them are
stubs of one step. The pictures of the result show the spectrum of what each level adds, coarse to fine.
"""

from dataclasses import replace
from functools import lru_cache, partial
from statistics import correlation

import numpy as np
import torch

from varkit.catalog.costs import seconds
from varkit.catalog.experiment import All, Arm, AtLeast, AtMost, Experiment, Metric, Part, Subject
from varkit.catalog.harness import PICTURES
from varkit.catalog.measures import EVALUATIONS, PARAMETERS, SECONDS, digits_read, fid_to
from varkit.catalog.models import Trained
from varkit.data.registry import open_dataset
from varkit.decode.loop import run
from varkit.evaluate.distribution import Pairs
from varkit.evaluate.features import load_features
from varkit.evaluate.reconstruction import Reconstruction, pictures, reconstruct
from varkit.evaluate.spectrum import THIRDS, log_spectra, radius
from varkit.generators.conditioning import ClassConfig
from varkit.generators.var import VARConfig
from varkit.hub.pipeline import Pipeline, Settings
from varkit.tokenizers.conv import ConvConfig
from varkit.tokenizers.frequency import FrequencyVQConfig
from varkit.tokenizers.multiscale_vq import MultiScaleVQConfig
from varkit.train.recipes import GeneratorRecipe, Recipe, digit_scales, nfig_digits
from varkit.train.recipes.nfig import nfig as banded
from varkit.train.task import TrainConfig

DRAWN, HELD_OUT = 600, 256
DEPTHS = (4, 8, 12)
LARGER = 1.25
ROUNDS = 3
ENLARGED = 8


def larger_var(seed: int) -> Trained:
    """VAR with a quarter more blocks, a quarter wider, over the tokenizer of the base."""
    base = digit_scales()
    own = base.generator.config
    assert isinstance(own, VARConfig)
    depth, heads = round(LARGER * own.depth), round(LARGER * own.heads)
    config = replace(own, depth=depth, heads=heads, width=own.width * heads // own.heads)
    generator = replace(base.generator, config=config)
    recipe = replace(base, name="digit-scales-larger", generator=generator)
    return Trained(recipe, seed, Trained(digit_scales(), seed, expected=6), expected=6)


def var(seed: int) -> Trained:
    """The base."""
    return Trained(digit_scales(), seed, expected=6)


def nfig(seed: int) -> Trained:
    """NFIG at the base's size."""
    return Trained(nfig_digits(), seed, expected=6)


# Time, with random weights


def published(depth: int, tokenizer: MultiScaleVQConfig) -> Pipeline:
    """A published size of VAR with random weights, over codes of the paper's grids; pixels hardly matter to it."""
    tokenizer = replace(tokenizer, conv=ConvConfig(32, (1,), res_blocks=1, attention=False))
    configs = {"tokenizer": tokenizer, **VARConfig.published(depth, tokenizer.schedule).fitted(tokenizer)}
    parts = {name: config.build() for name, config in configs.items()}
    return Pipeline(parts, configs, Settings(guidance=2.0, ramp=True))


def drawn(pipeline: Pipeline, seed: int) -> None:
    """From a label, guided, to all codes of one picture."""
    run(pipeline.model, pipeline.start([0], seed))


@lru_cache(maxsize=len(DEPTHS))
def times(depth: int, seed: int) -> dict[str, float]:
    """Median seconds of NFIG at a depth and of VAR a quarter larger, in turns after a first round."""
    torch.manual_seed(seed)
    both = {
        "NFIG": published(depth, FrequencyVQConfig()),
        "larger VAR": published(round(LARGER * depth), MultiScaleVQConfig()),
    }
    works = [partial(drawn, model, seed) for model in both.values()]
    return dict(zip(both, seconds(works, ROUNDS), strict=True))


def seconds_at(depth: int, subject: Subject) -> float:
    """The arm's own time; both arms' are measured together."""
    return times(depth, subject.seed)[subject.options["times"]]


TIMES = tuple(Metric(f"seconds at depth {d}", partial(seconds_at, d), "s, random weights") for d in DEPTHS)

SMALLER = Part(
    name="against a larger VAR",
    paper="FID 2.81 (310M) against 2.95 of VAR-d20 (600M), 1.25x faster (ImageNet 256)",
    arms=(
        Arm("larger VAR", larger_var, options={"times": "larger VAR"}),
        Arm("NFIG", nfig, options={"times": "NFIG"}),
    ),
    metrics=(PARAMETERS, EVALUATIONS, SECONDS, *TIMES, fid_to("digits", DRAWN), digits_read(30)),
    rule=All(
        (
            AtMost("FID", "NFIG", "larger VAR", 1.0),
            AtMost(TIMES[-1].name, "NFIG", "larger VAR", 1 / LARGER),
        )
    ),
)

EQUAL = Part(
    name="at equal sizes",
    paper="FID 2.81 against 3.55 of VAR-d16 (ImageNet 256), at the same cost",
    arms=(Arm("VAR", var), Arm("NFIG", nfig)),
    metrics=(PARAMETERS, EVALUATIONS, SECONDS, fid_to("digits", DRAWN), digits_read(30)),
    rule=All(
        (AtMost("FID", "NFIG", "VAR", 1.0), AtMost("seconds a picture", "NFIG", "VAR", 1.1)),
    ),
)


# Tokenizers


def photographs(name: str, tokenizer: MultiScaleVQConfig) -> Recipe:
    """A tokenizer trained on photographs as that of the digits is; the generator beside it is a stub."""
    base = digit_scales()
    stub = VARConfig(1, 32, 1, tokenizer.schedule, tokenizer.code_channels, ClassConfig(1, ("all",)))
    return replace(
        base,
        name=f"photographs-{name}",
        dataset="photographs",
        tokenizer=replace(base.tokenizer, config=tokenizer),
        generator=GeneratorRecipe(stub, TrainConfig(steps=1), batch_size=8, pictures=8),
        prompts=(0,),
    )


def over_photographs(bands: str | None, seed: int) -> Trained:
    """A tokenizer by a rule for bands; None is VAR's own, with phi."""
    base = digit_scales()
    config = (base if bands is None else banded(base, bands)).tokenizer.config
    assert isinstance(config, MultiScaleVQConfig)
    return Trained(photographs(bands or "var", config), seed, expected=2.5)


def rebuilt(subject: Subject) -> tuple[Reconstruction, float]:
    """Held-out photographs through the tokenizer, and their rFID; once a subject."""
    if "rebuilt" not in subject.kept:
        pairs = Pairs(load_features("small"))
        report = reconstruct(subject.pipeline.tokenizer, _held_out(subject), pairs.add)
        subject.kept["rebuilt"] = report, pairs.compare(resamples=0).figures["rfid"].value
        subject.kept[PICTURES] = spectra_of_levels(subject)
    return subject.kept["rebuilt"]


def _held_out(subject: Subject):
    return pictures(open_dataset("photographs").split("validation"), subject.pipeline.size, HELD_OUT)


@torch.no_grad()
def levels_added(subject: Subject) -> list[torch.Tensor]:
    """What each level adds to the features of held-out photographs, K of (B, D, h, w)."""
    if "levels" not in subject.kept:
        tokenizer = subject.pipeline.tokenizer
        ids = torch.cat([tokenizer.encode(batch)["ids"] for batch in _held_out(subject)])
        schedule = tokenizer.schedule
        sums = [tokenizer.quantizer.features(ids, schedule, level) for level in range(len(schedule) + 1)]
        subject.kept["levels"] = [after - before for before, after in zip(sums, sums[1:], strict=False)]
    return subject.kept["levels"]


def spectra_of_levels(subject: Subject) -> np.ndarray:
    """One picture a level, coarse to fine: power of each frequency in four decades, DC in the middle."""
    grey = log_spectra(levels_added(subject))
    large = np.kron(grey, np.ones((1, ENLARGED, ENLARGED), np.uint8))
    return np.repeat(large[..., None], 3, axis=-1)


def order(subject: Subject) -> float:
    """Rank correlation of a level's number and the mean radius of the energy that it adds; empty levels left out."""
    found = []
    for added in levels_added(subject):
        power = torch.fft.fft2(added.double()).abs().square().sum(dim=(0, 1)).numpy()
        if power.sum() > 0:
            found.append(float((power * radius(*power.shape)).sum() / power.sum()))
    ranks = np.argsort(np.argsort(found)).tolist()
    return correlation(range(len(ranks)), ranks)


def _third(name: str, what: str) -> Metric:
    return Metric(
        f"{what}, {name}", lambda subject: float(getattr(getattr(rebuilt(subject)[0].spectrum, name), what))
    )


TOKENIZERS = Part(
    name="tokenizers",
    paper="rFID 0.85 against 0.9; 87.6 % of frequencies kept against 79.5 %, 66.7 against 48.2 of the high ones",
    arms=(
        Arm("VAR", partial(over_photographs, None)),
        Arm("VAR without phi", partial(over_photographs, "whole")),
        Arm("NFIG", partial(over_photographs, "nested_square")),
        Arm("NFIG radial", partial(over_photographs, "radial")),
    ),
    metrics=(
        Metric("PSNR", lambda subject: rebuilt(subject)[0].psnr, "dB"),
        Metric("rFID", lambda subject: rebuilt(subject)[1], "small features"),
        Metric("PSD distance", lambda subject: rebuilt(subject)[0].spectrum.psd_distance),
        *(_third(name, what) for what in ("kept", "error") for name in ("all", *THIRDS)),
        Metric("order of frequencies", order, "rank correlation"),
    ),
    rule=All(
        (
            AtMost("rFID", "NFIG", "VAR", 1.0),
            AtMost("error, high", "NFIG", "VAR", 1.0),
            AtLeast("kept, all", "NFIG", "VAR", 1.0),
        )
    ),
)

EXPERIMENT = Experiment(
    "nfig",
    "Class-conditional digits at 32 x 32, 1000 and 1200 steps: NFIG against VAR of its size and a quarter larger; "
    "tokenizers on photographs at 32 x 32.",
    (SMALLER, EQUAL, TOKENIZERS),
)
