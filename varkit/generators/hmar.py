"""HMAR: VAR with a second branch that corrects a scale's first guess (arXiv 2506.04421).

Both branches share a trunk of blocks, the condition and the embeddings. The last `mask_depth` blocks, the modulation
before the head and the head itself are each branch's own. A slot of the refining branch shows two things:

    x = W area(f_hat) + m + b + position,    m = W area(phi(bicubic(codes of the draft))), or a mask token

the sum of the coarser scales, as in VAR, and what the draft of this scale adds, where it is committed. Masked codes
still reach their neighbours' m through bicubic and phi, as published.
Legend: B samples, L slots, D code width, C width.
"""

from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varkit.devices import sent_once
from varkit.errors import UserError
from varkit.generators.base import Prepared
from varkit.generators.var import VAR, VARConfig
from varkit.nn.adaln import AdaLNBlock
from varkit.plans.refined import MASK, RefinedConfig, coarse_counts
from varkit.plans.schedule import Schedule
from varkit.plans.step import Step
from varkit.tokenizers.multiscale_vq import MultiScaleVQConfig


@dataclass(frozen=True)
class HMARConfig(VARConfig):
    """Published sizes are VAR's of depth 16 to 30, with branches of 8 blocks."""

    mask_depth: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.mask_depth < self.depth:
            raise UserError(
                f"mask_depth {self.mask_depth} leaves no trunk of a generator of depth {self.depth}; use 1 to "
                f"{self.depth - 1}"
            )
        if self.reach:
            raise UserError(f"reach {self.reach} does not go with masked codes, which stand alone; use 0")

    def fitted(self, tokenizer: MultiScaleVQConfig) -> dict[str, Any]:
        """As VAR's, with a head for each branch and the released counts for coarse scales."""
        parts = super().fitted(tokenizer)
        counts = coarse_counts(Schedule.parse(tokenizer.schedule))
        return parts | {"head_mask": parts["head"], "plan": RefinedConfig(tokenizer.schedule, counts=counts)}

    def build(self) -> "HMAR":
        """The network, initialised as VAR; the refining branch is a copy of the other."""
        return HMAR(self)


class HMAR(VAR):
    """VAR's blocks are the trunk, `blocks`, and `main_blocks`; `mask_blocks` take the latter's place to refine."""

    stacks = ("blocks", "main_blocks", "mask_blocks")

    def __init__(self, config: HMARConfig) -> None:
        super().__init__(config)
        trunk, own = self.blocks[: -config.mask_depth], self.blocks[-config.mask_depth :]
        self.blocks: Sequence[AdaLNBlock] = trunk  # type: ignore[assignment]
        self.main_blocks: Sequence[AdaLNBlock] = own  # type: ignore[assignment]
        self.mask_blocks: Sequence[AdaLNBlock] = deepcopy(own)  # type: ignore[assignment]
        self.mask_modulation = deepcopy(self.final_modulation)
        self.mask_embed = nn.Parameter(torch.empty(1, config.width))
        nn.init.trunc_normal_(self.mask_embed, std=(1 / (3 * config.width)) ** 0.5)

    def path(self, route: str) -> Iterable[tuple[int, AdaLNBlock]]:
        """The trunk, then the route's own blocks."""
        trunk, own = len(self.blocks), len(self.main_blocks)
        first = trunk + own if route == MASK else trunk
        branch = self.mask_blocks if route == MASK else self.main_blocks
        return chain(enumerate(self.blocks), enumerate(branch, first))

    def finals(self, vector: Tensor) -> Prepared:
        mask = self.mask_modulation(F.silu(vector)).unflatten(-1, (2, -1))
        return {**super().finals(vector), "final_mask": mask}

    def final_of(self, route: str) -> str:
        return "final_mask" if route == MASK else "final"

    def shown(self, fed: dict[str, Tensor], step: Step) -> Tensor:
        h = super().shown(fed, step)
        if step.route != MASK:
            return h
        assert step.feed.time is not None, "a step that refines says by its times what is masked"
        draft = F.linear(fed["own"].to(h.dtype), self.embed.weight)
        masked = (sent_once(step.feed.time, h.device) > 0)[..., None]
        return h + torch.where(masked, self.mask_embed.to(h.dtype), draft)

    @torch.no_grad()
    def branch_off(self) -> list[nn.Parameter]:
        """Start the refining branch from the other, as the second stage of training does; its parameters."""
        pairs = [*zip(self.mask_blocks, self.main_blocks, strict=True)]
        modules: list[tuple[nn.Module, nn.Module]] = [*pairs, (self.mask_modulation, self.final_modulation)]
        for mine, other in modules:
            mine.load_state_dict(other.state_dict())
        return [self.mask_embed, *(p for mine, _ in modules for p in mine.parameters())]
