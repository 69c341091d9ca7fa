"""Which of a step's own slots see which, as data, so that attention can skip what is never seen.

Every form says its dense mask, which is the slow twin of whatever attention makes of it.
Legend: B batch, L slots.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Apart:
    """Runs of consecutive slots that see nothing of one another: a block-diagonal mask.

    runs: for each, its length and its own visibility.
    """

    runs: tuple[tuple[int, "Own"], ...]

    @classmethod
    def of(cls, runs: Sequence[tuple[int, "Own"]]) -> "Apart":
        """Join runs; those that are apart themselves come in as their parts."""
        flat: list[tuple[int, Own]] = []
        for length, own in runs:
            flat += own.runs if isinstance(own, Apart) else [(length, own)]
        return cls(tuple(flat))

    @property
    def lengths(self) -> tuple[int, ...]:
        """Slots of each run."""
        return tuple(length for length, _ in self.runs)

    def mask(self) -> Tensor:
        """(L, L) bool."""
        blocks = [
            torch.ones(n, n, dtype=torch.bool) if (mask := own_mask(own, n)) is None else mask
            for n, own in self.runs
        ]
        return torch.block_diag(*blocks).bool()


Own = str | Tensor | Apart
"""Visibility among a step's own slots: "all" of them, "causal" (itself and those before), "self", a mask (L, L) or
(B, L, L), or one of the forms above."""


def own_mask(own: Own, length: int) -> Tensor | None:
    """(L, L) or (B, L, L) bool, or None when all see all."""
    if isinstance(own, Tensor):
        return own
    if isinstance(own, Apart):
        return own.mask()
    if own == "all":
        return None
    eye = torch.ones(length, length, dtype=torch.bool)
    return eye.tril() if own == "causal" else torch.eye(length, dtype=torch.bool)
