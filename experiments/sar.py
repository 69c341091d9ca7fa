"""SAR (arXiv 2512.06421): a trained model refined on its own predictions, against training on for as many steps.

Small digits stand in for ImageNet. Every arm begins with the same trained model of its seed; SAR and teacher forcing go
on for 1/18 of its steps (10 epochs after 180), at a tenth of its rate. FlexVAR, which the paper refines, comes first;
on VAR, whose inputs add up, the method is an extension. The chart is the exposure bias of each scale.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from varkit.adapt.finetune import Finetune
from varkit.adapt.method import Method
from varkit.adapt.run import follow_up
from varkit.adapt.sar import SAR
from varkit.catalog.experiment import All, Arm, AtMost, Experiment, Part
from varkit.catalog.exposure import exposure_bias, gaps_by_scale, share_of_training
from varkit.catalog.measures import digits_read, fid_to
from varkit.catalog.models import Trained
from varkit.train.recipes import Recipe, digit_scales, flexvar_digits

PICTURES, HELD_OUT, SCALES = 600, 256, 6
REFINED, STRONG, TRUTH = SAR(), SAR(gamma=1.0), SAR(gamma=1.0, target="gt")


def before(recipe: Recipe, seed: int) -> Trained:
    """The trained model that every arm begins with."""
    return Trained(recipe, seed, expected=6.0)


def after(recipe: Recipe, method: Method, seed: int) -> Trained:
    """The same model, a little further by a method."""
    steps = recipe.generator.train.steps
    assert steps is not None, "equal budgets are counted in steps"
    return Trained(
        follow_up(recipe, method, steps), seed, expected=1.0, start=before(recipe, seed), method=method
    )


def arms(make: Callable[[], Recipe], methods: Mapping[str, Method | None]) -> tuple[Arm, ...]:
    """An arm for each method, None being the model as it was."""
    recipe = make()
    made = []
    for name, method in methods.items():
        model = partial(before, recipe) if method is None else partial(after, recipe, method)
        options: dict[str, Any] = {
            "teach": recipe.generator.teach, "teacher_forced": isinstance(method, Finetune),
        }  # fmt: skip
        made.append(Arm(name, model, options=options))
    return tuple(made)


def compared(name: str, make: Callable[[], Recipe], paper: str) -> Part:
    """The model as it was, trained on, and refined: pictures and the cost."""
    cost = share_of_training(REFINED, "digits", 64)
    return Part(
        name=name,
        paper=paper,
        arms=arms(make, {"before": None, "trained on": Finetune(), "refined": REFINED}),
        metrics=(fid_to("digits", PICTURES), digits_read(30), cost),
        rule=All(
            (
                AtMost("FID", "refined", "before", 0.974),  # half of the paper's 5.2 %
                AtMost("FID", "refined", "trained on", 1.0),
                AtMost("share of training", "refined", "before", 0.15),
            )
        ),
    )


def exposed(name: str, make: Callable[[], Recipe]) -> Part:
    """Exposure bias by scale, with the sheet of the paper's check as the rule."""
    return Part(
        name=name,
        paper="predictions from own inputs come nearer to those from true ones (analysis, no figure)",
        arms=arms(make, {"before": None, "trained on": Finetune(), "refined": REFINED, "weight 1": STRONG}),
        metrics=(*gaps_by_scale("digits", HELD_OUT, SCALES), *exposure_bias("digits", HELD_OUT)),
        rule=All(
            (
                AtMost("exposure bias", "refined", "trained on", 0.9),
                AtMost("loss on true inputs", "refined", "trained on", 1.01),
            )
        ),
    )


TARGETS = Part(
    name="what the student is led to",
    paper="own predictions work; the truth conflicts with inputs that are not its own",
    arms=arms(flexvar_digits, {"own predictions": STRONG, "truth": TRUTH}),
    metrics=(fid_to("digits", PICTURES), *exposure_bias("digits", HELD_OUT)),
    rule=All(
        (
            AtMost("FID", "own predictions", "truth", 1.0),
            AtMost("loss on true inputs", "own predictions", "truth", 1.0),
        )
    ),
)

EXPERIMENT = Experiment(
    "sar",
    "Class-conditional digits at 32 x 32: 67 steps after 1200, the same for each arm; the published weight 0.01, over "
    "all scales.",
    (
        compared(
            "refined FlexVAR",
            flexvar_digits,
            "FID 2.89 against 3.05 of FlexVAR-d16 (5.2 % lower), for 5.5 % of its training (ImageNet 256)",
        ),
        exposed("exposure bias of FlexVAR", flexvar_digits),
        TARGETS,
        compared("refined VAR, an extension", digit_scales, "not in the paper"),
        exposed("exposure bias of VAR, an extension", digit_scales),
    ),
)
