"""The full cache: every slot written stays, in place, at the address the plan gave it.

Fast path: when all samples feed the slots just behind what is cached, and see all of it, keys are written into the
storage and read back as a plain prefix, without mask or copy. Every other step (ragged samples, holes, narrowed
pasts, overwriting, steps that do not write) takes the general path, which attends over storage and own slots under a
mask.
Legend: N = R branches x B samples, H heads, S slots, L own slots, E head width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from varkit.decode.cache.base import Cache
from varkit.decode.cache.carried import Carried
from varkit.devices import sent, sent_once
from varkit.nn.attention import Packed, Scan, View, narrowed
from varkit.plans.step import Step

CARRIED = "carried."
"""Beginning of the names of what layers carry, among the saved tensors."""


class FullCache(Cache):
    """Keys and values of all written slots; storage grows by doubling up to `slots` (or without bound when None)."""

    def __init__(self, batch: int, branches: int = 1, slots: int | None = None) -> None:
        self.branches, self.slots = branches, slots
        self.written_at = torch.full(
            (batch, slots or 64), -1
        )  # the step (cursor) that wrote each slot, or -1
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        self.carried = Carried(batch, branches)
        self._step: Step | None = None
        self._alone: Packed | None = None  # the window's attention, when it sees no past and writes nothing
        self._filled: int | None = 0  # all samples hold exactly slots 0..filled-1; None when they do not

    @property
    def batch(self) -> int:
        """B."""
        return self.written_at.shape[0]

    @property
    def nbytes(self) -> int:
        held = (t for pair in self.layers.values() for t in pair)
        return sum(t.numel() * t.element_size() for t in held) + self.carried.nbytes

    def open(self, step: Step, at: Tensor) -> "FullCache":
        assert step.guided or not (step.writes or step.carries), (
            "a step of one branch would leave the others behind"
        )
        self._step, self._at = step, at
        self.carried.open(step, at)
        alone = step.sees.no_past and not step.writes and step.feed.valid is None
        self._alone = Packed.of(step, self.branches if step.guided else 1) if alone else None
        if alone:
            return self
        span = step.feed.span
        self._prefix = step.writes and span is not None and span[0] == self._filled and step.sees.whole_past
        if step.writes:
            self._grow(int(step.feed.ids.max()) + 1)
        self._held = self._filled if self._filled is not None else self._highest()
        self._mask = self._prefix_mask(step) if self._prefix else self._general_mask(step)
        return self

    def close(self) -> None:
        assert self._step is not None, "close() without open()"
        if self._step.writes:
            self._stamp(self._step.feed.ids)
        self.carried.close()
        self._step = None

    def carry(self, layer: int, x: Tensor, scan: Scan) -> Tensor:
        assert self._step is not None, "carry() outside a step"
        return self.carried.run(layer, x, scan)

    def views(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Sequence[View]:
        assert self._step is not None, "views() outside a step"
        if self._alone is not None:
            return self._alone.views(layer, q, k, v)
        if self._mask is not None:
            self._mask = sent(self._mask, q.device)
        if not self._step.writes and self._held == 0:
            return [View(k, v, self._mask)]
        keys, values = self._storage(layer, k)
        if self._prefix:
            a, b = self._step.feed.span or (0, 0)
            keys[:, :, a:b], values[:, :, a:b] = k, v
            return [View(keys[:, :, :b], values[:, :, :b], self._mask)]
        # A step of the first branch alone sees that branch's past.
        past_k, past_v = keys[: len(k), :, : self._held], values[: len(k), :, : self._held]
        view = View(torch.cat([past_k, k], dim=2), torch.cat([past_v, v], dim=2), self._mask)
        if self._step.writes:
            self._write(keys, k)
            self._write(values, v)
        return [view]

    def narrow(self, hidden: Tensor, ids: Tensor) -> "FullCache":
        if self._alone is not None:
            self._alone = self._alone.narrow(hidden, ids)
            return self
        ids = sent_once(ids, hidden.device)
        past = torch.arange(self._held, device=ids.device).expand(*ids.shape[:-1], -1)
        self._mask = narrowed(self._mask, hidden, torch.cat([past, ids], dim=-1), ids)
        return self

    def behind(self, cursor: Tensor) -> Tensor | None:
        return self.carried.behind(cursor)

    def rollback(self, lengths: Tensor) -> None:
        if self.carried.now.layers:  # who goes back further for a layer's sake writes its slots again too
            lengths = torch.minimum(lengths, self.carried.rollback(lengths))
        self.written_at[self.written_at >= lengths[:, None]] = -1
        self._recount()

    def select(self, ids: Sequence[int]) -> "FullCache":
        index = torch.as_tensor(ids, dtype=torch.int64)
        out = FullCache(len(index), self.branches, self.slots)
        out.written_at = self.written_at[index]
        for layer, pair in self.layers.items():
            split = [t.unflatten(0, (self.branches, self.batch)) for t in pair]
            k, v = (t[:, index.to(t.device)].flatten(0, 1) for t in split)
            out.layers[layer] = (k, v)
        out.carried = self.carried.select(index)
        out._recount()
        return out

    def joined(self, others: Sequence[Cache]) -> "FullCache":
        parts = [self, *others]
        assert all(isinstance(p, FullCache) and p.branches == self.branches for p in parts)
        full: list[FullCache] = [p for p in parts if isinstance(p, FullCache)]
        size = max(p.written_at.shape[1] for p in full)
        out = FullCache(sum(p.batch for p in full), self.branches, self.slots)
        out.written_at = torch.cat([_padded(p.written_at, size, -1, dim=1) for p in full])
        for layer in sorted(set().union(*(p.layers for p in full))):
            k, v = (
                torch.cat([p._branchwise(layer, i, size, full) for p in full], dim=1).flatten(0, 1)
                for i in (0, 1)
            )
            out.layers[layer] = (k, v)
        out.carried = Carried.joined([p.carried for p in full])
        out._recount()
        return out

    def tensors(self) -> dict[str, Tensor]:
        named = {"written_at": self.written_at}
        named |= {f"{CARRIED}{name}": tensor for name, tensor in self.carried.tensors().items()}
        for layer, (k, v) in self.layers.items():
            named[f"{layer}.k"], named[f"{layer}.v"] = k, v
        return named

    def with_tensors(self, tensors: dict[str, Tensor]) -> "FullCache":
        out = FullCache(len(tensors["written_at"]), self.branches, self.slots)
        out.written_at = tensors["written_at"]
        carried = {n.removeprefix(CARRIED): t for n, t in tensors.items() if n.startswith(CARRIED)}
        out.carried = self.carried.with_tensors(carried, out.batch)
        numbers = {int(n.split(".")[0]) for n in tensors if n[0].isdigit()}
        out.layers = {n: (tensors[f"{n}.k"], tensors[f"{n}.v"]) for n in sorted(numbers)}
        out._recount()
        return out

    def _branchwise(self, layer: int, which: int, size: int, parts: Sequence["FullCache"]) -> Tensor:
        """One layer's keys (0) or values (1) as (R, B, H, S, E); zeros where nothing was ever written."""
        if layer in self.layers:
            return _padded(self.layers[layer][which], size, 0, dim=2).unflatten(
                0, (self.branches, self.batch)
            )
        like = next(p.layers[layer][which] for p in parts if layer in p.layers)
        return like.new_zeros(self.branches, self.batch, like.shape[1], size, like.shape[3])

    def _grow(self, needed: int) -> None:
        size = self.written_at.shape[1]
        if needed <= size:
            return
        assert self.slots is None, f"slot {needed - 1} is beyond the plan's {self.slots} slots"
        size = max(needed, 2 * size)
        self.written_at = _padded(self.written_at, size, -1, dim=1)
        self.layers = {
            i: (_padded(k, size, 0, dim=2), _padded(v, size, 0, dim=2)) for i, (k, v) in self.layers.items()
        }

    def _storage(self, layer: int, like: Tensor) -> tuple[Tensor, Tensor]:
        if layer not in self.layers:
            shape = (like.shape[0], like.shape[1], self.written_at.shape[1], like.shape[3])
            self.layers[layer] = (like.new_zeros(shape), like.new_zeros(shape))
        return self.layers[layer]

    def _write(self, storage: Tensor, own: Tensor) -> None:
        """storage (N, H, S, E) at the step's slots <- own (N, H, L, E), skipping padding."""
        assert self._step is not None
        ids, device = self._step.feed.ids, storage.device
        if ids.ndim == 1:
            storage[:, :, sent_once(ids, device)] = own
            return
        ids = ids.repeat(self.branches, 1)
        rows, columns = (ids >= 0).nonzero(as_tuple=True)  # on the CPU: a device would have to tell how many
        at, places, here = (sent(t, device) for t in (rows, ids[rows, columns], columns))
        storage[at, :, places] = own[at, :, here]

    def _stamp(self, ids: Tensor) -> None:
        wanted = ids.expand(self.batch, -1)
        rows, columns = (wanted >= 0).nonzero(as_tuple=True)
        turn = self._step.feed.turn if self._step is not None else None
        turns = 0 if turn is None else turn.expand_as(wanted)[rows, columns]
        self.written_at[rows, wanted[rows, columns]] = self._at[rows] + turns
        span = self._step.feed.span if self._step is not None else None
        if span is not None and span[0] == self._filled:
            self._filled = span[1]
        else:
            self._recount()

    def _recount(self) -> None:
        """Find out whether all samples hold exactly a common prefix of slots."""
        held = self.written_at >= 0
        counts = held.sum(dim=1)
        n = int(counts[0]) if len(counts) else 0
        self._filled = n if bool((counts == n).all()) and bool(held[:, :n].all()) else None

    def _highest(self) -> int:
        used = (self.written_at >= 0).any(dim=0).nonzero()
        return int(used[-1]) + 1 if len(used) else 0

    def _prefix_mask(self, step: Step) -> Tensor | None:
        own = step.sees.own_mask(len(step.feed))
        if own is None or len(step.feed) == 1:
            return None
        a, _ = step.feed.span or (0, 0)
        past = torch.ones(*own.shape[:-1], a, dtype=torch.bool)
        return self._per_branch(torch.cat([past, own], dim=-1))

    def _general_mask(self, step: Step) -> Tensor | None:
        """(N or 1, 1, L, held + L) bool over storage then own slots; None where there is nothing to hide."""
        length, held = len(step.feed), self._held
        if not step.writes and held == 0 and step.sees.own_mask(length) is None and step.feed.valid is None:
            return None
        past = (self.written_at[:, :held] >= 0)[:, None]  # (B, 1, held)
        allowed = step.sees.past_mask(torch.arange(held)) if not step.sees.whole_past else None
        if allowed is not None:
            past = past & allowed
        if step.writes:  # the older value of a slot that is written again is no longer there
            ids = step.feed.ids.expand(self.batch, -1)
            again = torch.zeros(self.batch, held + 1, dtype=torch.bool)
            again.scatter_(1, torch.where((ids >= 0) & (ids < held), ids, held), True)
            past = past & ~again[:, None, :held]
        own = step.sees.own_mask(length)
        own = torch.ones(1, 1, dtype=torch.bool).expand(length, length) if own is None else own
        if step.feed.valid is not None:
            own = own & step.feed.valid[:, None, :]
            # a padded query would see nothing and turn into NaN: let it see itself
            own = own | torch.eye(length, dtype=torch.bool)
        full = torch.cat(
            [past.expand(self.batch, length, held), own.expand(self.batch, length, length)], dim=-1
        )
        return self._per_branch(full)

    def _per_branch(self, mask: Tensor) -> Tensor:
        """(L, S) as it is, (B, L, S) repeated for each branch as (N, 1, L, S)."""
        assert self._step is not None
        branches = self.branches if self._step.guided else 1
        return mask if mask.ndim == 2 else mask[:, None].repeat(branches, 1, 1, 1)


def _padded(table: Tensor, size: int, value: float, dim: int) -> Tensor:
    """Extend a dimension to `size` with a constant."""
    missing = size - table.shape[dim]
    if missing == 0:
        return table
    shape = list(table.shape)
    shape[dim] = missing
    return torch.cat([table, table.new_full(shape, value)], dim=dim)
