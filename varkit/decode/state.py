"""State owns everything a decoding run knows; search, speculation, servers and resuming need nothing else.

Legend: R condition branches, B samples.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from varkit.canvases.base import Canvas
from varkit.decode.cache.base import Cache
from varkit.decode.guidance import BySteps, Guidance
from varkit.decode.sampling import Sampler
from varkit.draws import Draws
from varkit.generators.base import Prepared
from varkit.heads.base import Ask, Combine
from varkit.nn.ports import Ports
from varkit.plans.step import Step

Override = Callable[[Step, dict[str, Tensor], "State"], dict[str, Tensor]]
"""Replace a step's values (B, T, ...) before the canvas takes them: edits, teacher leaks, forced prefixes."""


@dataclass(frozen=True)
class Options:
    """How a run decodes: guidance over branches, the sampler of discrete heads, ports, an override of values, and the
    temperature of heads over real numbers.
    """

    combine: Combine = Guidance()
    pick: Callable[[Tensor, Ask], dict[str, Tensor]] = Sampler()
    ports: Ports | None = None
    override: Override | None = None
    temperature: BySteps = 1.0


@dataclass
class State:
    """A batch of runs. `cursor` (B,) counts each sample's steps taken; samples may stand at different ones.

    prepared: the generator's condition, each tensor (R, B, ...). evaluations, tokens: what the run has cost so far,
    (B,) each (network evaluations that moved the sample, and positions committed).
    extras: what a caller's override or port needs of each sample, each tensor (B, ...); selected, merged and saved with
    the samples.
    """

    canvas: Canvas
    cache: Cache
    prepared: Prepared
    draws: Draws
    cursor: Tensor
    finished: Tensor
    evaluations: Tensor
    tokens: Tensor
    options: Options = field(default_factory=Options)
    extras: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def start(
        cls, canvas: Canvas, cache: Cache, prepared: Prepared, draws: Draws, options: Options | None = None
    ) -> "State":
        """A run at its first step."""
        batch = canvas.batch
        zero = torch.zeros(batch, dtype=torch.int64)
        return cls(
            canvas,
            cache,
            prepared,
            draws,
            zero,
            zero.bool(),
            zero.clone(),
            zero.clone(),
            options or Options(),
        )

    @property
    def batch(self) -> int:
        """B."""
        return len(self.cursor)

    def select(self, ids: Sequence[int]) -> "State":
        """Samples re-ordered, dropped or repeated; copies share nothing and keep their streams (`fork` renews
        those).
        """
        index = torch.as_tensor(list(ids), dtype=torch.int64)
        return replace(
            self,
            canvas=self.canvas.select(ids),
            cache=self.cache.select(ids),
            prepared={k: v[:, index.to(v.device)] for k, v in self.prepared.items()},
            draws=self.draws.select(list(ids)),
            cursor=self.cursor[index],
            finished=self.finished[index],
            evaluations=self.evaluations[index],
            tokens=self.tokens[index],
            extras={k: v[index.to(v.device)] for k, v in self.extras.items()},
        )

    def fork(self, ids: Sequence[int]) -> "State":
        """Like `select`, but the n-th copy of a sample draws from the n-th branch of its stream from here on."""
        counts: dict[int, int] = {}
        branches = []
        for i in ids:
            branches.append(counts.get(i, 0))
            counts[i] = branches[-1] + 1
        chosen = self.select(ids)
        return replace(chosen, draws=chosen.draws.fork(branches))

    @staticmethod
    def concat(states: Sequence["State"]) -> "State":
        """Samples of several runs (same model and options), one after the other, each at its own step."""
        first = states[0]
        assert all(s.options == first.options for s in states), "runs with different options cannot be merged"
        return replace(
            first,
            canvas=type(first.canvas).concat([s.canvas for s in states]),
            cache=first.cache.joined([s.cache for s in states[1:]]),
            prepared={k: torch.cat([s.prepared[k] for s in states], dim=1) for k in first.prepared},
            draws=Draws.concat([s.draws for s in states]),
            cursor=torch.cat([s.cursor for s in states]),
            finished=torch.cat([s.finished for s in states]),
            evaluations=torch.cat([s.evaluations for s in states]),
            tokens=torch.cat([s.tokens for s in states]),
            extras={k: torch.cat([s.extras[k] for s in states]) for k in first.extras},
        )

    def rollback(self, lengths: Tensor) -> None:
        """Undo the steps from `lengths[b]` on, for each sample b (lengths beyond the cursor change nothing)."""
        lengths = torch.minimum(lengths, self.cursor)
        self.canvas.rollback(lengths)
        self.cache.rollback(lengths)
        self.finished = self.finished & (lengths == self.cursor)
        self.cursor = lengths

    def tensors(self) -> dict[str, Tensor]:
        """Everything as named tensors, draws included (as JSON bytes): what a file needs to go on from here."""
        text = json.dumps(self.draws.to_json()).encode()
        own = {n: getattr(self, n) for n in ("cursor", "finished", "evaluations", "tokens")}
        return {
            **{f"canvas.{k}": v for k, v in self.canvas.tensors().items()},
            **{f"cache.{k}": v for k, v in self.cache.tensors().items()},
            **{f"prepared.{k}": v for k, v in self.prepared.items()},
            **{f"extras.{k}": v for k, v in self.extras.items()},
            **own,
            "draws": torch.frombuffer(bytearray(text), dtype=torch.uint8),
        }

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> "State":
        """A state of the same model and options from `tensors()` (copied); this state's own contents are not used."""
        tensors = {k: v.clone() for k, v in tensors.items()}

        def part(name: str) -> dict[str, Tensor]:
            return {k[len(name) + 1 :]: v for k, v in tensors.items() if k.startswith(name + ".")}

        return replace(
            self,
            cache=self.cache.with_tensors(part("cache")),
            extras=part("extras"),
            canvas=self.canvas.with_tensors(part("canvas")),
            prepared=part("prepared"),
            draws=Draws.from_json(json.loads(bytes(tensors["draws"].tolist()))),
            cursor=tensors["cursor"],
            finished=tensors["finished"],
            evaluations=tensors["evaluations"],
            tokens=tensors["tokens"],
        )
