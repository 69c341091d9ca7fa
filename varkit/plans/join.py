"""Joining steps: `pack` puts consecutive steps of a plan into one, `collate` puts samples at different steps into one.

Packing all steps makes the training sequence with its mask, packing a few makes a verification window over the cache,
and packing the first k makes the uncached twin of cached decoding; `only` takes some steps out of a pack.
Legend: B batch, L slots of a step, T targets, S slot ids named by a mask.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from varkit.plans.step import Sees, Slots, Step
from varkit.plans.visibility import Apart


def pack(steps: Sequence[Step]) -> Step:
    """Join consecutive steps of one route into one whose `sees.own` keeps each step's own visibility.

    A slot sees an earlier step's slots when that step writes, its own `past` and `mask` allow them, and no step in
    between has overwritten them; steps that see nothing of each other are kept `Apart`, without a mask. Visibility of
    what was cached before the pack is the whole past, unless a step narrows it.
    """
    assert len({(s.route, s.guided) for s in steps}) == 1, (
        "steps of different routes have different heads and cannot be packed"
    )
    starts = _running([len(s.feed) for s in steps])
    firsts = _running([s.turns for s in steps])

    def join(each: Callable[[Step], Tensor], trailing: int = 0) -> Tensor:
        return _cat([each(s) for s in steps], trailing)

    def turns(like: Callable[[Step], Tensor], turn: Callable[[Step], Tensor | None]) -> Tensor:
        return _cat([_turns(like(s), turn(s), first) for s, first in zip(steps, firsts, strict=True)])

    timed = any(s.feed.time is not None for s in steps)
    feed = Slots(
        ids=join(lambda s: s.feed.ids),
        shows=join(lambda s: s.feed.shows),
        coords=join(lambda s: s.feed.coords, trailing=1),
        level=join(lambda s: s.feed.level),
        segment=join(lambda s: s.feed.segment),
        time=join(lambda s: _time(s.feed)) if timed else None,
        turn=turns(lambda s: s.feed.ids, lambda s: s.feed.turn),
    )
    reads = [torch.where(s.read < 0, s.read, s.read + start) for s, start in zip(steps, starts, strict=True)]
    return Step(
        feed=feed,
        target=join(lambda s: s.target),
        read=_cat(reads),
        reveal=join(lambda s: s.reveal),
        sees=_sees_of_pack(steps, starts),
        writes=all(s.writes for s in steps),
        route=steps[0].route,
        turn=turns(lambda s: s.target, lambda s: s.turn),
        turns=sum(s.turns for s in steps),
        carries=all(s.writes or s.carries for s in steps),
        guided=steps[0].guided,
    )


def only(step: Step, turns: Sequence[int]) -> Step:
    """Of a pack that all samples share, the steps `turns`, in their order, as if the others had never been taken.

    Each sees of the others what it saw of them in the pack.
    """
    assert step.feed.turn is not None and step.turn is not None, "only a pack can be taken apart"
    assert step.feed.ids.ndim == 1, "samples that differ have packs of their own"
    assert step.sees.whole_past or step.sees.no_past, "what is seen of the past would differ by step"
    wanted, turn = torch.tensor(turns), step.feed.turn
    slots, targets = torch.isin(turn, wanted), torch.isin(step.turn, wanted)
    f, own = step.feed, step.sees.own_mask(len(step.feed))
    feed = Slots(
        f.ids[slots],
        f.shows[slots],
        f.coords[slots],
        f.level[slots],
        f.segment[slots],
        None if f.time is None else f.time[slots],
        torch.searchsorted(wanted, turn[slots]),
    )
    return replace(
        step,
        feed=feed,
        target=step.target[targets],
        read=(slots.cumsum(0) - 1)[step.read[targets]],
        reveal=step.reveal[targets],
        sees=Sees("all" if own is None else own[slots][:, slots], step.sees.past),
        turn=torch.searchsorted(wanted, step.turn[targets]),
        turns=len(turns),
    )


def collate(steps: Sequence[Step | None]) -> Step:
    """One step for a batch whose samples each take a shared (1-D) step of their own; None for a sample that is done.

    All steps must agree on their `kind` and on `turns` (a caller groups samples that do not).
    """
    first = next(s for s in steps if s is not None)
    if all(s is first for s in steps):
        return first
    rows = [_idle(first) if s is None else s for s in steps]
    assert len({(s.kind, s.turns) for s in rows}) == 1, "steps of different kinds cannot be collated"
    feeds = [s.feed for s in rows]
    timed, turned = any(f.time is not None for f in feeds), any(f.turn is not None for f in feeds)
    feed = Slots(
        ids=_stack([f.ids for f in feeds], -1),
        shows=_stack([f.shows for f in feeds], -1),
        coords=_stack([f.coords for f in feeds], 0),
        level=_stack([f.level for f in feeds], 0),
        segment=_stack([f.segment for f in feeds], 0),
        time=_stack([_time(f) for f in feeds], 0) if timed else None,
        turn=_stack([_turns(f.ids, f.turn, 0) for f in feeds], 0) if turned else None,
    )
    return replace(
        first,
        feed=feed,
        target=_stack([s.target for s in rows], -1),
        read=_stack([s.read for s in rows], -1),
        reveal=_stack([s.reveal for s in rows], False),
        sees=_sees_of_rows(rows, len(feed)),
        turn=_stack([_turns(s.target, s.turn, 0) for s in rows], 0) if turned else None,
    )


def _sees_of_pack(steps: Sequence[Step], starts: Sequence[int]) -> Sees:
    own = _apart(steps) or _own_of_pack(steps, starts)
    if all(s.sees.no_past for s in steps):
        return Sees(own=own, past=steps[0].sees.past)
    past, beyond = _past_of_pack(steps)
    return Sees(own=own, mask=past, beyond=beyond)


def _apart(steps: Sequence[Step]) -> Apart | None:
    """The steps' own visibilities, if none sees another's slots and samples agree."""
    if len(steps) == 1 and not isinstance(steps[0].sees.own, Apart):
        return None  # one run has nobody to be apart from
    unseen = all(s.sees.no_past for s in steps[1:]) or not any(s.writes for s in steps[:-1])
    shared = all(s.feed.ids.ndim == 1 for s in steps)
    shared = shared and not any(isinstance(s.sees.own, Tensor) and s.sees.own.ndim == 3 for s in steps)
    return Apart.of([(len(s.feed), s.sees.own) for s in steps]) if unseen and shared else None


def _own_of_pack(steps: Sequence[Step], starts: Sequence[int]) -> Tensor:
    """(L, L) or (B, L, L): row blocks are the steps as queries, column blocks the steps as keys."""
    batched = [s.feed.ids.shape[0] for s in steps if s.feed.ids.ndim == 2]
    for s in steps:
        masks = [m for m in (s.sees.own, s.sees.mask) if isinstance(m, Tensor) and m.ndim == 3]
        batched += [m.shape[0] for m in masks]
    total = starts[-1] + len(steps[-1].feed)
    own = torch.zeros((*batched[:1], total, total), dtype=torch.bool)
    for i, query in enumerate(steps):
        rows = slice(starts[i], starts[i] + len(query.feed))
        mask = query.sees.own_mask(len(query.feed))
        own[..., rows, rows] = True if mask is None else mask
        # a step that writes sees its own slots in their newest form
        gone = query.feed.ids if query.writes else query.feed.ids[..., :0]
        for j in range(i - 1, -1, -1):
            key = steps[j].feed.ids
            if steps[j].writes:
                own[..., rows, starts[j] : starts[j] + key.shape[-1]] = _sees_earlier(query.sees, key, gone)
                gone = _cat([gone, key])
    return own


def _sees_earlier(sees: Sees, keys: Tensor, gone: Tensor) -> Tensor:
    """Visibility of an earlier step's slots `keys`, less those overwritten since (`gone`); broadcasts over queries."""
    if keys.ndim == 1 and gone.ndim == 1:
        allowed = sees.past_mask(keys)
        seen = torch.ones(1, len(keys), dtype=torch.bool) if allowed is None else allowed
        return seen & ~torch.isin(keys, gone)
    batch = max(keys.shape[0] if keys.ndim == 2 else 1, gone.shape[0] if gone.ndim == 2 else 1)
    rows = []
    for b in range(batch):
        key, lost = keys[b] if keys.ndim == 2 else keys, gone[b] if gone.ndim == 2 else gone
        allowed = _sees_of_sample(sees, b).past_mask(key.clamp(min=0))
        seen = torch.ones(1, len(key), dtype=torch.bool) if allowed is None else allowed
        rows.append(seen & (key >= 0) & ~torch.isin(key, lost))
    return torch.stack([r.expand(max(x.shape[0] for x in rows), -1) for r in rows])


