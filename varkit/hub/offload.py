"""Generators larger than memory: their blocks are read one after the other, each while the one before it computes.

A generator goes through its stacks of blocks in order (`Generator.stacks`), so a stack may be any iterable. `Streamed`
is one that has the memory of two blocks, which all the others pass through in turn. They wait on disk, or in RAM: there
at the dtype they are stored in, which pays where it is smaller than that of the run, or where the run is on another
device. They compute what resident blocks compute, bit for bit.
"""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from varkit.errors import UserError, unknown_name
from varkit.files import StrPath
from varkit.generators.base import Generator
from varkit.hub.states import check_state
from varkit.hub.tensor_file import TensorFile

PLACES = ("disk", "ram")
"""Where blocks may wait."""

Fill = Callable[[str, Tensor], None]
"""Put the weight of a name, such as "3.ffn.up.weight" of block 3, into a tensor."""


class Streamed(nn.Module):
    """`count` blocks like `empty`, a block without memory; iterating yields each until the next is asked for.

    It follows `.to` (dtype and device). Its weights are not in it, so it cannot be saved.
    """

    like: Tensor

    def __init__(self, empty: nn.Module, count: int, fill: Fill, dtype: torch.dtype) -> None:
        super().__init__()
        self._empty = (empty.eval(),)  # in a tuple it is not a module of the model: it has no memory to move
        self.count, self.fill = count, fill
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[nn.Module]:
        blocks = [
            deepcopy(self._empty[0]).to(self.like.dtype).to_empty(device=self.like.device) for _ in range(2)
        ]
        with ThreadPoolExecutor(max_workers=1) as reader:
            coming = reader.submit(self._fill, 0, blocks[0])
            for i in range(self.count):
                coming.result()
                if i + 1 < self.count:
                    coming = reader.submit(self._fill, i + 1, blocks[(i + 1) % 2])
                yield blocks[i % 2]

    def _fill(self, i: int, block: nn.Module) -> None:
        for name, tensor in block.state_dict().items():
            self.fill(f"{i}.{name}", tensor)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        raise UserError(
            "the weights of an offloaded model are not in it; load it without offload, or copy its folder"
        )


def stream(generator: nn.Module, path: StrPath, dtypes: Mapping[str, torch.dtype], place: str) -> None:
    """Fill an empty generator from a safetensors file, at `dtypes` or the file's own; its blocks wait at `place`.

    Raises `UserError` for a generator that is not made of stacks.
    """
    if place not in PLACES:
        raise unknown_name("place to offload to", place, PLACES)
    if not isinstance(generator, Generator) or not generator.stacks:
        raise UserError(
            f"a {type(generator).__name__} has no stack of like blocks to offload; leave offload out"
        )
    file = TensorFile(path)
    check_state(generator.state_dict(), file.described(), repr(str(path)))
    inside = tuple(f"{stack}." for stack in generator.stacks)
    resident = [name for name in file.entries if not name.startswith(inside)]
    state = {name: file.read(name, dtypes.get(name)) for name in resident}
    generator.load_state_dict(state, strict=False, assign=True)
    for stack in generator.stacks:
        blocks = getattr(generator, stack)
        fill: Fill = partial(_from_disk, file, f"{stack}.")
        if place == "ram":
            inside_it = [name for name in file.entries if name.startswith(f"{stack}.")]
            fill = partial(_from_ram, {name.removeprefix(f"{stack}."): file.read(name) for name in inside_it})
        first = f"{stack}.0.{next(iter(blocks[0].state_dict()))}"
        setattr(
            generator,
            stack,
            Streamed(blocks[0], len(blocks), fill, dtypes.get(first, file.entries[first].dtype)),
        )


def _from_disk(file: TensorFile, prefix: str, name: str, out: Tensor) -> None:
    file.read_into(prefix + name, out)


def _from_ram(kept: Mapping[str, Tensor], name: str, out: Tensor) -> None:
    out.copy_(kept[name])
