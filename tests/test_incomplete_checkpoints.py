"""Published files of which a part is lost, or that do not belong together, though their shapes fit."""

import argparse
import json
import os
import pickle
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.models import tiny_pipeline
from tests.test_llamagen_checkpoints import state_of as llamagen_states
from tests.test_llamagen_checkpoints import tiny as llamagen_pipeline
from tests.test_llamagen_checkpoints import written
from tests.test_released import same, write_infinity
from varkit.cli.main import main
from varkit.errors import UserError
from varkit.generators.conditioning import ClassConfig
from varkit.generators.flexvar import FlexVARConfig
from varkit.generators.infinity import InfinityConfig
from varkit.generators.llamagen import LlamaGenConfig
from varkit.generators.m_var import MVarConfig
from varkit.generators.mar import MARConfig
from varkit.generators.var import VARConfig
from varkit.heads.bits import BitsConfig
from varkit.heads.categorical import CategoricalConfig
from varkit.heads.diffusion import DiffusionConfig
from varkit.hub import flexvar, infinity, llamagen, m_var, mar, published_infinity, var
from varkit.hub.published import pipeline_from_published, save_published
from varkit.hub.published_llamagen import files as llamagen_files
from varkit.hub.states import build_empty, read_checkpoint
from varkit.plans.flexible import PUBLISHED
from varkit.plans.schedule import Schedule
from varkit.tokenizers.bitwise import BitwiseConfig
from varkit.tokenizers.conv import ConvConfig

SHARDS = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]


def refused(*paths: Path) -> str:
    with pytest.raises(UserError) as error:
        pipeline_from_published(paths)
    assert "\n" not in str(error.value)
    return str(error.value)


# Shards


@pytest.fixture
def sharded(tmp_path: Path) -> tuple[Path, Path]:
    """A tokenizer and the folder of a generator's two shards, the second of which has the last block alone."""
    root = write_infinity(tmp_path / "files")
    folder, state = root / "infinity_8b_weights", {}
    for name in SHARDS:
        state |= torch.load(folder / name, weights_only=True)
    last = {n: t for n, t in state.items() if n.startswith("block_chunks.3.")}
    for name, names in zip(SHARDS, (state.keys() - last.keys(), last.keys()), strict=True):
        torch.save({n: state[n] for n in names}, folder / name)
    return root / "infinity_vae_d56_f8_14_patchify.pth", folder


def test_a_lost_shard_is_named(sharded: tuple[Path, Path]):
    tokenizer, folder = sharded
    line = refused(tokenizer, folder / SHARDS[0])
    assert f"'{folder / SHARDS[1]}' was not given with '{SHARDS[0]}'" in line
    (folder / SHARDS[1]).unlink()
    for given in (folder / SHARDS[0], folder):
        assert f"'{folder / SHARDS[1]}' is missing beside '{SHARDS[0]}'" in refused(tokenizer, given)


def test_a_shard_that_only_the_index_tells_of_is_named(sharded: tuple[Path, Path]):
    tokenizer, folder = sharded
    (folder / SHARDS[0]).rename(folder / "a.bin")
    (folder / SHARDS[1]).rename(folder / "b.bin")
    whole = pipeline_from_published([tokenizer, folder])
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"cfg_uncond": "a.bin", "pos_start": "b.bin"}}))
    assert same(whole, pipeline_from_published([tokenizer, folder]))
    (folder / "b.bin").unlink()
    assert f"'{folder / 'b.bin'}' is missing beside 'a.bin'" in refused(tokenizer, folder)
    index.write_text("{")
    assert f"'{index}' is damaged" in refused(tokenizer, folder)


def test_a_name_of_very_many_shards_is_refused_at_once(sharded: tuple[Path, Path]):
    tokenizer, folder = sharded
    (folder / SHARDS[0]).rename(folder / "x-00001-of-99999999999.bin")
    assert "tells of 99999999999 shards" in refused(tokenizer, folder)


def test_folders_are_converted_by_the_files_in_them(sharded: tuple[Path, Path], tmp_path: Path, capsys):
    tokenizer, folder = sharded
    files = [tokenizer, *(folder / name for name in SHARDS)]
    wanted = pipeline_from_published(files)
    for given in ([folder.parent], [folder, tokenizer]):
        out = tmp_path / f"model{len(given)}"
        assert main(["convert", *map(str, given), "--out", str(out)]) == 0
        assert same(wanted, pipeline_from_published(given))
    assert "is a folder of varkit's already" in refused(tmp_path / "model1")
    (tmp_path / "empty").mkdir()
    assert f"'{tmp_path / 'empty'}' holds no checkpoint" in refused(tmp_path / "empty")


