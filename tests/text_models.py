"""Tiny models that read features of words, and tiny text encoders, all with random weights; nothing is downloaded."""

from pathlib import Path
from typing import Any

import pytest
import torch

from varkit.generators.infinity import InfinityConfig
from varkit.generators.llamagen import LlamaGenConfig
from varkit.generators.text import TextFeaturesConfig
from varkit.hub.pipeline import Pipeline, Settings
from varkit.tokenizers.bitwise import BitwiseConfig
from varkit.tokenizers.conv import ConvConfig
from varkit.tokenizers.vq import VQConfig

WIDTH, LENGTH = 32, 48
WORDS = ("a", "red", "blue", "circle", "square", "left", "of", "two")
SHORT, LONG = "a red circle", "two blue square left of a red circle a a blue square"
PROMPTS = [SHORT, LONG, "blue", "a blue square left of two red circle"]


def infinity(schedule: Any = (1, 2, 4), stages: int = 2) -> Pipeline:
    """A model of Infinity's kind that listens to its prompt; pictures are 8 x 8 by default."""
    multipliers = (1,) * (stages - 1) + (2,)
    conv = ConvConfig(8, multipliers, res_blocks=1, latent_channels=8, attention=False, groups=4)
    generator = InfinityConfig(2, WIDTH, 2, 8, TextFeaturesConfig(WIDTH, LENGTH), gate_init=1.0)
    return assembled(BitwiseConfig(conv, schedule), generator)


def llamagen() -> Pipeline:
    """A model of LlamaGen's kind, of pictures 8 x 8."""
    conv = ConvConfig(8, (1, 2), res_blocks=1, latent_channels=8, attention=False, groups=4)
    generator = LlamaGenConfig(2, WIDTH, 2, 16, TextFeaturesConfig(WIDTH, LENGTH))
    return assembled(VQConfig(conv, 16, 4, 4), generator)


def assembled(tokenizer: Any, generator: Any) -> Pipeline:
    """Parts with random weights, in which what is asked for and what is drawn matter."""
    configs = {"tokenizer": tokenizer, **generator.fitted(tokenizer)}
    torch.manual_seed(0)
    parts = {name: config.build() for name, config in configs.items()}
    for name in ("generator", "head"):
        for weight in parts[name].parameters():
            if weight.ndim > 1:
                torch.nn.init.normal_(weight, std=1.5 * weight.shape[-1] ** -0.5)
    return Pipeline(parts, configs, Settings(guidance=3.0), {})


def save_t5(folder: Path, width: int = WIDTH) -> Path:
    """A T5 encoder and its tokenizer, of `WORDS`, as transformers saves them."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -9.0)]
    pieces += [(f"\u2581{word}", -1.0) for word in WORDS]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0)
    torch.manual_seed(3)
    sizes = {"d_model": width, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
    T5EncoderModel(T5Config(vocab_size=len(pieces), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_clip(folder: Path, width: int = WIDTH) -> Path:
    """A CLIP text tower and its tokenizer, of `WORDS`, of prompts up to 44 tokens."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    letters = sorted(set("".join(WORDS)))
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: i for i, piece in enumerate(vocabulary)}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[])
    torch.manual_seed(4)
    sizes = {"hidden_size": width, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"bos_token_id": len(vocab) - 2, "eos_token_id": len(vocab) - 1}
    config = CLIPTextConfig(vocab_size=len(vocab), max_position_embeddings=44, **sizes, **ends)
    CLIPTextModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny T5."""
    return save_t5(tmp_path_factory.mktemp("encoders") / "t5")


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny CLIP."""
    return save_clip(tmp_path_factory.mktemp("encoders") / "clip")


@pytest.fixture(scope="session")
def features_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `infinity()`."""
    folder = tmp_path_factory.mktemp("models") / "features"
    infinity().save(folder)
    return folder
