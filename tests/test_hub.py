"""The hub: configurations as JSON, pipeline folders, state dicts, published checkpoints, and their errors."""

import json
import os
import pickle
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.configs import CONFIGS, CONV, GENERATOR, HEAD, SCHEDULE, TOKENIZER
from varkit.errors import UserError
from varkit.generators.conditioning import ClassConfig
from varkit.generators.llamagen import LlamaGenConfig
from varkit.generators.var import VARConfig
from varkit.heads.categorical import CategoricalConfig
from varkit.hub import llamagen, var
from varkit.hub.config import from_json, to_json
from varkit.hub.folder import load_parts, save_parts
from varkit.hub.registry import PARTS, config_type, type_name
from varkit.hub.states import (
    build_empty,
    load_state,
    read_checkpoint,
    read_safetensors,
    write_safetensors,
)
from varkit.tokenizers.multiscale_vq import MultiScaleVQConfig


def built(config, seed=0):
    torch.manual_seed(seed)
    return config.build()


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "model"
    parts = {name: (built(config), config) for name, config in CONFIGS.items()}
    parts["head"][0].bfloat16()
    save_parts(folder, parts, {"defaults": {"guidance": 3.0}, "about": {"data": "scenes"}})
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def edit(folder: Path, change) -> None:
    file = folder / "config.json"
    whole = json.loads(file.read_text())
    change(whole)
    file.write_text(json.dumps(whole))


# Configurations


@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
def test_config_round_trip_through_json(config):
    text = json.dumps(to_json(config))
    assert from_json(json.loads(text), type(config)) == config


@pytest.mark.parametrize("name", PARTS)
def test_registered_names_are_found_both_ways(name):
    examples = {type_name(config): type(config) for config in CONFIGS.values()}
    assert config_type(name) is examples[name]


@dataclass(frozen=True)
class Toy:
    count: int
    rate: float = 0.5
    pair: tuple[int, int] = (1, 2)
    names: tuple[str, ...] | None = None


@pytest.mark.parametrize(
    "value, says",
    [
        ({"count": 1, "rat": 2.0}, ["unknown field 'rat'", "'rate'", "2.0"]),
        ({}, ["toy lacks the field 'count'", "an integer"]),
        ({"count": "3"}, ["toy.count is '3'", "an integer"]),
        ({"count": True}, ["toy.count is True"]),
        ({"count": 1.0}, ["toy.count is 1.0"]),
        ({"count": 1, "rate": float("nan")}, ["toy.rate is nan", "a number"]),
        ({"count": 1, "pair": [1, 2, 3]}, ["toy.pair is [1, 2, 3]", "a list of 2"]),
        ({"count": 1, "pair": [1, "x"]}, ["toy.pair[1] is 'x'"]),
        ({"count": 1, "names": "abc"}, ["toy.names is 'abc'", "null"]),
        ([1], ["toy is [1]", "Toy"]),
    ],
)
def test_wrong_config_names_field_value_and_expectation(value, says):
    with pytest.raises(UserError) as caught:
        from_json(value, Toy, "toy")
    assert all(part in str(caught.value) for part in says), caught.value


def test_integers_are_read_as_floats_where_floats_are_asked_for():
    rate = from_json({"count": 1, "rate": 2}, Toy).rate
    assert rate == 2 and isinstance(rate, float)


def test_condition_type_is_tagged_and_unknown_tags_are_refused():
    value = to_json(GENERATOR)
    assert value["condition"]["type"] == "ClassConfig"
    value["condition"]["type"] = "ClasConfig"
    with pytest.raises(UserError, match="'ClasConfig'.*'ClassConfig'"):
        from_json(value, VARConfig)


# Folders


def test_folder_round_trip_keeps_weights_dtypes_configs_and_the_rest(saved):
    loaded = load_parts(saved)
    assert loaded.configs == CONFIGS
    assert loaded.rest == {"defaults": {"guidance": 3.0}, "about": {"data": "scenes"}}
    for name, config in CONFIGS.items():
        part, fresh = loaded.built[name], built(config)
        assert type(part) is type(fresh)
        if isinstance(part, nn.Module):
            fresh = fresh.bfloat16() if name == "head" else fresh
            assert same(part.state_dict(), fresh.state_dict())
            assert not part.training and all(p.requires_grad for p in part.parameters())
        else:
            assert part.evaluations == fresh.evaluations
    assert not (saved / "scales.safetensors").exists()


