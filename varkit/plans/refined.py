"""Next scale with masked refinement (HMAR, arXiv 2506.04421): a scale is guessed whole, then corrected in steps.

A scale sees only itself: what it is fed already sums up the coarser ones. Its first step predicts all n positions at
once, which takes them for independent; of that guess the T[0] surest are committed. Each further step shows the draft
with what is not committed masked, predicts that anew through blocks and a head of its own, and commits the T[s]
surest, until T adds up to n. The counts T may be changed at any time without training; T = (n,) is VAR's way.
Legend: B samples, K levels, n positions of a level, T targets of a step.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from varkit.errors import UserError
from varkit.plans.base import CONFIDENCE, Plan, together
from varkit.plans.scales import ScalePlan, ScalesConfig
from varkit.plans.schedule import Schedule
from varkit.plans.step import Step

if TYPE_CHECKING:
    from varkit.decode.state import State

Counts = tuple[tuple[int, ...], ...]
"""For each level, how many of its positions each of its steps commits."""

MASK = "mask"
"""The route of the steps that refine."""

FEW: dict[int, tuple[int, ...]] = {4: (1, 3), 9: (1, 1, 2, 5)}
"""The released counts at 256 pixels, by the positions of a level; all other levels are drawn at once."""


def coarse_counts(schedule: Schedule, more: Mapping[int, tuple[int, ...]] | None = None) -> Counts:
    """The counts of `FEW`, or of `more` by positions of a level, for each level."""
    few = FEW | dict(more or {})
    return tuple(few.get(n, (n,)) for n in schedule.lengths)


def parse_counts(text: str, schedule: Schedule) -> Counts:
    """Counts as users write them, by the sides of levels: "2:1,3 4x6:8,16", the others drawn at once; "none" for all.

    Raises `UserError` for what is no such text, and for sides that no level has.
    """
    few: dict[tuple[int, int], tuple[int, ...]] = {}
    for word in [] if text == "none" else text.split():
        found = re.fullmatch(r"(\d+)(?:x(\d+))?:(\d+(?:,\d+)*)", word)
        if not found:
            raise UserError(f"refinement {word!r} is not SIDE:N,N,...; write e.g. '2:1,3 3:1,1,2,5', or none")
        side = int(found[1]), int(found[2] or found[1])
        if side not in schedule.sides:
            known = ", ".join(f"{h}x{w}" for h, w in schedule.sides)
            raise UserError(f"no scale is {side[0]}x{side[1]}; those of this model are {known}")
        few[side] = tuple(map(int, found[3].split(",")))
    pairs = zip(schedule.sides, schedule.lengths, strict=True)
    return tuple(few.get(side, (n,)) for side, n in pairs)


class RefinedPlan(Plan):
    """First guesses follow `scales`, the plan without refinement, which is also how they are trained.

    counts: those of each level. guided: whether guidance applies to refining steps too. noise: at above 0, what is
    surest is decided among log probabilities plus Gumbel noise of this size, which falls to 0 at a level's last step.
    """

    def __init__(self, scales: ScalePlan, counts: Counts, guided: bool = False, noise: float = 0.0) -> None:
        self.scales, self.schedule, self.slots = scales, scales.schedule, scales.slots
        self.counts, self.guided, self.noise = counts, guided, noise
        self.order = [(level, turn) for level, own in enumerate(counts) for turn in range(len(own))]
        self._whole = scales.training_step()
        self._commits = torch.tensor([counts[level][turn] for level, turn in self.order])
        self._levels = torch.tensor([level for level, _ in self.order])
        self._turns = torch.tensor([turn for _, turn in self.order])
        self._last = torch.tensor([len(counts[level]) - 1 for level, _ in self.order])

    @property
    def evaluations(self) -> int:
        """Evaluations of the network that a run takes."""
        return len(self.order)

    def next_step(self, state: "State") -> Step | None:
        known = state.canvas.known.cpu()
        cursors, done = state.cursor.tolist(), state.finished | self.finished(state)
        if not bool(done.any()) and len(set(cursors)) == 1:
            return self.step(cursors[0], known)
        samples = zip(cursors, done.tolist(), known, strict=True)
        return together(None if idle else self.step(at, own) for at, idle, own in samples)

    def step(self, at: int, known: Tensor) -> Step:
        """Step number `at`, where the positions `known`, (L,) or (B, L) bool, are committed."""
        level, turn = self.order[at]
        whole, commits = self.scales.steps[level], self.counts[level][turn]
        if turn == 0:
            # Which are committed is decided once they are drawn; the first ones stand for them.
            return (
                whole
                if len(self.counts[level]) == 1
                else replace(whole, reveal=_first(whole.target, commits))
            )
        first, end = self.schedule.offsets[level], self.schedule.offsets[level + 1]
        left = sum(self.counts[level][turn:])
        return self.refining(whole, known[..., first:end], left, commits)

    def refining(self, whole: Step, known: Tensor, left: int, commits: int) -> Step:
        """Predict anew the `left` slots of `whole` that are not `known`, (n,) or (B, n), and commit `commits`."""
        read = known.int().argsort(dim=-1, stable=True)[..., :left]
        return replace(
            whole,
            feed=replace(whole.feed, time=(~known).float()),
            target=whole.target[read],
            read=read,
            reveal=_first(read, commits),
            route=MASK,
            carries=False,
            guided=self.guided,
        )

    def masked(self, positions: Tensor) -> Step:
        """All levels in one refining step that predicts the positions (B, T), as in training."""
        time = torch.zeros(len(positions), self.schedule.total).scatter_(1, positions, 1.0)
        reveal = torch.ones_like(positions, dtype=torch.bool)
        return replace(
            self._whole,
            feed=replace(self._whole.feed, time=time),
            target=positions,
            read=positions,
            reveal=reveal,
            turn=None,
            route=MASK,
            carries=False,
        )

    def by_confidence(self, step: Step) -> bool:
        """Where some of the targets are left to later steps of their level."""
        return not bool((step.reveal | (step.target < 0)).all())

    def settle(self, step: Step, values: Mapping[str, Tensor], state: "State") -> Step:
        if not self.by_confidence(step):
            return step
        if CONFIDENCE not in values:
            raise UserError(
                f"refinement commits what is surest, but the step's values are {', '.join(values)}; let the sampler "
                f"add {CONFIDENCE!r}, the probability of each choice, where it is asked for, or refine no scale"
            )
        at = state.cursor.clamp(max=len(self.order) - 1)
        sure = values[CONFIDENCE].cpu().double().clamp(min=1e-300).log()
        if self.noise:
            rest = 1 - self._turns[at] / self._last[at].clamp(min=1)
            gumbel = state.draws.gumbel("confidence", at, step.target.clamp(min=0)).squeeze(-1)
            sure = sure + self.noise * rest[:, None] * gumbel
        target = step.target.expand(len(sure), -1)
        sure = torch.where(target < 0, -torch.inf, sure)
        rank = sure.argsort(dim=1, stable=True).argsort(dim=1)
        return replace(step, reveal=(rank >= sure.shape[1] - self._commits[at][:, None]) & (target >= 0))

    def finished(self, state: "State") -> Tensor:
        return state.cursor >= len(self.order)

    def progress(self, at: Tensor) -> Tensor:
        return self._levels[at.clamp(max=len(self.order) - 1)] / max(1, len(self.schedule) - 1)


def _first(like: Tensor, count: int) -> Tensor:
    """True at the first `count` of the last dimension."""
    return (torch.arange(like.shape[-1]) < count).expand(like.shape)


@dataclass(frozen=True)
class RefinedConfig(ScalesConfig):
    """Next-scale order whose levels are refined in steps; `history` is 0, since a draft is nothing to be cached.

    counts: for each level, how many positions each of its steps commits; levels left out are drawn at once. guided,
    noise: see `RefinedPlan`.
    """

    history: int | None = 0
    counts: Counts = ()
    guided: bool = False
    noise: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.history != 0:
            raise UserError(
                f"history {self.history} does not go with refinement, whose scales see none; use 0"
            )
        if self.windows is not None:
            raise UserError(
                f"{self.windows} does not go with refinement, whose masked steps see whole scales; leave windows out"
            )
        if not 0 <= self.noise < float("inf"):
            raise UserError(f"noise {self.noise} of the confidence is below 0; use 0 for none, or e.g. 1")
        lengths = Schedule.parse(self.schedule).lengths
        given = tuple(tuple(own) for own in self.counts)
        if len(given) > len(lengths):
            raise UserError(f"counts are given for {len(given)} levels; the schedule has {len(lengths)}")
        for level, (own, n) in enumerate(zip(given, lengths, strict=False)):
            if sum(own) != n or min(own, default=0) < 1:
                raise UserError(
                    f"the counts {own} of level {level} do not make up its {n} positions; give numbers from 1 up "
                    f"that add up to {n}"
                )
        if given and len(given[0]) > 1:
            raise UserError(f"level 0 is drawn from start tokens at once; its counts must be ({lengths[0]},)")
        object.__setattr__(self, "counts", given + tuple((n,) for n in lengths[len(given) :]))

    def build(self) -> RefinedPlan:  # type: ignore[override]
        """Make the plan."""
        scales = ScalePlan(Schedule.parse(self.schedule), self.frame, history=0)
        return RefinedPlan(scales, self.counts, self.guided, self.noise)
