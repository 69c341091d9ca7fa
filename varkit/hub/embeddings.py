"""Features of prompts in a file, computed once, so that a large text encoder need not stay beside the generator.

An .npz or .safetensors file holds, of N prompts one after the other or padded to T tokens,

    features (T_1 + ... + T_N, D) and lengths (N,),    or    features (N, T, D) and mask (N, T)

and may hold the prompts: as an array `prompts` (N,) of text in an .npz, as a JSON list under `prompts` in a
.safetensors' metadata. Without them the prompts are called "0", "1", ... by their rows. From .safetensors, features are
read when they are asked for. Legend: N prompts, T tokens, D features of a token.
"""

import json
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from varkit.errors import UserError, unknown_name
from varkit.files import StrPath, atomic_write
from varkit.hub.tensor_file import as_safetensors, check_file

SUFFIXES = (".npz", ".safetensors")
NUMBERS = ("features", "lengths", "mask")


class Embeddings:
    """A `TextSource` of the prompts in a file. read: the features (T, D) of a row; lengths (N,): its T."""

    def __init__(
        self, prompts: Sequence[str], lengths: Tensor, read: Callable[[int], Tensor], width: int, where: str
    ) -> None:
        self.rows = {prompt: row for row, prompt in enumerate(prompts)}
        self.lengths, self.read, self.width, self.where = lengths, read, width, where

    @classmethod
    def load(cls, path: StrPath) -> "Embeddings":
        """Read a file. A prompt may be there more than once with the same features.

        Raises `UserError` for a file of another layout, and for two rows of one prompt that differ.
        """
        check_suffix(path)
        told = _safetensors(path) if Path(path).suffix == ".safetensors" else _npz(path)
        return cls(*_checked(told, str(path)), str(path))

    @property
    def prompts(self) -> list[str]:
        """All prompts, in the order of the file."""
        return list(self.rows)

    def count(self, prompt: str) -> int:
        """Tokens of a prompt. Raises `UserError` for one that is not there."""
        return int(self.lengths[self._row(prompt)])

    def encode(self, prompt: str) -> Tensor:
        """Features (T, D) of a prompt, as stored. Raises `UserError` for one that is not there."""
        return self.read(self._row(prompt))

    def _row(self, prompt: str) -> int:
        if prompt not in self.rows:
            raise unknown_name(
                "prompt", prompt, self.rows, f"(in {self.where!r}; varkit embed makes such a file)"
            )
        return self.rows[prompt]


def save_embeddings(path: StrPath, rows: Mapping[str, Tensor]) -> None:
    """Write the features (T_i, D) of prompts, atomically; an .npz, which has no bfloat16, keeps them as float32."""
    check_suffix(path)
    features, lengths = torch.cat(list(rows.values())), torch.tensor([len(row) for row in rows.values()])
    with atomic_write(path) as part:
        if part.suffix == ".safetensors":
            metadata = {"prompts": json.dumps(list(rows), ensure_ascii=False)}
            save_file({"features": features.contiguous(), "lengths": lengths}, part, metadata)
            return
        plain = features.float() if features.dtype == torch.bfloat16 else features
        np.savez(part, features=plain.numpy(), lengths=lengths.numpy(), prompts=np.array(list(rows)))


def check_suffix(path: StrPath) -> None:
    """Raise `UserError` for a name that no embeddings have."""
    if Path(path).suffix not in SUFFIXES:
        raise UserError(f"{str(path)!r} is no name for embeddings; it must end in {' or '.join(SUFFIXES)}")


