"""State dicts: reading checkpoint files safely, and loading them into modules with errors a person can act on.

Files are memory-mapped, and modules are built without memory for their parameters, which the file's own tensors
then become: loading costs about the size of the file, once. Where weights change their dtype on the way they are read
one by one instead (`varkit.hub.tensor_file`), so that the file's pages do not count beside what is made of them.
"""

import argparse
import difflib
import itertools
import pickletools
import re
import threading
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode
from torch.serialization import MAGIC_NUMBER

from varkit.errors import UserError
from varkit.files import StrPath, atomic_write
from varkit.hub.tensor_file import as_safetensors, check_file, read_as

State = dict[str, Tensor]
M = TypeVar("M")

LISTED = 5
"""Problems that an error names before it only counts."""

PICKLE_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")


def read_safetensors(path: StrPath) -> State:
    """Tensors of a safetensors file, memory-mapped."""
    with as_safetensors(path):
        return load_file(path)


def write_safetensors(path: StrPath, state: Mapping[str, Tensor]) -> None:
    """Write tensors at their own dtypes, atomically."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    with atomic_write(path) as part:
        save_file(plain, part, metadata={"format": "pt"})
        part.chmod(0o644)  # the library makes files that only their owner can read


def read_checkpoint(path: StrPath, mapped: bool = True) -> dict[str, Any]:
    """A published checkpoint, safetensors or pickled; of pickles only tensors and plain containers are unpacked, and
    `argparse.Namespace`, a container too, in which many trainers keep their arguments.

    Not `mapped`, each tensor has memory of its own, which is free again once it was cast.
    """
    suffix = Path(path).suffix
    if suffix == ".safetensors":
        return dict(read_safetensors(path) if mapped else read_as(path, {}))
    if suffix not in PICKLE_SUFFIXES:
        allowed = ", ".join((".safetensors", *PICKLE_SUFFIXES))
        raise UserError(f"{str(path)!r} ends in {suffix!r}; a checkpoint ends in one of {allowed}")
    check_file(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            # Such a file is read all the same, or refused below.
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            loaded = torch.load(
                path, map_location="cpu", weights_only=True, mmap=mapped and zipfile.is_zipfile(path)
            )
    except (PermissionError, MemoryError):
        raise
    except Exception as error:  # damage shows as many kinds
        refused, plain = re.search(r"GLOBAL ([\w.]+)", str(error)), plain_pickle(path)
        if code := [refused[1]] if refused else plain:
            raise UserError(
                f"{str(path)!r} holds more than tensors ({code[0]}); code in checkpoints is never run: save its state "
                "dict alone, with torch.save"
            ) from error
        if plain is not None:
            raise UserError(
                f"{str(path)!r} is a plain pickle and no checkpoint; save a state dict, with torch.save"
            ) from error
        raise UserError(f"{str(path)!r} is damaged or no checkpoint; fetch or save it again") from error
    if not isinstance(loaded, dict):
        raise UserError(f"{str(path)!r} holds a {type(loaded).__name__}; a checkpoint is a dict of tensors")
    return loaded


def plain_pickle(path: StrPath) -> list[str] | None:
    """What code a file of Python's own `pickle` names, if it is one; nothing is executed.

    torch's old format begins with a pickle too, of one number; such a file is damaged if it could not be read.
    """
    named: list[str] = []
    strings: list[str] = []
    try:
        if zipfile.is_zipfile(path):
            return None
        with open(path, "rb") as file:
            for code, value, _ in pickletools.genops(file):
                cut_zip = code.name == "PERSID"  # "P", with which a zip file begins
                if value == MAGIC_NUMBER or cut_zip:
                    return None
                if code.name in ("GLOBAL", "INST"):
                    named.append(str(value).replace(" ", "."))
                elif code.name == "STACK_GLOBAL":
                    named.append(".".join(strings[-2:]) or "code")
                elif isinstance(value, str):
                    strings.append(value)
    except Exception:  # whatever its bytes were taken for, it is no pickle
        return None
    return named


def unwrapped(checkpoint: Mapping[str, Any], wrappers: Sequence[str]) -> Mapping[str, Any]:
    """What a checkpoint has under the first of these names, or the checkpoint as it is."""
    for wrapper in wrappers:
        if isinstance(checkpoint.get(wrapper), Mapping):
            return checkpoint[wrapper]
    return checkpoint


class _NoInitialisation(TorchFunctionMode):
    """Skips initialisers: what has no memory draws nothing, and on the meta device they import a compiler (a
    second).
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        name, home = getattr(function, "__name__", ""), getattr(function, "__module__", "")
        if home == "torch.nn.init" or name in ("normal_", "uniform_"):
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


def build_empty(build: Callable[[], M]) -> M:
    """What `build` makes, with every module parameter on the meta device; buffers are real, so none is ever missing."""
    me = threading.get_ident()

    def without_memory(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or threading.get_ident() != me:
            return parameter
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    hook = register_module_parameter_registration_hook(without_memory)  # type: ignore[arg-type]
    try:
        with _NoInitialisation():
            return build()
    finally:
        hook.remove()


def load_state(module: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Make `state` the parameters and buffers of `module`, at their own dtype and without a copy.

    Raises `UserError` that names missing, unexpected and misshapen tensors, with the nearest names.
    """
    check_state(module.state_dict(), state, where)
    module.load_state_dict(dict(state), strict=True, assign=True)


def check_state(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], where: str) -> None:
    """Raise `UserError` unless both have the same names with the same shapes."""
    missing = [name for name in expected if name not in state]
    extra = [name for name in state if name not in expected]
    misshapen = [n for n in expected if n in state and state[n].shape != expected[n].shape]
    if not missing and not extra and not misshapen:
        return
    problems = itertools.chain(  # lazy: the search for near names takes long
        (f"missing {_named(n, expected)}{_near(n, extra, state)}" for n in missing),
        (f"unexpected {_named(n, state)}{_near(n, missing, expected)}" for n in extra),
        (f"{_named(n, state)} should be {tuple(expected[n].shape)}" for n in misshapen),
    )
    listed = "; ".join(itertools.islice(problems, LISTED))
    rest = len(missing) + len(extra) + len(misshapen) - LISTED
    more = f"; and {rest} more" if rest > 0 else ""
    raise UserError(
        f"{where} does not fit its configuration: {listed}{more}; check that both belong to one model"
    )


def _named(name: str, state: Mapping[str, Tensor]) -> str:
    return f"{name} {tuple(state[name].shape)}"


def _near(name: str, others: list[str], state: Mapping[str, Tensor]) -> str:
    near = difflib.get_close_matches(name, others, n=1, cutoff=0.6)
    return f" (nearest: {_named(near[0], state)})" if near else ""
