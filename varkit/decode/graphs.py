"""CUDA graphs: the kernels of a step, recorded once for a batch's shape and replayed by every later run.

Where rows are few, launching kernels one by one takes the host longer than the device needs to run them. The loop stays
what it is: the model's generator is wrapped, and so is a diffusion head, whose own loop is most of its run. A recording
reads and writes fixed places, so keys and values (`Leased`) and the prepared condition stay where they are, and one run
of a batch's shape holds them at a time.
Recorded are the steps of a static plan while all samples are at the same one, and MAR's, whose shapes follow from how
many positions are known; any other step runs kernel by kernel. So do the heads over codes and bits, which wait for
draws made on the CPU, the canvas, and the tokenizer's decoder, which is large enough to fill a device. Refused are
generators that are not `recordable`: M-VAR, whose layers carry tensors without a fixed place, and PixelCNN++.

What is recorded has been checked by running recorded operations again on a CPU (tests/tape.py), not yet on a device.
"""

import weakref
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from varkit.decode.cache.full import FullCache
from varkit.decode.loop import Model
from varkit.devices import sent
from varkit.errors import UserError
from varkit.generators.base import Condition, Generator, Prepared
from varkit.generators.mar import MAR
from varkit.heads.base import Ask, Head
from varkit.heads.diffusion import DiffusionHead
from varkit.nn.ports import Ports
from varkit.plans.base import Plan, StaticPlan
from varkit.plans.masked import MaskedPlan
from varkit.plans.step import Step

Record = Callable[[Callable[[], Tensor]], tuple[Tensor, Callable[[], None]]]
"""Runs a function, and returns its output and what computes the output anew, in place, from what the function read."""

WARM_UPS = 2
"""Runs before a recording, in which libraries choose their kernels and allocate what they work in."""


class CudaGraphs:
    """Records on one stream; all graphs share the memory of what they compute on the way."""

    def __init__(self) -> None:
        self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        graph, now = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        self.stream.wait_stream(now)
        # `torch.cuda.graph` would collect garbage and empty the allocator each time: 256 recordings cannot afford it.
        with torch.cuda.stream(self.stream):
            for _ in range(WARM_UPS):
                function()
            graph.capture_begin(pool=self.pool)
            try:
                output = function()
            finally:
                graph.capture_end()
        now.wait_stream(self.stream)
        graph.replay()  # recording computes nothing
        return output, graph.replay


@dataclass
class Recording:
    """One function of tensors. kept: what it reads beside its inputs, and must not be freed."""

    inputs: dict[str, Tensor]
    output: Tensor
    replay: Callable[[], None]
    kept: tuple[Any, ...] = ()

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The output for these inputs, which holds until the next call."""
        copied(inputs, self.inputs)
        self.replay()
        return self.output


@dataclass
class Recordings:
    """Functions of tensors by what tells them apart, the shapes of their inputs included."""

    record: Record
    made: dict[Hashable, Recording] = field(default_factory=dict)

    def run(
        self,
        key: Hashable,
        function: Callable[[dict[str, Tensor]], Tensor],
        inputs: dict[str, Tensor],
        *kept: Any,
    ) -> Tensor:
        """function(inputs), replayed if it has been recorded under this key and at these shapes."""
        key = key, shapes(inputs)
        if key in self.made:
            return self.made[key](inputs)
        fixed = {name: value.clone() for name, value in inputs.items()}
        output, replay = self.record(lambda: function(fixed))
        self.made[key] = Recording(fixed, output, replay, kept)
        return output


def shapes(tensors: Mapping[str, Tensor]) -> Hashable:
    """What recordings of the same function differ by."""
    return tuple((name, t.shape, t.dtype) for name, t in sorted(tensors.items()))


def copied(values: Mapping[str, Tensor], places: Mapping[str, Tensor]) -> None:
    """Write tensors into those of the same names."""
    for name, place in places.items():
        place.copy_(values[name], non_blocking=True)


class Places:
    """What runs of one batch's shape read and write, one run at a time: keys and values, and the prepared condition."""

    def __init__(self, record: Record) -> None:
        self.recordings = Recordings(record)
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        self.holder: weakref.ref[Leased] | None = None
        self._prepared: dict[Hashable, tuple[Prepared, Prepared]] = {}

    def prepared(self, values: Prepared) -> Prepared:
        """The fixed tensors that hold a prepared condition, filled once for a run."""
        key = shapes(values)
        fixed, held = self._prepared.get(key, (None, None))
        if fixed is None:
            fixed = {name: value.clone() for name, value in values.items()}
        elif held is not values:
            copied(values, fixed)
        self._prepared[key] = fixed, values
        return fixed


