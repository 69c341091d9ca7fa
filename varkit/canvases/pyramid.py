"""Canvas over a residual pyramid (VAR, arXiv 2404.02905, Algorithm 2): codes of every level add up to one feature map.

The input of level k is the running sum of the levels before it, area-resized to level k's grid; the canvas keeps that
table of inputs, filled level by level by the same operations in training and decoding.
Legend: B samples, L positions of all levels, D code width, h w finest grid.
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
from varkit.devices import sent
from varkit.plans.schedule import Schedule
from varkit.plans.step import Slots, Step


class PyramidCanvas(Canvas):
    """What is chosen (B, L, ...), inputs (B, L, D), and f_hat, the running sum (B, D, h, w).

    Samples may stand at different levels. `quantizer` names and makes what is chosen (ids, bits), and provides
    `lookup`, `accumulate`, `next_input` and `own_input` (`ScaleQuantizer` in tokenizers/residual.py), which say what
    f_hat is; `show` maps f_hat to images. Values may bring `codes` (B, T, D) to be added in place of those looked up
    (smooth sampling, blended edits); the codes added are kept, so that a rollback can add them again. A scale is added
    to f_hat once all of it is committed; until then what is drawn of it is a draft. Slots with a noise time show the
    draft too.
    """

    def __init__(
        self,
        quantizer,
        batch: int,
        schedule: Schedule,
        show: Callable[[Tensor], Tensor] | None = None,
        tensors: dict[str, Tensor] | None = None,
    ) -> None:
        self.quantizer, self.schedule, self.show = quantizer, schedule, show
        self.name: str = quantizer.latent
        if tensors is None:
            chosen = quantizer.empty(batch, schedule.total)
            codes = quantizer.lookup(chosen)
            tensors = {
                self.name: chosen,
                "codes": torch.zeros_like(codes),
                "inputs": torch.zeros_like(codes),
                "f_hat": quantizer.zeros(batch, schedule),
                "revealed_at": torch.full((batch, schedule.total), NEVER),
            }
        self._tensors = tensors

    @property
    def chosen(self) -> Tensor:
        """(B, L, ...): ids int64 (B, L), or bits uint8 (B, L, D)."""
        return self._tensors[self.name]

    @property
    def f_hat(self) -> Tensor:
        """(B, D, h, w) running sum of the revealed levels."""
        return self._tensors["f_hat"]

    @property
    def revealed_at(self) -> Tensor:  # type: ignore[override]
        return self._tensors["revealed_at"]

    def feed(self, slots: Slots) -> dict[str, Tensor]:
        fed = {"vectors": gather_positions(self._tensors["inputs"], slots.shows)}
        if slots.time is not None:
            fed["own"] = gather_positions(self._own(slots), slots.shows)
        return fed

    def _own(self, slots: Slots) -> Tensor:
        """(B, L, D): what each scale among the slots holds by itself; zeros at the other scales."""
        own = torch.zeros_like(self._tensors["inputs"])
        for level in slots.level.unique().tolist():
            a, e = self.schedule.offsets[level], self.schedule.offsets[level + 1]
            own[:, a:e] = self.quantizer.own_input(self._tensors["codes"][:, a:e], level, self.schedule)
        return own

    def reveal(self, step: Step, values: dict[str, Tensor], at: Tensor) -> None:
        before = self._complete()
        again = gather_positions(self.known, step.target).any(dim=1)
        scatter_positions(self.chosen, step.target, values[self.name])
        codes = values["codes"] if "codes" in values else self.quantizer.lookup(values[self.name])
        scatter_positions(self._tensors["codes"], step.target, codes)
        mark_revealed(self.revealed_at, step, at)
        fresh = self._complete() & ~before
        for level in fresh.any(dim=0).nonzero()[:, 0].tolist():
            a, e = self.schedule.offsets[level], self.schedule.offsets[level + 1]
            rows = sent(fresh[:, level].nonzero()[:, 0], self.f_hat.device)
            self._add(level, self._tensors["codes"][rows, a:e], None if len(rows) == self.batch else rows)
        for b in again.nonzero()[:, 0].tolist():
            self._replay(b)  # a level drawn anew: its old codes must leave the sum

    def _complete(self) -> Tensor:
        """(B, K) bool: levels that are committed to their last position."""
        return torch.stack(
            [part.all(dim=1) for part in self.known.split(self.schedule.lengths, dim=1)], dim=1
        )

    def _add(self, level: int, codes: Tensor, rows: Tensor | None) -> None:
        """Add one level's codes to f_hat of `rows` (None: all), and fill in the next level's input."""
        a, b = self.schedule.offsets[level], self.schedule.offsets[level + 1]
        self._tensors["codes"][slice(None) if rows is None else rows, a:b] = codes
        f_hat = self.f_hat if rows is None else self.f_hat[rows]
        f_hat = self.quantizer.accumulate(f_hat, level, codes, self.schedule)
        if rows is None:
            self._tensors["f_hat"] = f_hat
        else:
            self.f_hat[rows] = f_hat
        if level + 1 < len(self.schedule):
            after = self.quantizer.next_input(f_hat, level + 1, self.schedule)
            end = self.schedule.offsets[level + 2]
            self._tensors["inputs"][slice(None) if rows is None else rows, b:end] = after

    def latents(self) -> dict[str, Tensor]:
        return {self.name: self.chosen}

    def fill(self, latents: dict[str, Tensor]) -> None:
        check_positions(latents, (self.name,), self.schedule.total)
        like = self.chosen
        self._tensors[self.name] = latents[self.name].to(like.device, like.dtype, copy=True)
        self._tensors["f_hat"] = torch.zeros_like(self.f_hat)
        for level in range(len(self.schedule)):
            a, b = self.schedule.offsets[level], self.schedule.offsets[level + 1]
            self._add(level, self.quantizer.lookup(self.chosen[:, a:b]), None)
        self._tensors["revealed_at"] = torch.zeros_like(self.revealed_at)

    def preview(self) -> Tensor:
        if self.show is None:
            raise TypeError("this canvas has no decoder, so it cannot show a picture")
        return self.show(self.f_hat)

    def rollback(self, lengths: Tensor) -> None:
        gone = self.revealed_at >= lengths[:, None]
        self.revealed_at[gone] = NEVER
        for b in gone.any(dim=1).nonzero()[:, 0].tolist():
            self._replay(b)

    def _replay(self, b: int) -> None:
        """Recompute f_hat and the inputs of one sample from its known levels."""
        rows = torch.tensor([b], device=self.f_hat.device)
        self.f_hat[rows] = 0
        for level in range(len(self.schedule)):
            a, e = self.schedule.offsets[level], self.schedule.offsets[level + 1]
            if bool(self.known[b, a:e].all()):
                self._add(level, self._tensors["codes"][rows, a:e], rows)

    def tensors(self) -> dict[str, Tensor]:
        return self._tensors

    def with_tensors(self, tensors: dict[str, Tensor]) -> "PyramidCanvas":
        return type(self)(self.quantizer, 0, self.schedule, self.show, tensors)
