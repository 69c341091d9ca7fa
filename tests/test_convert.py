"""`varkit convert` both ways, and models through the Hugging Face hub, whose network is replaced by fakes."""

import os
import random
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import models
from tests.models import CLASSES, CODE_WIDTH, CODES, tiny_pipeline
from varkit.cli.main import main
from varkit.errors import UserError
from varkit.generators.conditioning import ClassConfig
from varkit.generators.var import VARConfig
from varkit.heads.categorical import CategoricalConfig
from varkit.hub import var
from varkit.hub.pipeline import Pipeline, load
from varkit.hub.published import pipeline_from_published, save_published, tokenizer_from_published
from varkit.hub.published_var import SETTINGS
from varkit.hub.states import build_empty
from varkit.plans.schedule import Schedule

class_model, text_model = models.class_model, models.text_model
TOKENIZER, GENERATOR = "vae_ch8v16z4.pth", "var_d2.pth"


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


def read(file: Path) -> dict:
    return torch.load(file, weights_only=True)


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """A folder with both published files of one tiny model."""
    folder = tmp_path_factory.mktemp("published") / "files"
    save_published(tiny_pipeline(ClassConfig(3)), folder)
    return folder


@pytest.fixture
def convert(tmp_path, capsys):
    """Run the command with --out tmp_path/out; it must fail in one line, which is returned, and leave nothing."""

    def run(*args: object) -> str:
        before = sorted(tmp_path.rglob("*"))
        code = main(["convert", *map(str, args), "--out", str(tmp_path / "out")])
        out, err = capsys.readouterr()
        assert (code, out) == (2, "") and err.startswith("varkit: error: ") and err.count("\n") == 1, err
        assert sorted(tmp_path.rglob("*")) == before
        return err

    return run


# Published files -> folder -> published files


@pytest.mark.parametrize("order", [1, -1])
def test_files_become_a_folder_that_generates(published, tmp_path, order, capsys):
    files = [str(published / TOKENIZER), str(published / GENERATOR)][::order]
    assert main(["convert", "--out", str(tmp_path / "model"), *files]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'model'}\n"
    assert sorted(p.name for p in tmp_path.rglob("*.*")) == [
        "config.json",
        "generator.safetensors",
        "head.safetensors",
        "tokenizer.safetensors",
    ]
    picture = tmp_path / "owl.png"
    assert main(["generate", "--model", str(tmp_path / "model"), "--label", "2", "--out", str(picture)]) == 0
    converted = load(tmp_path / "model")
    wanted = tiny_pipeline(ClassConfig(3)).generate([2], guidance=2.5, ramp=True, top_k=900, top_p=0.96)
    assert converted.generate([2])[0].tobytes() == wanted[0].tobytes()
    assert converted.settings == SETTINGS and converted.configs["generator"].condition.names == ()
    assert converted.configs == tiny_pipeline(ClassConfig(3)).configs


