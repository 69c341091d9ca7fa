"""What a cache policy promises: keys and values of earlier steps, addressed by (sample, layer, head, slot), and what
recurrent layers carry (`varkit.decode.cache.carried`).

A policy opens a window for a step, hands its views to the layers, and closes it, which commits what the step wrote. It
never knows an order: slots, visibility and writing come with the step.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from varkit.nn.attention import Window
from varkit.plans.step import Step


class Cache(ABC):
    """Keys and values of a batch, for R condition branches of B samples (N = R x B rows, branch-major)."""

    @abstractmethod
    def open(self, step: Step, at: Tensor) -> Window:
        """The window of one step; `at` (B,) are the samples' cursors."""

    @abstractmethod
    def close(self) -> None:
        """End the step opened last: what it wrote now belongs to the past."""

    @abstractmethod
    def rollback(self, lengths: Tensor) -> None:
        """Forget slots written at step `lengths[b]` of sample b or later. It may forget more, and says so: `behind`."""

    def behind(self, cursor: Tensor) -> Tensor | None:
        """Steps of each sample that the cache has not forgotten, (B,), when some have to be fed again before the
        step at `cursor` (B,); None otherwise."""
        return None

    @abstractmethod
    def select(self, ids: Sequence[int]) -> "Cache":
        """Samples re-ordered, dropped or repeated (copies)."""

    @abstractmethod
    def joined(self, others: Sequence["Cache"]) -> "Cache":
        """This cache's samples followed by those of others of the same kind."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes held by keys and values, and by what layers carry."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Everything as named tensors, for saving."""

    @abstractmethod
    def with_tensors(self, tensors: dict[str, Tensor]) -> "Cache":
        """A cache of the same kind holding what `tensors` gave."""
