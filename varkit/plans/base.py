"""A plan is an order of prediction. Static plans are a list of steps; others look at the state to find the next one.

`next_step(state)` is the lazy form: a state may have been forked, rolled back or merged since the last step, so the
plan is asked afresh each time instead of holding an iterator. Legend: B samples.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from varkit.plans.join import collate, pack
from varkit.plans.step import Step

if TYPE_CHECKING:
    from varkit.decode.state import State


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

    def progress(self, at: Tensor) -> Tensor:
        """Steps taken before (any shape, int64) -> how far along, in [0, 1], for schedules of guidance and the like."""
        return torch.zeros(at.shape)


class StaticPlan(Plan):
    """A plan known beforehand, the same for every sample."""

    def __init__(self, steps: Sequence[Step], slots: int) -> None:
        self.steps, self.slots = list(steps), slots

    def next_step(self, state: "State") -> Step | None:
        cursors = state.cursor.tolist()
        taken = [
            self.steps[c] if c < len(self.steps) and not f else None
            for c, f in zip(cursors, state.finished.tolist(), strict=True)
        ]
        kinds = {(s.route, s.writes) for s in taken if s is not None}
        if not kinds:
            return None
        if len(kinds) > 1:  # samples at steps of another kind wait for theirs
            first = next(s for s in taken if s is not None)
            taken = [
                s if s is not None and (s.route, s.writes) == (first.route, first.writes) else None
                for s in taken
            ]
        return collate(taken)

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
