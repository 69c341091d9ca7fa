"""Another schedule for each training step (FlexVAR, arXiv 2502.20313): plan and mask are made anew for each draw.

Every map is the whole picture at its grid, so pictures are encoded once at all grids (`MapVQ.every`), and a step takes
those of its schedule. The sampler is the released code's; the paper's wording (at most 10 scales, each but the last
left out with 5 %) differs. Legend: B batch, L positions.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from varkit.errors import UserError
from varkit.plans.flexible import PUBLISHED, FlexibleScalesConfig, proportional
from varkit.plans.scales import ScalePlan
from varkit.plans.schedule import Side
from varkit.plans.step import Step
from varkit.tokenizers.base import Latents
from varkit.tokenizers.map_vq import MapVQ
from varkit.train.lessons import Lesson

DROPS = (0.9, 0.95, 0.98, 0.99)
"""One uniform number decides how many scales are left out: one more above each of these."""


@dataclass(frozen=True)
class ScheduleSampler:
    """Draws the longer sides of a training schedule, increasing from 1 to `last`.

    early and late sides come from 3 to `turn`, and from there to below `last`. usual: a schedule taken with
    probability `usual_rate` in place of drawn sides. limit: positions at most; scales are left out until it is kept.
    compat: leaving out may hit the last scale too, as in the released code; in the paper it always stays.
    """

    last: int
    turn: int
    early: int
    late: int
    usual: tuple[int, ...]
    usual_rate: float = 0.05
    limit: int = 0
    compat: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "usual", tuple(self.usual))
        between = max(0, self.turn - 2), max(0, self.last - self.turn - 1)
        if not (
            2 <= self.turn < self.last and 0 <= self.early <= between[0] and 0 <= self.late <= between[1]
        ):
            raise UserError(
                f"{self.early} sides from 3 to {self.turn} and {self.late} from there to below {self.last} cannot be "
                f"drawn; there are {between[0]} and {between[1]}"
            )

    @classmethod
    def published(cls, compat: bool = False) -> "ScheduleSampler":
        """For 256 pixels at stride 16. compat: as released, where the paper keeps the last scale."""
        return cls(16, 10, early=5, late=2, usual=PUBLISHED[10], limit=680, compat=compat)

    @classmethod
    def small(cls, schedule: Sequence[int]) -> "ScheduleSampler":
        """The same for a pyramid of squares: as many sides between 2 and the last as its default schedule has.

        Raises `UserError` for a schedule that does not begin with 1, 2 and end above 3.
        """
        if tuple(schedule[:2]) != (1, 2) or schedule[-1] < 4:
            raise UserError(
                f"schedules like {tuple(schedule)} cannot be drawn; begin with 1, 2 and end above 3"
            )
        last = schedule[-1]
        return cls(last, last - 1, early=len(schedule) - 3, late=0, usual=tuple(schedule))

    @classmethod
    def fitting(cls, schedule: Sequence[int], compat: bool = False) -> "ScheduleSampler":
        """The published one for a schedule that was published for 256 pixels, otherwise `small`."""
        return cls.published(compat) if tuple(schedule) in PUBLISHED.values() else cls.small(schedule)

    def draw(self, generator: torch.Generator | None = None) -> tuple[int, ...]:
        """The sides of one schedule; from torch's own generator by default."""

        def uniform() -> float:
            return torch.rand((), generator=generator, dtype=torch.float64).item()

        def below(n: int) -> int:
            return int(torch.randint(n, (), generator=generator))

        def some(count: int, start: int, end: int) -> list[int]:
            return (start + torch.randperm(end - start, generator=generator)[:count]).tolist()

        if uniform() < self.usual_rate:
            sides = list(self.usual)
        else:
            early, late = some(self.early, 3, self.turn + 1), some(self.late, self.turn + 1, self.last)
            sides = [1, 2, *sorted(early + late), self.last]
        chance = uniform()
        for threshold in DROPS:
            if chance > threshold and len(sides) > 3:
                del sides[2 + below(len(sides) - 3)]
        while self.limit and sum(side**2 for side in sides) > self.limit:
            droppable = 4 if self.compat else 3
            del sides[len(sides) - 4 + below(droppable)]
        return tuple(sides)


class ScheduleLessons:
    """Teacher forcing over a schedule drawn for each step, uniform over its positions.

    Without a sampler the plan's schedule tells one (`ScheduleSampler.fitting`; compat is for it). Held-out losses are
    measured on the plan's own schedule, and on each of `others` that ends at the same finest side. Raises `UserError`
    for a plan over grids that are not the tokenizer's.
    """

    def __init__(
        self,
        tokenizer: MapVQ,
        plan: ScalePlan,
        sampler: ScheduleSampler | None = None,
        others: Sequence[tuple[int, ...]] = (),
        compat: bool = False,
    ) -> None:
        self.tokenizer, self.plan = tokenizer, plan
        own = [max(side) for side in plan.schedule.sides]
        self.sampler = sampler or ScheduleSampler.fitting(own, compat)
        self.others = tuple(sides for sides in others if sides[-1] == own[-1])
        self.settings: dict[str, Any] = {"kind": type(self).__name__, **asdict(self.sampler)}
        self._planned = lru_cache(maxsize=64)(self._plan_of)
        self._planned(plan.schedule.sides)

    def lesson(self, latents: Latents, step: int | None = None) -> Lesson:
        """Over a schedule drawn from torch's generator; with no step, over the plan's own."""
        if step is None:
            return self.over(latents, self.plan.schedule.sides)
        return self.over(latents, proportional(self.sampler.draw(), self.plan.schedule.last))

    def held_out(self, latents: Latents) -> dict[str, Lesson]:
        """A lesson for each further schedule that is validated, by its sides."""
        last = self.plan.schedule.last
        return {
            "_".join(map(str, sides)): self.over(latents, proportional(sides, last)) for sides in self.others
        }

    def over(self, latents: Latents, sides: tuple[Side, ...]) -> Lesson:
        """The lesson over these grids, of ids (B, L) over all grids."""
        plan, step, index = self._planned(sides)
        canvas = self.tokenizer.canvas(len(latents["ids"]), plan.schedule)
        canvas.fill({"ids": latents["ids"][:, index]})
        return Lesson(canvas, step, canvas.latents(), plan.schedule.total)

    def _plan_of(self, sides: tuple[Side, ...]) -> tuple[ScalePlan, Step, Tensor]:
        """The plan over these grids, all its steps, and where its ids lie among those of all grids.

        Raises `UserError` for a grid that pictures are not encoded at.
        """
        plan, every = FlexibleScalesConfig(sides).build(), self.tokenizer.every
        for h, w in plan.schedule.sides:
            if (h, w) not in every.sides:
                (h1, w1) = every.last
                raise UserError(
                    f"a schedule with the grid {h}x{w} cannot be taught by a tokenizer of maps up to {h1}x{w1}; "
                    "train the model in its tokenizer's schedule"
                )
        levels = [every.sides.index(side) for side in plan.schedule.sides]
        return plan, plan.training_step(), torch.cat([every.positions(level) for level in levels])
