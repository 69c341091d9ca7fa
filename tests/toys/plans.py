"""Toy orders that stretch the seams: random masked, chunk x denoising with a clean pass, and one computed from the
sample.
"""

import torch
from torch import Tensor

from varkit.plans.base import Plan, StaticPlan
from varkit.plans.join import collate
from varkit.plans.step import Slots, Step


def grid_coords(positions: Tensor, width: int) -> Tensor:
    """(row, column) of raster positions."""
    return torch.stack([positions // width, positions % width], dim=-1)


class MaskedPlan(Plan):
    """MAR-like: every step feeds all positions (unknown ones as masks), sees everything, and reveals some, per sample.

    The order is each sample's own, drawn from its stream; nothing is ever cached.
    """

    def __init__(self, side: int, steps: int) -> None:
        self.side, self.n_steps, self.slots = side, steps, side * side

    def orders(self, state) -> Tensor:
        """(B, P): each sample's permutation."""
        return state.draws.uniform("order", 0, torch.arange(self.slots)).squeeze(-1).argsort(dim=1)

    def next_step(self, state) -> Step | None:
        if bool(state.finished.all()):
            return None
        per_step = self.slots // self.n_steps
        ids = torch.arange(self.slots)
        start = (state.cursor * per_step)[:, None] + torch.arange(per_step)
        target = torch.where(
            state.finished[:, None], -1, self.orders(state).gather(1, start.clamp(max=self.slots - 1))
        )
        shows = torch.where(state.canvas.known, ids, -1)
        batch = len(state.cursor)
        feed = Slots.of(
            torch.where(state.finished[:, None], -1, ids.expand(batch, -1)),
            shows,
            grid_coords(ids, self.side).expand(batch, -1, -1),
        )
        return Step.of(feed, target=target, read=target, writes=False)

    def finished(self, state) -> Tensor:
        return state.cursor >= self.n_steps

    def progress(self, at: Tensor) -> Tensor:
        return at / self.n_steps


class ChunkPlan(StaticPlan):
    """Video-like: each chunk of positions is denoised in several evaluations, then a clean pass only writes the
    cache.
    """

    def __init__(self, chunks: int, size: int, denoise: int) -> None:
        steps = []
        for chunk in range(chunks):
            ids = torch.arange(chunk * size, (chunk + 1) * size)
            coords = grid_coords(ids, size)
            for i in range(denoise):
                noisy = Slots.of(ids, ids, coords, level=chunk, time=1 - i / denoise)
                last = torch.full_like(ids, i == denoise - 1, dtype=torch.bool)
                steps.append(Step.of(noisy, target=ids, reveal=last, writes=False))
            clean = Slots.of(ids, ids, coords, level=chunk, time=0.0)
            steps.append(Step.of(clean, target=ids[:0]))
        super().__init__(steps, chunks * size)


class WanderPlan(Plan):
    """The next position depends on the last token; a sample ends when it draws token 0, or after `longest` steps."""

    def __init__(self, positions: int, longest: int) -> None:
        self.slots, self.positions, self.longest = longest, positions, longest

    def next_step(self, state) -> Step | None:
        if bool(state.finished.all()):
            return None
        steps = [None if bool(state.finished[b]) else self._step(state, b) for b in range(state.batch)]
        return collate(steps)

    def _step(self, state, b: int) -> Step:
        at = int(state.cursor[b])
        last = int(state.canvas.revealed_at[b].argmax()) if at else -1
        target = self._after(state, b, last)
        feed = Slots.of(
            torch.tensor([at]), torch.tensor([last]), grid_coords(torch.tensor([max(last, 0)]), 4), level=at
        )
        return Step.of(feed, target=torch.tensor([target]))

    def _after(self, state, b: int, last: int) -> int:
        """The first unknown position after `last` plus the token found there."""
        token = int(state.canvas.values["ids"][b, last]) if last >= 0 else 0
        known = state.canvas.known[b]
        order = [(last + 1 + token + i) % self.positions for i in range(self.positions)]
        return next(p for p in order if not bool(known[p]))

    def finished(self, state) -> Tensor:
        last = state.canvas.revealed_at.argmax(dim=1)
        token = state.canvas.values["ids"][torch.arange(state.batch), last]
        drew_end = (token == 0) & (state.cursor > 0)
        return drew_end | (state.cursor >= min(self.longest, self.positions))