def test_the_way_back_is_exact(published, tmp_path, capsys):
    model, back = tmp_path / "model", tmp_path / "back"
    assert main(["convert", "--out", str(model), *map(str, published.iterdir())]) == 0
    assert main(["convert", "--to", "published", "--out", str(back), str(model)]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [str(back / TOKENIZER), str(back / GENERATOR)]
    for name in (TOKENIZER, GENERATOR):
        assert same(read(back / name), read(published / name))
        assert (back / name).read_bytes() == (published / name).read_bytes()


def test_trainer_checkpoints_wrapped_and_safetensors_files(published, tmp_path):
    tokenizer, generator = read(published / TOKENIZER), read(published / GENERATOR)
    both = {"epoch": 3, "trainer": {"var_wo_ddp": generator, "vae_local": tokenizer, "var_opt": {"lr": 0.1}}}
    torch.save(both, tmp_path / "ar-ckpt-last.pth")
    torch.save({"state_dict": tokenizer}, tmp_path / "wrapped.pt")
    save_file(generator, tmp_path / "x.safetensors")
    wanted = pipeline_from_published([published / TOKENIZER, published / GENERATOR])
    for files in (["ar-ckpt-last.pth"], ["wrapped.pt", "x.safetensors"]):
        found = pipeline_from_published([tmp_path / file for file in files])
        assert found.configs == wanted.configs
        for part in ("tokenizer", "generator", "head"):
            assert same(found.parts[part].state_dict(), wanted.parts[part].state_dict())


def test_dtype_is_the_files_own_or_the_one_asked_for(published, tmp_path):
    half = {n: t.half() if t.is_floating_point() else t for n, t in read(published / GENERATOR).items()}
    torch.save(half, tmp_path / "half.pth")
    files = [str(tmp_path / "half.pth"), str(published / TOKENIZER)]
    for dtype, generator, tokenizer in (
        ([], torch.float16, torch.float32),
        (["--dtype", "bfloat16"], torch.bfloat16, torch.bfloat16),
        (["--dtype", "float32"], torch.float32, torch.float32),
    ):
        folder = tmp_path / "-".join(["m", *dtype])
        assert main(["convert", *files, *dtype, "--out", str(folder)]) == 0
        assert {t.dtype for t in load_file(folder / "generator.safetensors").values()} == {generator}
        saved = load_file(folder / "tokenizer.safetensors")
        assert {t.dtype for n, t in saved.items() if not n.startswith("quantizer.")} == {tokenizer}
        assert {t.dtype for n, t in saved.items() if n.startswith("quantizer.")} == {torch.float32}
        assert load(folder).generate([0, 1])[0].size == (6, 6)


@pytest.mark.parametrize(
    "schedule", [(1, 2, 3, 4, 6, 9, 13, 18, 24, 32), (1, 2, 4, 7), var.SCHEDULES[680]], ids=str
)
def test_schedules_are_inferred(schedule, tmp_path):
    config = VARConfig.published(1, schedule, width=64, code_width=CODE_WIDTH, condition=ClassConfig(3))
    generator, head = config.build().state_dict(), CategoricalConfig(64, CODES).build().state_dict()
    torch.save(var.generator_to_published(generator, head, config), tmp_path / "g.pth")
    own = tiny_pipeline(ClassConfig(3))
    tokenizer = var.tokenizer_to_published(own.tokenizer.state_dict(), own.configs["tokenizer"])
    torch.save(tokenizer, tmp_path / "t.pth")
    found = pipeline_from_published([tmp_path / "g.pth", tmp_path / "t.pth"])
    assert found.configs["tokenizer"].schedule == found.configs["plan"].schedule == schedule
    assert found.size == (2 * schedule[-1],) * 2


def test_the_released_sizes_are_told_by_their_shapes():
    """Without memory: 16 blocks at 256 pixels, and 36 with shared modulation at 512."""
    for depth, positions in ((16, 680), (36, 2240)):
        config = VARConfig.published(depth, var.SCHEDULES[positions])
        head = CategoricalConfig(config.width, 4096)
        state = build_empty(config.build).state_dict(), build_empty(head.build).state_dict()
        published = var.to_published(var.joined(generator=state[0], head=state[1]), var.GENERATOR_RULES)
        assert var.generator_configs(published) == (config, head)
        assert depth != 16 or sum(t.numel() for t in published.values()) == 310_283_520


# What cannot be converted


def test_half_a_model_and_two_of_a_kind(convert, published):
    assert f"no tokenizer is in '{published / GENERATOR}'" in convert(published / GENERATOR)
    assert "no generator is in" in convert(published / TOKENIZER)
    twice = convert(published / GENERATOR, published / TOKENIZER, published / GENERATOR)
    assert "both hold a generator" in twice
    assert "no checkpoint is given" in convert()


def test_generators_of_two_families_are_no_shards_of_one(convert, published, tmp_path):
    torch.save(
        {"tok_embeddings.weight": torch.zeros(4, 4), "cls_embedding.x": torch.zeros(1)}, tmp_path / "gpt.pt"
    )
    line = convert(published / TOKENIZER, published / GENERATOR, tmp_path / "gpt.pt")
    assert f"'{published / GENERATOR}' and '{tmp_path / 'gpt.pt'}' both hold a generator" in line


@pytest.mark.parametrize("wrapper", ["model", "state_dict"])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_wrapped_states_are_unwrapped(published, tmp_path, wrapper, prefix):
    bare = {prefix + name: tensor for name, tensor in read(published / GENERATOR).items()}
    torch.save({wrapper: bare, "epoch": 3}, tmp_path / "wrapped.pth")
    found = pipeline_from_published([tmp_path / "wrapped.pth", published / TOKENIZER])
    wanted = pipeline_from_published([published / GENERATOR, published / TOKENIZER])
    assert same(found.generator.state_dict(), wanted.generator.state_dict())


def test_a_tokenizer_is_read_alone(published):
    found = tokenizer_from_published(published / TOKENIZER)
    assert same(found.state_dict(), tiny_pipeline(ClassConfig(3)).tokenizer.state_dict())
    with pytest.raises(UserError, match="holds no tokenizer"):
        tokenizer_from_published(published / GENERATOR)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"code_width": 8}, "the tokenizer's code width is 4 and the generator's is 8"),
        ({"vocab": 32}, "the tokenizer's number of codes is 16 and the generator's is 32"),
    ],
)
def test_a_pair_that_does_not_belong_together(convert, published, tmp_path, change, says):
    state = read(published / GENERATOR)
    if "code_width" in change:
        state["word_embed.weight"] = torch.zeros(32, 8)
    else:
        state["head.weight"], state["head.bias"] = torch.zeros(32, 32), torch.zeros(32)
    torch.save(state, tmp_path / "other.pth")
    assert says in convert(tmp_path / "other.pth", published / TOKENIZER)