# Depth


def empty(*configs):
    return [build_empty(config.build).state_dict() for config in configs]


def var_state(depth: int):
    config = VARConfig.published(depth, var.SCHEDULES[680])
    state, head = empty(config, CategoricalConfig(config.width, 4096))
    return var.to_published(var.joined(generator=state, head=head), var.GENERATOR_RULES), var


def m_var_state(depth: int):
    config = MVarConfig.published(depth, var.SCHEDULES[680])
    state, head = empty(config, CategoricalConfig(config.width, 4096))
    return m_var.to_published(var.joined(generator=state, head=head), m_var.RULES), m_var


def flexvar_state(depth: int):
    config = FlexVARConfig.published(depth)
    state, head = empty(config, CategoricalConfig(config.width, 8912))
    return flexvar.generator_to_published(state, head, config, Schedule.parse(PUBLISHED[10])), flexvar


def llamagen_state(size: str):
    config = LlamaGenConfig.published(size)
    head = CategoricalConfig(config.width, 16384, bias=False)
    return llamagen.generator_to_published(*empty(config, head)), llamagen


def infinity_state(size: str):
    config = InfinityConfig.published(size)
    return infinity.generator_to_published(
        *empty(config, BitsConfig(config.width, config.code_width))
    ), infinity


def mar_state(size: str):
    config = MARConfig.published(size)
    return mar.generator_to_published(*empty(config, DiffusionConfig(768, 16, 1024, 6))), mar


@pytest.mark.parametrize(
    ("made", "last", "says"),
    [
        (lambda: var_state(16), "blocks.15.", "15 blocks of width 1024, and the published one of that width 16"),
        (lambda: m_var_state(32), "blocks.31.", "31 blocks of width 2048, and the published one of that width 32"),
        (lambda: flexvar_state(20), "blocks.19.", "19 blocks of width 1280, and"),
        (lambda: llamagen_state("B"), "layers.11.", "11 blocks of width 768, and the published one of that width 12"),
        (lambda: infinity_state("layer12"), "blocks.11.", "11 blocks of width 768, and"),
        (lambda: mar_state("base"), ("encoder_blocks.11.", "decoder_blocks.11."), "11 blocks of width 768, and"),
        (lambda: mar_state("base"), "diffloss.net.res_blocks.5.", "head has 5 blocks of width 1024, and"),
    ],
    ids=["VAR", "M-VAR", "FlexVAR", "LlamaGen", "Infinity", "MAR", "MAR's head"],
)  # fmt: skip
def test_a_published_size_without_its_last_block_is_no_smaller_model(made, last, says: str):
    state, family = made()
    family.generator_configs(state)
    short = {name: tensor for name, tensor in state.items() if not name.startswith(last)}
    assert len(short) < len(state)
    with pytest.raises(UserError, match=says):
        family.generator_configs(short)


# Pairs


