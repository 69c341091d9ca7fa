"""Greedy decoding against reference tokens, through the library's own decoding loop and cache.

Arg-max decoding of a whole picture diverges for good at the first tie that rounds the other way. So each step is
given the reference's choice to go on from, and must itself have rated that choice as the best, or within rounding of
the best.
Legend: B samples, T targets, V vocabulary, L positions.
"""

from dataclasses import replace

import torch
from torch import Tensor

from varkit.canvases.base import Canvas
from varkit.decode.cache.full import FullCache
from varkit.decode.loop import Model, run
from varkit.decode.state import Options, State
from varkit.draws import Draws
from varkit.generators.base import Condition
from varkit.heads.base import Ask
from varkit.hub.verify import Case


class Forced:
    """A picker that returns the reference's choices (B, L, ...), and keeps its own, how much theirs fall short, and the
    logits of each step.
    """

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens
        self.chosen = torch.full_like(tokens, -1)
        self.gap = torch.full(tokens.shape, torch.inf)
        self.logits: list[Tensor] = []

    def __call__(self, logits: Tensor, ask: Ask) -> dict[str, Tensor]:
        """Guided logits (B, T, ..., V) -> {"ids": (B, T, ...)}."""
        target = ask.step.target
        given = self.tokens[:, target]
        self.logits.append(logits)
        best, self.chosen[:, target] = logits.max(dim=-1)
        self.gap[:, target] = best - logits.gather(-1, given[..., None]).squeeze(-1)
        return {"ids": given}


def compare_greedy(
    case: Case,
    model: Model,
    canvas: Canvas,
    condition: Condition,
    options: Options,
    array: str = "greedy_tokens",
) -> Tensor:
    """Decode a condition (R, B, ...) and compare an array of choices; the canvas ends up holding the reference's.

    Returns the guided logits, targets (dimension 1) in the order of decoding.
    """
    forced = Forced(case.reference(array))
    cache = FullCache(canvas.batch, branches=2, slots=model.plan.slots)
    draws = Draws.start(0, canvas.batch)  # arg-max draws nothing
    prepared = model.generator.prepare(condition)
    run(model, State.start(canvas, cache, prepared, draws, replace(options, pick=forced)))
    case.compare_tokens(array, forced.chosen, forced.gap)
    return torch.cat(forced.logits, dim=1)


def labels_and_null(labels: Tensor, null: int) -> Condition:
    """Labels (B,) against the label that stands for none."""
    return {"label": torch.stack([labels, torch.full_like(labels, null)])}
