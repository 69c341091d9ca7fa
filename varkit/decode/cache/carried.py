"""What recurrent layers carry through a run: named tensors of constant size, beside any policy's keys and values.

A recurrent state cannot be cut as a list of keys can. So the states at the ends of the last window's steps are kept,
with the one before it, however long the run is: a rollback into the last window is exact, and one beyond goes to the
beginning, from where the loop feeds the steps again (`Cache.behind`).
Legend: R branches, B samples, N = R x B rows (branch-major), L slots.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from varkit.devices import sent
from varkit.nn.attention import Carry, Scan
from varkit.plans.step import Step


@dataclass(frozen=True)
class Moment:
    """What is carried after `at` (B,) steps, by layer. A layer that has not run yet is missing, which means zeros."""

    at: Tensor
    layers: dict[int, Carry] = field(default_factory=dict)


class Carried:
    """The moments kept, oldest first; the last one is now."""

    def __init__(self, batch: int, branches: int) -> None:
        self.branches = branches
        self.moments = [Moment(torch.zeros(batch, dtype=torch.int64))]
        self._spans: list[_Span] = []
        self._after: list[dict[int, Carry]] = []

    @property
    def now(self) -> Moment:
        """What is carried at present."""
        return self.moments[-1]

    @property
    def nbytes(self) -> int:
        """Bytes of all moments."""
        carries = (carry for moment in self.moments for carry in moment.layers.values())
        return sum(t.numel() * t.element_size() for carry in carries for t in carry.values())

    def behind(self, cursor: Tensor) -> Tensor | None:
        """How many steps are in what is carried, (B,), if that is less than the cursor for any sample, else None."""
        lost = bool(self.now.layers) and bool((self.now.at < cursor).any())
        return self.now.at if lost else None

    def open(self, step: Step, at: Tensor) -> None:
        """Begin a window of one step or of several packed ones."""
        self._step, self._at = step, at
        self._spans, self._after = [], []  # most models carry nothing and never ask

    def run(self, layer: int, x: Tensor, scan: Scan) -> Tensor:
        """A layer's scan over the window, (N, L, C) -> (N, L, C)."""
        if not self._spans:
            self._spans = _spans(self._step, self.branches)
            self._after = [{} for _ in self._spans]
        carry = self.now.layers.get(layer)
        if len(self._spans) == 1 and self._spans[0].index is None:
            out, self._after[0][layer] = scan(x, carry, self._spans[0].counts(x))
            return out
        out = torch.zeros_like(x)
        for span, after in zip(self._spans, self._after, strict=True):
            index, counts = span.index, span.counts(x)
            assert index is not None
            index = sent(index, x.device)[..., None].expand(len(x), -1, x.shape[-1])
            piece, carry = scan(x.gather(1, index), carry, counts)
            if counts is not None:  # what lies behind a row's slots means nothing
                real = torch.arange(piece.shape[1], device=x.device) < counts[:, None]
                piece = piece * real[..., None]
            out.scatter_add_(1, index, piece)
            after[layer] = carry
        return out

    def close(self) -> None:
        """End the window; a step that neither writes nor carries changes nothing but the count of steps."""
        step = self._step
        if not self._spans and not self.now.layers:
            return
        valid = step.feed.valid
        moved = torch.ones_like(self._at, dtype=torch.bool) if valid is None else valid.any(dim=1)

        def at(turns: int) -> Tensor:
            return torch.where(moved, self._at + turns, before.at)

        before = self.now
        if not self._spans or not (step.writes or step.carries):
            self.moments[-1] = replace(before, at=at(step.turns))
            return
        self.moments = [before]
        turns = [step.turns] if len(self._spans) == 1 else range(1, step.turns + 1)
        for turn, layers in zip(turns, self._after, strict=True):
            self.moments.append(Moment(at(turn), self.now.layers | layers))

    def rollback(self, lengths: Tensor) -> Tensor:
        """Go back to at most `lengths` steps of each sample; returns how many are left, (B,)."""
        if bool((self.now.at <= lengths).all()):
            return self.now.at
        chosen = torch.full_like(lengths, -1)
        for i, moment in enumerate(self.moments):
            chosen[moment.at <= lengths] = i
        at = torch.zeros_like(lengths)
        layers = {n: {k: torch.zeros_like(t) for k, t in c.items()} for n, c in self.now.layers.items()}
        for i, moment in enumerate(self.moments):
            at = torch.where(chosen == i, moment.at, at)
            rows = (chosen == i).nonzero()[:, 0]
            rows = torch.cat([rows + branch * len(at) for branch in range(self.branches)])
            for n, carry in moment.layers.items():
                for k, t in carry.items():
                    at_rows = sent(rows, t.device)
                    layers[n][k][at_rows] = t[at_rows]
        self.moments = [Moment(at, layers)]
        return at

    def select(self, index: Tensor) -> "Carried":
        """Samples `index` (n,), as copies."""

        def chosen(t: Tensor) -> Tensor:
            return t.unflatten(0, (self.branches, -1))[:, index.to(t.device)].flatten(0, 1)

        out = Carried(len(index), self.branches)
        out.moments = [
            Moment(m.at[index], {n: {k: chosen(t) for k, t in c.items()} for n, c in m.layers.items()})
            for m in self.moments
        ]
        return out

    @staticmethod
    def joined(parts: Sequence["Carried"]) -> "Carried":
        """Samples of several, one after the other; who keeps fewer moments repeats its oldest."""
        out = Carried(0, parts[0].branches)
        out.moments = [_together(parts, age) for age in range(max(len(p.moments) for p in parts), 0, -1)]
        return out

    def tensors(self) -> dict[str, Tensor]:
        """Everything by name; nothing where no layer carries anything."""
        named = {}
        for i, moment in enumerate(self.moments if self.now.layers else []):
            named[f"{i}.at"] = moment.at
            named |= {f"{i}.{n}.{k}": t for n, carry in moment.layers.items() for k, t in carry.items()}
        return named

    def with_tensors(self, tensors: dict[str, Tensor], batch: int) -> "Carried":
        """What `tensors` gave."""
        out = Carried(batch, self.branches)
        count = sum(name.endswith(".at") for name in tensors)
        out.moments = [Moment(tensors[f"{i}.at"]) for i in range(count)] or out.moments
        for name, tensor in tensors.items():
            i, _, rest = name.partition(".")
            if rest != "at":
                layer, _, key = rest.partition(".")
                out.moments[int(i)].layers.setdefault(int(layer), {})[key] = tensor
        return out


