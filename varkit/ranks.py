"""Several processes, started by torchrun: who computes which micro-batch, and how the results come together.

A step always is `accumulation` micro-batches, each a pure function of its number. Rank r of W computes those with
number = r mod W, so any W that divides `accumulation` takes the same step but for the order of sums, and a run may be
resumed on another number of ranks. Weights, moments and averages are whole on every rank, and the first one writes,
unless they are spread over the ranks (`varkit/train/sharding.py`).
"""

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from varkit.errors import UserError


@dataclass(frozen=True)
class Ranks:
    """One process among `world`; every method is a promise that all of them call it in the same order."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """The numbers, of 0 to count - 1, that are this rank's. Raises `UserError` unless all ranks get as many."""
        if count % self.world:
            raise UserError(
                f"{count} micro-batches a step cannot be shared by {self.world} ranks; use a number of ranks that "
                f"divides {count}, or more accumulation"
            )
        return range(self.rank, count, self.world)

    def all(self, ok: bool) -> bool:
        """Whether it is so on every rank."""
        return ok if self.world == 1 else self._reduced(float(ok), dist.ReduceOp.MIN) > 0

    def any(self, so: bool) -> bool:
        """Whether it is so on some rank."""
        return so if self.world == 1 else self._reduced(float(so), dist.ReduceOp.MAX) > 0

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace each gradient by the sum over ranks; what has none on any rank is left without."""
        if self.world == 1:
            return
        owners = list(parameters)
        used = torch.tensor([p.grad is not None for p in owners], dtype=torch.uint8, device=owners[0].device)
        dist.all_reduce(used, dist.ReduceOp.MAX)
        owners = [p for p, some in zip(owners, used.tolist(), strict=True) if some]
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in owners]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        for p, part in zip(owners, flat.split([g.numel() for g in gradients]), strict=True):
            p.grad = part.view_as(p)

    def sum_metrics(self, sums: Mapping[str, list[float]]) -> dict[str, list[float]]:
        """[sum, count] of each metric over all ranks; every rank has the same metrics."""
        if self.world == 1:
            return dict(sums)
        names = sorted(sums)
        table = torch.tensor([sums[name] for name in names], dtype=torch.float64)
        dist.all_reduce(table)
        return dict(zip(names, table.tolist(), strict=True))

    def copy_from(self, rank: int, tensors: Iterable[Tensor]) -> None:
        """Give every rank the tensors of one."""
        if self.world > 1:
            for tensor in tensors:
                dist.broadcast(tensor, rank)

    def told(self, value: Any) -> Any:
        """The first rank's value, on every rank."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    def merged(self, entries: dict[str, Any]) -> dict[str, Any]:
        """The entries of all ranks."""
        return {name: value for box in self.gathered(entries) for name, value in box.items()}

    def gathered(self, value: Any) -> list[Any]:
        """Every rank's value, in their order, on every rank."""
        if self.world == 1:
            return [value]
        boxes: list[Any] = [None] * self.world
        dist.all_gather_object(boxes, value)
        return boxes

    def wait(self) -> None:
        """Until every rank is here."""
        if self.world > 1:
            dist.barrier()

    def _reduced(self, value: float, how: dist.ReduceOp.RedOpType) -> float:
        flag = torch.tensor(value)
        dist.all_reduce(flag, how)
        return float(flag)


def current() -> Ranks:
    """This process's place; alone unless `together` is under way."""
    if dist.is_available() and dist.is_initialized():
        return Ranks(dist.get_rank(), dist.get_world_size())
    return Ranks()


@contextmanager
def together() -> Iterator[Ranks]:
    """Join the processes that torchrun started, if it did; they part when the block ends."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks()
        return
    store, rank, world = next(dist.rendezvous("env://"))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    try:
        yield current()
        _part(store, rank, world)
    finally:  # also after an error: threads of the group that live on would abort the process at its end
        dist.destroy_process_group()


def _part(store: dist.Store, rank: int, world: int) -> None:
    """Wait, over the store, until every rank has its last message: one that leaves earlier breaks the others'."""
    store.add("done", 1)
    while store.add("done", 0) < world:
        time.sleep(0.01)
    store.add("left", 1)
    while rank == 0 and store.add("left", 0) < world:  # the store may live in this process
        time.sleep(0.01)
