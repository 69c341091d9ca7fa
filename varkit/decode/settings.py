"""How a model samples, as it is saved with it and replaced for a run."""

from dataclasses import dataclass

from varkit.decode.guidance import BySteps, Guidance, Ramp
from varkit.decode.sampling import Sampler
from varkit.errors import UserError


@dataclass(frozen=True)
class Settings:
    """How to sample. guidance s means u + s (c - u): 1 is off; `ramp` raises it from 1 over the steps (VAR).

    temperature 0 is arg-max, or no noise in the steps of a head over real numbers; top_k 0 and top_p 0 keep every code;
    `smooth` mixes codes (VAR's more_smooth). guidance and temperature may be lists, a number for each step.
    guidance_layer: the block after which hidden states are guided, counted back from the last, -1 (Infinity); 0 guides
    the head's output.
    """

    guidance: BySteps = 1.0
    ramp: Ramp = False
    temperature: BySteps = 1.0
    top_k: int = 0
    top_p: float = 0.0
    smooth: bool = False
    guidance_layer: int = 0

    def __post_init__(self) -> None:
        for name in ("guidance", "ramp", "temperature"):
            values = getattr(self, name)
            if isinstance(values, list):  # a tuple has a hash, by which tables of steps are kept
                object.__setattr__(self, name, tuple(values))
            if values in ([], ()):
                raise UserError(f"{name} is an empty list; give one number, or a number for each step")
        self.combine(), self.sampler()  # validates

    def combine(self) -> Guidance:
        """The guidance over branches."""
        return Guidance(self.guidance, self.ramp)

    def sampler(self) -> Sampler:
        """The sampler of ids."""
        return Sampler(self.temperature, self.top_k, self.top_p)