@dataclass(frozen=True)
class _Span:
    """The slots of one step within a window, in order. index: (1 or N, n) of them, None for all; lengths: (N,) how many
    of these are a row's own, None for all."""

    index: Tensor | None = None
    lengths: Tensor | None = None

    def counts(self, x: Tensor) -> Tensor | None:
        return None if self.lengths is None else sent(self.lengths, x.device)


def _spans(step: Step, branches: int) -> list[_Span]:
    """One span a turn."""
    feed = step.feed
    valid = feed.valid
    if feed.turn is None or step.turns == 1:
        return [_Span(None, None if valid is None else valid.sum(1).repeat(branches))]
    turn = torch.atleast_2d(feed.turn)
    spans = []
    for t in range(step.turns):
        own = (turn == t) if valid is None else (turn == t) & valid
        counts = own.sum(1)
        index = (~own).byte().argsort(dim=1, stable=True)[:, : int(counts.max())]  # a row's own come first
        shared = len(own) == 1
        spans.append(
            _Span(index, None) if shared else _Span(index.repeat(branches, 1), counts.repeat(branches))
        )
    return spans


def _together(parts: Sequence[Carried], age: int) -> Moment:
    """The `age`-newest moments as one."""
    moments = [p.moments[max(len(p.moments) - age, 0)] for p in parts]
    like = {(n, k): t for m in moments for n, c in m.layers.items() for k, t in c.items()}
    layers: dict[int, Carry] = {}
    for (n, k), example in like.items():
        pieces = []
        for part, moment in zip(parts, moments, strict=True):
            zeros = example.new_zeros(part.branches * len(moment.at), *example.shape[1:])
            pieces.append(moment.layers.get(n, {}).get(k, zeros).unflatten(0, (part.branches, -1)))
        layers.setdefault(n, {})[k] = torch.cat(pieces, dim=1).flatten(0, 1)
    return Moment(torch.cat([m.at for m in moments]), layers)
