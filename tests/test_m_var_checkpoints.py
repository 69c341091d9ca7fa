"""Published M-VAR checkpoints: reference cases of the published code, files both ways, released names."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.models import CODE_WIDTH, CODES, SCHEDULE
from varkit.errors import UserError
from varkit.generators.conditioning import ClassConfig
from varkit.generators.m_var import MVarConfig
from varkit.heads.categorical import CategoricalConfig
from varkit.hub import fill
from varkit.hub.pipeline import Pipeline, Settings, load
from varkit.hub.published import pipeline_from_published, save_published
from varkit.hub.verify import Case, verify_case
from varkit.nn.mamba import Mamba2Config
from varkit.plans.scales import ScalesConfig
from varkit.tokenizers.conv import ConvConfig
from varkit.tokenizers.multiscale_vq import MultiScaleVQConfig

REFERENCE = Path(__file__).parent / "reference"


def tiny(seed: int = 0, **changes) -> Pipeline:
    """A class model of two blocks."""
    conv = ConvConfig(8, (1, 2), res_blocks=1, latent_channels=8)
    settings = {
        "width": 32,
        "heads": 4,
        "code_width": CODE_WIDTH,
        "condition": ClassConfig(3),
        "cosine": True,
    }
    scan = Mamba2Config(state=8, head_width=16)
    configs = {
        "tokenizer": MultiScaleVQConfig(conv, CODES, CODE_WIDTH, SCHEDULE),
        "generator": MVarConfig.published(2, SCHEDULE, **(settings | {"scan": scan} | changes)),
        "head": CategoricalConfig(32, CODES),
        "plan": ScalesConfig(SCHEDULE, history=0),
    }
    torch.manual_seed(seed)
    parts = {name: config.build() for name, config in configs.items()}
    return Pipeline(parts, configs, Settings(guidance=2.0), {"data": "none"})


def outcome(path: Path) -> dict[str, bool]:
    return {row.array: row.passed for row in verify_case(Case.open(path))}


@pytest.mark.parametrize("name", ["m_var_tiny", "m_var_tiny_nol2"])
def test_tiny_cases_pass_and_every_array_is_used(name: str) -> None:
    rows = verify_case(Case.open(REFERENCE / f"{name}.json"))
    assert all(row.passed for row in rows), rows
    with np.load(REFERENCE / f"{name}.npz") as arrays:
        assert {row.array for row in rows} == set(arrays)
    assert {r.array for r in rows if r.role == "input"} == {"labels", "infer_labels", "mamba_input"}


@pytest.mark.slow
def test_released_size_passes() -> None:
    assert all(outcome(REFERENCE / "m_var_d16_256.json").values())


@pytest.mark.parametrize(
    "key, first",
    [
        ("blocks.0.mamba.A_log", "mamba_state"),
        ("blocks.1.ada_lin.1.bias", "guided_logits"),
    ],
)
def test_a_wrong_weight_is_noticed(monkeypatch: pytest.MonkeyPatch, key: str, first: str) -> None:
    true = fill.fill_array
    monkeypatch.setattr(fill, "fill_array", lambda n, *rest: true(n, *rest) * (1.5 if n == key else 1))
    assert not outcome(REFERENCE / "m_var_tiny.json")[first]


def test_wrong_logits_of_decoding_are_noticed(tmp_path: Path) -> None:
    shutil.copy(REFERENCE / "m_var_tiny.json", tmp_path)
    with np.load(REFERENCE / "m_var_tiny.npz") as stored:
        arrays = dict(stored)
    arrays["guided_logits"].flat[-1] += 0.002
    np.savez(tmp_path / "m_var_tiny.npz", **arrays)
    assert [a for a, ok in outcome(tmp_path / "m_var_tiny.json").items() if not ok] == ["guided_logits"]


def test_written_keys_are_the_published_ones(tmp_path: Path) -> None:
    """Names, shapes and dtypes of a case, from a pipeline of that case's configuration."""
    case = json.loads((REFERENCE / "m_var_tiny.json").read_text())["generator_state"]
    config = MVarConfig.published(
        2, (1, 2, 3, 4), width=64, heads=4, code_width=8, condition=ClassConfig(10), cosine=True
    )
    conv = ConvConfig(32, (1, 1, 2, 2, 4), res_blocks=2, latent_channels=8)
    configs = {
        "tokenizer": MultiScaleVQConfig(conv, 64, 8, (1, 2, 3, 4)),
        "generator": config,
        "head": CategoricalConfig(64, 64),
        "plan": ScalesConfig((1, 2, 3, 4), history=0),
    }
    pipeline = Pipeline({n: c.build() for n, c in configs.items()}, configs, Settings())
    _, generator = save_published(pipeline, tmp_path / "out")
    written = torch.load(generator, weights_only=True)
    assert generator.name == "d2.pth"
    assert {n: [list(t.shape), str(t.dtype).removeprefix("torch.")] for n, t in written.items()} == case
    hidden = written["attn_bias_for_masking"][0, 0]
    assert hidden[1:5, 1:5].eq(0).all() and hidden[1:5, 5:].isinf().all() and hidden[1:5, 0].isinf().all()
    assert written["blocks.1.attn.patch_nums"].tolist() == [1, 4, 9, 16]


def test_there_and_back_is_the_same_model(tmp_path: Path) -> None:
    pipeline = tiny()
    files = save_published(pipeline, tmp_path / "out")
    found = pipeline_from_published(files[::-1])
    own = replace(pipeline.configs["generator"], drop_path=found.configs["generator"].drop_path)
    assert found.configs["generator"] == own and found.configs["plan"] == pipeline.configs["plan"]
    for name in ("tokenizer", "generator", "head"):
        theirs = found.parts[name].state_dict()
        assert all(torch.equal(t, theirs[n]) for n, t in pipeline.parts[name].state_dict().items())
    assert found.settings == Settings(guidance=2.5, ramp=True, top_k=900, top_p=0.96)
    assert load(tmp_path / "out").generate([1], seed=0)[0].size == found.size[::-1]


def test_what_the_layout_cannot_say_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="heads of the generator is 4, which would be read back as 1"):
        save_published(tiny(cosine=False), tmp_path / "out")
    seeing = tiny()
    seeing.configs["plan"] = ScalesConfig(SCHEDULE)
    with pytest.raises(UserError, match="history of the plan is None, which would be read back as 0"):
        save_published(seeing, tmp_path / "out")


def test_released_settings_have_the_papers_sizes() -> None:
    """27 C^2 a layer, beside tables: the sheet's 464M, 900M and 1.5B, and 3.0B for depth 30."""
    from varkit.hub.states import build_empty

    for depth, millions in ((16, 464), (20, 900), (24, 1550), (30, 3020)):
        config = MVarConfig.published(depth, (1, 2, 3, 4, 5, 6, 8, 10, 13, 16))
        generator = build_empty(config.build)
        blocks = sum(p.numel() for p in generator.blocks.parameters()) / 1e6  # type: ignore[attr-defined]
        assert blocks == pytest.approx(27 * depth * (64 * depth) ** 2 / 1e6, rel=0.01)
        assert sum(p.numel() for p in generator.parameters()) / 1e6 == pytest.approx(millions, rel=0.03)
        assert config.cosine == (depth > 20)
