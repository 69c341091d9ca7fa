"""VAR (arXiv 2404.02905): whole scales against single tokens in raster order, the scaling law, in-painting.

Small digits, and captioned scenes, stand in for ImageNet. Raster order is LlamaGen's, at the same parameters of
generator and head (within 7 %), over the same pictures in the same order. On digits its grid is the finest scale of the
pyramid; on scenes it is twice as fine, without which its codes cannot say shapes (the score of rebuilt pictures tells
what either's can). So there the tokenizers differ in more than scales, and a picture costs raster order twice the slots
in training. Both arms have VAR's optimizer and rate. Each samples as scored best on 96 captions of the training part,
among guidance 1 to 6 with temperature 1, with top-p 0.95 as well, and at temperature 0.8 with it.
"""

from dataclasses import replace
from functools import partial

from varkit.catalog.experiment import All, Arm, AtLeast, AtMost, Experiment, Part, PowerLaw
from varkit.catalog.measures import (
    BLOCKS,
    EVALUATIONS,
    LOSS,
    PARAMETERS,
    SECONDS,
    digits_read,
    fid_to,
    halves_completed,
    scenes_rebuilt,
    scenes_right,
)
from varkit.catalog.models import Trained
from varkit.generators.var import VARConfig
from varkit.train.recipes import digit_grid, digit_scales, llamagen_scenes, scenes, scenes_small

PICTURES = 600
CAPTIONED = 300
MINUTES = 6.0

ORDERS = Part(
    name="scales against raster",
    paper="FID 1.80 against 18.65 of raster order, about 20 times faster (ImageNet 256)",
    arms=(
        Arm("raster", lambda seed: Trained(digit_grid(), seed, expected=MINUTES)),
        Arm("scales", lambda seed: Trained(digit_scales(), seed, expected=MINUTES)),
    ),
    metrics=(PARAMETERS, EVALUATIONS, SECONDS, fid_to("digits", PICTURES), digits_read(30)),
    rule=All(
        (
            AtMost("FID", "scales", "raster", 1.0),
            AtMost("seconds a picture", "scales", "raster", 0.5),
            AtMost("evaluations", "scales", "raster", 0.25),
        )
    ),
)

CAPTIONS = Part(
    name="scales against raster, captions",
    paper="FID 1.80 against 18.65 of raster order by class (ImageNet 256); by caption nothing is claimed",
    arms=(
        Arm("raster", lambda seed: Trained(llamagen_scenes(), seed, expected=90.0)),
        Arm("scales", lambda seed: Trained(scenes_small(), seed, expected=55.0)),
    ),
    metrics=(
        PARAMETERS,
        EVALUATIONS,
        SECONDS,
        fid_to("scenes-tidy", PICTURES),
        scenes_right(CAPTIONED),
        scenes_rebuilt("scenes-tidy", CAPTIONED),
    ),
    rule=All(
        (
            AtMost("FID", "scales", "raster", 1.0),
            AtLeast("scene score", "scales", "raster", 0.0, difference=True),
            AtMost("seconds a picture", "scales", "raster", 0.5),
            AtMost("evaluations", "scales", "raster", 0.25),
        )
    ),
    sampling=True,
)

SIZES = {
    "1x48": (1, 48, 4.0),
    "1x80": (1, 80, 5.0),
    "2x96": (2, 96, 7.0),
    "3x128": (3, 128, 11.0),
    "5x160": (5, 160, 20.0),
}
"""Depth, width and about how many minutes the training takes."""


def sized(depth: int, width: int, minutes: float, seed: int) -> Trained:
    """A model of the scenes at one size, over the bundled tokenizer; every size sees the same pictures."""
    base = scenes()
    own = base.generator.config
    assert isinstance(own, VARConfig)
    config = replace(own, depth=depth, width=width, heads=max(1, width // 64))
    train = replace(base.generator.train, steps=600, lr=1.5e-3)
    generator = replace(base.generator, config=config, train=train, batch_size=32, pictures=38_400)
    return Trained(
        replace(base, name=f"scenes-{depth}x{width}", generator=generator), seed, "scenes", minutes
    )


SCALING = Part(
    name="scaling law",
    paper="loss falls as a power of the parameters, correlation -0.998 in logarithms (18M to 2B)",
    arms=tuple(Arm(name, partial(sized, *size)) for name, size in SIZES.items()),
    metrics=(PARAMETERS, BLOCKS, LOSS),
    rule=PowerLaw("held-out loss", "block parameters", -0.98),
    seeds=(0,),
    sampling=True,
)

INPAINTING = Part(
    name="in-painting",
    paper="zero-shot in-painting, shown in pictures (no figure)",
    arms=(
        Arm("grey", lambda seed: Trained(digit_scales(), seed, expected=MINUTES), options={"fill": "grey"}),
        Arm(
            "in-painted",
            lambda seed: Trained(digit_scales(), seed, expected=MINUTES),
            options={"fill": "model"},
        ),
    ),
    metrics=halves_completed(200),
    rule=All(
        (
            AtLeast("halves read", "in-painted", "grey", 0.3, difference=True),
            AtMost("error outside", "in-painted", "grey", 1.0),
        )
    ),
)

EXPERIMENT = Experiment(
    "var",
    "Class-conditional digits at 32 x 32, 1200 steps of 32 pictures an arm; tidy scenes by caption at 64 x 64, "
    "1250 steps of 32; five sizes on captioned scenes at 64 x 64.",
    (ORDERS, CAPTIONS, SCALING, INPAINTING),
)
