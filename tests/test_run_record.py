"""What the record of a run knows a model by (every weight of it, however it is opened), and features of words."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import text_models
from tests.contracts import CASES
from tests.text_models import LONG, PROMPTS, SHORT
from varkit.cli.main import main
from varkit.cli.run_record import model_digest
from varkit.hub.embeddings import save_embeddings
from varkit.hub.offload import PLACES
from varkit.hub.pipeline import Settings, load
from varkit.hub.text_encoders import PretrainedEncoder

t5, features_model = text_models.t5, text_models.features_model

STACKED = [name for name, case in CASES.items() if case.generator.build().stacks]  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["hmar-refined", "mar-text", "pixelcnn-class"])
def test_every_weight_counts(name: str):
    pipeline = CASES[name].pipeline(Settings())
    digests = [model_digest(pipeline)]
    for part in (pipeline.tokenizer, pipeline.generator, *pipeline.model.heads.values()):
        for weight in part.parameters():
            with torch.no_grad():
                weight += 1
            digests.append(model_digest(pipeline))
    assert len(digests) > 10 and len(set(digests)) == len(digests)


@pytest.mark.parametrize("name", CASES)
def test_a_model_is_itself_however_it_is_opened(name: str, tmp_path: Path):
    CASES[name].pipeline(Settings()).save(tmp_path / "model")
    opened = [
        load(tmp_path / "model"),
        load(tmp_path / "model").packed(),
        load(tmp_path / "model", "bfloat16"),
    ]
    if name in STACKED:
        opened += [load(tmp_path / "model", offload=place) for place in PLACES]
    assert len({model_digest(pipeline) for pipeline in opened}) == 1


@pytest.mark.parametrize("place", PLACES)
def test_every_offloaded_block_counts(place: str, tmp_path: Path):
    pipeline = CASES["var-text"].pipeline(Settings())
    digests = []
    for i, block in enumerate(pipeline.generator.blocks):  # type: ignore[arg-type]
        with torch.no_grad():
            next(block.parameters()).add_(1)
        pipeline.save(tmp_path / f"{i}")
        digests.append(model_digest(load(tmp_path / f"{i}", offload=place)))
    assert len(set(digests)) == len(digests) > 1


def test_features_of_another_source_are_not_gone_on_with(
    t5: Path,
    features_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """The same rows are the same features, in whatever file they are."""

    def resumed(option: str, source: str) -> str:
        words = ("generate", "--prompts", "prompts.txt", "--model", features_model, "--resume")
        code = main([str(word) for word in (*words, f"--{option}", source, "--out", option)])
        said = capsys.readouterr()
        assert (code == 2) == bool(said.err)
        return said.err

    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("\n".join(PROMPTS))
    encoder = PretrainedEncoder.load(t5)
    rows = {prompt: encoder.encode(prompt) for prompt in PROMPTS}
    save_embeddings("e.npz", rows)
    assert not resumed("embeddings", "e.npz")
    save_embeddings("other.safetensors", {"another": rows[SHORT]} | rows)
    assert not resumed("embeddings", "other.safetensors")
    changed = rows[LONG].clone()
    changed[-1] += 1
    save_embeddings("e.npz", rows | {LONG: changed})
    assert "are of another run (embeddings " in resumed("embeddings", "e.npz")

    shutil.copytree(t5, "here")
    assert not resumed("text_encoder", "here") and not resumed("text_encoder", str(t5))
    tokens = Path("here/tokenizer.json")
    tokens.write_text(tokens.read_text().replace("red", "RED"))
    assert "are of another run (text_encoder " in resumed("text_encoder", "here")
    for file in t5.iterdir():
        shutil.copy(file, "here")
    weights = load_file("here/model.safetensors")
    weights["encoder.final_layer_norm.weight"] *= 2
    save_file(weights, "here/model.safetensors", {"format": "pt"})
    assert "are of another run (text_encoder " in resumed("text_encoder", "here")
