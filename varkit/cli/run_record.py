"""What a run of `varkit generate` was, beside its pictures, so that `--resume` never goes on with those of another run.

Shards and Ray's command write into one folder, each its own pictures, and the record of one is that of all: it holds
what fixes the pictures' bytes, not who draws which of them. Devices round differently, and are left out.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from varkit.errors import UserError
from varkit.files import write_json

if TYPE_CHECKING:
    from torch import Tensor, nn

    from varkit.hub.pipeline import Pipeline
    from varkit.hub.prompts import TextSource

Facts = Mapping[str, Any]
OVER = "pictures"
"""A record's entry while pictures of another run may still lie among this one's."""

PROBED = 64
"""Numbers read of each tensor: enough to tell trainings apart, and quick for a model of any size."""

DIGITS = 16
"""Of a digest in hexadecimal: 64 bits, which a line of an error has room for."""


def model_digest(pipeline: "Pipeline") -> str:
    """A model by its configuration and some of each weight, wherever it lies and however it is laid out.

    They are rounded, so that a model is itself in any dtype, which a record has on its own.
    """
    from varkit.hub.config import to_json

    digest = hashlib.sha256(json.dumps({n: to_json(c) for n, c in pipeline.configs.items()}).encode())
    for part in (pipeline.tokenizer, pipeline.generator, *pipeline.model.heads.values()):
        digest.update(_some_of_each(part))
    return digest.hexdigest()[:DIGITS]


def words_digest(source: "TextSource", prompts: Sequence[str | int]) -> str:
    """What gives the features of prompts: a text encoder, or a file by the rows that it has of them.

    A text encoder is known by its configuration, dtype, some of each weight, and the tokens it makes of the prompts.
    Nothing is encoded for that: it takes long, and sums round differently on another number of threads.
    """
    from varkit.hub.text_encoders import PretrainedEncoder

    asked = [str(prompt) for prompt in dict.fromkeys(prompts)]
    digest = hashlib.sha256()
    if isinstance(source, PretrainedEncoder):
        config = {k: v for k, v in source.model.config.to_diff_dict().items() if k != "transformers_version"}
        tokens = [source.tokenizer(prompt, verbose=False).input_ids for prompt in asked]
        told = [config, str(source.model.dtype), tokens]
        digest.update(json.dumps(told, default=str).encode() + _some_of_each(source.model))
    else:
        for prompt in asked:  # some of each token, since the first token may be the same in all
            some = source.encode(prompt)[:, :PROBED].float().numpy()
            digest.update(f"{prompt} {some.shape}".encode() + some.tobytes())
    return digest.hexdigest()[:DIGITS]


def prompts_digest(prompts: Sequence[str | int]) -> str:
    """The prompts in their order."""
    return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()[:DIGITS]


def _some_of_each(part: "nn.Module") -> bytes:
    """The first numbers of each weight, as bfloat16, in the order of their names."""
    some = {}
    for name, weight in _weights(part):  # at once: the next offloaded block takes the memory of this one
        some[name] = weight.detach().flatten()[:PROBED].bfloat16().float().cpu().numpy().tobytes()
    return b"".join(name.encode() + some[name] for name in sorted(some))


def _weights(part: "nn.Module") -> Iterator[tuple[str, "Tensor"]]:
    """The state of a part by name. Offloaded blocks pass by once, which takes as long as in one step of drawing."""
    from varkit.hub.offload import Streamed

    children = dict(part.named_children())
    if not any(isinstance(child, Streamed) for child in children.values()):
        yield from part.state_dict().items()
        return
    yield from part.named_parameters(recurse=False)
    yield from part.named_buffers(recurse=False)
    for name, child in children.items():
        if isinstance(child, Streamed):
            for i, block in enumerate(child):
                yield from block.state_dict(prefix=f"{name}.{i}.").items()
        else:
            yield from child.state_dict(prefix=f"{name}.").items()


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
