"""Next-scale order whose schedule is a choice at run time (FlexVAR, arXiv 2502.20313): steps, size and aspect ratio.

Every slot tells the grid that its scale has, so a generator can place it in any schedule: coordinates are (row,
column, height, width). Non-square schedules are ours; the published code is square only: sides keep the shape of the
finest grid. Legend: K scales, L positions.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from varkit.errors import UserError
from varkit.plans.scales import ScalePlan, ScalesConfig
from varkit.plans.schedule import Schedule, Side

PUBLISHED: dict[int, tuple[int, ...]] = {
    6: (1, 2, 4, 6, 10, 16),
    8: (1, 2, 3, 5, 7, 10, 13, 16),
    9: (1, 2, 3, 4, 5, 7, 10, 13, 16),
    10: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    11: (1, 2, 3, 4, 5, 6, 7, 9, 11, 13, 16),
    12: (*range(1, 9), 10, 12, 14, 16),
    13: (*range(1, 11), 12, 14, 16),
    14: (*range(1, 13), 14, 16),
}
"""Schedules for 256 pixels, by their number of steps."""

PUBLISHED_512 = (*range(1, 11), 12, 14, 16, 23, 32)
"""The schedule for 512 pixels, from a model of 256."""

GROWTH = 1.45
"""By how much sides grow at most from one scale to the next, beyond the trained size (23 / 16 is published)."""

RAMP = 9
"""Steps over which guidance rises, at most (published)."""


def measured(schedule: Schedule) -> Tensor:
    """(row, column, height, width) of each position in its own scale, (L, 4) int64."""
    sides = torch.tensor(schedule.sides)[schedule.level_of]
    return torch.cat([schedule.coords, sides], dim=1)


def proportional(sides: Iterable[int], last: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """Grids of these longer sides in the shape of the grid `last`: (4,) like (8, 6) -> ((4, 3),)."""
    longest = max(last)
    height, width = last
    return tuple(
        (max(1, round(side * height / longest)), max(1, round(side * width / longest))) for side in sides
    )


def spread(steps: int, last: int) -> tuple[int, ...]:
    """A schedule of squares with `steps` sides up to `last`: the published one, or sides in even geometric steps.

    Raises `UserError` for a number of steps that no growing schedule has.
    """
    if not (2 <= steps <= last or steps == last == 1):
        raise UserError(
            f"{steps} steps cannot reach a grid of {last}; use 2 to {last}, each scale larger than the last"
        )
    if last == PUBLISHED[10][-1] and steps in PUBLISHED:
        return PUBLISHED[steps]
    if (steps, last) == (len(PUBLISHED_512), PUBLISHED_512[-1]):
        return PUBLISHED_512
    sides = [1]
    for k in range(1, steps):
        wanted = round(last ** (k / (steps - 1)))
        sides.append(max(sides[-1] + 1, min(wanted, last - (steps - 1 - k))))
    return tuple(sides)


def sides_of(text: str) -> tuple[Side, ...]:
    """Sides written as 1,2,4,6,8, or 1x1,2x3 (rows x columns). Raises `UserError` for anything else."""
    found: list[Side] = []
    for part in text.split(","):
        numbers = part.strip().lower().split("x")
        if not all(n.isdecimal() for n in numbers) or len(numbers) > 2:
            raise UserError(f"schedule {text!r} is not a list of sides; write e.g. 1,2,4,8 or 1x1,2x3,4x6")
        found.append(int(numbers[0]) if len(numbers) == 1 else (int(numbers[0]), int(numbers[1])))
    return tuple(found)


@dataclass(frozen=True)
class FlexibleScalesConfig(ScalesConfig):
    """`schedule` is the default; any other may take its place. seen: sides that the generator was trained with.

    seen is empty where nobody knows: then all sides up to the default's longest count as seen. greedy_unseen: scales of
    other sides take the likeliest codes. clamp: guidance that rises ends where it was told to (see `ramp`).
    """

    seen: tuple[int, ...] = ()
    greedy_unseen: bool = True
    clamp: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "seen", tuple(self.seen))

    @property
    def known(self) -> tuple[int, ...]:
        """The sides of training: those seen, or where nobody knows all up to the default's longest."""
        return self.seen or tuple(range(1, max(Schedule.parse(self.schedule).last) + 1))

    @property
    def trained(self) -> int:
        """The longest side of training."""
        return max(self.known)

    def over(self, schedule: Sequence[Side]) -> "FlexibleScalesConfig":
        """The order over other grids; what was trained is still known."""
        return replace(self, schedule=tuple(schedule), seen=self.known)

    def stepped(self, steps: int) -> "FlexibleScalesConfig":
        """The order in another number of steps, up to the same finest grid."""
        last = Schedule.parse(self.schedule).last
        return self.over(proportional(spread(steps, max(last)), last))

    def to_grid(self, last: tuple[int, int]) -> "FlexibleScalesConfig":
        """The order up to another finest grid (h, w): the sides that fit, then larger ones step by step.

        From the trained size of the released models to twice that, it is the published one.
        """
        longest = max(last)
        if (self.trained, longest) == (PUBLISHED[10][-1], PUBLISHED_512[-1]):
            return self.over(proportional(PUBLISHED_512, last))
        sides = [max(side) for side in Schedule.parse(self.schedule).sides]
        kept = sorted({side for side in sides if side < longest})
        if longest <= max(sides):
            return self.over(proportional([*kept, longest], last))
        more = next(n for n in range(1, longest + 1) if longest <= kept[-1] * GROWTH**n)
        grown = [round(kept[-1] * (longest / kept[-1]) ** (k / more)) for k in range(1, more + 1)]
        return self.over(proportional([*kept, *grown], last))

    def unseen(self) -> tuple[bool, ...]:
        """Which of the schedule's scales have a side, height or width, that training never drew."""
        known = self.known
        return tuple(h not in known or w not in known for h, w in Schedule.parse(self.schedule).sides)

    def build(self) -> ScalePlan:
        """Make the plan."""
        schedule = Schedule.parse(self.schedule)
        return ScalePlan(schedule, self.frame, coords=measured(schedule))


def ramp(schedule: Schedule, trained: int, clamp: bool = False) -> tuple[float, ...]:
    """How far guidance has risen at each step, as published: r = k / min(K - 1, 9), and 1 beyond the trained side.

    In schedules of more than ten steps r passes 1 (at K = 13 it ends at 12 / 9); `clamp` stops it there.
    """
    rise = max(1, min(len(schedule) - 1, RAMP))
    shares = [k / rise if max(side) <= trained else 1.0 for k, side in enumerate(schedule.sides)]
    return tuple(min(1.0, share) if clamp else share for share in shares)
