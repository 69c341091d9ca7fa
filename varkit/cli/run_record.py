"""What a run of `varkit generate` was, beside its pictures, so that `--resume` never goes on with those of another run.

Shards and Ray's command write into one folder, each its own pictures, and the record of one is that of all: it holds
what fixes the pictures' bytes, not who draws which of them. Devices round differently, and are left out.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from varkit.errors import UserError
from varkit.files import write_json

if TYPE_CHECKING:
    from varkit.hub.pipeline import Pipeline

Facts = Mapping[str, Any]
OVER = "pictures"
"""A record's entry while pictures of another run may still lie among this one's."""

PROBED = 64
"""Numbers read of each tensor: enough to tell trainings apart, and quick for a model of any size."""


def model_digest(pipeline: "Pipeline") -> str:
    """A model by its configuration and some of its weights, wherever it lies: those that no offloading moves.

    They are rounded, so that a model is itself in any dtype, which a record has on its own.
    """
    from varkit.hub.config import to_json

    digest = hashlib.sha256(json.dumps({n: to_json(c) for n, c in pipeline.configs.items()}).encode())
    for part in (pipeline.tokenizer, *pipeline.model.heads.values()):
        for name, weight in sorted(part.state_dict().items()):
            some = weight.detach().flatten()[:PROBED].bfloat16().float().cpu()
            digest.update(name.encode() + some.numpy().tobytes())
    return digest.hexdigest()[:16]


def prompts_digest(prompts: Sequence[str | int]) -> str:
    """The prompts in their order."""
    return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()[:16]


def claim(record: Path, facts: Facts, pictures: Sequence[Path], resume: bool) -> Facts | None:
    """What the record has to become before the first picture is written; None where it is so already.

    Raises `UserError` for going on with those of another run; a folder without a record is taken as it is. A run that
    draws over another's marks the record until `settle`, since an interruption would leave a mixture.
    """
    told = _read(record)
    if told == facts:
        return None
    if told is None or not any(picture.exists() for picture in pictures):
        return facts
    if not resume:
        return {**facts, OVER: "of several runs"}
    other = [name for name in (*facts, OVER) if told.get(name) != facts.get(name)]
    values = ", ".join(f"{name} {told.get(name)}, not {facts.get(name, 'of one')}" for name in other)
    raise UserError(
        f"the pictures in {str(record.parent)!r} are of another run ({values}); leave out --resume to draw all anew, "
        "or choose another --out"
    )


def settle(record: Path, facts: Facts) -> None:
    """Say that every picture has been drawn by this run."""
    if _read(record) != facts:
        write_json(record, facts)


def _read(record: Path) -> dict[str, Any] | None:
    try:
        told = json.loads(record.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        told = None
    if not isinstance(told, dict):
        raise UserError(
            f"{str(record)!r} is not a record of varkit generate; remove it, or choose another --out"
        )
    return told
