"""Checkpoints in several files, as they are published: whether all of them were given.

A lost shard may hold a generator's last blocks alone, and what is left looks like a smaller model, so names are checked
rather than weights: `pytorch_model-00001-of-00002.bin` tells how many there are, and an index beside them which.
"""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from varkit.errors import UserError
from varkit.files import StrPath

NAME = re.compile(r"(?P<stem>.*-)(?P<number>\d+)(?P<of>-of-(?P<total>\d+).*)")
INDEX = "*.index.json"
MOST = 10_000
"""Shards that a name may ask for; a damaged one could ask for more than can be listed."""


def check_complete(paths: Sequence[StrPath]) -> None:
    """Raise `UserError` that names a shard which belongs to the files given and is not among them."""
    given = [Path(path) for path in paths]
    for folder in dict.fromkeys(path.parent for path in given):
        names = [path.name for path in given if path.parent == folder]
        for name in (*_numbered(names), *_indexed(folder, names)):
            if name not in names:
                where = "was not given with" if (folder / name).is_file() else "is missing beside"
                raise UserError(
                    f"the shard {str(folder / name)!r} {where} {names[0]!r}; give all shards of the checkpoint, or its "
                    "folder"
                )


def told_name(path: StrPath) -> str:
    """A file's name, behind that of its folder if it is a shard, which by itself tells nothing of the model."""
    path = Path(path)
    shard = NAME.fullmatch(path.name) or path.stem in ("model", "pytorch_model")
    return "/".join(path.parts[-2:]) if shard else path.name


def _numbered(names: Iterable[str]) -> Iterable[str]:
    """All names of every series that one of these is in."""
    for found in filter(None, map(NAME.fullmatch, names)):
        digits, total = len(found["number"]), int(found["total"])
        if total > MOST:
            raise UserError(
                f"the name {found[0]!r} tells of {total} shards, more than {MOST}; rename the file"
            )
        for number in range(1, total + 1):
            yield f"{found['stem']}{number:0{digits}}{found['of']}"


def _indexed(folder: Path, names: Sequence[str]) -> Iterable[str]:
    """The files of every index in the folder that has one of these; an empty index says nothing."""
    for path in sorted(folder.glob(INDEX)):
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{str(path)!r} is damaged or no JSON; fetch it again, or remove it") from error
        weights = index.get("weight_map") if isinstance(index, dict) else None
        files = sorted(set(map(str, weights.values()))) if isinstance(weights, dict) else []
        if not set(files).isdisjoint(names):
            yield from files
