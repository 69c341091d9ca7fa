"""One step of decoding, as data: what enters the network, what it may see, what is predicted and committed.

A plan is a list (or a lazy stream) of such steps, and nothing else in the library knows an order of prediction.
`pack` joins steps into one: all of them make the training sequence with its mask, a few make a verification window,
the first k make the uncached twin of cached decoding. `collate` pads the steps of samples that stand at different
places.
Legend: B batch, L slots fed, T targets, S slots of the whole plan. Tensors are (L,) when every sample agrees, else
(B, L) with -1 as padding at the end.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Slots:
    """Places of the network's sequence that a step feeds.

    ids: cache address of each slot, unique in the plan. shows: the canvas position whose value enters there, -1 for
    none (a start or mask token). coords: (..., L, D) coordinates for position embeddings. level: scale, frame or phase.
    segment: which named segment the slot belongs to (index into the plan's `segments`). time: noise time in [0, 1] of
    what is shown, 0 is data; None when nothing is noisy.
    """

    ids: Tensor
    shows: Tensor
    coords: Tensor
    level: Tensor
    segment: Tensor
    time: Tensor | None = None

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

    own: the step's own slots: "all" of them, "causal" (itself and those before), "self", or a mask (L, L) / (B, L, L).
    past: which slots written earlier: None all of them, else their ids (P,); an empty tensor means none.
    mask: (L, S) or (B, L, S) bool over slot ids, narrowing `past` for each query (neighbourhoods, reference segments).
    """

    own: str | Tensor = "all"
    past: Tensor | None = None
    mask: Tensor | None = None

    @property
    def whole_past(self) -> bool:
        """True when every slot written earlier is visible."""
        return self.past is None and self.mask is None

    def own_mask(self, length: int) -> Tensor | None:
        """(L, L) or (B, L, L) bool, or None when all see all."""
        if isinstance(self.own, Tensor):
            return self.own
        if self.own == "all":
            return None
        eye = torch.ones(length, length, dtype=torch.bool)
        return eye.tril() if self.own == "causal" else torch.eye(length, dtype=torch.bool)

    def past_mask(self, ids: Tensor) -> Tensor | None:
        """Visibility of past slots `ids` (N,): (1 or L, N) or (B, L, N) bool, or None when all are visible."""
        seen = None if self.past is None else torch.isin(ids, self.past)[None]
        if self.mask is None:
            return seen
        width = self.mask.shape[-1]
        # what the mask does not name is not seen
        narrowed = self.mask[..., ids.clamp(max=width - 1)] & (ids < width)
        return narrowed if seen is None else narrowed & seen


@dataclass(frozen=True)
class Step:
    """One evaluation of the network and what it settles.

    target: canvas positions predicted. read: index into the fed slots where each is read from. reveal: bool, the
    targets committed now (the others stay provisional). writes: whether the fed slots enter the cache. route: name
    of the head (and of the generator's blocks) that serves this step.
    """

    feed: Slots
    target: Tensor
    read: Tensor
    reveal: Tensor
    sees: Sees = Sees()
    writes: bool = True
    route: str = "main"

    @classmethod
    def of(cls, feed: Slots, target: Tensor, read: Tensor | None = None, **rest) -> "Step":
        """Build a step that reveals all its targets, read by default from the fed slots in order."""
        read = torch.arange(target.shape[-1]).expand(target.shape) if read is None else read
        rest.setdefault("reveal", torch.ones_like(target, dtype=torch.bool))
        return cls(feed, target, read, **rest)

    @cached_property
    def reads_all(self) -> bool:
        """True when targets are read from every fed slot in order, so that no gather is needed."""
        n = len(self.feed)
        return self.read.ndim == 1 and len(self.read) == n and bool((self.read == torch.arange(n)).all())


def _join(tensors: Sequence[Tensor], trailing: int = 0) -> Tensor:
    """Concatenate along the slot dimension, giving shared tensors a batch dimension when others have one.

    `trailing` counts the dimensions behind the slots (1 for coordinates)."""
    rank = max(t.ndim for t in tensors)
    batch = max((t.shape[0] for t in tensors if t.ndim == rank), default=1)
    full = [t if t.ndim == rank else t.expand(batch, *t.shape) for t in tensors]
    return torch.cat(full, dim=-1 - trailing)


def pack(steps: Sequence[Step]) -> Step:
    """Join consecutive steps into one whose `sees.own` mask keeps each step's own visibility.

    A slot sees an earlier step's slots when that step writes, its own `past` and `mask` allow them, and no step in
    between has overwritten them. Visibility of what was cached before the pack is the whole past, unless a step
    narrows it.
    """
    lengths = [len(s.feed) for s in steps]
    starts = [sum(lengths[:i]) for i in range(len(steps))]
    total = sum(lengths)
    batched = any(t.ndim == 2 for s in steps for t in (s.feed.ids,)) or any(
        isinstance(s.sees.own, Tensor) and s.sees.own.ndim == 3 for s in steps
    )
    batch = next((s.feed.ids.shape[0] for s in steps if s.feed.ids.ndim == 2), 1)
    own = torch.zeros((batch, total, total) if batched else (total, total), dtype=torch.bool)
    for i, query in enumerate(steps):
        rows = slice(starts[i], starts[i] + lengths[i])
        mask = query.sees.own_mask(lengths[i])
        own[..., rows, rows] = True if mask is None else mask
        # a step that writes sees its own slots in their newest form
        gone = query.feed.ids if query.writes else query.feed.ids[..., :0]
        for j in range(i - 1, -1, -1):
            key = steps[j]
            if not key.writes:
                continue
            columns = slice(starts[j], starts[j] + lengths[j])
            own[..., rows, columns] = _sees_earlier(query.sees, key.feed.ids, gone)
            gone = _join([gone, key.feed.ids])
    feed = Slots(
        ids=_join([s.feed.ids for s in steps]),
        shows=_join([s.feed.shows for s in steps]),
        coords=_join([s.feed.coords for s in steps], trailing=1),
        level=_join([s.feed.level for s in steps]),
        segment=_join([s.feed.segment for s in steps]),
        time=_join_times([s.feed for s in steps]),
    )
    shifted = [
        torch.where(s.read < 0, s.read, s.read + start) for s, start in zip(steps, starts, strict=True)
    ]
    return Step(
        feed=feed,
        target=_join([s.target for s in steps]),
        read=_join(shifted),
        reveal=_join([s.reveal for s in steps]),
        sees=Sees(own=own, mask=_joined_past(steps)),
        writes=all(s.writes for s in steps),
        route=steps[0].route,
    )


def _sees_earlier(sees: Sees, keys: Tensor, gone: Tensor) -> Tensor:
    """Visibility of an earlier step's slots `keys`, less those overwritten since (`gone`); broadcasts over queries."""
    if keys.ndim == 1:
        allowed = sees.past_mask(keys.clamp(min=0))
        seen = torch.ones(1, len(keys), dtype=torch.bool) if allowed is None else allowed
        return seen & ~torch.isin(keys, gone)
    rows = []
    for b, row in enumerate(keys):
        narrowed = Sees(
            past=sees.past,
            mask=None if sees.mask is None else sees.mask[b] if sees.mask.ndim == 3 else sees.mask,
        )
        allowed = narrowed.past_mask(row.clamp(min=0))
        seen = torch.ones(1, len(row), dtype=torch.bool) if allowed is None else allowed
        rows.append(seen & (row >= 0) & ~torch.isin(row, gone[b] if gone.ndim == 2 else gone))
    return torch.stack(rows)


def _joined_past(steps: Sequence[Step]) -> Tensor | None:
    """The narrowing of slots cached before the pack, (L, S), or None when every step sees its whole past."""
    if all(s.sees.whole_past for s in steps):
        return None
    highest = max(
        [int(s.sees.mask.shape[-1]) for s in steps if s.sees.mask is not None]
        + [int(s.sees.past.max()) + 1 for s in steps if s.sees.past is not None and len(s.sees.past)]
        + [int(s.feed.ids.max()) + 1 for s in steps]
    )
    every = torch.arange(highest)
    rows = []
    for step in steps:
        mask = step.sees.past_mask(every)
        mask = torch.ones(1, highest, dtype=torch.bool) if mask is None else mask
        rows.append(mask.expand(*mask.shape[:-2], len(step.feed), highest))
    return _join(rows, trailing=1)


def _join_times(feeds: Sequence[Slots]) -> Tensor | None:
    if all(f.time is None for f in feeds):
        return None
    return _join([torch.zeros(f.ids.shape) if f.time is None else f.time for f in feeds])


def _pad(rows: Sequence[Tensor], value: float) -> Tensor:
    """Stack 1-D (or coordinate) rows of different lengths, padding at the end."""
    longest = max(r.shape[0] for r in rows)
    padded = [torch.cat([r, r.new_full((longest - r.shape[0], *r.shape[1:]), value)]) for r in rows]
    return torch.stack(padded)


def collate(steps: Sequence[Step | None]) -> Step:
    """One step for a batch whose samples each take a shared (1-D) step of their own; None for a sample that is done.

    All steps must agree on `writes` and `route` (a caller groups samples that do not).
    """
    first = next(s for s in steps if s is not None)
    if all(s is first for s in steps):
        return first
    idle = replace_with_nothing(first)
    rows = [idle if s is None else s for s in steps]
    assert all(s.writes == first.writes and s.route == first.route for s in rows if s is not idle)
    feeds = [s.feed for s in rows]
    times = [torch.zeros(len(f)) if f.time is None else f.time for f in feeds]
    feed = Slots(
        ids=_pad([f.ids for f in feeds], -1),
        shows=_pad([f.shows for f in feeds], -1),
        coords=_pad([f.coords for f in feeds], 0),
        level=_pad([f.level for f in feeds], 0),
        segment=_pad([f.segment for f in feeds], 0),
        time=None if all(f.time is None for f in feeds) else _pad(times, 0.0),
    )
    return Step(
        feed=feed,
        target=_pad([s.target for s in rows], -1),
        read=_pad([s.read for s in rows], -1),
        reveal=_pad([s.reveal for s in rows], False),
        sees=_collated_sees(rows, feed.ids.shape[1]),
        writes=first.writes,
        route=first.route,
    )


def replace_with_nothing(step: Step) -> Step:
    """The same kind of step, feeding and predicting nothing."""
    f = step.feed
    time = None if f.time is None else f.time[:0]
    empty = Slots(f.ids[:0], f.shows[:0], f.coords[:0], f.level[:0], f.segment[:0], time)
    return replace(
        step, feed=empty, target=step.target[:0], read=step.read[:0], reveal=step.reveal[:0], sees=Sees()
    )


def _collated_sees(rows: Sequence[Step], longest: int) -> Sees:
    first = next(r.sees for r in rows if len(r.feed))
    simple = isinstance(first.own, str) and all(
        r.sees.whole_past and r.sees.own is first.own for r in rows if len(r.feed)
    )
    if simple:
        return first
    own = torch.zeros(len(rows), longest, longest, dtype=torch.bool)
    slots = 1 + max(int(r.feed.ids.max()) if len(r.feed) else 0 for r in rows)
    slots = max([slots] + [int(r.sees.mask.shape[-1]) for r in rows if r.sees.mask is not None])
    slots = max(
        [slots] + [int(r.sees.past.max()) + 1 for r in rows if r.sees.past is not None and len(r.sees.past)]
    )
    past = torch.zeros(len(rows), longest, slots, dtype=torch.bool)
    for b, row in enumerate(rows):
        n = len(row.feed)
        mask = row.sees.own_mask(n)
        own[b, :n, :n] = True if mask is None else mask
        allowed = row.sees.past_mask(torch.arange(slots))
        past[b, :n] = True if allowed is None else allowed
    return Sees(own=own, mask=past)