def test_loaded_tokenizer_gives_the_same_picture(saved):
    ids = torch.arange(14)[None] % 16
    fresh, loaded = built(TOKENIZER).eval(), load_parts(saved).built["tokenizer"]
    assert torch.equal(fresh.decode({"ids": ids}), loaded.decode({"ids": ids}))


def mapped_file(tensor: torch.Tensor) -> str:
    """The file whose pages hold the tensor, or the empty string."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *fields = line.split(maxsplit=5)
        first, last = (int(end, 16) for end in span.split("-"))
        if first <= tensor.data_ptr() < last:
            return Path(fields[-1]).name
    return ""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of memory maps")
def test_weights_are_memory_mapped(saved):
    loaded = load_parts(saved).built["generator"]
    assert {mapped_file(p) for p in loaded.parameters()} == {"generator.safetensors"}


def test_loaded_parts_can_be_saved_over_their_own_folder(folder):
    loaded = load_parts(folder)
    save_parts(
        folder, {n: (loaded.built[n], c) for n, c in loaded.configs.items()}, loaded.rest, replace=True
    )
    again = load_parts(folder)
    assert again.rest == loaded.rest
    assert same(again.built["generator"].state_dict(), loaded.built["generator"].state_dict())


def test_saving_refuses_a_full_folder_unless_told_to_replace_it(folder):
    with pytest.raises(UserError, match="already has files"):
        save_parts(folder, {"head": (built(HEAD), HEAD)})
    save_parts(folder, {"head": (built(HEAD), HEAD)}, replace=True)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "head.safetensors"]


def test_failed_save_leaves_nothing(tmp_path):
    with pytest.raises(ValueError):
        save_parts(tmp_path / "new", {"head": (built(HEAD), HEAD)}, {"about": float("nan")})
    assert list(tmp_path.iterdir()) == []


def set_in(*keys_and_value):
    *keys, last, value = keys_and_value

    def change(whole):
        for key in keys:
            whole = whole[key]
        whole[last] = value

    return change


@pytest.mark.parametrize(
    "change, says",
    [
        (set_in("format_version", 2), "format_version 2, newer than this varkit .* upgrade"),
        (set_in("format_version", "1"), "format_version '1'; it must be an integer"),
        (lambda w: w.pop("format_version"), "is not a varkit model: it has varkit, parts"),
        (set_in("parts", "head", "type", "CategoricalHed"), "'CategoricalHed'; did you mean 'CategoricalHead'"),
        (set_in("parts", "head", "type", "os:system"), "unknown part type 'os:system'"),
        (set_in("parts", "head", "config", "width", "wide"), "head.config.width is 'wide'; it must be an integer"),
        (set_in("parts", "head", "config", "vocab_size", 1), "vocab_size is 1; it must be at least 2"),
        (set_in("parts", "head", 3), 'parts.head must be an object with "type" and "config"'),
        (set_in("parts", "../head", {"type": "CategoricalHead", "config": {}}), "a part named '../head'"),
        (set_in("parts", "head", "config", "vocab_size", 17), r"out\.weight \(16, 32\) should be \(17, 32\)"),
    ],
)  # fmt: skip
def test_wrong_config_json_is_one_clear_line(folder, change, says):
    edit(folder, change)
    with pytest.raises(UserError, match=says) as caught:
        load_parts(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_missing_and_foreign_files(folder, tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        load_parts(tmp_path / "nowhere")
    (folder / "head.safetensors").unlink()
    with pytest.raises(UserError, match="there is no file .*head.safetensors"):
        load_parts(folder)
    (folder / "config.json").write_text("{]")
    with pytest.raises(UserError, match="is not JSON"):
        load_parts(folder)
    (folder / "config.json").write_text('{"architectures": ["T5"]}')
    with pytest.raises(UserError, match="not a varkit model: it has architectures.*convert"):
        load_parts(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="has no config.json"):
        load_parts(folder)


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_truncated_weights(folder, size):
    file = folder / "head.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(UserError, match="is damaged or not safetensors"):
        load_parts(folder)


def test_a_header_whose_length_begins_like_a_pickle_is_read(tmp_path):
    """The first byte of a safetensors file is the lowest of its header's length, and may be 0x80."""
    for padding in range(256):
        path = tmp_path / "weights.safetensors"
        save_file({"weight": torch.ones(2)}, path, metadata={"padding": "x" * padding})
        if path.read_bytes()[0] == 0x80:
            break
    else:
        pytest.fail("no padding gives such a header")
    assert torch.equal(read_safetensors(path)["weight"], torch.ones(2))


