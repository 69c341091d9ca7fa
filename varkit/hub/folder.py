"""A pipeline folder: config.json, and one safetensors file for each part that has weights.

    {"format_version": 1, "varkit": "0.1.0",
     "parts": {"generator": {"type": "VAR", "config": {...}}, "plan": {"type": "scales", "config": {...}}, ...},
     "compute_dtype": "float32", "defaults": {...}, "about": {...}}

Everything but the first three entries is the caller's. Weights keep the dtype they were saved with, or with
"compute_dtype" are brought to that one.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from varkit import __version__
from varkit.errors import UserError, unknown_name
from varkit.files import StrPath, atomic_folder, write_json
from varkit.hub.config import from_json, to_json
from varkit.hub.fit import NEEDED, check_fit
from varkit.hub.offload import stream
from varkit.hub.registry import config_type, type_name
from varkit.hub.states import build_empty, load_state, read_safetensors, write_safetensors
from varkit.hub.tensor_file import read_as

FORMAT_VERSION = 1
CONFIG = "config.json"
PLAN = "plan"
_OURS = ("format_version", "varkit", "parts")
SMALL = 2**26
"""Numbers that any part may ask for: what is wrong with it is told better by the names in its file."""

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}


@dataclass(frozen=True)
class Parts:
    """What a folder holds, by part name: `built` modules (in eval mode) and plans, their `configs`, and the `rest`."""

    built: dict[str, Any]
    configs: dict[str, Any]
    rest: dict[str, Any] = field(default_factory=dict)


def save_parts(
    folder: StrPath,
    parts: Mapping[str, tuple[Any, Any]],
    rest: Mapping[str, Any] | None = None,
    replace: bool = False,
    dtype: torch.dtype | None = None,
) -> None:
    """Write {name: (module or plan, config)} and the caller's `rest` (JSON values) as one folder, atomically.

    Floating-point weights are written as `dtype`, or as they are. A folder that has files is refused unless `replace`.
    """
    rest = dict(rest or {})
    assert not set(rest) & set(_OURS), f"{_OURS} are the folder's own"
    entries = {
        name: {"type": type_name(config), "config": to_json(config)} for name, (_, config) in parts.items()
    }
    whole = {"format_version": FORMAT_VERSION, "varkit": __version__, "parts": entries, **rest}
    with atomic_folder(folder, replace=replace) as building:
        for name, (built, _) in parts.items():
            if isinstance(built, nn.Module):
                state = built.state_dict()
                if dtype is not None:
                    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
                write_safetensors(building / f"{name}.safetensors", state)
        write_json(building / CONFIG, whole)


def load_parts(folder: StrPath, dtype: str | None = None, offload: str | None = None) -> Parts:
    """Read what `save_parts` wrote: memory-mapped, or cast to `dtype`; `offload` streams the generator's blocks.

    Every problem is a `UserError`.
    """
    root = Path(folder)
    whole = _read_config(root)
    dtype = dtype or whole.get("compute_dtype")
    if dtype is not None and dtype not in DTYPES:
        raise unknown_name("dtype", str(dtype), DTYPES, f"(for {str(root / CONFIG)!r})")
    configs = {name: _part_config(root, name, entry) for name, entry in whole["parts"].items()}
    built = {
        name: _module(config, root, name, dtype, offload if name == "generator" else None)
        for name, config in configs.items()
        if name != PLAN
    }
    if set(NEEDED) <= set(configs):
        check_fit(configs, repr(str(root / CONFIG)))
    if PLAN in configs:  # last, since one that does not fit may be of any size
        built[PLAN] = build_empty(configs[PLAN].build)
    rest = {k: v for k, v in whole.items() if k not in _OURS}
    return Parts({name: built[name] for name in configs}, configs, rest)


def _module(config: Any, root: Path, name: str, dtype: str | None, offload: str | None) -> Any:
    """What a configuration builds, in eval mode and, if it has weights, with those of its file."""
    file = root / f"{name}.safetensors"
    with _Bounded(file) as bounds:
        try:
            part = build_empty(config.build)
        except _TooLarge as error:
            read_safetensors(file)  # raises for one that is damaged
            size, value = max(_integers(to_json(config)), key=lambda pair: pair[1])
            raise UserError(
                f"{str(root / CONFIG)!r}: parts.{name}.config asks for more weights than {file.name} holds: its "
                f"largest size is {size}, {value}, and the file has {bounds.size} bytes; check that both belong to "
                "one model"
            ) from error
    if isinstance(part, nn.Module):
        if dtype is not None:
            part.to(DTYPES[dtype])  # parameters have no memory yet
        _fill(part, file, dtype is not None, offload)
        part.eval()
    return part


class _TooLarge(Exception):
    """A part would have more weights than its file."""


class _Bounded(TorchFunctionMode):
    """Raises `_TooLarge` once a module being built has asked for more numbers than its file has bytes, and `SMALL`.

    Each parameter is an allocation before `build_empty` takes its memory away, which fails for terabytes with an error
    of torch's, and takes forever for a billion blocks. linspace: rates, one a block.
    """

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.size = file.stat().st_size if file.is_file() else 0
        self.left = max(SMALL, self.size)

    def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if function in (torch.empty, torch.randn, torch.linspace):
            sizes = args[2:] if function is torch.linspace else args
            self.left -= math.prod(
                n for size in sizes for n in (size if isinstance(size, tuple | list) else (size,))
            )
            if self.left < 0:
                raise _TooLarge
        return function(*args, **(kwargs or {}))


def _integers(value: Any, name: str = "") -> Iterator[tuple[str, int]]:
    """The integers of JSON values, each by the name of the field it stands in."""
    if type(value) is int:
        yield name, value
    elif isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else ((name, inner) for inner in value)
        for inner_name, inner in items:
            yield from _integers(inner, inner_name)


def _fill(part: nn.Module, file: Path, cast: bool, offload: str | None) -> None:
    dtypes = {name: tensor.dtype for name, tensor in part.state_dict().items()} if cast else {}
    if offload is not None:
        stream(part, file, dtypes, offload)
    else:
        load_state(part, read_as(file, dtypes) if cast else read_safetensors(file), repr(str(file)))


def _part_config(root: Path, name: str, entry: Any) -> Any:
    where = f"parts.{name}"
    file = repr(str(root / CONFIG))
    if not re.fullmatch("[a-z][a-z0-9_]*", name):  # it becomes a file name: no way out of the folder
        raise UserError(f"{file} has a part named {name!r}; names are lower-case letters, digits and _")
    if not isinstance(entry, dict) or not isinstance(entry.get("type"), str) or "config" not in entry:
        raise UserError(f'{file}: {where} must be an object with "type" and "config"; save the model again')
    try:
        return from_json(entry["config"], config_type(entry["type"]), f"{where}.config")
    except UserError as error:
        raise UserError(f"{file}: {error}") from error


def _read_config(root: Path) -> dict[str, Any]:
    file = root / CONFIG
    if not root.is_dir():
        raise UserError(f"there is no folder {str(root)!r}; give the folder of a saved model")
    if not file.is_file():
        raise UserError(f"the folder {str(root)!r} has no {CONFIG}; give the folder of a saved model")
    try:
        whole = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{str(file)!r} is not JSON ({error}); save the model again") from error
    if (
        not isinstance(whole, dict)
        or "format_version" not in whole
        or not isinstance(whole.get("parts"), dict)
    ):
        has = ", ".join(list(whole)[:5]) if isinstance(whole, dict) else type(whole).__name__
        raise UserError(
            f'{str(file)!r} is not a varkit model: it has {has or "nothing"}, but not "format_version" and "parts"; '
            "published checkpoints are converted with `varkit convert`"
        )
    version = whole["format_version"]
    if type(version) is not int or version < 1:
        raise UserError(
            f"{str(file)!r} has format_version {version!r}; it must be an integer from 1 to {FORMAT_VERSION}"
        )
    if version > FORMAT_VERSION:
        raise UserError(
            f"{str(file)!r} has format_version {version}, newer than this varkit ({__version__}) reads "
            f"({FORMAT_VERSION}); upgrade varkit"
        )
    return whole