@pytest.mark.parametrize(
    "keys, says",
    [
        (["x_embedder.proj.weight", "blocks.0.attn.qkv.weight"], "it looks like DiT"),
        (["quantize.embedding.weight", "encoder.down.0.block.0.conv1.weight"], "a single-scale VQGAN"),
        (["blocks.0.attention.qkv.weight", "conditioner.embed.weight"], "a part of a varkit folder"),
        (["lm_head.weight"], "VAR: it holds lm_head.weight; give"),
    ],
)
@pytest.mark.parametrize("wrapper", [None, "model"])
def test_other_families_are_named(convert, published, tmp_path, keys, says, wrapper):
    state = {key: torch.zeros(2, 2) for key in keys}
    torch.save({wrapper: state} if wrapper else state, tmp_path / "other.pth")
    line = convert(tmp_path / "other.pth", published / TOKENIZER)
    assert says in line and str(tmp_path / "other.pth") in line


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


def test_pickles_with_code_are_refused_unrun(convert, published, tmp_path):
    torch.save(read(published / GENERATOR) | {"extra": Evil(tmp_path / "ran")}, tmp_path / "evil.pth")
    assert "code in checkpoints is never run" in convert(tmp_path / "evil.pth", published / TOKENIZER)


def test_entries_that_are_no_tensors(convert, published, tmp_path):
    torch.save(read(published / GENERATOR) | {"epoch": 3}, tmp_path / "g.pth")
    assert "entries that are no tensors (epoch ...)" in convert(tmp_path / "g.pth", published / TOKENIZER)


def test_truncated_files(convert, published, tmp_path):
    whole = (published / GENERATOR).read_bytes()
    cuts = [0, 1, 2, 100, len(whole) - 1, *random.Random(0).sample(range(len(whole)), 10)]
    for cut in cuts:
        (tmp_path / "cut.pth").write_bytes(whole[:cut])
        assert "is damaged" in convert(tmp_path / "cut.pth", published / TOKENIZER), cut
    torch.save(read(published / GENERATOR), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "cut.pth").write_bytes((tmp_path / "old.pth").read_bytes()[:-1000])
    assert "is damaged" in convert(tmp_path / "cut.pth", published / TOKENIZER)


@pytest.mark.parametrize("name", [TOKENIZER, GENERATOR])
def test_missing_and_misshapen_keys_are_named(convert, published, tmp_path, name):
    other = published / (GENERATOR if name == TOKENIZER else TOKENIZER)
    key = {TOKENIZER: "post_quant_conv.bias", GENERATOR: "blocks.1.ffn.fc2.bias"}[name]
    state = read(published / name)
    torch.save({n: t for n, t in state.items() if n != key}, tmp_path / "x.pth")
    assert f"missing {key}" in convert(tmp_path / "x.pth", other)
    torch.save(state | {key: torch.zeros(3)}, tmp_path / "x.pth")
    assert f"{key} (3,) should be" in convert(tmp_path / "x.pth", other)
    torch.save(state | {key + "s": torch.zeros(3)}, tmp_path / "x.pth")
    assert f"unexpected {key}s (3,)" in convert(tmp_path / "x.pth", other)


def test_wrong_words_and_places(convert, published, tmp_path, text_model):
    files = [published / TOKENIZER, published / GENERATOR]
    assert "'bfloat15'; did you mean 'bfloat16'" in convert(*files, "--dtype", "bfloat15")
    assert "'onnx'" in convert(*files, "--to", "onnx")
    assert "there is no file" in convert(tmp_path / "none.pth")
    (tmp_path / "folder").mkdir()
    assert "holds no checkpoint" in convert(tmp_path / "folder")
    assert "only class-conditional VAR and MAR models" in convert("--to", "published", text_model)
    assert "takes one model folder" in convert("--to", "published", text_model, text_model)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    assert "already has files in it" in convert(*files)


