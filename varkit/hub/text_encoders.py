"""T5's encoder and CLIP's text tower, through transformers (extra `text`): words to the features that models read.

    model = varkit.load("infinity-2b").with_text(PretrainedEncoder.load("flan-t5-xl"))

The features are the last hidden states of a prompt's own tokens, the end token included. A prompt is encoded without
padding and without company, so neither changes it. Legend: T tokens, D features of a token.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from varkit.errors import UserError, unknown_name
from varkit.files import StrPath
from varkit.hub.captions import clean_caption
from varkit.hub.fetch import NotFetched, fetched, first_words
from varkit.hub.folder import DTYPES

CLASSES = {"t5": "T5EncoderModel", "clip": "CLIPTextModel", "clip_text_model": "CLIPTextModel"}
"""transformers' class for each `model_type`."""


FILES = ("*.json", "*.txt", "*.model", "*.safetensors")
"""Configuration, tokenizer and weights, without the copies for other frameworks that a repository may have."""


class PretrainedEncoder:
    """A text encoder: a `TextSource`. clean: prompts are cleaned first, as LlamaGen's were (`clean_caption`)."""

    def __init__(self, model: Any, tokenizer: Any, clean: bool = False) -> None:
        self.model, self.tokenizer, self.clean = model.eval(), tokenizer, clean
        self.width: int = model.config.hidden_size
        self.length: int | None = getattr(model.config, "max_position_embeddings", None)

    @classmethod
    def load(
        cls, name_or_folder: StrPath, dtype: str | None = None, clean: bool = False
    ) -> "PretrainedEncoder":
        """From a folder as transformers saves it, or a name on the Hugging Face hub (which alone uses the network).

        dtype: that of its weights ("bfloat16", ...), by default the one they are stored in. Raises `UserError` for a
        model that is neither T5 nor CLIP, and for files that are missing or do not fit.
        """
        if dtype is not None and dtype not in DTYPES:
            raise unknown_name("dtype", dtype, DTYPES)
        name = os.fspath(name_or_folder)
        transformers = _transformers()
        try:
            with _silent(transformers.utils.logging):
                return cls(*_read(transformers, _folder(name), dtype or "auto"), clean)
        except UserError:
            raise
        except (NotFetched, OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            why = first_words(error)
            raise UserError(
                f"text encoder {name!r} could not be read ({why}); give a folder with config.json, tokenizer and "
                "weights as transformers saves them, or the name of one on the Hugging Face hub"
            ) from error

    def to(self, *args: Any, **kwargs: Any) -> "PretrainedEncoder":
        """Move or cast the weights, as `torch.nn.Module.to` does."""
        self.model.to(*args, **kwargs)
        return self

    def count(self, prompt: str) -> int:
        """Tokens of a prompt. Raises `UserError` for one that the encoder is too short for."""
        return len(self._ids(prompt))

    @torch.no_grad()
    def encode(self, prompt: str) -> Tensor:
        """Features (T, D) of a prompt, on the CPU, in the dtype of the weights."""
        ids = torch.tensor([self._ids(prompt)], device=self.model.device)
        features = self.model(input_ids=ids).last_hidden_state[0]
        if not bool(features.isfinite().all()):
            raise UserError(
                f"the features of {prompt[:60]!r} overflow {str(features.dtype).removeprefix('torch.')}; load the text "
                "encoder in bfloat16 or float32 (--dtype, or that of varkit embed)"
            )
        return features.cpu()

    def _ids(self, prompt: str) -> list[int]:
        ids = self.tokenizer(clean_caption(prompt) if self.clean else prompt, verbose=False).input_ids
        if self.length is not None and len(ids) > self.length:
            raise UserError(
                f"prompt {prompt[:60]!r} has {len(ids)} tokens; this text encoder reads at most {self.length}: shorten "
                "it"
            )
        return ids


def _folder(name: str) -> str:
    """A folder that is one already, or of the files that "model" or "owner/model" has on the hub."""
    if Path(name).is_dir():
        return name
    if name.count("/") > 1 or name.startswith((".", "/", "~")) or name.endswith("/"):
        raise UserError(f"there is no text encoder in {name!r}; check the path")
    folder = fetched(name, None, FILES)
    return folder if list(Path(folder).glob("*.safetensors")) else fetched(name, None, (*FILES, "*.bin"))


def _read(transformers: Any, name: str, dtype: str) -> tuple[Any, Any]:
    """The model and its tokenizer."""
    kind = transformers.AutoConfig.from_pretrained(name).model_type
    if kind not in CLASSES:
        raise unknown_name("kind of text encoder", kind, CLASSES, f"(in {name!r})")
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    model, report = getattr(transformers, CLASSES[kind]).from_pretrained(
        name, dtype=dtype, output_loading_info=True
    )
    if missing := sorted(report["missing_keys"]):  # transformers would go on with random ones
        raise UserError(
            f"text encoder {name!r} lacks {len(missing)} weights, such as {missing[0]}; fetch its files again"
        )
    return model, tokenizer


@contextmanager
def _silent(logging: Any) -> Iterator[None]:
    """transformers without its progress bars and advice, for the time being."""
    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _transformers() -> Any:
    try:
        return import_module("transformers")
    except ImportError as error:
        raise UserError(
            f"a text encoder needs transformers ({error}); run: pip install 'varkit[text]', or give embeddings "
            "computed elsewhere"
        ) from error
