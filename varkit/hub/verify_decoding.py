"""Greedy decoding against reference tokens, through the library's own decoding loop and cache.

Arg-max decoding of a whole picture diverges for good at the first tie that rounds the other way. So each step is
given the reference's choice to go on from, and must itself have rated that choice as the best, or within rounding of
the best.
Legend: B samples, T targets, V vocabulary, L positions.
"""

import torch
from torch import Tensor

from varkit.canvases.base import Canvas
from varkit.decode.cache.full import FullCache
from varkit.decode.guidance import Guidance
from varkit.decode.loop import Model, run
from varkit.decode.state import Options, State
from varkit.draws import Draws
from varkit.heads.base import Ask
from varkit.hub.verify import Case


class Forced:
    """A picker that returns the reference's tokens (B, L), and keeps its own choice and how much theirs falls short."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens
        self.chosen = torch.full_like(tokens, -1)
        self.gap = torch.full(tokens.shape, torch.inf)

    def __call__(self, logits: Tensor, ask: Ask) -> dict[str, Tensor]:
        """Guided logits (B, T, V) -> {"ids": (B, T)}."""
        target = ask.step.target
        given = self.tokens[:, target]
        best, self.chosen[:, target] = logits.max(dim=-1)
        self.gap[:, target] = best - logits.gather(-1, given[..., None]).squeeze(-1)
        return {"ids": given}


def compare_greedy(
    case: Case, model: Model, canvas: Canvas, labels: Tensor, null: int, guidance: Guidance
) -> None:
    """Decode `labels` (B,) against the label `null`, compare `greedy_tokens`; the canvas ends up holding them."""
    forced = Forced(case.reference("greedy_tokens"))
    branches = torch.stack([labels, torch.full_like(labels, null)])
    cache = FullCache(len(labels), branches=2, slots=model.plan.slots)
    draws = Draws.start(0, len(labels))  # arg-max draws nothing
    prepared = model.generator.prepare({"label": branches})
    run(model, State.start(canvas, cache, prepared, draws, Options(combine=guidance, pick=forced)))
    case.compare_tokens("greedy_tokens", forced.chosen, forced.gap)