class Leased(FullCache):
    """The full cache in fixed places, until another run of the same shape takes them."""

    def __init__(self, places: Places, batch: int, branches: int, slots: int | None) -> None:
        super().__init__(batch, branches, slots)
        self.places, self.layers = places, places.layers
        places.holder = weakref.ref(self)

    def open(self, step: Step, at: Tensor) -> "Leased":
        if self.places.holder is None or self.places.holder() is not self:
            raise UserError(
                f"a later run of {self.batch} samples has taken this run's place among the CUDA graphs; "
                "finish one run before the next, or use the pipeline without `graphed`"
            )
        self._mask = None
        super().open(step, at)
        return self

    def opened(self, device: torch.device) -> tuple[Any, Tensor | None]:
        """How layers see the window, on their device, before any of them narrows it."""
        return self._alone, None if self._mask is None else sent(self._mask, device)

    def reopened(self, opened: tuple[Any, Tensor | None]) -> "Leased":
        """The window as it was."""
        self._alone, self._mask = opened
        return self

    @property
    def fixed(self) -> Hashable | None:
        """What tells windows of a static plan's step apart, None where samples differ in what they hold."""
        return None if self.slots is None or self._filled is None else self._filled


class GraphedGenerator(Generator):
    """A generator whose steps are replayed where that is possible; what it computes is the same."""

    def __init__(self, inner: Generator, plan: Plan) -> None:
        super().__init__()
        self.inner, self.width, self.depth = inner, inner.width, inner.depth
        self.conditioner, self.stacks = inner.conditioner, inner.stacks
        self.steps = {id(step): step for step in plan.steps} if isinstance(plan, StaticPlan) else {}
        self.masked = isinstance(inner, MAR) and isinstance(plan, MaskedPlan)

    def prepare(self, condition: Condition) -> Prepared:
        return self.inner.prepare(condition)

    def forward(
        self,
        fed: dict[str, Tensor],
        step: Step,
        prepared: Prepared,
        window: Any,
        ports: Ports | None = None,
    ) -> Tensor:
        if not isinstance(window, Leased):
            return self.inner(fed, step, prepared, window, ports)
        key, inputs = self._key(step, window), fed
        if key is None:
            return self.inner(fed, step, prepared, window, ports)
        device = next(iter(fed.values())).device
        if self.masked:
            assert isinstance(self.inner, MAR)
            layout = self.inner.layout(step.feed, len(fed["latents"]))
            inputs = fed | {name: sent(value, device) for name, value in layout.items()}
        places, opened = window.places, window.opened(device)
        fixed = places.prepared(prepared)

        def run(own: dict[str, Tensor]) -> Tensor:
            return self.inner(own, step, fixed, window.reopened(opened), ports)

        key = key, shapes(fixed), frozenset((ports or {}).items())
        return places.recordings.run(key, run, inputs, step, fixed, opened)

    def _key(self, step: Step, window: Leased) -> Hashable | None:
        """What tells this evaluation from others of the same shapes; None where it cannot be recorded."""
        if self.masked:
            return "masked"
        return (id(step), window.fixed) if id(step) in self.steps and window.fixed is not None else None


class GraphedDiffusion(Head):
    """A diffusion head whose whole loop over the times is replayed."""

    def __init__(self, inner: DiffusionHead, record: Record) -> None:
        super().__init__()
        self.inner, self._recordings = inner, Recordings(record)

    def loss(self, h: Tensor, targets: dict[str, Tensor], draws: dict[str, Tensor] | None = None) -> Tensor:
        return self.inner.loss(h, targets, draws)

    def sample(self, h: Tensor, ask: Ask) -> dict[str, Tensor]:
        combine, temperature = ask.combine, ask.temperature
        inputs = {"h": h, "noise": self.inner.noise(ask, h.device), "progress": sent(ask.progress, h.device)}
        if isinstance(temperature, Tensor):
            inputs["temperature"] = sent(temperature, h.device)

        def run(own: dict[str, Tensor]) -> Tensor:
            return self.inner.sample_with(
                own["h"],
                own["noise"],
                lambda eps: combine(eps, own["progress"]),
                own.get("temperature", temperature),
            )

        key = combine, None if isinstance(temperature, Tensor) else temperature
        return {"latents": self._recordings.run(key, run, inputs, combine)}


class Graphs:
    """A model whose steps are replayed, and the caches that its runs need: `model` and `cache`.

    Raises `UserError` for a generator that is not `recordable`.
    """

    def __init__(self, model: Model, record: Record) -> None:
        if not model.generator.recordable:
            name = type(model.generator).__name__
            raise UserError(f"the steps of {name} cannot be CUDA graphs; use the pipeline without `graphed`")
        self.record = record
        self._places: dict[Hashable, Places] = {}
        heads = {
            route: GraphedDiffusion(head, record) if isinstance(head, DiffusionHead) else head
            for route, head in model.heads.items()
        }
        self.model = Model(model.plan, GraphedGenerator(model.generator, model.plan), heads)

    def cache(self, batch: int, branches: int, slots: int | None) -> Leased:
        """A run's cache, in the places of its shape."""
        key = batch, branches, slots
        if key not in self._places:
            self._places[key] = Places(self.record)
        return Leased(self._places[key], batch, branches, slots)


def cuda_graphs(model: Model, device: torch.device) -> Graphs:
    """`Graphs` on a CUDA device. Raises `UserError` where the model is on another."""
    if device.type != "cuda":
        raise UserError(
            f"CUDA graphs need a CUDA device, and this model is on {device.type!r}; move it by `.to`"
        )
    return Graphs(model, CudaGraphs())
