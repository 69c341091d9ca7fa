"""A canvas is what is drawn so far: it gives the next feed, takes the outputs, previews, and forgets on rollback.

One file a latent layout (a grid or line of tokens, a residual pyramid). A canvas belongs to samples, never to condition
branches, and knows no order: positions come from the plan's steps.
Legend: B samples, P positions, L slots fed, T targets.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from varkit.devices import sent, sent_once
from varkit.errors import UserError
from varkit.plans.step import Slots, Step

NEVER = -1


class Canvas(ABC):
    """Values over P positions for B samples.

    `revealed_at` (B, P) int64 holds the decoding step (the sample's cursor) at which a position was last committed,
    or -1; this is what rollback, completion and resuming read.
    """

    revealed_at: Tensor

    @property
    def batch(self) -> int:
        """B."""
        return self.revealed_at.shape[0]

    @property
    def known(self) -> Tensor:
        """(B, P) bool: committed positions."""
        return self.revealed_at >= 0

    @abstractmethod
    def feed(self, slots: Slots) -> dict[str, Tensor]:
        """Values entering the network at `slots`: named tensors (B, L, ...), zeros where `shows` is -1."""

    @abstractmethod
    def reveal(self, step: Step, values: dict[str, Tensor], at: Tensor) -> None:
        """Take the head's values (B, T, ...) for `step.target`; `at` (B,) is each sample's cursor.

        Targets that the step does not reveal keep the value provisionally: it is fed again, but not `known`.
        """

    @abstractmethod
    def latents(self) -> dict[str, Tensor]:
        """Everything drawn, in the tokenizer's form."""

    @abstractmethod
    def fill(self, latents: dict[str, Tensor]) -> None:
        """Put true latents at every position (teacher forcing). Raises `UserError` for another number of positions."""

    @abstractmethod
    def preview(self) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] of what is known so far."""

    @abstractmethod
    def rollback(self, lengths: Tensor) -> None:
        """Forget what was revealed at step `lengths[b]` of sample b or later.

        A value that overwrote an earlier one, provisional or not, cannot be restored: roll back only over positions
        that were written once, or to before a canvas kept aside with `select`.
        """

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """All state as named tensors with samples on dimension 0 (for select, concat and saving)."""

    @abstractmethod
    def with_tensors(self, tensors: dict[str, Tensor]) -> "Canvas":
        """The same layout holding other tensors (of any batch size)."""

    def select(self, ids: Sequence[int]) -> "Canvas":
        """Samples re-ordered, dropped or repeated (copies)."""
        index = torch.as_tensor(ids, dtype=torch.int64)
        return self.with_tensors({k: v[index.to(v.device)] for k, v in self.tensors().items()})

    @staticmethod
    def concat(parts: Sequence["Canvas"]) -> "Canvas":
        """Samples of several canvases of the same layout, one after the other."""
        tables = [p.tensors() for p in parts]
        return parts[0].with_tensors({k: torch.cat([t[k] for t in tables]) for k in tables[0]})


def check_positions(latents: dict[str, Tensor], names: Iterable[str], positions: int) -> None:
    """Raise `UserError` unless latents (B, P, ...) of these names have a value for each of a canvas's positions."""
    for name in names:
        if latents[name].shape[1] != positions:
            raise UserError(
                f"latents {name!r} of {latents[name].shape[1]} positions do not fill a canvas of {positions}; encode "
                "the pictures in the schedule that is drawn in"
            )


def gather_positions(table: Tensor, positions: Tensor) -> Tensor:
    """table (B, P, ...) at positions (L,) or (B, L) -> (B, L, ...), zeros where the position is -1."""
    complete = bool(
        (positions >= 0).all()
    )  # asked where the plan's tensors live: no synchronisation with the device
    positions = sent_once(positions, table.device)
    if positions.ndim == 1:
        found = table[:, positions.clamp(min=0)]
    else:
        rows = torch.arange(table.shape[0], device=table.device)[:, None]
        found = table[rows, positions.clamp(min=0)]
    if complete:
        return found
    keep = (positions >= 0).reshape(*positions.shape, *([1] * (table.ndim - 2)))
    return torch.where(keep, found, torch.zeros_like(found))


def scatter_positions(table: Tensor, positions: Tensor, values: Tensor, keep: Tensor | None = None) -> None:
    """Write values (B, T, ...) into table (B, P, ...) at positions (T,) or (B, T), skipping -1 and where `keep` is
    False.
    """
    complete = positions.ndim == 1 and keep is None and bool((positions >= 0).all())
    if complete:
        table[:, sent_once(positions, table.device)] = values.to(table.dtype)
        return
    wanted = positions.expand(table.shape[0], -1)
    ok = wanted >= 0 if keep is None else (wanted >= 0) & keep
    rows, columns = ok.nonzero(as_tuple=True)  # there too: a device would have to tell how many they are
    there, places, here = (sent(t, table.device) for t in (rows, wanted[rows, columns], columns))
    table[there, places] = values.to(table.dtype)[there, here]


def steps_of(step: Step, at: Tensor) -> Tensor:
    """The decoding step each target belongs to, (B, 1) or (B, T): the cursor, plus its turn in a pack."""
    return at[:, None] if step.turn is None else at[:, None] + step.turn


def mark_revealed(revealed_at: Tensor, step: Step, at: Tensor) -> None:
    """Note in `revealed_at` (B, P) that the step's revealed targets were committed at cursor `at` (B,)."""
    keep = None if bool(step.reveal.all()) else step.reveal.expand(revealed_at.shape[0], -1)
    stamp = steps_of(step, at).expand(revealed_at.shape[0], step.target.shape[-1])
    scatter_positions(revealed_at, step.target, stamp, keep)
