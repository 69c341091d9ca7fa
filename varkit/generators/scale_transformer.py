"""The transformer that next-scale generators share: AdaLN blocks over whole maps of codes (VAR, arXiv 2404.02905).

What is fed at a scale is a map of code vectors, embedded; the first scale shows nothing and holds start tokens made of
the condition. Every block is modulated by the condition's vector and, where there is one, attends to its memory. A
subclass says how a slot knows where it stands.
Legend: R branches, B samples, N = R x B, L slots, C width, K levels, M prompt length.
"""

from collections.abc import Iterable, Sequence
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varkit.devices import sent_once
from varkit.generators.base import Condition, Generator, Prepared, per_row, rows
from varkit.generators.conditioning import Conditioner
from varkit.nn.adaln import AdaLNBlock, BlockConfig, modulate
from varkit.nn.attention import Rotation, Window
from varkit.nn.linear import Linear
from varkit.nn.ports import Ports, port_at, through
from varkit.nn.surroundings import Surroundings
from varkit.plans.step import Step


class ScaleTransformer(Generator):
    """`forward` takes {"vectors": (B, L, code_width)} and returns (N, L, C).

    starts: tokens of the first scale. levels: scales that have an embedding, 0 for none. around: what of a map is
    embedded at each of its slots; by default the vector there.
    """

    stacks: tuple[str, ...] = ("blocks",)

    def __init__(
        self, conditioner: Conditioner, block: BlockConfig, depth: int, code_width: int, starts: int, levels: int,
        drop_path: float, around: Surroundings | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.width, self.depth, self.eps = block.width, depth, block.norm_eps
        width = block.width
        self.conditioner = conditioner
        self.around = around
        self.embed = Linear(code_width * (around.places if around else 1), width)
        self.start = nn.Parameter(torch.empty(starts, width))
        if levels:
            self.level = nn.Embedding(levels, width)
        self.shared_modulation = Linear(width, 6 * width) if block.shared_modulation else None
        rates = torch.linspace(0, drop_path, depth).tolist()
        self.blocks: Sequence[AdaLNBlock] = nn.ModuleList(block.build(width, r) for r in rates)  # type: ignore[assignment]
        self.final_modulation = Linear(width, 2 * width)

    def place(self, ids: Tensor, level: Tensor) -> Tensor:
        """What is added to embedded codes at slots `ids` of scales `level`, both (L,) or (N, L) -> (..., L, C)."""
        return self.level(level)

    def shown(self, fed: dict[str, Tensor], step: Step) -> Tensor:
        """What is fed, embedded: (B, L, D) -> (B, L, C)."""
        vectors = fed["vectors"]
        if self.around is not None:
            vectors = self.around(vectors, sent_once(step.feed.ids, self.start.device).clamp(min=0))
        return self.embed(vectors.to(self.embed.weight.dtype))

    def every_block(self) -> Iterable[AdaLNBlock]:
        """The blocks of all stacks."""
        return chain.from_iterable(getattr(self, stack) for stack in self.stacks)

    def path(self, route: str) -> Iterable[tuple[int, AdaLNBlock]]:
        """The blocks that a step of a route goes through, each with its number among `every_block`."""
        return enumerate(self.blocks)

    def finals(self, vector: Tensor) -> Prepared:
        """The modulation before each head, (N, 2, C), by the names that `final_of` gives."""
        return {"final": self.final_modulation(F.silu(vector)).unflatten(-1, (2, -1))}

    def final_of(self, route: str) -> str:
        """Which of `finals` serves a route."""
        return "final"

    def stands(self, step: Step, branches: int, device: torch.device) -> Tensor:
        """What is added to embedded codes at the step's slots, (L, C) or (N, L, C); by default by number and scale."""
        ids, level = (per_row(sent_once(t, device), 1, branches) for t in (step.feed.ids, step.feed.level))
        return self.place(ids.clamp(min=0), level)

    def rotation(self, step: Step, branches: int, device: torch.device) -> Rotation | None:
        """How attention turns queries and keys, if it does."""
        return None

    def prepare(self, condition: Condition) -> Prepared:
        branches, batch = next(iter(condition.values())).shape[:2]
        vector, memory, mask = self.conditioner({k: v.flatten(0, 1) for k, v in condition.items()})
        shared = None
        if self.shared_modulation is not None:
            shared = self.shared_modulation(F.silu(vector)).unflatten(-1, (6, -1))
        vectors, pairs = [], []
        for block in self.every_block():  # once, since going through them may mean reading them
            vectors.append(block.vectors(vector, shared))
            if memory is not None:
                pairs.append(block.cross.project(memory))
        prepared = {"start": vector, "modulation": torch.stack(vectors, dim=1), **self.finals(vector)}
        if memory is not None and mask is not None:
            prepared["memory_k"] = torch.stack([k for k, _ in pairs], dim=1)
            prepared["memory_v"] = torch.stack([v for _, v in pairs], dim=1)
            prepared["memory_mask"] = mask[:, None, None]
        return {k: v.unflatten(0, (branches, batch)) for k, v in prepared.items()}

    def forward(
        self,
        fed: dict[str, Tensor],
        step: Step,
        prepared: Prepared,
        window: Window,
        ports: Ports | None = None,
    ) -> Tensor:
        flat = {k: v.flatten(0, 1) for k, v in prepared.items()}
        h = self._embed(fed, step, flat["start"])
        h = through(ports, "input", 0, h, step, prepared)
        rotate = self.rotation(step, len(h) // len(fed["vectors"]), h.device)
        for layer, (at, block) in enumerate(self.path(step.route)):
            memory = None
            if "memory_k" in flat:
                memory = (flat["memory_k"][:, at], flat["memory_v"][:, at], flat["memory_mask"])
            port = port_at(ports, "attention", layer, step, prepared)
            h = block(h, flat["modulation"][:, at], window, layer, memory, rotate, port)
            h = through(ports, "block", layer, h, step, prepared)
        scale, shift = flat[self.final_of(step.route)].split(1, dim=1)
        return through(ports, "output", 0, modulate(h, scale, shift, self.eps), step, prepared)

    def _embed(self, fed: dict[str, Tensor], step: Step, start: Tensor) -> Tensor:
        """Fed -> (N, L, C): the shown maps, or the start tokens where nothing is shown, plus where they stand."""
        branches, device = start.shape[0] // fed["vectors"].shape[0], self.start.device
        starts = bool((step.feed.shows < 0).any())
        ids, shows = (per_row(sent_once(t, device), 1, branches) for t in (step.feed.ids, step.feed.shows))
        h = rows(self.shown(fed, step), branches)
        if starts:
            first = start[:, None] + self.start[ids.clamp(0, len(self.start) - 1)]
            h = torch.where((shows < 0)[..., None], first, h)
        return h + self.stands(step, branches, device)

    @torch.no_grad()
    def initialise(self, gate: float, modulation: float = 0.5) -> None:
        """Truncated normal of std sqrt(1 / 3C); projections into the residual over sqrt(2 depth).

        The modulation's rows that gate residual branches are multiplied by `gate` (the paper's alng), its others by
        `modulation`. Without this, deep models stall.
        """
        width = self.width
        std = (1 / (3 * width)) ** 0.5
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        self.conditioner.initialise()
        nn.init.trunc_normal_(self.start, std=std)
        self.final_modulation.weight.mul_(modulation)
        for block in self.blocks:
            if block.shared:
                block.modulation_offset[2:].mul_(modulation)
                block.modulation_offset[:2].mul_(gate)
            else:
                block.modulation.weight[2 * width :].mul_(modulation)
                block.modulation.weight[: 2 * width].mul_(gate)
            block.attention.out.weight.div_((2 * self.depth) ** 0.5)
            block.ffn.down.weight.div_((2 * self.depth) ** 0.5)
            if hasattr(block, "cross"):
                block.cross.out.weight.div_((2 * self.depth) ** 0.5)