def test_a_released_generator_wants_tokens_of_its_own_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The tiny tokenizer has 4 pixels a token."""
    generator, tokenizer = llamagen_states(llamagen_pipeline("c2i"))
    pipeline_from_published(written(tmp_path, generator, tokenizer))
    monkeypatch.setattr("varkit.hub.published_llamagen.PUBLISHED", {(2, 128)})
    line = refused(*written(tmp_path, generator, tokenizer))
    assert "tokens have 4 pixels a side and the generator's 16" in line and "such as vq_ds16_c2i.pt" in line
    told = {"model": generator, "args": argparse.Namespace(downsample_size=4)}
    pipeline_from_published(written(tmp_path, told, tokenizer))
    pipeline_from_published(written(tmp_path, generator, tokenizer, "c2i_B_ds4_64.pt"))
    told["args"].downsample_size = 8
    assert "and the generator's 8; " in refused(*written(tmp_path, told, tokenizer, "c2i_B_ds4_64.pt"))
    files = llamagen_files(llamagen_pipeline("c2i"))
    assert list(files) == ["vq_ds4_c2i.pt", "c2i_layer2_ds4_64.pt"]
    saved = save_published(llamagen_pipeline("c2i"), tmp_path / "saved")
    assert same(pipeline_from_published(saved), llamagen_pipeline("c2i"))


@pytest.mark.parametrize(("kind", "other"), [("c2i", "t2i"), ("t2i", "c2i")])
def test_tokenizers_of_classes_and_of_text_are_told_by_their_names(kind: str, other: str, tmp_path: Path):
    generator, tokenizer = written(tmp_path, *llamagen_states(llamagen_pipeline(kind)), f"{kind}_B_64.pt")
    wrong, right = (shutil.copy(tokenizer, tmp_path / f"vq_ds16_{name}.pt") for name in (other, kind))
    line = refused(generator, wrong)
    assert f"'vq_ds16_{other}.pt' is by its name for {other}" in line and f"such as vq_ds16_{kind}.pt" in line
    pipeline_from_published([generator, right])


def test_an_infinity_tokenizer_of_a_quarter_of_the_bits_is_not_taken_for_patches():
    eight = BitwiseConfig(
        ConvConfig(160, (1, 1, 2, 2, 4), latent_channels=8, attention=False), (1, 2), patch=2
    )
    assert eight.conv.stride == 16 and eight.token_bits == 32
    with pytest.raises(UserError, match=r"32 covers 32 pixels .* such as infinity_vae_d32reg.pth$"):
        published_infinity._check_stride(InfinityConfig.published("2b"), eight)
    whole = replace(eight, conv=replace(eight.conv, latent_channels=32), patch=1)
    published_infinity._check_stride(InfinityConfig.published("2b"), whole)


def test_released_infinity_generators_want_tokens_of_16_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    root = write_infinity(tmp_path / "files")
    pipeline = pipeline_from_published([root])
    monkeypatch.setattr(infinity, "DEPTHS", {24: 4})
    assert "a token of 16 covers 4 pixels a side" in refused(root)
    with pytest.raises(UserError, match="covers 4 pixels"):
        save_published(pipeline, tmp_path / "saved")


def test_the_other_tokenizer_of_32_bits_is_told_by_its_name():
    published_infinity._check_variant(["infinity_2b_reg.pth", "infinity_vae_d32_reg.pth"])
    published_infinity._check_variant(["infinity_2b_reg.pth", "mine.pth"])
    with pytest.raises(
        UserError, match=r"'infinity_vae_d32.pth' .* give infinity_vae_d32reg.pth, or rename it"
    ):
        published_infinity._check_variant(["infinity_2b_reg.pth", "infinity_vae_d32.pth"])


def test_a_small_head_of_mar_is_a_whole_one():
    whole, _ = mar_state("base")
    state = {n: t for n, t in whole.items() if not re.match(r"diffloss\.net\.res_blocks\.[345]", n)}
    assert mar.generator_configs(state)[1].depth == 3


def test_errors_of_pairs_name_a_tokenizer(tmp_path: Path):
    tokenizer, generator = save_published(tiny_pipeline(ClassConfig(3)), tmp_path / "var")
    files = written(tmp_path, *llamagen_states(llamagen_pipeline("c2i")))
    assert refused(files[0], tokenizer).endswith("such as vq_ds16_c2i.pt")
    assert refused(files[1], generator).endswith("such as vae_ch160v4096z32.pth")


# Plain pickles


class Code:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("protocol", range(6))
def test_plain_pickles_are_told_as_such_and_not_run(protocol: int, tmp_path: Path):
    for value, says in (
        (
            {"pos_1LC": Code(tmp_path / "ran")},
            r"holds more than tensors \(\w+.mkdir\); code in checkpoints is never",
        ),
        ({"pos_1LC": 1}, "is a plain pickle and no checkpoint"),
    ):
        (tmp_path / "x.pth").write_bytes(pickle.dumps(value, protocol))
        with pytest.raises(UserError, match=says):
            read_checkpoint(tmp_path / "x.pth")
    assert not (tmp_path / "ran").exists()


# Sizes


def test_unknown_sizes_are_told_with_the_known_ones():
    with pytest.raises(UserError, match="unknown size 'XXXXL'; did you mean 'XXXL'"):
        LlamaGenConfig.published("XXXXL")
    with pytest.raises(UserError, match="unknown size '125X'; known: 20b, 2b"):
        InfinityConfig.published("125X")
