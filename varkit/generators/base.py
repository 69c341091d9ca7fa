"""What every generator promises: known latents and a prepared condition -> hidden states, with no run state on the
module.

Legend: R condition branches, B samples, N = R x B rows (branch-major), L slots fed, C width.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from varkit.errors import UserError
from varkit.generators.conditioning import Conditioner
from varkit.nn.attention import Window
from varkit.nn.ports import Ports
from varkit.plans.step import Step

Condition = dict[str, Tensor]
"""What steers a run, by name, each (R, B, ...): `label` int64, `text` (R, B, T) int64, ..."""

Prepared = dict[str, Tensor]
"""A condition after everything that does not depend on the step, each (R, B, ...)."""


class Generator(nn.Module, ABC):
    """Blocks over a window. `prepare` runs once for a run, `forward` once for each step.

    Random parts of training (stochastic depth) use torch's generator; decoding draws nothing.
    """

    width: int
    depth: int
    conditioner: Conditioner
    stacks: tuple[str, ...] = ()
    """Lists of like blocks that `prepare` and `forward` go through in order, and only so: any iterable may replace
    them."""
    recordable: bool = True
    """Whether a static plan's step always takes the same kernels on tensors that stay in their places, as a CUDA graph
    (`varkit.decode.graphs`) has to; layers that carry tensors on, or send their own to the device, do not."""

    @abstractmethod
    def prepare(self, condition: Condition) -> Prepared:
        """Condition (R, B, ...) -> everything the steps need of it, (R, B, ...)."""

    @abstractmethod
    def forward(
        self,
        fed: dict[str, Tensor],
        step: Step,
        prepared: Prepared,
        window: Window,
        ports: Ports | None = None,
    ) -> Tensor:
        """Values at the step's slots, (B, L, ...), by name -> hidden states (N, L, C) after the last norm."""


class GeneratorConfig(Protocol):
    """What describes a generator: plain values in a frozen dataclass."""

    @property
    def condition(self) -> Any:
        """How what users ask for becomes a condition."""

    def fitted(self, tokenizer: Any) -> dict[str, Any]:
        """The configurations of generator, head and plan (by these names) for a tokenizer's; `UserError` if they do
        not go together."""

    def build(self) -> Generator:
        """The network, freshly initialised."""


def check_tokenizer(generator: object, tokenizer: object, *settings: str) -> None:
    """Raise `UserError` unless a tokenizer's configuration has the settings that a generator's is fitted to."""
    lacking = [name for name in settings if not hasattr(tokenizer, name)]
    if lacking:
        kinds = [type(config).__name__.removesuffix("Config") for config in (generator, tokenizer)]
        raise UserError(
            f"{kinds[0]} is fitted to a tokenizer's {', '.join(settings)}, and {kinds[1]} has no {', '.join(lacking)}; "
            "take generator and tokenizer from one model"
        )


def branches_and_batch(prepared: Mapping[str, Tensor]) -> tuple[int, int]:
    """R and B of a condition or a prepared condition."""
    first = next(iter(prepared.values()))
    return first.shape[0], first.shape[1]


def per_row(t: Tensor, shared_rank: int, branches: int) -> Tensor:
    """A plan's tensor for each row: repeated over branches if it is per sample, as it is if all samples share it."""
    return t if t.ndim == shared_rank else rows(t, branches)


def rows(x: Tensor, branches: int) -> Tensor:
    """Per-sample (B, ...) -> per-row (R x B, ...), branch-major."""
    return x if branches == 1 else x.repeat(branches, *([1] * (x.ndim - 1)))
