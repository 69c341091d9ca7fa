"""`varkit convert`: published checkpoints to a model folder, and back."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from varkit.errors import UserError, unknown_name
from varkit.files import ensure_new_folder

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Convert:
    """Turn published checkpoints (VAR, LlamaGen, Infinity, MAR, ...) into a model folder, or a folder into them."""

    checkpoints: Positional[tuple[Path, ...]]
    """The files of the tokenizer and the generator, in any order, or a trainer checkpoint of both; a folder stands for
    the files in it, such as all shards of one. With --to published, a model folder."""
    out: Path
    """The new folder."""
    to: Literal["varkit", "published"] = "varkit"
    """The layout to write."""
    dtype: str | None = None
    """Store the weights as float32, bfloat16 or float16 (codes stay as they are); by default all stay as they are."""

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in DTYPES:
            raise unknown_name("dtype", self.dtype, DTYPES)

    def run(self) -> None:
        """Write the folder and print what was written."""
        if not self.checkpoints:
            raise UserError("no checkpoint is given; write: varkit convert --out DIR TOKENIZER GENERATOR")
        ensure_new_folder(self.out)

        from varkit.hub.published import pipeline_from_published, save_published

        if self.to == "varkit":
            pipeline_from_published(self.checkpoints, self.dtype).save(self.out)
            print(self.out)
            return

        from varkit.hub.pipeline import load

        if len(self.checkpoints) > 1:
            raise UserError(
                f"{len(self.checkpoints)} models were given; --to published takes one model folder"
            )
        for file in save_published(load(self.checkpoints[0], self.dtype), self.out):
            print(file)
