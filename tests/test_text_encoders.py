"""T5 and CLIP through transformers: their features, captions cleaned for them, folders that hold no text encoder."""

import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from tests import text_models
from tests.text_models import LONG, PROMPTS, SHORT, WIDTH
from varkit.errors import UserError
from varkit.hub.captions import clean_caption
from varkit.hub.text_encoders import PretrainedEncoder

t5, clip = text_models.t5, text_models.clip


@pytest.fixture(params=["t5", "clip"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of an encoder's folder, to be damaged."""
    return Path(shutil.copytree(request.getfixturevalue(request.param), tmp_path / "encoder"))


@torch.no_grad()
def test_features_are_those_of_the_padded_batch(folder: Path):
    """As the published samplers have it: padded, masked, and cut to each prompt's own tokens."""
    encoder = PretrainedEncoder.load(folder)
    batch = encoder.tokenizer(PROMPTS, padding=True, return_tensors="pt")
    hidden = encoder.model(batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
    for row, mask, prompt in zip(hidden, batch.attention_mask, PROMPTS, strict=True):
        features = encoder.encode(prompt)
        assert features.shape == (encoder.count(prompt), WIDTH) and encoder.width == WIDTH
        assert torch.allclose(features, row[: int(mask.sum())], atol=1e-5)
    assert encoder.encode(LONG).std() > 0.1


def test_weights_keep_their_dtype_or_take_another(folder: Path):
    encoder = PretrainedEncoder.load(folder)
    assert encoder.encode(SHORT).dtype == torch.float32
    encoder.to(torch.bfloat16).model.save_pretrained(folder)
    exact = encoder.encode(SHORT)
    assert exact.dtype == PretrainedEncoder.load(folder).encode(SHORT).dtype == torch.bfloat16
    wide = PretrainedEncoder.load(folder, "float32").encode(SHORT)
    assert wide.dtype == torch.float32 and torch.allclose(wide, exact.float(), atol=0.1)
    with pytest.raises(UserError, match="unknown dtype 'half'; known: bfloat16"):
        PretrainedEncoder.load(folder, "half")


def test_a_t5_of_encoder_and_decoder_serves_too(t5: Path, tmp_path: Path):
    from transformers import T5Config, T5ForConditionalGeneration

    encoder = PretrainedEncoder.load(t5)
    whole = T5ForConditionalGeneration(T5Config.from_pretrained(t5))
    whole.load_state_dict(encoder.model.state_dict(), strict=False)
    whole.save_pretrained(tmp_path)
    encoder.tokenizer.save_pretrained(tmp_path)
    assert torch.equal(PretrainedEncoder.load(tmp_path).encode(LONG), encoder.encode(LONG))


def test_captions_are_cleaned_where_asked(t5: Path):
    plain, clean = PretrainedEncoder.load(t5), PretrainedEncoder.load(t5, clean=True)
    messy = "A RED <b>circle</b> https://example.com/x.png"
    assert torch.equal(clean.encode(messy), plain.encode("a red circle"))
    assert clean.count(messy) == plain.count("a red circle") < plain.count(messy)


def test_prompts_that_are_too_long(clip: Path):
    encoder = PretrainedEncoder.load(clip)
    with pytest.raises(UserError, match="tokens; this text encoder reads at most 44: shorten it"):
        encoder.count(LONG + " circle circle")


def test_features_that_overflow(t5: Path):
    encoder = PretrainedEncoder.load(t5)
    encoder.model.encoder.final_layer_norm.weight.data.fill_(float("inf"))
    with pytest.raises(UserError, match="overflow float32; load the text encoder in bfloat16"):
        encoder.encode(SHORT)


def test_folders_that_hold_no_text_encoder(folder: Path, tmp_path: Path):
    def refused(place: object) -> str:
        with pytest.raises(UserError) as error:
            PretrainedEncoder.load(str(place))
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "there is no text encoder in" in refused(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "could not be read" in refused(tmp_path / "empty")
    weights = folder / "model.safetensors"
    state = load_file(weights)
    gone = next(
        name for name in state if name.endswith("weight") and "norm" not in name and "shared" not in name
    )
    save_file({name: tensor for name, tensor in state.items() if name != gone}, weights, {"format": "pt"})
    assert "lacks 1 weights, such as" in refused(folder)
    weights.write_bytes(weights.read_bytes()[:200])
    assert "could not be read" in refused(folder)
    (folder / "config.json").write_text('{"model_type": "bert"}')
    assert "unknown kind of text encoder 'bert'" in refused(folder)


def test_names_are_fetched_into_the_hubs_cache_and_read_there(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked: list[list[str]] = []

    def snapshot_download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        if name != "google/t5":
            raise LocalEntryNotFoundError("no network\nat all")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    named, local = PretrainedEncoder.load("google/t5"), PretrainedEncoder.load(folder)
    assert torch.equal(named.encode(SHORT), local.encode(SHORT))
    assert len(asked) == 1 and "*.bin" not in asked[0]  # not in two formats
    with pytest.raises(UserError, match=r"'google/t6' could not be read \(no network\); give a folder"):
        PretrainedEncoder.load("google/t6")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="'google/t5' could not be read"):
        PretrainedEncoder.load("google/t5")
    assert "*.bin" in asked[-1]


def test_without_transformers(t5: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"run: pip install 'varkit\[text\]'"):
        PretrainedEncoder.load(t5)


def test_transformers_is_imported_by_whoever_loads_an_encoder_alone():
    script = (
        "import sys, varkit.hub.pipeline, varkit.hub.text_encoders, varkit.hub.embeddings\n"
        "assert 'transformers' not in sys.modules and 'ray' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("caption", "clean"),
    [
        ("Two Red Circles", "two red circles"),
        (
            "A photo of <b>Two Cats</b> &amp; a dog, see https://x.com/a?b=1 now!",
            "a photo of two cats a dog, see now!",
        ),
        ("\u201cSunset over the sea\u201d", "sunset over the sea"),
        ("sunset \u2014 oil on canvas 30 x 40", "sunset - oil on canvas"),
        ("the-big-red-old-house", "the big red old house"),
        ("IMG_2034.jpg a house, by @maker #12345", "a house, by"),
        ("\u732b cat", "cat"),
        ("a.cat,sits  on 3.5 mats", "a. cat, sits on 3.5 mats"),
        ("a sign that says 'stop'", "a sign that says 'stop"),
        ("free shipping! vase (blue) [new]", "! vase blue new"),
        ("", ""),
    ],
)
def test_cleaned_captions(caption: str, clean: str):
    assert clean_caption(caption) == clean
