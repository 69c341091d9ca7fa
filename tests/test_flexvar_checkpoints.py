"""FlexVAR's published files: told apart, read, written, and refused where they cannot say what a model is."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from varkit.errors import UserError
from varkit.generators.conditioning import ClassConfig
from varkit.generators.flexvar import FlexVARConfig
from varkit.heads.categorical import CategoricalConfig
from varkit.hub import flexvar
from varkit.hub.pipeline import Pipeline
from varkit.hub.published import pipeline_from_published, save_published
from varkit.hub.released import RELEASED
from varkit.plans.flexible import PUBLISHED, FlexibleScalesConfig
from varkit.tokenizers.conv import ConvConfig
from varkit.tokenizers.map_vq import MapVQConfig

CONV = ConvConfig(channels=32, multipliers=(1, 2), latent_channels=16, groups=32)


def published() -> Pipeline:
    """Random weights in the published layout, and its settings; pictures of 32 x 32 pixels."""
    configs = {
        "tokenizer": MapVQConfig(CONV, 24, 8),
        "generator": FlexVARConfig.published(2, width=64, heads=2, code_width=8, condition=ClassConfig(5)),
        "head": CategoricalConfig(64, 24),
        "plan": FlexibleScalesConfig(PUBLISHED[10]),
    }
    torch.manual_seed(0)
    parts = {name: config.build() for name, config in configs.items()}
    torch.nn.init.normal_(parts["head"].out.weight)
    return Pipeline(parts, configs, flexvar.SETTINGS)


def test_files_there_and_back_are_the_same_model(tmp_path: Path):
    made = published()
    files = save_published(made, tmp_path / "files")
    assert [file.name for file in files] == ["FlexVAE.pth", "FlexVARd2.pth"]
    again = pipeline_from_published(list(reversed(files)))
    for name in ("tokenizer", "generator", "head"):
        ours, theirs = made.parts[name].state_dict(), again.parts[name].state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert again.settings == flexvar.SETTINGS
    assert again.schedule.sides[-1] == (16, 16) and not any(again.configs["plan"].unseen())
    pictures = (p.generate([1], seed=3) for p in (made, again))
    assert len({picture[0].tobytes() for picture in pictures}) == 1


def test_a_trainers_checkpoint_and_a_mask_of_any_length_are_read(tmp_path: Path):
    made = published()
    tokenizer, generator = save_published(made, tmp_path / "files")
    state = torch.load(generator, weights_only=True)
    assert state["pos_1LC"].shape == (1, 64, 32, 32)
    assert not any(name.startswith("lvl") for name in state)
    state["attn_bias_for_masking"] = torch.zeros(1, 1, 688, 688)
    nested = tmp_path / "nested.pth"
    torch.save({"trainer": {"var_wo_ddp": state}}, nested)
    again = pipeline_from_published([tokenizer, nested])
    assert torch.equal(again.generator.position, made.generator.position)


def test_what_the_layout_cannot_say_is_refused(tmp_path: Path):
    made = published()
    made.configs["generator"] = replace(made.configs["generator"], norm_eps=1e-3)
    with pytest.raises(UserError, match="norm_eps"):
        save_published(made, tmp_path / "no")
    tokenizer, generator = save_published(published(), tmp_path / "files")
    state = torch.load(generator, weights_only=True)
    state["word_embed.weight"] = torch.zeros(64, 9)
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(UserError, match="code width is 8 and the generator's is 9"):
        pipeline_from_published([tokenizer, tmp_path / "other.pth"])


def test_released_sizes_have_names():
    variants = RELEASED["jiaosiyu1999/FlexVAR"].variants
    assert variants["flexvar_d24"] == ("FlexVAE.pth", "FlexVARd24-epo349.pth")
