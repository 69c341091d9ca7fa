"""Published LlamaGen checkpoints there and back, and the reference cases of the published code."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.models import tiny_pipeline
from tests.test_convert import same
from tests.test_verify import REFERENCE, outcome, tampered
from varkit.cli.main import main
from varkit.errors import UserError
from varkit.generators.conditioning import ClassConfig
from varkit.generators.llamagen import SIZES, LlamaGenConfig
from varkit.generators.text import TextConfig, TextFeaturesConfig
from varkit.heads.categorical import CategoricalConfig
from varkit.hub import llamagen
from varkit.hub.pipeline import Pipeline, Settings
from varkit.hub.published import pipeline_from_published, save_published
from varkit.hub.published_llamagen import SETTINGS
from varkit.hub.states import build_empty
from varkit.hub.verify import Case, verify_case
from varkit.plans.raster import RasterConfig
from varkit.tokenizers.conv import ConvConfig
from varkit.tokenizers.patch import PatchEncoderConfig
from varkit.tokenizers.vq import VQConfig

CONV = ConvConfig(8, (1, 2, 2), res_blocks=1, latent_channels=6)
VQ = VQConfig(CONV, vocab_size=16, code_channels=4, grid=16)
CONDITIONS = {"c2i": ClassConfig(3), "t2i": TextFeaturesConfig(6, 5)}


def tiny(kind: str, tokenizer: VQConfig = VQ, **changes) -> Pipeline:
    """Random weights in the released form; pictures of 64 x 64 pixels."""
    told = {"hidden": 96, "condition": CONDITIONS[kind], "zero_prefix": True} | changes
    generator = LlamaGenConfig(2, 128, 2, 16, **told)
    configs = {"tokenizer": tokenizer, **generator.fitted(tokenizer)}
    torch.manual_seed(0)
    parts = {name: config.build() for name, config in configs.items()}
    torch.nn.init.normal_(parts["head"].out.weight)
    return Pipeline(parts, configs, Settings())


def state_of(pipeline: Pipeline) -> tuple[dict, dict]:
    """The published generator and tokenizer."""
    states = {name: pipeline.parts[name].state_dict() for name in ("generator", "head", "tokenizer")}
    generator = llamagen.generator_to_published(states["generator"], states["head"])
    return generator, llamagen.tokenizer_to_published(states["tokenizer"], pipeline.configs["tokenizer"])


def written(folder: Path, generator: object, tokenizer: object, name: str = "c2i_B_64.pt") -> list[Path]:
    """Both as files."""
    files = [folder / name, folder / "vq.pt"]
    torch.save(generator, files[0])
    torch.save(tokenizer, files[1])
    return files


# Names, shapes, sizes


def test_the_published_names_of_a_text_model():
    generator, _ = state_of(tiny("t2i"))
    names = {name for name in generator if not name.startswith("layers.")}
    assert names == {
        "cls_embedding.cap_proj.fc1.weight", "cls_embedding.cap_proj.fc2.weight",
        "cls_embedding.uncond_embedding", "tok_embeddings.weight", "norm.weight", "output.weight",
    }  # fmt: skip
    assert {name for name in generator if name.startswith("layers.1.")} == {
        f"layers.1.{name}.weight"
        for name in (
            "attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3",
            "attention_norm", "ffn_norm",
        )
    }  # fmt: skip
    assert generator["cls_embedding.cap_proj.fc1.weight"].shape == (128, 6)
    assert generator["layers.0.feed_forward.w1.weight"].shape == (96, 128)


def test_the_published_tokenizer_has_its_entries_and_counts_levels_from_the_lowest():
    case = json.loads((REFERENCE / "llamagen_vq16.json").read_text())["state"]
    ours = build_empty(VQConfig().build)
    published = llamagen.tokenizer_to_published(ours.state_dict(), VQConfig())
    assert len(published) == 344
    assert {name: list(t.shape) for name, t in published.items()} == {n: s for n, (s, _) in case.items()}
    assert published["decoder.conv_blocks.0.res.0.conv1.weight"].shape[:2] == (512, 512)
    assert published["encoder.conv_blocks.4.attn.1.q.weight"].shape == (512, 512, 1, 1)
    assert llamagen.tokenizer_config(published) == VQConfig()
    eight = json.loads((REFERENCE / "llamagen_vq8.json").read_text())["state"]
    told = llamagen.tokenizer_config(
        {name: torch.empty(shape, device="meta") for name, (shape, _) in eight.items()}, 32
    )
    assert (
        told == VQConfig(ConvConfig(128, (1, 2, 2, 4), latent_channels=256), grid=32)
        and told.conv.stride == 8
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["c2i", "t2i"])
def test_released_sizes_are_told_by_their_shapes(size: str, kind: str):
    condition = ClassConfig(1000) if kind == "c2i" else TextFeaturesConfig(2048, 120)
    config = LlamaGenConfig.published(size, condition=condition, dropout=0.0)  # of which shapes tell nothing
    head = CategoricalConfig(config.width, 16384, bias=False, init_scale=0.0)
    published = llamagen.generator_to_published(*(build_empty(c.build).state_dict() for c in (config, head)))
    assert llamagen.generator_configs(published) == (replace(config, hidden=config.inner), head)


def test_fewer_key_heads_are_told_by_the_shapes():
    pipeline = tiny("c2i", kv_heads=1)
    generator, _ = state_of(pipeline)
    assert llamagen.generator_configs(generator)[0] == pipeline.configs["generator"]


# Files


@pytest.mark.parametrize("kind", ["c2i", "t2i"])
def test_convert_goes_both_ways_exactly(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pipeline = tiny(kind)
    names = [path.name for path in save_published(pipeline, tmp_path / "files")]
    assert names == [f"vq_ds4_{kind}.pt", f"{kind}_layer2_64.pt"]
    files = [str(tmp_path / "files" / name) for name in names]
    assert main(["convert", *files, "--out", str(tmp_path / "model")]) == 0
    found = Pipeline.from_folder(tmp_path / "model")
    assert found.configs == pipeline.configs and found.settings == SETTINGS[kind]
    for part in ("tokenizer", "generator", "head"):
        assert same(found.parts[part].state_dict(), pipeline.parts[part].state_dict())
    back = ["--to", "published", "--out", str(tmp_path / "back"), str(tmp_path / "model")]
    assert main(["convert", *back]) == 0
    for name in names:
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "files" / name).read_bytes()
    if kind == "t2i":
        capsys.readouterr()
        assert (
            main(["generate", "a cat", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "x.png")])
            == 2
        )
        assert "'a cat' cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("wrapper", ["model", "module", "state_dict", None])
def test_wrappers_of_every_trainer_and_old_angles(wrapper: str | None, tmp_path: Path):
    pipeline = tiny("c2i")
    generator, tokenizer = state_of(pipeline)
    old = generator | {"freqs_cis": torch.zeros(17, 32, 2)}
    trained = {"optimizer": {"lr": 1.0}, "steps": 3}
    files = written(
        tmp_path,
        {wrapper: old, **trained} if wrapper else old,
        {wrapper: tokenizer} if wrapper else tokenizer,
    )
    found = pipeline_from_published(files)
    assert found.configs == pipeline.configs
    assert same(found.generator.state_dict(), pipeline.generator.state_dict())
    assert same(found.tokenizer.state_dict(), pipeline.tokenizer.state_dict())


def test_tokenizers_are_read_averaged_and_generators_are_not(tmp_path: Path):
    pipeline = tiny("c2i")
    generator, tokenizer = state_of(pipeline)
    spoilt = [{name: t + 1 for name, t in state.items()} for state in (generator, tokenizer)]
    files = written(
        tmp_path,
        {"model": generator, "ema": spoilt[0]},
        {"model": spoilt[1], "ema": tokenizer, "discriminator": {}},
    )
    found = pipeline_from_published(files)
    assert same(found.generator.state_dict(), pipeline.generator.state_dict())
    assert same(found.tokenizer.state_dict(), pipeline.tokenizer.state_dict())


@pytest.mark.parametrize(
    ("name", "arguments", "side"),
    [
        ("c2i_L_384.pt", None, 96),
        ("t2i_XL_stage2_512.pt", None, 128),
        ("mine.pt", None, 64),
        ("0050000.pt", None, 64),
        ("0050000.pt", argparse.Namespace(image_size=128, data="x"), 32),
        ("c2i_L_384.pt", argparse.Namespace(image_size=128), 32),
        ("c2i_L_384.pt", argparse.Namespace(), 96),
    ],
)
def test_the_grid_comes_from_arguments_then_the_name_then_the_size(name, arguments, side, tmp_path: Path):
    generator, tokenizer = state_of(tiny("t2i" if name.startswith("t2i") else "c2i"))
    found = pipeline_from_published(
        written(tmp_path, {"model": generator, "args": arguments}, tokenizer, name)
    )
    assert found.configs["plan"].grid == (side, side) and found.configs["tokenizer"].grid == side


def test_sizes_released_at_384_pixels_alone_are_of_384(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("varkit.hub.published_llamagen.LARGE", {(2, 128)})
    for kind, side in (("c2i", 96), ("t2i", 64)):
        found = pipeline_from_published(written(tmp_path, *state_of(tiny(kind)), "mine.pt"))
        assert found.configs["plan"].grid == (side, side)


# What cannot be


def test_pairs_that_do_not_belong_together(tmp_path: Path):
    generator, tokenizer = state_of(tiny("c2i"))
    save_published(tiny_pipeline(ClassConfig(3)), tmp_path / "var")
    files = written(tmp_path, generator, tokenizer)
    with pytest.raises(UserError, match="the tokenizer is VAR's and the generator LlamaGen's"):
        pipeline_from_published([files[0], tmp_path / "var" / "vae_ch8v16z4.pth"])
    with pytest.raises(UserError, match="the tokenizer is LlamaGen's and the generator VAR's"):
        pipeline_from_published([files[1], tmp_path / "var" / "var_d2.pth"])
    other = written(tmp_path, generator, state_of(tiny("c2i", replace(VQ, vocab_size=32)))[1])
    with pytest.raises(UserError, match="the tokenizer has 32 codes and the generator 16"):
        pipeline_from_published(other)
    files = written(tmp_path, generator, tokenizer, "c2i_B_63.pt")
    with pytest.raises(UserError, match="63 pixels a side are no multiple of the tokenizer's 4"):
        pipeline_from_published(files)


def test_missing_left_over_and_partial_entries_are_named(tmp_path: Path):
    generator, tokenizer = state_of(tiny("t2i"))
    name = "layers.1.attention.wqkv.weight"
    with pytest.raises(UserError, match=rf"missing {name} \(384, 128\)"):
        pipeline_from_published(
            written(tmp_path, {n: t for n, t in generator.items() if n != name}, tokenizer)
        )
    with pytest.raises(UserError, match=r"unexpected adapter.weight \(2,\)"):
        pipeline_from_published(written(tmp_path, generator | {"adapter.weight": torch.zeros(2)}, tokenizer))
    with pytest.raises(UserError, match="missing decoder.conv_blocks.0.res.1.conv2.bias"):
        short = {n: t for n, t in tokenizer.items() if n != "decoder.conv_blocks.0.res.1.conv2.bias"}
        pipeline_from_published(written(tmp_path, generator, short))
    with pytest.raises(UserError, match="the LlamaGen generator checkpoint lacks tok_embeddings.weight"):
        pipeline_from_published(written(tmp_path, {name: generator[name]}, tokenizer))


@pytest.mark.parametrize(
    ("pipeline", "says"),
    [
        (lambda: tiny("c2i", zero_prefix=False), "zero_prefix of the generator is False"),
        (
            lambda: tiny("c2i", condition=TextConfig(("a",), 4, 16, 1, 2)),
            "classes or text features over a VQ",
        ),
        (lambda: tiny("c2i", replace(VQ, normalize=False)), "normalize of the tokenizer is False"),
        (lambda: tiny("c2i", replace(VQ, rate=1.0)), "rate of the tokenizer is 1.0"),
        (lambda: tiny("c2i", replace(VQ, encoder=PatchEncoderConfig(16, 1))), "encoder of the tokenizer is"),
        (lambda: tiny("c2i", replace(VQ, grid=(16, 8))), "grid of the tokenizer is"),
        (
            lambda: tiny("c2i", replace(VQ, conv=replace(CONV, groups=4))),
            "its tokenizer normalises",
        ),
    ],
)
def test_what_the_published_layout_cannot_say_is_refused(pipeline, says: str, tmp_path: Path):
    with pytest.raises(UserError, match=says):
        save_published(pipeline(), tmp_path / "files")
    assert not (tmp_path / "files").exists()


def test_what_only_training_uses_does_not_stand_in_the_way(tmp_path: Path):
    pipeline = tiny(
        "c2i", replace(VQ, beta=1.0), dropout=0.1, drop_path=0.1, condition=ClassConfig(3, ("a", "b", "c"))
    )
    pipeline.configs["head"] = replace(pipeline.configs["head"], init_scale=1.0)
    pipeline.configs["plan"] = RasterConfig((16, 16))
    found = pipeline_from_published(save_published(pipeline, tmp_path / "files"))
    assert same(found.generator.state_dict(), pipeline.generator.state_dict())


# Reference cases of the published code


def test_the_tiny_text_case_passes_and_every_array_is_used():
    rows = verify_case(Case.open(REFERENCE / "llamagen_tiny_t2i.json"))
    assert all(row.passed for row in rows), rows
    inputs = {row.array for row in rows if row.role == "input"}
    assert inputs == {"input_tokens", "caption_embeddings", "caption_mask"} and len(rows) == 5


@pytest.mark.parametrize("array", ["caption_mask", "caption_embeddings"])
def test_the_text_case_notices_another_prompt(array: str, tmp_path: Path):
    def change(arrays):
        arrays[array][:, -60:] = 1 - arrays[array][:, -60:]

    passed = outcome(tampered(tmp_path, "llamagen_tiny_t2i", change))
    assert not passed["greedy_tokens"] and passed["logits"] == (array == "caption_mask")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llamagen_vq16", "llamagen_vq8", "llamagen_b_256"])
def test_released_sizes_pass(name: str):
    rows = verify_case(Case.open(REFERENCE / f"{name}.json"))
    assert all(row.passed for row in rows), rows
