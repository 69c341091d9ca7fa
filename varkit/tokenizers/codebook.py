"""A codebook: look-up, exact nearest search, and what keeps it healthy in training.

Codes are trained by gradients (the quantizer's loss), or by the moving average of the vectors assigned to
them (VQ-VAE, arXiv 1711.00937, appendix A.1); `CodebookKeeper` does the latter and moves codes that nothing
chooses any more. Neither it nor `CodebookStatistics` is part of the module: they belong to a training run.
Legend: V codes, D channels of a code, N vectors, K levels, L positions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varkit.errors import UserError
from varkit.plans.schedule import Schedule

ROWS = 256
"""Vectors searched at a time. Always this many, padded if need be: a product of fixed shape rounds the same
way for every batch, so a vector's code never depends on its neighbours."""


class Codebook(nn.Module):
    """V codes of D channels; `normalize` puts vectors and codes on the unit sphere at each use (LlamaGen)."""

    def __init__(self, vocab_size: int, channels: int, normalize: bool = False) -> None:
        super().__init__()
        self.normalize = normalize
        self.weight = nn.Parameter(
            torch.empty(vocab_size, channels).uniform_(-1 / vocab_size, 1 / vocab_size)
        )

    @property
    def codes(self) -> Tensor:
        """The codes as they are used, (V, D) float32 (or wider)."""
        weight = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        return F.normalize(weight, dim=-1) if self.normalize else weight

    def forward(self, ids: Tensor) -> Tensor:
        """Look ids (...) up: (..., D)."""
        return F.embedding(ids, self.codes)

    @torch.no_grad()
    def nearest(self, vectors: Tensor, cost: Tensor | None = None) -> Tensor:
        """Index (...) int64 of the nearest code to each of `vectors` (..., D); ties go to the lowest.

        `cost` (V,) is added to the squared distances.
        """
        codes = self.codes
        flat = vectors.to(codes.dtype).reshape(-1, codes.shape[1])
        if self.normalize:
            flat = F.normalize(flat, dim=-1)
        padded = F.pad(flat, (0, 0, 0, -len(flat) % ROWS))
        minus_2_codes, squares = -2 * codes.T, codes.square().sum(1)
        if cost is not None:
            squares = squares + cost
        with torch.autocast(flat.device.type, enabled=False):
            # |x - c|^2 without |x|^2, which is the same for every code.
            found = [torch.addmm(squares, rows, minus_2_codes).argmin(1) for rows in padded.split(ROWS)]
        return (
            torch.cat(found)[: len(flat)].reshape(vectors.shape[:-1]) if found else flat.new_empty(0).long()
        )


class CodebookKeeper:
    """Runs after each optimizer step: moving-average updates and the revival of codes that have died.

    Make it after the codes have their first values, where averages begin, and before the optimizer. With
    `decay` each code becomes the moving average of the vectors it was chosen for, and is no longer trained by
    gradients. With `patience`, a code that was not chosen for that many steps in a row moves onto one of the
    current vectors, drawn with the given generator.
    """

    def __init__(self, codebook: Codebook, decay: float | None = None, patience: int | None = None) -> None:
        if decay is not None:
            check_decay(decay)
        if patience is not None and patience < 1:
            raise UserError(f"codebook patience {patience} is below 1 step; 100 is usual")
        self.codebook, self.decay, self.patience = codebook, decay, patience
        weight = codebook.weight
        weight.requires_grad_(decay is None)
        self.idle = torch.zeros(len(weight), dtype=torch.int64, device=weight.device)
        self.counts = torch.ones(len(weight), device=weight.device)
        self.sums = weight.detach().float().clone()

    @torch.no_grad()
    def update(self, vectors: Tensor, ids: Tensor, generator: torch.Generator) -> int:
        """Learn from `vectors` (..., D) and the `ids` (...) chosen for them; return how many codes moved."""
        vectors, ids = vectors.detach().float().flatten(0, -2), ids.flatten()
        if self.codebook.normalize:
            vectors = F.normalize(vectors, dim=-1)
        counts = torch.bincount(ids, minlength=len(self.idle))
        if self.decay is not None:
            self._average(vectors, ids, counts, self.decay)
        if self.patience is None:
            return 0
        self.idle = torch.where(counts > 0, 0, self.idle + 1)
        return self._revive((self.idle >= self.patience).nonzero().squeeze(1), vectors, generator)

    def _average(self, vectors: Tensor, ids: Tensor, counts: Tensor, decay: float) -> None:
        self.counts.lerp_(counts.to(self.counts.dtype), 1 - decay)
        self.sums.lerp_(torch.zeros_like(self.sums).index_add_(0, ids, vectors), 1 - decay)
        # A code whose count has faded keeps its place: both would tend to 0 / 0.
        alive = self.counts > 1e-3
        self.codebook.weight[alive] = (self.sums[alive] / self.counts[alive, None]).to(
            self.codebook.weight.dtype
        )

    def _revive(self, dead: Tensor, vectors: Tensor, generator: torch.Generator) -> int:
        if not len(dead):
            return 0
        # Drawn on the CPU, so the same on every device, and each vector once: twin codes would never part.
        chosen = torch.randperm(len(vectors), generator=generator)[: len(dead)].to(vectors.device)
        dead = dead[: len(chosen)]
        self.codebook.weight[dead] = vectors[chosen].to(self.codebook.weight.dtype)
        self.sums[dead], self.counts[dead], self.idle[dead] = vectors[chosen], 1.0, 0
        return len(dead)

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run needs."""
        return {"idle": self.idle, "counts": self.counts, "sums": self.sums}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up where `state_dict` left off."""
        for name in self.state_dict():
            getattr(self, name).copy_(state[name])


def check_decay(decay: float) -> None:
    """Raise `UserError` for what is no decay of a moving average."""
    if not 0 <= decay < 1:
        raise UserError(f"codebook decay {decay} is outside [0, 1); 0.99 is usual")


class CodebookStatistics:
    """How often each level chose each code; collapse at coarse levels, the usual failure, shows here."""

    def __init__(self, vocab_size: int, schedule: Schedule) -> None:
        self.schedule = schedule
        self.counts = torch.zeros(len(schedule), vocab_size, dtype=torch.int64)

    def update(self, ids: Tensor) -> None:
        """Count ids (B, L)."""
        vocab_size = self.counts.shape[1]
        cells = self.schedule.level_of * vocab_size + ids.cpu()
        self.counts += torch.bincount(cells.flatten(), minlength=self.counts.numel()).view_as(self.counts)

    def usage(self, level: int | None = None) -> float:
        """Fraction of the codebook chosen at least once, by one level or by any."""
        return (self._counts(level) > 0).double().mean().item()

    def perplexity(self, level: int | None = None) -> float:
        """exp of the entropy of the chosen codes: V when all are equally frequent, 1 when one takes all."""
        counts = self._counts(level)
        return torch.special.entr(counts / counts.sum().clamp(min=1)).sum().exp().item()

    def metrics(self) -> dict[str, float]:
        """Usage and perplexity of all levels, and of each."""
        metrics = {"usage": self.usage(), "perplexity": self.perplexity()}
        for k in range(len(self.schedule)):
            metrics |= {f"usage_{k}": self.usage(k), f"perplexity_{k}": self.perplexity(k)}
        return metrics

    def _counts(self, level: int | None) -> Tensor:
        return (self.counts.sum(0) if level is None else self.counts[level]).double()
