"""Names that a pipeline folder may use, each with the configuration that builds the part.

Only what is listed here can be loaded. Modules are imported when their name comes up, so the table costs nothing.
"""

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from varkit.errors import UserError, unknown_name

if TYPE_CHECKING:
    from varkit.heads.categorical import CategoricalHead
    from varkit.plans.raster import RasterPlan
    from varkit.plans.scales import ScalePlan

PARTS: dict[str, str] = {
    "MultiScaleVQ": "varkit.tokenizers.multiscale_vq:MultiScaleVQConfig",
    "VQ": "varkit.tokenizers.vq:VQConfig",
    "VAR": "varkit.generators.var:VARConfig",
    "LlamaGen": "varkit.generators.llamagen:LlamaGenConfig",
    "CategoricalHead": "varkit.hub.registry:CategoricalConfig",
    "scales": "varkit.hub.registry:ScalesConfig",
    "raster": "varkit.hub.registry:RasterConfig",
}


def config_type(name: str) -> Any:
    """The configuration class of a part's name. Raises `UserError` with the nearest names for an unknown one."""
    if name not in PARTS:
        raise unknown_name("part type", name, PARTS)
    module, _, attribute = PARTS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def type_name(config: Any) -> str:
    """The name under which a configuration is registered."""
    path = f"{type(config).__module__}:{type(config).__qualname__}"
    found = [name for name, target in PARTS.items() if target == path]
    assert found, f"{path} is not in PARTS"
    return found[0]


@dataclass(frozen=True)
class CategoricalConfig:
    """A softmax head: hidden width -> vocabulary."""

    width: int
    vocab_size: int
    bias: bool = True

    def __post_init__(self) -> None:
        for name, least in (("width", 1), ("vocab_size", 2)):
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least {least}")

    def build(self) -> "CategoricalHead":
        """Make the head, freshly initialised."""
        from varkit.heads.categorical import CategoricalHead

        return CategoricalHead(self.width, self.vocab_size, self.bias)


@dataclass(frozen=True)
class ScalesConfig:
    """Next-scale order over a pyramid; an integer side stands for a square."""

    schedule: tuple[int | tuple[int, int], ...]

    def __post_init__(self) -> None:
        from varkit.plans.schedule import Schedule

        Schedule.parse(self.schedule)

    def build(self) -> "ScalePlan":
        """Make the plan."""
        from varkit.plans.scales import ScalePlan
        from varkit.plans.schedule import Schedule

        return ScalePlan(Schedule.parse(self.schedule))


@dataclass(frozen=True)
class RasterConfig:
    """Raster order over a (height, width) grid behind `prefix` condition slots."""

    grid: tuple[int, int]
    prefix: int = 1

    def __post_init__(self) -> None:
        if min(*self.grid, self.prefix) < 1:
            raise UserError(
                f"grid {self.grid} with prefix {self.prefix} is too small; all must be at least 1"
            )

    def build(self) -> "RasterPlan":
        """Make the plan."""
        from varkit.plans.raster import RasterPlan

        return RasterPlan(self.grid, self.prefix)