def test_settings_of_training_alone_do_not_stand_in_the_way(tmp_path):
    pipeline = tiny_pipeline(ClassConfig(3, CLASSES), adaln_init=0.5, drop_path=0.3)
    pipeline.configs["head"] = replace(pipeline.configs["head"], init_scale=0.5)
    pipeline.configs["tokenizer"] = replace(pipeline.configs["tokenizer"], beta=0.5)
    save_published(pipeline, tmp_path / "files")
    found = pipeline_from_published([tmp_path / "files" / TOKENIZER, tmp_path / "files" / GENERATOR])
    assert same(found.generator.state_dict(), pipeline.generator.state_dict())


def test_models_that_the_published_layout_cannot_express(convert, tmp_path):
    pipeline = tiny_pipeline(ClassConfig(3, CLASSES))
    conv = replace(pipeline.configs["tokenizer"].conv, groups=4)
    pipeline.configs["tokenizer"] = replace(pipeline.configs["tokenizer"], conv=conv)
    pipeline.save(tmp_path / "model")
    assert "its tokenizer normalises 4 groups of channels" in convert("--to", "published", tmp_path / "model")


# The Hugging Face hub


def test_from_pretrained_reads_what_push_to_hub_uploads(class_model, tmp_path, monkeypatch):
    calls = []

    class Api:
        def create_repo(self, repository, **options):
            calls.append(("create", repository, options))

        def upload_folder(self, repo_id, folder_path):
            files = {p.name: p.read_bytes() for p in Path(folder_path).iterdir()}
            calls.append(("upload", repo_id, sorted(files)))
            (tmp_path / "repository").mkdir()
            for name, data in files.items():
                (tmp_path / "repository" / name).write_bytes(data)
            return f"https://hub/{repo_id}"

    def snapshot_download(name, revision=None, allow_patterns=None):
        calls.append(("download", name, revision))
        return str(tmp_path / "repository")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    own = Pipeline.from_folder(class_model)
    assert own.push_to_hub("me/animals", private=True) == "https://hub/me/animals"
    again = Pipeline.from_pretrained("me/animals", revision="v1")
    names = ["config.json", "generator.safetensors", "head.safetensors", "tokenizer.safetensors"]
    assert calls == [
        ("create", "me/animals", {"private": True, "exist_ok": True}),
        ("upload", "me/animals", names),
        ("download", "me/animals", "v1"),
    ]
    assert again.configs == own.configs and again.settings == own.settings and again.about == own.about
    assert again.generate(["dog"])[0].tobytes() == own.generate(["dog"])[0].tobytes()


def test_from_pretrained_takes_folders_without_the_hub(class_model, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    assert Pipeline.from_pretrained(str(class_model)).size == (6, 6)


@pytest.mark.parametrize("name", ["nobody/nothing-here", "no/such/name"])
def test_without_a_network_one_line_says_what_to_do(name, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        UserError, match=f"'{name}'.*download the folder elsewhere and give its path"
    ) as caught:
        Pipeline.from_pretrained(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("history", [None, 0, 1])
def test_the_attention_mask_of_a_var_tells_how_many_coarser_scales_are_seen(history, tmp_path):
    """The first stage of HMAR, and MVAR, have VAR's very weights; loaded as VAR's they would draw something else."""
    pipeline = tiny_pipeline(ClassConfig(3))
    pipeline = pipeline.over(replace(pipeline.configs["plan"], history=history))
    files = save_published(pipeline, tmp_path / "published")
    loaded = pipeline_from_published(files)
    assert loaded.configs["plan"] == pipeline.configs["plan"] and loaded.model.plan.history == history
    told = {"guidance": 2.0, "ramp": False, "top_k": 0, "top_p": 0.0}
    ours, theirs = (p.generate(1, seed=2, **told)[0].tobytes() for p in (pipeline, loaded))
    assert ours == theirs
    schedule = Schedule.parse(pipeline.configs["plan"].schedule)
    state = torch.load(next(f for f in files if f.name.startswith("var_d")), weights_only=True)
    level = schedule.level_of
    if history == 0:
        assert torch.equal(state[var.MASK][0, 0] == 0, level[:, None] == level)
    state[var.MASK][0, 0, 1, 0] = 0 if history == 0 else -torch.inf
    with pytest.raises(UserError, match="attn_bias_for_masking of the checkpoint"):
        var.history_of(state, schedule, None)
    del state[var.MASK]
    assert var.history_of(state, schedule, None) is None and var.history_of(state, schedule, 0) == 0
