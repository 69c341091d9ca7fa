"""A plan is an order of prediction. Static plans are a list of steps; others look at the state to find the next one.

`next_step(state)` is the lazy form: a state may have been forked, rolled back or merged since the last step, so the
plan is asked afresh each time instead of holding an iterator. Legend: B samples.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from varkit.plans.join import collate, pack
from varkit.plans.step import Step

if TYPE_CHECKING:
    from varkit.decode.state import State

CONFIDENCE = "confidence"
"""The name of a choice's probability among the values of a step; a plan may want it, a canvas never does."""


class Plan(ABC):
    """The order in which a generator feeds and settles positions.

    slots: cache addresses in all, or None when unbounded. segments: names of the sequence's parts, indexed by
    `Slots.segment`.
    """

    slots: int | None = None
    segments: tuple[str, ...] = ("target",)

    @abstractmethod
    def next_step(self, state: "State") -> Step | None:
        """The next step of the samples that are not finished (the others idle), or None when all are."""

    @abstractmethod
    def finished(self, state: "State") -> Tensor:
        """(B,) bool: samples for which no step is left."""

    def by_confidence(self, step: Step) -> bool:
        """Whether `settle` wants to know how sure the sampler is of what it chooses at the step."""
        return False

    def settle(self, step: Step, values: Mapping[str, Tensor], state: "State") -> Step:
        """The step, with `reveal` as what was drawn, values (B, T, ...), decides: for orders that commit what is sure.

        With `by_confidence` the values have `CONFIDENCE` (B, T), the probability of each choice.
        """
        return step

    def progress(self, at: Tensor) -> Tensor:
        """Steps taken before (any shape, int64) -> how far along, in [0, 1], for schedules of guidance and the like."""
        return torch.zeros(at.shape)


def together(steps: Iterable[Step | None]) -> Step | None:
    """One step for samples that are each at a step of their own, None for one that is done; None when all are.

    Samples whose step is of another kind than the first one's wait for theirs.
    """
    taken = list(steps)
    first = next((s for s in taken if s is not None), None)
    if first is None:
        return None
    return collate([s if s is not None and s.kind == first.kind else None for s in taken])


class StaticPlan(Plan):
    """A plan known beforehand, the same for every sample."""

    def __init__(self, steps: Sequence[Step], slots: int) -> None:
        self.steps, self.slots = list(steps), slots

    def next_step(self, state: "State") -> Step | None:
        cursors = state.cursor.tolist()
        return together(
            self.steps[c] if c < len(self.steps) and not f else None
            for c, f in zip(cursors, state.finished.tolist(), strict=True)
        )

    def finished(self, state: "State") -> Tensor:
        return state.cursor >= len(self.steps)

    def progress(self, at: Tensor) -> Tensor:
        return at.clamp(max=len(self.steps) - 1) / max(1, len(self.steps) - 1)

    def training_step(self, first: int | None = None) -> Step:
        """All steps (or the first few) as one packed step: the training sequence with its mask."""
        return pack(self.steps[:first])

    @property
    def evaluations(self) -> int:
        """Evaluations of the network that a run takes."""
        return len(self.steps)
