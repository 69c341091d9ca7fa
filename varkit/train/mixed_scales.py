"""Mixed training of scales that see only themselves (MVAR, arXiv 2505.12742): a few of them in each step.

Inputs come from the tokenizer, so a scale needs no other: coarse scales are packed, and each fine one has steps of its
own, shorter and so lighter in memory. In a round of k + n steps the coarse scales have the first k, then the n finest
one each. Legend: T targets of a step, L of the plan.
"""

import torch
from torch import Tensor

from varkit.errors import UserError
from varkit.plans.base import StaticPlan
from varkit.plans.join import pack
from varkit.plans.step import Step
from varkit.tokenizers.base import Latents, Tokenizer
from varkit.train.lessons import Lesson, WholePlan


class MixedScales(WholePlan):
    """coarse: steps of the packed coarse scales in a round (k; 8 in the paper). alone: how many of the finest scales
    are by themselves (n; 2 at 256 pixels, 4 at 512).

    A step's loss is weighted by how rarely its scales come, so that in the mean over a round every target counts alike,
    as when all scales are packed; with `match_paper` it is the mean over the step's own targets. Held-out losses are
    those of the whole plan. Raises `UserError` for scales that see others, and for rounds that cannot be.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        plan: StaticPlan,
        coarse: int = 8,
        alone: int = 2,
        match_paper: bool = False,
    ) -> None:
        super().__init__(tokenizer, plan)
        levels = len(plan.steps)
        if not all(step.sees.no_past for step in plan.steps):
            raise UserError(
                "scales of this plan see coarser ones, and cannot be trained apart; set its history to 0"
            )
        if coarse < 1 or not 1 <= alone < levels:
            raise UserError(
                f"a round of {coarse} coarse steps and {alone} fine scales cannot be; use at least 1 coarse step, and "
                f"1 to {levels - 1} fine scales"
            )
        self.settings |= {"coarse": coarse, "alone": alone, "match_paper": match_paper}
        self.match_paper = match_paper
        groups = [pack(plan.steps[: levels - alone]), *plan.steps[levels - alone :]]
        self.round = [groups[0]] * coarse + groups[1:]

    def lesson(self, latents: Latents, step: int | None = None) -> Lesson:
        """That of the step's place in its round; with no step, the whole plan."""
        if step is None:
            return super().lesson(latents)
        assert self.progressive is None, "mixed scales do not grow; leave progressive training out"
        canvas, targets = self.taught(latents)
        taken = self.round[step % len(self.round)]
        if self.match_paper:
            return Lesson(canvas, taken, targets, len(taken.target))
        return Lesson(canvas, taken, targets, sum(self.sizes), self._weight(taken))

    def _weight(self, taken: Step) -> Tensor:
        """(T,): one over the share of steps in which these targets come."""
        count = sum(step is taken for step in self.round)
        return torch.full(taken.target.shape, len(self.round) / count)
