"""Canvas over plain positions: a grid, a line, frames of them. Any set of named values lives at each position.

Serves token ids, real vectors and bits alike; raster, masked, diagonal, chunked and data-dependent orders all draw
on it.
Legend: B samples, P positions, D value width.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from varkit.canvases.base import (
    NEVER,
    Canvas,
    check_positions,
    gather_positions,
    mark_revealed,
    scatter_positions,
)
from varkit.plans.step import Slots, Step


class GridCanvas(Canvas):
    """Named values (B, P, ...) and which of them are committed.

    `show` turns latents into images for previews; without it (toy problems, features) `preview` raises TypeError.
    """

    def __init__(
        self,
        values: dict[str, Tensor],
        revealed_at: Tensor,
        show: Callable[[dict[str, Tensor]], Tensor] | None = None,
    ):
        self.values = values
        self.revealed_at = revealed_at
        self.show = show

    @classmethod
    def empty(
        cls,
        batch: int,
        positions: int,
        fields: dict[str, tuple[tuple[int, ...], torch.dtype]],
        show: Callable[[dict[str, Tensor]], Tensor] | None = None,
        device: torch.device | None = None,
    ) -> "GridCanvas":
        """Nothing revealed; `fields` gives each value's shape behind (B, P) and its dtype."""
        values = {
            name: torch.zeros(batch, positions, *shape, dtype=dtype, device=device)
            for name, (shape, dtype) in fields.items()
        }
        return cls(values, torch.full((batch, positions), NEVER), show)

    def feed(self, slots: Slots) -> dict[str, Tensor]:
        return {name: gather_positions(table, slots.shows) for name, table in self.values.items()}

    def reveal(self, step: Step, values: dict[str, Tensor], at: Tensor) -> None:
        assert values.keys() <= self.values.keys(), (
            f"this canvas holds {list(self.values)}, not {list(values)}"
        )
        for name, value in values.items():
            scatter_positions(self.values[name], step.target, value)
        mark_revealed(self.revealed_at, step, at)

    def latents(self) -> dict[str, Tensor]:
        return self.values

    def fill(self, latents: dict[str, Tensor]) -> None:
        check_positions(latents, self.values, self.revealed_at.shape[1])
        for name in self.values:
            self.values[name] = latents[name].to(self.values[name].device, copy=True)
        self.revealed_at = torch.zeros_like(self.revealed_at)

    def preview(self) -> Tensor:
        if self.show is None:
            raise TypeError("this canvas has no decoder, so it cannot show a picture")
        return self.show(self.values)

    def rollback(self, lengths: Tensor) -> None:
        gone = self.revealed_at >= lengths[:, None]
        self.revealed_at[gone] = NEVER
        for table in self.values.values():
            table[gone] = 0

    def tensors(self) -> dict[str, Tensor]:
        return {**self.values, "revealed_at": self.revealed_at}

    def with_tensors(self, tensors: dict[str, Tensor]) -> "GridCanvas":
        values = {k: v for k, v in tensors.items() if k != "revealed_at"}
        return GridCanvas(values, tensors["revealed_at"], self.show)