def _sees_of_sample(sees: Sees, b: int) -> Sees:
    mask = sees.mask[b] if sees.mask is not None and sees.mask.ndim == 3 else sees.mask
    beyond = sees.beyond[b] if isinstance(sees.beyond, Tensor) and sees.beyond.ndim == 2 else sees.beyond
    return Sees(past=sees.past, mask=mask, beyond=beyond)


def _past_of_pack(steps: Sequence[Step]) -> tuple[Tensor | None, bool | Tensor]:
    """The narrowing of what was cached before the pack: (L, S) and what lies beyond S, (L,); None without narrowing."""
    if all(s.sees.whole_past for s in steps):
        return None, False
    every = torch.arange(max(_named(s.sees) for s in steps))
    masks, beyond = [], []
    for step in steps:
        n = len(step.feed)
        mask = step.sees.past_mask(every)
        mask = torch.ones(1, len(every), dtype=torch.bool) if mask is None else mask
        masks.append(mask.expand(*mask.shape[:-2], n, len(every)))
        beyond.append(_beyond(step.sees, n))
    return _cat(masks, trailing=1), _cat(beyond)


def _sees_of_rows(rows: Sequence[Step], longest: int) -> Sees:
    """Visibility of collated steps: by rule when all agree, else as masks."""
    busy = [r.sees for r in rows if len(r.feed)]
    if isinstance(busy[0].own, str) and all(s.whole_past and s.own is busy[0].own for s in busy):
        return busy[0]
    own = torch.zeros(len(rows), longest, longest, dtype=torch.bool)
    past = torch.zeros(len(rows), longest, max(_named(s) for s in busy), dtype=torch.bool)
    beyond = torch.zeros(len(rows), longest, dtype=torch.bool)
    for b, row in enumerate(rows):
        n = len(row.feed)
        mask, seen = row.sees.own_mask(n), row.sees.past_mask(torch.arange(past.shape[-1]))
        own[b, :n, :n] = True if mask is None else mask
        past[b, :n] = True if seen is None else seen
        beyond[b, :n] = _beyond(row.sees, n)
    return Sees(own=own, mask=past, beyond=beyond)


