"""Random draws as a pure function of (seed, sample, fork path, purpose, step, position).

A counter-based generator (Philox-4x32-10, Salmon et al., SC 2011) hashes each coordinate to its own numbers, so a draw
is the same for any batch, rank, fork order or device, and no state has to be carried. Draws are made on the CPU.
Legend: B samples, P positions, N numbers at each position.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from varkit.errors import UserError

_MASK = np.uint64(0xFFFFFFFF)
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))


def philox(counter: Sequence[np.ndarray], key: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Ten rounds of Philox-4x32: four counter words and two key words (uint64 arrays below 2^32) -> four words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (p1 >> np.uint64(32)) ^ c1 ^ k0,
            p1 & _MASK,
            (p0 >> np.uint64(32)) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return [c0, c1, c2, c3]


@dataclass(frozen=True)
class Stream:
    """The identity of one sample's draws: the run's seed, the sample's number, and the forks it descends from."""

    seed: int
    sample: int
    path: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed {self.seed} is out of range; use an integer from 0 to 2^63 - 1")

    def key(self, purpose: str) -> int:
        """64 bits that stand for this stream and a purpose such as "token" or "noise"."""
        text = f"{self.seed}/{self.sample}/{','.join(map(str, self.path))}/{purpose}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


class Draws:
    """The random streams of a batch; moves with the samples on `select`, `fork` and `concat`."""

    def __init__(self, streams: Sequence[Stream]) -> None:
        self.streams = list(streams)

    @classmethod
    def start(cls, seed: int, samples: Sequence[int] | int) -> "Draws":
        """Streams of samples 0..n-1 (or the sample numbers given) of one seed."""
        numbers = range(samples) if isinstance(samples, int) else samples
        return cls([Stream(seed, n) for n in numbers])

    def __len__(self) -> int:
        return len(self.streams)

    def select(self, ids: Sequence[int]) -> "Draws":
        """The same streams, re-ordered, dropped or repeated."""
        return Draws([self.streams[i] for i in ids])

    def fork(self, branches: Sequence[int]) -> "Draws":
        """Each sample becomes a new stream: branch number i is appended to the path of sample i."""
        assert len(branches) == len(self.streams)
        return Draws(
            [Stream(s.seed, s.sample, (*s.path, b)) for s, b in zip(self.streams, branches, strict=True)]
        )

    def bits(self, purpose: str, step: int | Tensor, positions: Tensor, n: int = 1) -> np.ndarray:
        """(B, P, n) uint64 below 2^32. `step` is a number, (B,) or (B, P); `positions` (P,) or (B, P), values >= 0."""
        batch = len(self.streams)
        keys = np.array([s.key(purpose) for s in self.streams], dtype=np.uint64)[:, None, None]
        place = (
            np.atleast_2d(positions.cpu().numpy()).astype(np.int64) & 0xFFFFFFFF
        )  # padding (-1) is harmless
        at = np.asarray(step, dtype=np.int64)
        steps = at[..., None] if at.ndim == 2 else at.reshape(-1, 1, 1)
        shape = (batch, place.shape[-1], -(-n // 4))
        block = np.broadcast_to(np.arange(shape[2], dtype=np.uint64), shape)
        counter = [
            block,
            np.broadcast_to(place.astype(np.uint64)[..., None], shape),
            np.broadcast_to(steps.astype(np.uint64), shape),
            np.zeros(shape, dtype=np.uint64),
        ]
        words = philox(counter, (keys & _MASK, keys >> np.uint64(32)))
        return np.stack(words, axis=-1).reshape(batch, place.shape[-1], -1)[:, :, :n]

    def uniform(self, purpose: str, step: int | Tensor, positions: Tensor, n: int = 1) -> Tensor:
        """(B, P, n) float32, uniform in the open interval (0, 1)."""
        # 23 bits and a half one: exact in float32, so never rounded to 0 or 1
        bits = self.bits(purpose, step, positions, n) >> np.uint64(9)
        return torch.from_numpy(((bits.astype(np.float64) + 0.5) / 2**23).astype(np.float32))

    def normal(self, purpose: str, step: int | Tensor, positions: Tensor, n: int = 1) -> Tensor:
        """(B, P, n) float32, standard normal (inverse of the distribution function at 32-bit uniforms)."""
        bits = self.bits(purpose, step, positions, n).astype(np.float64)
        return torch.special.ndtri(torch.from_numpy((bits + 0.5) / 2**32)).float()

    def gumbel(self, purpose: str, step: int | Tensor, positions: Tensor, n: int = 1) -> Tensor:
        """(B, P, n) float32, standard Gumbel."""
        bits = self.bits(purpose, step, positions, n).astype(np.float64)
        return -torch.log(-torch.log(torch.from_numpy((bits + 0.5) / 2**32))).float()

    @staticmethod
    def concat(parts: Sequence["Draws"]) -> "Draws":
        """Streams of several batches, one after the other."""
        return Draws([s for part in parts for s in part.streams])

    def to_json(self) -> list[list]:
        """A list that `from_json` reads back."""
        return [[s.seed, s.sample, list(s.path)] for s in self.streams]

    @classmethod
    def from_json(cls, rows: Sequence[Sequence]) -> "Draws":
        """Inverse of `to_json`."""
        return cls([Stream(seed, sample, tuple(path)) for seed, sample, path in rows])
