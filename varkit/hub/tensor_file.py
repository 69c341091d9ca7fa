"""Safetensors files whose tensors are read into memory that is there already.

New memory comes page by page while it is filled, at 1.4 GB/s where memory in use takes 7.5 (two Zen 4 cores), and the
stock reader keeps Python's other threads waiting meanwhile. So whoever reads block after block brings the memory along.
"""

import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from varkit.errors import UserError
from varkit.files import StrPath

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip

STAGING = 2**20
"""Bytes that are cast at a time: few enough to stay in the processor's cache."""


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: `start` is its first byte."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int


class TensorFile:
    """The tensors of a safetensors file by name; the file is open only while one is read."""

    def __init__(self, path: StrPath) -> None:
        self.path = path
        with (
            as_safetensors(path),
            safe_open(path, "np"),
        ):  # it checks that the header fits the file, and maps no memory for writing
            pass
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        self.entries = {
            name: Entry(self._dtype(name, e["dtype"]), tuple(e["shape"]), 8 + length + e["data_offsets"][0])
            for name, e in header.items()
        }

    def _dtype(self, name: str, text: str) -> torch.dtype:
        if text not in DTYPES:
            raise UserError(f"{name} in {str(self.path)!r} is of dtype {text}; known: {', '.join(DTYPES)}")
        return DTYPES[text]

    def described(self) -> dict[str, Tensor]:
        """Every tensor's shape and dtype, as a tensor without memory."""
        return {name: torch.empty(e.shape, dtype=e.dtype, device="meta") for name, e in self.entries.items()}

    def read(self, name: str, dtype: torch.dtype | None = None, staging: Tensor | None = None) -> Tensor:
        """One tensor in new memory, at its own dtype or another."""
        entry = self.entries[name]
        out = torch.empty(entry.shape, dtype=dtype or entry.dtype)
        self.read_into(name, out, staging)
        return out

    def read_into(self, name: str, out: Tensor, staging: Tensor | None = None) -> None:
        """Fill a contiguous tensor of the same shape, of any dtype and on any device.

        staging: bytes for what is cast or moved. Whoever makes many tensors brings them along, or they would lie
        scattered between the tensors.
        """
        entry, flat = self.entries[name], out.view(-1)
        with open(self.path, "rb", buffering=0) as file:
            file.seek(entry.start)
            if out.dtype == entry.dtype and out.device.type == "cpu":
                self._fill(file, flat)
                return
            read = (new_staging() if staging is None else staging).view(entry.dtype)
            for part in flat.split(len(read)):
                self._fill(file, read[: len(part)])
                part.copy_(read[: len(part)])

    def _fill(self, file: io.FileIO, flat: Tensor) -> None:
        rest = flat.view(torch.uint8).numpy().data
        while len(rest):
            count = file.readinto(rest)
            if not count:
                raise UserError(
                    f"{str(self.path)!r} became shorter while it was read; fetch or save it again"
                )
            rest = rest[count:]


def new_staging() -> Tensor:
    """Memory to cast in."""
    return torch.empty(STAGING, dtype=torch.uint8)


def read_as(path: StrPath, dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """Tensors in memory of their own, those of real numbers at the dtypes given: no second copy is ever there."""
    file, staging = TensorFile(path), new_staging()
    return {
        name: file.read(name, dtypes.get(name) if entry.dtype.is_floating_point else None, staging)
        for name, entry in file.entries.items()
    }


@contextmanager
def as_safetensors(path: StrPath) -> Iterator[None]:
    """What goes wrong in opening a safetensors file, as a `UserError`."""
    check_file(path)
    with open(path, "rb") as file:
        head = file.read(9)
    # The length of a safetensors header may begin with a pickle's first byte; its ninth byte opens the header.
    if head[8:] != b"{" and head.startswith((b"PK\x03\x04", b"\x80")):
        raise UserError(
            f"{str(path)!r} is a pickled checkpoint under a safetensors name; convert it with `varkit convert`"
        )
    try:
        yield
    except SafetensorError as error:
        raise UserError(
            f"{str(path)!r} is damaged or not safetensors ({error}); fetch or save it again"
        ) from error


def check_file(path: StrPath) -> None:
    """Raise `UserError` unless there is a file."""
    if not Path(path).is_file():
        raise UserError(f"there is no file {str(path)!r}; check the path")
