"""The selective state-space recurrence of Mamba-2 (Dao and Gu, arXiv 2405.21060), one step at a time and in chunks.

    S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T,    y_t = S_t C_t

`recurrence` is that equation; `scan` is the same by matrix products (the paper's SSD, Sec. 6): within a chunk it is
attention under decaying weights, and from chunk to chunk a state is handed on.
Legend: N rows, L slots, H heads, P channels of a head, E entries of a state, M chunks, Q slots of a chunk.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64
"""Slots of a chunk, at most. Longer chunks do more work within, shorter ones hand on more states: on one Zen 4 core
2 x 680 slots of 32 heads took 54, 65, 65 and 113 ms in chunks of 16, 32, 64 and 128 (the recurrence 199), and with
gradients 2 x 256 slots took 150, 99, 92 and 108 ms (the recurrence 682)."""


def recurrence(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Slot after slot, the twin of `scan`.

    x (N, L, H, P); dt (N, L, H), not negative; a (H,), negative; b and c (N, L, E), which all heads share; state
    (N, H, P, E), the one before the first slot. Returns y (N, L, H, P) and the state after the last slot.
    """
    outputs = []
    for t in range(x.shape[1]):
        write = (dt[:, t, :, None] * x[:, t])[..., None] * b[:, t, None, None]
        state = torch.exp(dt[:, t] * a)[..., None, None] * state + write
        outputs.append((state * c[:, t, None, None]).sum(-1))
    return torch.stack(outputs, dim=1) if outputs else x, state


def scan(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """The same as `recurrence`, in time linear in L. Slots whose dt is 0 leave the state as it is."""
    n, length, heads, width = x.shape
    if length == 0:
        return x, state
    chunk = -(-length // -(-length // chunk))  # as many chunks as that takes, of like lengths: less is padded
    x, dt, b, c = (_in_chunks(t, chunk) for t in (x, dt, b, c))
    decay = (dt * a).cumsum(
        dim=2
    )  # (N, M, Q, H): logarithm of what is left at a slot of the state before the chunk
    write = x * dt[..., None]
    within = _within(decay, write, b, c)
    kept = (decay[:, :, -1:] - decay).exp()  # of a slot's own writing, at the chunk's end
    added = (write * kept[..., None]).flatten(3).mT @ b  # (N, M, H P, E)
    left = decay[:, :, -1].exp()[..., None, None]
    before = []
    for m in range(x.shape[1]):
        before.append(state)
        state = left[:, m] * state + added[:, m].view_as(state)
    carried = c @ torch.stack(before, dim=1).flatten(2, 3).mT  # (N, M, Q, H P)
    y = within + carried.view_as(within) * decay.exp()[..., None]
    return y.flatten(1, 2)[:, :length], state


def _within(decay: Tensor, write: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """What slots read of those of their own chunk, themselves included: (N, M, Q, H, P)."""
    logs = decay.transpose(2, 3)  # (N, M, H, Q)
    later = torch.ones(logs.shape[-1], logs.shape[-1], dtype=torch.bool, device=logs.device).triu(1)
    weights = (logs[..., :, None] - logs[..., None, :]).masked_fill_(later, -torch.inf).exp()
    weights = weights * (c @ b.mT)[:, :, None]
    return (weights @ write.transpose(2, 3)).transpose(2, 3)


def _in_chunks(t: Tensor, chunk: int) -> Tensor:
    """(N, L, ...) -> (N, M, Q, ...), with zeros at the end."""
    missing = -t.shape[1] % chunk
    if missing:
        t = F.pad(t, (0, 0) * (t.ndim - 2) + (0, missing))
    return t.unflatten(1, (-1, chunk))
