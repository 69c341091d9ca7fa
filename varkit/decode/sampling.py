"""Sampling of discrete codes: temperature, top-k, top-p, one uniform a token, and VAR's smooth mixing of codes.

Legend: B samples, T targets, V vocabulary, D code width.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from varkit.decode.guidance import BySteps, by_step
from varkit.devices import sent
from varkit.errors import UserError, no_numbers
from varkit.heads.base import Ask
from varkit.plans.base import CONFIDENCE


@dataclass(frozen=True)
class Sampler:
    """temperature 0 is arg-max; top_k 0 and top_p 0 keep everything. A temperature may be given for each step.

    Ties at the k-th value are all kept (as published). top-p keeps the smallest set of probability >= top_p.
    """

    temperature: BySteps = 1.0
    top_k: int = 0
    top_p: float = 0.0

    def __post_init__(self) -> None:
        for temperature in self.temperature if isinstance(self.temperature, tuple) else (self.temperature,):
            if not 0 <= temperature < math.inf:
                raise UserError(
                    f"temperature {temperature} is not a number from 0 up; use 0 (arg-max) or e.g. 1"
                )
        if self.top_k < 0:
            raise UserError(f"top-k {self.top_k} is below 0; use 0 (keep all) or a count of codes to keep")
        if not 0 <= self.top_p <= 1:
            raise UserError(f"top-p {self.top_p} is outside 0 to 1; use 0 (keep all) or e.g. 0.95")

    def __call__(self, logits: Tensor, ask: Ask) -> dict[str, Tensor]:
        """logits (B, T, ..., V) -> ids (B, T, ...); what a target is made of (bits) has a draw each.

        Where it is asked for, with the probability of each under the filtered logits. Raises `UserError` for logits
        that are no numbers, which would be drawn from like any others.
        """
        # On a CPU: elsewhere the question would make every step wait, and the picture is looked at in the end.
        if logits.device.type == "cpu" and bool(logits.sum().isnan()):
            raise no_numbers("what the head gives")
        if self.temperature == 0 and not ask.confidence:
            return {"ids": logits.argmax(dim=-1)}
        p = self.filtered(logits, ask.progress).softmax(dim=-1)
        ids = self._ids(logits, p, ask)
        return (
            {"ids": ids, CONFIDENCE: p.gather(-1, ids[..., None]).squeeze(-1)}
            if ask.confidence
            else {"ids": ids}
        )

    def _ids(self, logits: Tensor, p: Tensor, ask: Ask) -> Tensor:
        """Drawn from the probabilities p of the filtered logits, or the logits' arg-max at temperature 0."""
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        target, shape = ask.step.target.clamp(min=0), logits.shape[:-1]
        uniform = ask.draws.uniform("token", ask.at, target, math.prod(shape[2:])).view(shape)
        ids = pick(p, sent(uniform, logits.device))
        if isinstance(self.temperature, tuple) and 0 in self.temperature:
            greedy = _over(by_step(self.temperature, ask.progress) == 0, ids)
            ids = torch.where(greedy, logits.argmax(dim=-1), ids)
        return ids

    def filtered(self, logits: Tensor, progress: Tensor | None = None) -> Tensor:
        """logits (B, T, ..., V) over the temperature, -inf where top-k or top-p drop a code.

        `progress` (B, 1) or (B, T) says which temperature, when there is one for each step.
        """
        if isinstance(self.temperature, tuple):
            assert progress is not None, "temperatures by step need the progress"
            temperature = by_step(self.temperature, progress)
            logits = logits / _over(torch.where(temperature == 0, 1.0, temperature), logits)
        elif self.temperature not in (0.0, 1.0):
            logits = logits / self.temperature
        if self.top_k and self.top_k < logits.shape[-1]:
            logits = keep_top_k(logits, self.top_k)
        if self.top_p and self.top_p < 1:
            logits = keep_top_p(logits, self.top_p)
        return logits


def _over(x: Tensor, like: Tensor) -> Tensor:
    """(B, 1) or (B, T) -> broadcastable to `like` (B, T, ...)."""
    return sent(x, like.device).view(*x.shape, *([1] * (like.ndim - 2)))


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """-inf below the k-th largest of each row."""
    threshold = logits.topk(k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < threshold, -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """-inf outside the smallest set of codes whose probability reaches p (the best code always stays)."""
    ordered, order = logits.sort(dim=-1, descending=False)
    drop = ordered.softmax(dim=-1).cumsum(dim=-1) <= 1 - p
    drop[..., -1] = False
    return logits.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), -torch.inf)


def pick(p: Tensor, uniform: Tensor) -> Tensor:
    """Inverse of the cumulative distribution: probabilities (..., V), uniform (...) in (0, 1) -> ids (...)."""
    mass = p.cumsum(dim=-1)
    wanted = uniform[..., None] * mass[..., -1:]
    ids = torch.searchsorted(mass, wanted, right=True).squeeze(-1)
    # a uniform next to 1 may round past the end: step back onto the last code that was kept
    places = torch.arange(p.shape[-1], device=p.device)
    last = torch.where(p > 0, places, 0).amax(dim=-1)
    return torch.minimum(ids, last)


@dataclass(frozen=True)
class SmoothSampler:
    """VAR's `more_smooth`: the codes added are Gumbel-softmax mixtures that sharpen over the scales.

    With r = progress: codes = softmax((logits (1 + r) + Gumbel) / tau) @ codebook, tau = max(0.27 (1 - 0.95 r), 0.005).
    The ids are drawn as usual (they are what is kept as tokens). codebook (V, D).
    """

    sampler: Sampler
    codebook: Tensor

    def __call__(self, logits: Tensor, ask: Ask) -> dict[str, Tensor]:
        """logits (B, T, V) -> ids (B, T) and codes (B, T, D)."""
        gumbel = ask.draws.gumbel("smooth", ask.at, ask.step.target.clamp(min=0), logits.shape[-1])
        gumbel, r = sent(gumbel, logits.device), sent(ask.progress, logits.device)[..., None]
        tau = (0.27 * (1 - 0.95 * r)).clamp(min=0.005)
        weights = ((self.sampler.filtered(logits, ask.progress) * (1 + r) + gumbel) / tau).softmax(dim=-1)
        return {**self.sampler(logits, ask), "codes": weights @ self.codebook}
