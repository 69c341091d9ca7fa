"""Where a command's model gets features of words from: the options for it."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from varkit.errors import UserError

if TYPE_CHECKING:
    from varkit.hub.embeddings import Embeddings
    from varkit.hub.pipeline import Pipeline


@dataclass(frozen=True, kw_only=True)
class Words:
    """A text encoder, or a file of what one gave."""

    text_encoder: str | None = None
    """For a model that takes features of words: a folder, or name on the Hugging Face hub, of a T5 or CLIP. It computes
    in the dtype and on the device that the command is given, else as it was saved and on the CPU."""
    embeddings: Path | None = None
    """In place of a text encoder: a file made by varkit embed. Where many prompts are drawn and none is given, all
    prompts in it are."""
    clean_prompts: bool = False
    """Clean what the text encoder reads, as the captions that LlamaGen was trained on."""

    def check_words(self) -> None:
        """Raise `UserError` for options that exclude each other."""
        if self.text_encoder is not None and self.embeddings is not None:
            raise UserError("--text-encoder and --embeddings were given; give one of them")
        if self.clean_prompts and self.text_encoder is None:
            raise UserError(
                "--clean-prompts is for what a text encoder reads; give --text-encoder, or clean in varkit embed"
            )

    def with_words(self, pipeline: "Pipeline", dtype: str | None = None, device: str = "auto") -> "Pipeline":
        """The model, reading words as the options ask for: a text encoder in the command's dtype and on its device.

        Without a dtype it keeps the one it is stored in. With "auto" it stays on the CPU: its features are those of
        varkit embed, and a GPU's memory is the model's.
        """
        if self.embeddings is not None:
            return pipeline.with_text(self.stored)
        if self.text_encoder is None:
            return pipeline
        from varkit.devices import AUTO, find_device
        from varkit.hub.text_encoders import PretrainedEncoder

        encoder = PretrainedEncoder.load(self.text_encoder, dtype, self.clean_prompts)
        return pipeline.with_text(encoder if device == AUTO else encoder.to(find_device(device)))

    @cached_property
    def stored(self) -> "Embeddings":
        """The file of embeddings. Raises `UserError` where it has a prompt twice: either row could be meant."""
        from varkit.hub.embeddings import Embeddings

        assert self.embeddings is not None
        read = Embeddings.load(self.embeddings)
        if len(read.rows) < len(read.lengths):
            taken = set(read.rows.values())
            again = next(row for row in range(len(read.lengths)) if row not in taken)
            raise UserError(
                f"{str(self.embeddings)!r} has {len(read.lengths)} prompts of which {len(read.rows)} differ: row "
                f"{again} is there once more; keep one row of each prompt"
            )
        return read
