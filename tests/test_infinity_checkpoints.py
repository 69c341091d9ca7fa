"""Published Infinity checkpoints there and back, and the reference cases of the published code."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.contracts import CASES
from varkit.cli.main import main
from varkit.errors import UserError
from varkit.generators.infinity import InfinityConfig
from varkit.generators.text import TextFeaturesConfig
from varkit.heads.bits import BitsConfig
from varkit.hub import verify_infinity
from varkit.hub.infinity import (
    checkpoint_states,
    generator_configs,
    generator_from_published,
    generator_to_published,
    tokenizer_config,
    tokenizer_from_published,
    tokenizer_to_published,
)
from varkit.hub.pipeline import Pipeline, Settings
from varkit.hub.published import save_published
from varkit.hub.verify import Case, verify_case
from varkit.plans.ratios import scales
from varkit.tokenizers.bitwise import BitwiseConfig
from varkit.tokenizers.conv import ConvConfig

REFERENCE = Path(__file__).parent / "reference"


def published(chunks: int, **form) -> tuple[dict, dict, dict]:
    torch.manual_seed(0)
    config = InfinityConfig(4, 24, 2, 8, TextFeaturesConfig(16, 6))
    generator, head = config.build(), BitsConfig(24, 8).build()
    ours, ours_head = generator.state_dict(), head.state_dict()
    return generator_to_published(ours, ours_head, chunks, **form), ours, ours_head


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("heads_last", [False, True])
def test_generators_go_there_and_back_exactly(chunks: int, heads_last: bool):
    state, ours, ours_head = published(chunks, heads_last=heads_last)
    assert state["cfg_uncond"].shape == (6, 16) and state["pos_start"].shape == (1, 1, 24)
    first = "blocks.0" if chunks == 1 else "block_chunks.0.module.0"
    assert state[f"{first}.sa.scale_mul_1H11"].shape == ((1, 1, 2, 1) if heads_last else (1, 2, 1, 1))
    assert not bool(state[f"{first}.ca.zero_k_bias"].any()) and state[f"{first}.ada_gss"].shape == (
        1,
        1,
        6,
        24,
    )
    config, head = generator_configs(state)
    assert config == InfinityConfig(4, 24, 2, 8, TextFeaturesConfig(16, 6)) and head == BitsConfig(24, 8)
    back, back_head = generator_from_published(state)
    for mine, again in ((ours, back), (ours_head, back_head)):
        assert list(mine) == list(again) and all(torch.equal(mine[k], again[k]) for k in mine)
    again = generator_to_published(back, back_head, chunks, heads_last=heads_last)
    assert again.keys() == state.keys() and all(torch.equal(again[k], state[k]) for k in state)


@pytest.mark.parametrize("nested", [True, False])
def test_tokenizers_go_there_and_back_exactly(nested: bool):
    conv = ConvConfig(32, (1, 2), res_blocks=2, latent_channels=8, attention=False)
    config = BitwiseConfig(conv, (1, 2), patch=2)
    ours = config.build().state_dict()
    state = tokenizer_to_published(ours, config, nested)
    assert ("encoder.down.0.block.0.conv1.conv.weight" in state) == nested
    assert state["quantizer.lfq.mask"].tolist() == [128, 64, 32, 16, 8, 4, 2, 1]
    noise = {"lpips.lin.weight": torch.zeros(2), "disc.conv.weight": torch.zeros(3)}
    found = checkpoint_states({"vae": state | noise})["tokenizer"]
    assert tokenizer_config(found, (1, 2), patch=2) == config
    back = tokenizer_from_published(found, config)
    assert list(back) == list(ours) and all(torch.equal(back[k], ours[k]) for k in ours)


def test_what_a_file_holds_is_told_by_its_keys():
    state, *_ = published(2)
    assert (
        set(checkpoint_states(state))
        == set(checkpoint_states({"trainer": {"gpt_fsdp": state}}))
        == {"generator"}
    )
    shard = {k: v for k, v in state.items() if k.startswith("block_chunks.1")}
    assert (
        set(checkpoint_states(shard)) == {"generator"}
        and checkpoint_states({"pos_1LC": torch.zeros(1)}) == {}
    )
    with pytest.raises(UserError, match=r"missing blocks\.0"):
        generator_from_published(
            {k: v for k, v in state.items() if "block_chunks.0.module.0.sa.proj" not in k}
        )
    spoiled = state | {"block_chunks.0.module.0.sa.zero_k_bias": torch.ones(24)}
    with pytest.raises(UserError, match="zero_k_bias"):
        generator_from_published(spoiled)


def test_convert_reads_and_writes_whole_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """`varkit convert`, with the generator in two shards, and back: the same tensors."""
    torch.manual_seed(0)
    conv = ConvConfig(32, (1, 1), res_blocks=2, latent_channels=4, attention=False)
    configs = {
        "tokenizer": BitwiseConfig(conv, scales(1.0, "0.06M").schedule, patch=2),
        "generator": InfinityConfig(4, 24, 2, 16, TextFeaturesConfig(16, 6)),
        "head": BitsConfig(24, 16),
        "plan": scales(1.0, "0.06M"),
    }  # fmt: skip
    pipeline = Pipeline({name: c.build() for name, c in configs.items()}, configs, Settings())
    names = [path.name for path in save_published(pipeline, tmp_path / "files")]
    assert names == ["infinity_vae_d16_f2_4_patchify.pth", "infinity_layer4.pth"]
    generator = torch.load(tmp_path / "files" / names[1])
    assert "block_chunks.3.module.0.ca.v_bias" in generator
    shards = ({k: v for k, v in generator.items() if ("chunks.2" in k) == second} for second in (False, True))
    for i, shard in enumerate(shards):
        torch.save(shard, tmp_path / f"shard{i}.bin")
    files = [str(tmp_path / "shard1.bin"), str(tmp_path / "files" / names[0]), str(tmp_path / "shard0.bin")]
    assert main(["convert", *files, "--out", str(tmp_path / "model")]) == 0
    found = Pipeline.from_folder(tmp_path / "model")
    assert found.configs == configs and found.settings.guidance == 3.0 and found.size == (64, 64)
    for part in ("tokenizer", "generator", "head"):
        ours, again = pipeline.parts[part].state_dict(), found.parts[part].state_dict()
        assert all(torch.equal(ours[k], again[k]) for k in ours) and list(ours) == list(again)
    assert (
        main(["convert", "--to", "published", "--out", str(tmp_path / "back"), str(tmp_path / "model")]) == 0
    )
    for name in names:
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "files" / name).read_bytes()
    capsys.readouterr()
    assert main(["convert", files[1], files[2], "--out", str(tmp_path / "half")]) == 2
    assert "missing" in capsys.readouterr().err
    text = CASES["infinity-text"].pipeline(Settings())
    with pytest.raises(UserError, match="text features over a bitwise tokenizer"):
        save_published(text, tmp_path / "text")


# Reference cases of the published code


@pytest.mark.parametrize("name", ["infinity_tiny", "infinity_tiny_patchify"])
def test_the_tiny_generators_compute_what_the_published_code_does(name: str, monkeypatch: pytest.MonkeyPatch):
    """Everything but the tokenizer's convolutions, whose only size is the released one."""
    case = Case.open(REFERENCE / f"{name}.json")
    conv = ConvConfig(4, (1, 1, 1, 1, 1), 1, case.entry("codebook_dim"), attention=False)
    patch = 1 + case.entry("apply_spatial_patchify")
    small = replace(conv, multipliers=conv.multipliers[: 6 - patch])
    monkeypatch.setattr(
        verify_infinity,
        "_tokenizer",
        lambda case, plan: BitwiseConfig(small, plan.schedule.sides, patch).build(),
    )
    monkeypatch.setattr(verify_infinity, "_compare_tokenizer", lambda case, tokenizer: None)
    with torch.no_grad():
        verify_infinity.verify(case)
    compared = {row.array: row.passed for row in case.rows if row.role == "compared"}
    assert compared.pop("greedy_image_bgr_uint8") is False, "of another tokenizer"
    assert compared == {
        name: True
        for name in ("scale_schedule", "logits", "greedy_bits_cfg_logits", "greedy_bits_cfg_layer_minus_2")
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["infinity_tiny", "infinity_tiny_patchify", "infinity_layer12"])
def test_reference_cases_pass_and_every_array_is_used(name: str):
    rows = verify_case(Case.open(REFERENCE / f"{name}.json"))
    assert all(row.passed for row in rows), rows