@pytest.mark.parametrize("zipped", [True, False])
def test_pickle_in_place_of_safetensors(folder, zipped):
    torch.save({"w": torch.zeros(1)}, folder / "head.safetensors", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="is a pickled checkpoint.*convert"):
        load_parts(folder)


# State dicts


def test_state_mismatch_lists_five_with_shapes_and_nearest_names():
    module = built(GENERATOR)
    state = module.state_dict()
    state["posit"] = state.pop("position")
    state["level.weight"] = state["level.weight"][:2]
    state |= {f"extra{i}": torch.zeros(i) for i in range(9)}
    with pytest.raises(UserError) as caught:
        load_state(module, state, "'x.safetensors'")
    text = str(caught.value)
    assert text.startswith("'x.safetensors' does not fit its configuration: ")
    assert "missing position (14, 32) (nearest: posit (14, 32))" in text
    assert "and 7 more" in text and "\n" not in text
    assert same(module.state_dict(), built(GENERATOR).state_dict()), "a refused state must change nothing"


class WithBuffers(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))
        self.register_buffer("table", torch.arange(3.0), persistent=False)
        self.register_buffer("kept", torch.zeros(3))


def test_building_empty_gives_meta_parameters_and_real_buffers():
    module = build_empty(WithBuffers)
    assert module.weight.is_meta and torch.equal(module.table, torch.arange(3.0))
    load_state(module, {"weight": torch.ones(3), "kept": torch.full((3,), 2.0)}, "toy")
    assert torch.equal(module.weight + module.table + module.kept, torch.tensor([3.0, 4.0, 5.0]))
    assert not WithBuffers().weight.is_meta, "the hook must not outlive the call"


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_checkpoints_never_run_code(tmp_path):
    file, marker = tmp_path / "evil.pth", tmp_path / "ran"
    torch.save({"w": Evil(marker)}, file)
    with pytest.raises(UserError, match="code in checkpoints is never run"):
        read_checkpoint(file)
    file.write_bytes(pickle.dumps(Evil(marker)))
    with pytest.raises(UserError):
        read_checkpoint(file)
    assert not marker.exists()