def _npz(path: StrPath) -> dict[str, Any]:
    check_file(path)
    try:
        file = np.load(path, allow_pickle=False)
        if isinstance(file, np.ndarray):
            raise ValueError("it is one array alone, an .npy")
        with file:
            told = dict(file)
    except (ValueError, OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(
            f"{str(path)!r} is damaged, or holds more than plain arrays ({error}); make it anew, as by varkit embed"
        ) from error
    numbers = {name: _tensor(name, told[name], str(path)) for name in NUMBERS if name in told}
    prompts = {"prompts": told["prompts"].tolist()} if "prompts" in told else {}
    return told | numbers | prompts


def _tensor(name: str, array: np.ndarray, where: str) -> Tensor:
    try:
        return torch.from_numpy(array)
    except (TypeError, ValueError) as error:  # text, NumPy's own kinds, bytes in another order
        raise _unlike(
            where, f"the dtype of its {name} is {array.dtype}, which torch does not have"
        ) from error


def _safetensors(path: StrPath) -> dict[str, Any]:
    with as_safetensors(path), safe_open(path, "pt") as file:
        told: dict[str, Any] = {
            name: file.get_tensor(name) if name in ("lengths", "mask") else file.get_slice(name)
            for name in file.keys()
        }
        prompts = (file.metadata() or {}).get("prompts")
    if prompts is None:
        return told
    try:
        return told | {"prompts": json.loads(prompts)}
    except (ValueError, RecursionError) as error:
        raise _unlike(str(path), f"its prompts are no JSON ({error})") from error


def _checked(
    told: Mapping[str, Any], where: str
) -> tuple[Sequence[str], Tensor, Callable[[int], Tensor], int]:
    """prompts, lengths, read and width of what a file holds."""
    lengths, width = _lengths(told, where)
    prompts = _prompts(told.get("prompts", list(range(len(lengths)))), where)
    if len(prompts) != len(lengths):
        raise _unlike(where, f"it has {len(prompts)} prompts and features of {len(lengths)}")
    features, ends = told["features"], lengths.cumsum(0).tolist()

    def packed(row: int) -> Tensor:
        return features[ends[row] - int(lengths[row]) : ends[row]]

    def masked(row: int) -> Tensor:
        return features[row : row + 1][0][told["mask"][row].bool()]

    read = masked if "mask" in told else packed
    _check_repeated(prompts, read, where)
    return prompts, lengths, read, width


def _prompts(told: Any, where: str) -> list[str]:
    if not isinstance(told, list) or not all(isinstance(prompt, str | int) for prompt in told):
        raise _unlike(where, "its prompts are no list of texts")
    return [str(prompt) for prompt in told]


def _check_repeated(prompts: Sequence[str], read: Callable[[int], Tensor], where: str) -> None:
    """Raise `UserError` where rows of one prompt differ: either could be meant."""
    first: dict[str, int] = {}
    for row, prompt in enumerate(prompts):
        other = first.setdefault(prompt, row)
        if other != row and not torch.equal(read(other), read(row)):
            raise UserError(
                f"{where!r} has prompt {prompt[:60]!r} in rows {other} and {row} with features that differ; keep one "
                "row of each prompt"
            )


def _lengths(told: Mapping[str, Any], where: str) -> tuple[Tensor, int]:
    """Tokens of each prompt (N,), and the width of features."""
    features, kind = told.get("features"), "mask" if "mask" in told else "lengths"
    if features is None or kind not in told:
        raise _unlike(where, f"it has {', '.join(sorted(told)) or 'nothing'}")
    shape = tuple(features.get_shape() if hasattr(features, "get_shape") else features.shape)
    rest = told[kind]
    _check_numbers(kind, rest, where)
    lengths = rest.long() if kind == "lengths" else rest.bool().sum(-1)
    fits = {
        # Python's sum, which does not wrap.
        "lengths": len(shape) == 2 and rest.ndim == 1 and sum(lengths.tolist()) == shape[0],
        "mask": len(shape) == 3 and rest.shape == shape[:2],
    }
    if not fits[kind]:
        raise _unlike(where, f"its features are {shape} and its {kind} {tuple(rest.shape)}")
    if not len(lengths) or int(lengths.min()) < 1:
        raise _unlike(where, "it has no prompt, or one without a token")
    dtype = features[:0].dtype  # reads nothing
    if not dtype.is_floating_point:
        raise _unlike(where, f"the dtype of its features is {_name(dtype)}, not floating-point")
    return lengths, shape[-1]


def _check_numbers(kind: str, rest: Tensor, where: str) -> None:
    """Raise `UserError` for lengths that are no whole numbers, and for a mask that is meant to be added."""
    if rest.is_complex():
        raise _unlike(where, f"the dtype of its {kind} is {_name(rest.dtype)}, not real")
    if kind == "lengths" and not torch.equal(rest.long().double(), rest.double()):
        raise _unlike(where, "its lengths are no whole numbers")
    if kind == "mask" and rest.is_floating_point() and not bool(rest.float().isfinite().all()):
        raise _unlike(
            where, "its mask has NaN or infinity, where a prompt's own tokens have 1 and padding has 0"
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _unlike(where: str, why: str) -> UserError:
    return UserError(
        f"{where!r} holds no embeddings: {why}; it takes features (tokens of all prompts, D) with lengths (N,), or "
        "features (N, T, D) with mask (N, T), as varkit embed writes"
    )