def _named(sees: Sees) -> int:
    """How many slot ids, from 0, the narrowing names."""
    by_mask = 0 if sees.mask is None else sees.mask.shape[-1]
    by_past = 0 if sees.past is None or not len(sees.past) else int(sees.past.max()) + 1
    return max(by_mask, by_past, 1)


def _beyond(sees: Sees, length: int) -> Tensor:
    """(L,) or (B, L) bool: whether slots that the narrowing does not name are seen."""
    if sees.whole_past:
        return torch.ones(length, dtype=torch.bool)
    if sees.past is not None:
        return torch.zeros(length, dtype=torch.bool)
    return sees.beyond if isinstance(sees.beyond, Tensor) else torch.full((length,), sees.beyond)


def _running(counts: Sequence[int]) -> list[int]:
    """Sums of what comes before each."""
    return [sum(counts[:i]) for i in range(len(counts))]


def _turns(like: Tensor, turn: Tensor | None, first: int) -> Tensor:
    return torch.full_like(like, first) if turn is None else turn + first


def _time(feed: Slots) -> Tensor:
    return torch.zeros(feed.ids.shape) if feed.time is None else feed.time


def _cat(tensors: Sequence[Tensor], trailing: int = 0) -> Tensor:
    """Concatenate along the slot dimension, giving shared tensors a batch dimension when others have one.

    `trailing` counts the dimensions behind the slots (1 for coordinates).
    """
    rank = max(t.ndim for t in tensors)
    batch = max((t.shape[0] for t in tensors if t.ndim == rank), default=1)
    full = [t if t.ndim == rank else t.expand(batch, *t.shape) for t in tensors]
    return torch.cat(full, dim=-1 - trailing)


def _stack(rows: Sequence[Tensor], value: float) -> Tensor:
    """Stack rows of different lengths, padding at the end."""
    longest = max(r.shape[0] for r in rows)
    return torch.stack(
        [torch.cat([r, r.new_full((longest - r.shape[0], *r.shape[1:]), value)]) for r in rows]
    )


def _idle(step: Step) -> Step:
    """The same kind of step, feeding and predicting nothing."""
    f = step.feed
    parts = {"time": None if f.time is None else f.time[:0], "turn": None if f.turn is None else f.turn[:0]}
    empty = Slots(f.ids[:0], f.shows[:0], f.coords[:0], f.level[:0], f.segment[:0], **parts)
    turn = None if step.turn is None else step.turn[:0]
    return replace(
        step,
        feed=empty,
        target=step.target[:0],
        read=step.read[:0],
        reveal=step.reveal[:0],
        sees=Sees(),
        turn=turn,
    )
