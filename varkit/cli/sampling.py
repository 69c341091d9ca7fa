"""How a command's model samples, and in what order it draws: the options for it."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from varkit.errors import UserError

if TYPE_CHECKING:
    from varkit.hub.pipeline import Pipeline

STEPS = 10_000
"""Steps that a list of numbers may be for; a slip of the key could ask for more than memory holds."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Replacements for a model's own sampling settings."""

    guidance: str | None = None
    """Guidance scale s in u + s (c - u); 1 is off. Or one for each step, such as 4,3,2,1 or 4*101,1*155: the latter
    guides 101 steps and leaves 155 alone."""
    ramp: Literal["on", "off"] | None = None
    """Whether guidance rises over the steps from off to its scale (VAR's form), or is the same at all of them."""
    guidance_layer: int | None = None
    """Guide the hidden states behind this block, counted back from the last, -1 (Infinity); 0 guides what the head
    gives."""
    temperature: str | None = None
    """0 takes the likeliest code, 1 samples as learned. Or one for each step, as for --guidance."""
    top_k: int | None = None
    """Keep only the k likeliest codes; 0 keeps all."""
    top_p: float | None = None
    """Keep the likeliest codes of this total probability; 0 keeps all."""
    smooth: bool = False
    """Mix codes instead of choosing one (VAR's more_smooth)."""

    def chosen(self) -> dict[str, Any]:
        """What was given, by name. Raises `UserError` for what is no number."""
        values = {n: getattr(self, n) for n in ("guidance_layer", "top_k", "top_p")}
        values |= {n: parse_by_steps(n, getattr(self, n)) for n in ("guidance", "temperature")}
        given = {n: v for n, v in values.items() if v is not None}
        given |= {} if self.ramp is None else {"ramp": self.ramp == "on"}
        return given | ({"smooth": True} if self.smooth else {})


@dataclass(frozen=True, kw_only=True)
class Ordered(Sampling):
    """And other scales, or steps within them, where the model takes any."""

    schedule: str | None = None
    """Sides of the scales, e.g. 1,2,4,8 or 1x1,2x3,4x6, for a model that takes any (FlexVAR)."""
    steps: int | None = None
    """How many steps to draw in: scales up to the same finest one, in place of a schedule (FlexVAR), or iterations
    (MAR)."""
    diffusion_steps: int | None = None
    """Steps in which a diffusion head draws a token (MAR)."""
    counts: str | None = None
    """For a model that refines its scales (HMAR): the tokens that each step settles, by the side of a scale, such as
    "2:1,3 3:1,1,2,5"; or none."""

    def check_order(self, size: str | None) -> None:
        """Raise `UserError` for options that say the order of scales twice."""
        if self.schedule is not None and self.steps is not None:
            raise UserError("--schedule and --steps were given; give one of them")
        if self.schedule is not None and size is not None:
            raise UserError(
                "--schedule and --size were given; the last side of a schedule is the size already"
            )

    def in_order(self, pipeline: "Pipeline") -> "Pipeline":
        """The model in the order that the options ask for."""
        from varkit.plans.flexible import sides_of

        if self.schedule is not None:
            pipeline = pipeline.scheduled(sides_of(self.schedule))
        elif self.steps is not None:
            pipeline = pipeline.scheduled(self.steps)
        if self.diffusion_steps is not None:
            pipeline = pipeline.diffused(self.diffusion_steps)
        return pipeline if self.counts is None else pipeline.refined(self.counts)


def parse_by_steps(name: str, text: str | None) -> float | tuple[float, ...] | None:
    """ "3" -> 3.0; "4,3*2,1" -> (4.0, 3.0, 3.0, 1.0): numbers of the steps, of which each may stand for several."""
    if text is None:
        return None
    option = f"--{name} {text!r}"
    found: list[float] = []
    for word in text.split(","):
        number, star, times = word.strip().partition("*")
        try:
            value, count = float(number), int(times) if star else 1
        except ValueError:
            raise UserError(
                f"{option} is no number, nor numbers for the steps; write e.g. 3, or 4,3,1*8"
            ) from None
        if not 1 <= count <= STEPS - len(found):
            raise UserError(f"{option} is for no step, or for more than {STEPS}; write e.g. 3, or 4,3,1*8")
        found += [value] * count
    return found[0] if len(found) == 1 and "*" not in text else tuple(found)


def parse_size(text: str | None) -> tuple[int, int] | None:
    """HEIGHTxWIDTH -> (height, width). Raises `UserError` for anything else."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+)[xX](\d+)", text)
    if not found:
        raise UserError(f"--size {text!r} is not HEIGHTxWIDTH in pixels; write e.g. 64x64")
    return int(found[1]), int(found[2])