def test_reading_checkpoints(tmp_path):
    state = {"w": torch.randn(4, 3)}
    write_safetensors(tmp_path / "a.safetensors", state)
    assert same(read_checkpoint(tmp_path / "a.safetensors"), state)
    for zipped in (True, False):
        torch.save(state, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
        assert same(read_checkpoint(tmp_path / "a.pth"), state)
    (tmp_path / "a.pth").write_bytes((tmp_path / "a.pth").read_bytes()[:50])
    with pytest.raises(UserError, match="is damaged"):
        read_checkpoint(tmp_path / "a.pth")
    torch.save([1], tmp_path / "list.pth")
    with pytest.raises(UserError, match="holds a list"):
        read_checkpoint(tmp_path / "list.pth")
    with pytest.raises(UserError, match="ends in '.txt'; a checkpoint ends in one of .safetensors, .pth"):
        read_checkpoint(tmp_path / "a.txt")
    with pytest.raises(UserError, match="there is no file"):
        read_safetensors(tmp_path / "b.safetensors")


# Published VAR


def published_generator(**changes):
    config = VARConfig.published(2, SCHEDULE, width=128, condition=ClassConfig(5), **{"heads": 4} | changes)
    head = CategoricalConfig(128, 16)
    generator, head_module = built(config), built(head)
    return (
        config,
        head,
        var.generator_to_published(generator.state_dict(), head_module.state_dict(), config),
        generator,
        head_module,
    )


@pytest.mark.parametrize("changes", [{}, {"shared_modulation": True}, {"cosine": False, "heads": 2}])
def test_var_generator_round_trip_is_exact(changes):
    config, head, published, generator, head_module = published_generator(**changes)
    assert published["pos_1LC"].shape == (1, 14, 128) and published["lvl_1L"].dtype == torch.int64
    assert var.generator_configs(published) == (config, head)
    state, head_state = var.generator_from_published(published)
    assert same(state, generator.state_dict()) and same(head_state, head_module.state_dict())
    assert same(var.generator_to_published(state, head_state, config), published)


def test_var_attention_mask_is_block_causal():
    mask = published_generator()[2]["attn_bias_for_masking"][0, 0]
    assert mask.shape == (14, 14) and mask[1:5, :5].eq(0).all() and mask[1:5, 5:].eq(-torch.inf).all()


@pytest.mark.parametrize("sharing, key", [(4, "qresi_ls.3.weight"), (1, "qresi.weight"), (0, "2.weight")])
def test_var_tokenizer_round_trip_is_exact(sharing, key):
    config = MultiScaleVQConfig(CONV, 16, 4, SCHEDULE, phi_sharing=sharing)
    state = built(config).state_dict()
    published = var.tokenizer_to_published(state, config)
    assert f"quantize.quant_resi.{key}" in published
    assert published["quantize.ema_vocab_hit_SV"].shape == (3, 16)
    assert var.tokenizer_config(published, SCHEDULE) == config
    again = var.tokenizer_from_published(published, config)
    assert same(again, state) and same(var.tokenizer_to_published(again, config), published)


def test_var_buffers_may_be_absent_but_key_biases_must_be_zero():
    _, _, published, generator, _ = published_generator()
    lean = {n: t for n, t in published.items() if "zero_k" not in n and n not in (var.LEVELS, var.MASK)}
    assert same(var.generator_from_published(lean, SCHEDULE)[0], generator.state_dict())
    with pytest.raises(UserError, match="no published schedule has 14 positions .*680"):
        var.generator_from_published(lean)
    published["blocks.1.attn.zero_k_bias"][0] = 1
    with pytest.raises(UserError, match="blocks.1.attn.zero_k_bias .* is not zero"):
        var.generator_from_published(published)


def test_var_left_over_and_missing_keys_are_named_with_the_nearest():
    published = published_generator()[2]
    published["blocks.0.attn.mat_qk.weight"] = published.pop("blocks.0.attn.mat_qkv.weight")
    with pytest.raises(
        UserError, match="missing blocks.0.attn.mat_qkv.weight .*nearest: blocks.0.attn.mat_qk.weight"
    ):
        var.generator_from_published(published)
    with pytest.raises(UserError, match="lacks class_emb.weight"):
        var.generator_from_published({})
    state = var.tokenizer_to_published(built(TOKENIZER).state_dict(), TOKENIZER)
    state["quant_conf.bias"] = torch.zeros(4)
    with pytest.raises(UserError, match=r"unexpected quant_conf.bias \(4,\)"):
        var.tokenizer_from_published(state, TOKENIZER)


def test_var_trainer_checkpoints_nest_both_parts(tmp_path):
    generator = published_generator()[2]
    tokenizer = var.tokenizer_to_published(built(TOKENIZER).state_dict(), TOKENIZER)
    whole = {"epoch": 3, "trainer": {"var_wo_ddp": generator, "vae_local": tokenizer, "var_opt": {"lr": 0.1}}}
    torch.save(whole, tmp_path / "ar-ckpt-last.pth")
    found = var.checkpoint_states(read_checkpoint(tmp_path / "ar-ckpt-last.pth"))
    assert same(found["generator"], generator) and same(found["tokenizer"], tokenizer)
    assert var.checkpoint_states(tokenizer).keys() == {"tokenizer"}
    assert var.checkpoint_states(generator).keys() == {"generator"}
    assert var.checkpoint_states({"lm_head": torch.zeros(1)}) == {}


# Published LlamaGen


def test_llamagen_round_trip_is_exact():
    config = LlamaGenConfig(2, 128, 2, 16, ClassConfig(5), hidden=384, zero_prefix=True)
    head = CategoricalConfig(128, 16, bias=False, init_scale=0.0)
    state, head_state = built(config).state_dict(), built(head).state_dict()
    published = llamagen.generator_to_published(state, head_state)
    assert published["layers.1.feed_forward.w3.weight"].equal(state["blocks.1.ffn.up.weight"])
    assert llamagen.generator_configs(published) == (config, head)
    again, head_again = llamagen.generator_from_published(published, (config, head))
    assert same(again, state) and same(head_again, head_state)
    del published["norm.weight"]
    with pytest.raises(UserError, match=r"missing norm.weight \(128,\)"):
        llamagen.generator_from_published(published, (config, head))
    with pytest.raises(UserError, match="lacks tok_embeddings"):
        llamagen.generator_configs({})
