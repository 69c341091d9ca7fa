"""One step of decoding, as data: what enters the network, what it may see, what is predicted and committed.

A plan is a list (or a lazy stream) of such steps, and nothing else in the library knows an order of prediction.
Several steps are joined into one by varkit/plans/join.py.
Legend: B batch, L slots fed, T targets, S slots of the whole plan. Tensors are (L,) when every sample agrees, else
(B, L) with -1 as padding at the end.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from varkit.plans.visibility import Own, own_mask


@dataclass(frozen=True)
class Slots:
    """Places of the network's sequence that a step feeds.

    ids: cache address of each slot, unique in the plan. shows: the canvas position whose value enters there, -1 for
    none (a start or mask token). coords: (..., L, D) coordinates for position embeddings. level: scale, frame or phase.
    segment: which named segment the slot belongs to (index into the plan's `segments`). time: noise time in [0, 1] of
    what is shown, 0 is data; None when nothing is noisy. turn: in a
    pack, which of its steps a slot belongs to; None: the first.
    """

    ids: Tensor
    shows: Tensor
    coords: Tensor
    level: Tensor
    segment: Tensor
    time: Tensor | None = None
    turn: Tensor | None = None

    @classmethod
    def of(
        cls,
        ids: Tensor,
        shows: Tensor,
        coords: Tensor,
        level: Tensor | int = 0,
        segment: Tensor | int = 0,
        time: Tensor | float | None = None,
    ) -> "Slots":
        """Build slots; numbers stand for the same value at every slot."""

        def fill(value: Tensor | int) -> Tensor:
            return value if isinstance(value, Tensor) else torch.full_like(ids, value)

        if isinstance(time, int | float):
            time = torch.full(ids.shape, float(time))
        return cls(ids, shows, coords, fill(level), fill(segment), time)

    def __len__(self) -> int:
        return self.ids.shape[-1]

    @cached_property
    def span(self) -> tuple[int, int] | None:
        """(a, b) when the ids are a, a+1, ..., b-1 for every sample, else None."""
        if self.ids.ndim != 1 or len(self) == 0:
            return None
        a, n = int(self.ids[0]), len(self)
        return (a, a + n) if bool((self.ids == torch.arange(a, a + n)).all()) else None

    @cached_property
    def valid(self) -> Tensor | None:
        """(B, L) bool, False at padding; None when nothing is padded."""
        if self.ids.ndim == 1:
            return None
        ok = self.ids >= 0
        return None if bool(ok.all()) else ok


@dataclass(frozen=True)
class Sees:
    """What the slots of a step may attend to.

    own: the step's own slots: "all" of them, "causal" (itself and those before), "self", a mask (L, L) / (B, L, L), or
    a form of `varkit.plans.visibility`.
    past: which slots written earlier: None all of them, else their ids (P,); an empty tensor means none.
    mask: (L, S) or (B, L, S) bool over slot ids, narrowing `past` for each query (neighbourhoods, reference segments).
    beyond: whether slots from S on, which the mask does not name, are seen; a bool, or one a query, (L,) or (B, L).
    """

    own: Own = "all"
    past: Tensor | None = None
    mask: Tensor | None = None
    beyond: bool | Tensor = False

    @property
    def whole_past(self) -> bool:
        """True when every slot written earlier is visible."""
        return self.past is None and self.mask is None

    @property
    def no_past(self) -> bool:
        """True when no slot written earlier is visible, whatever they are."""
        return self.past is not None and len(self.past) == 0

    def own_mask(self, length: int) -> Tensor | None:
        """(L, L) or (B, L, L) bool, or None when all see all."""
        return own_mask(self.own, length)

    def past_mask(self, ids: Tensor) -> Tensor | None:
        """Visibility of past slots `ids` (N,): (1 or L, N) or (B, L, N) bool, or None when all are visible."""
        seen = None if self.past is None else torch.isin(ids, self.past)[None]
        if self.mask is None:
            return seen
        width = self.mask.shape[-1]
        beyond = self.beyond[..., None] if isinstance(self.beyond, Tensor) else torch.tensor(self.beyond)
        narrowed = torch.where(ids < width, self.mask[..., ids.clamp(max=width - 1)], beyond)
        return narrowed if seen is None else narrowed & seen


@dataclass(frozen=True)
class Step:
    """One evaluation of the network and what it settles.

    target: canvas positions predicted. read: index into the fed slots where each is read from. reveal: bool, the
    targets committed now (the others stay provisional). writes: whether the fed slots enter the cache. carries: whether
    recurrent layers go on from them even so, as where no later step sees them (those of steps that write always do).
    route: name of the head (and of the generator's blocks) that serves this step. turn: in a pack, which of its steps a
    target belongs to (None: the first); turns: how many steps it stands for. guided: whether guidance applies; a step
    without it is evaluated for the first condition branch alone, and so must not write or carry.
    """

    feed: Slots
    target: Tensor
    read: Tensor
    reveal: Tensor
    sees: Sees = Sees()
    writes: bool = True
    route: str = "main"
    turn: Tensor | None = None
    turns: int = 1
    carries: bool = False
    guided: bool = True

    @classmethod
    def of(cls, feed: Slots, target: Tensor, read: Tensor | None = None, **rest) -> "Step":
        """Build a step that reveals all its targets, read by default from the fed slots in order."""
        read = torch.arange(target.shape[-1]).expand(target.shape) if read is None else read
        rest.setdefault("reveal", torch.ones_like(target, dtype=torch.bool))
        return cls(feed, target, read, **rest)

    @property
    def kind(self) -> tuple[str, bool, bool, bool]:
        """What samples must agree on to take their steps together."""
        return self.route, self.writes, self.carries, self.guided

    @cached_property
    def reads_all(self) -> bool:
        """True when targets are read from every fed slot in order, so that no gather is needed."""
        n = len(self.feed)
        return self.read.ndim == 1 and len(self.read) == n and bool((self.read == torch.arange(n)).all())
