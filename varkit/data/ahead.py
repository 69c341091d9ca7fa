"""Things made ahead of their use in other processes, in order: what keeps an accelerator from waiting for pictures.

    for batch in made_ahead(make, range(1000), workers=8): ...

What is made is a function of its number alone, so it is the same with any number of workers.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from torch.utils.data import DataLoader, Dataset

T = TypeVar("T")
AHEAD = 4
"""Things that each worker has ready."""


def made_ahead(make: Callable[[int], T], numbers: Iterable[int], workers: int = 0) -> Iterator[T]:
    """`make(number)` for each number. With workers, forked processes make them, and what `make` changes stays there."""
    if workers == 0:
        return map(make, numbers)
    loader = DataLoader(
        _Made(make), sampler=numbers, batch_size=None, collate_fn=_as_it_is, num_workers=workers,
        prefetch_factor=AHEAD, multiprocessing_context="fork",
    )  # fmt: skip
    return iter(loader)


@dataclass(frozen=True)
class _Made(Dataset):
    make: Callable[[int], Any]

    def __getitem__(self, number: int) -> Any:
        return self.make(number)


def _as_it_is(value: Any) -> Any:
    return value
