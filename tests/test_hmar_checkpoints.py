"""HMAR's published layout: both ways, stages split and merged, and the reference cases."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.models import CODE_WIDTH, CODES, SCHEDULE, WIDTH
from varkit.errors import UserError
from varkit.generators.conditioning import ClassConfig
from varkit.generators.hmar import HMARConfig
from varkit.heads.categorical import CategoricalConfig
from varkit.hub import hmar, var
from varkit.hub.pipeline import Pipeline, Settings
from varkit.hub.published import pipeline_from_published, save_published
from varkit.hub.states import build_empty, load_state
from varkit.hub.verify import Case, verify_case
from varkit.nn.attention import Packed
from varkit.plans.refined import RefinedConfig
from varkit.plans.scales import ScalePlan
from varkit.plans.schedule import Schedule
from varkit.tokenizers.conv import ConvConfig
from varkit.tokenizers.multiscale_vq import MultiScaleVQConfig

REFERENCE = Path(__file__).parent / "reference"
COUNTS = ((1,), (1, 3), (1, 1, 2, 5))


def tiny(seed: int = 0) -> Pipeline:
    """Random weights, also in the refining branch; pictures of 6 x 6 pixels."""
    conv = ConvConfig(channels=8, multipliers=(1, 2), res_blocks=1, latent_channels=8)
    generator = HMARConfig(3, WIDTH, 4, SCHEDULE, CODE_WIDTH, ClassConfig(3), mask_depth=2)
    configs = {
        "tokenizer": MultiScaleVQConfig(conv, CODES, CODE_WIDTH, SCHEDULE),
        "generator": generator,
        "head": CategoricalConfig(WIDTH, CODES),
        "head_mask": CategoricalConfig(WIDTH, CODES),
        "plan": RefinedConfig(SCHEDULE, counts=COUNTS),
    }
    torch.manual_seed(seed)
    parts = {name: config.build() for name, config in configs.items()}
    for parameter in [*parts["generator"].parameters(), *parts["head_mask"].parameters()]:
        torch.nn.init.normal_(parameter, std=0.1)
    return Pipeline(parts, configs, Settings(guidance=2.0), {"data": "none"})


def published(pipeline: Pipeline) -> dict[str, torch.Tensor]:
    """The merged checkpoint of a pipeline."""
    states = {name: pipeline.parts[name].state_dict() for name in ("generator", "head", "head_mask")}
    return hmar.generator_to_published(states, pipeline.configs["generator"])


@pytest.mark.parametrize("name", ["hmar_tiny", pytest.param("hmar_d16_256", marks=pytest.mark.slow)])
def test_reference_cases_pass_and_every_array_is_used(name):
    rows = verify_case(Case.open(REFERENCE / f"{name}.json"))
    assert all(row.passed for row in rows), [row for row in rows if not row.passed]
    with np.load(REFERENCE / f"{name}.npz") as arrays:
        assert {row.array for row in rows} == set(arrays)
    inputs = {row.array for row in rows if row.role == "input"}
    assert inputs <= {"labels", "infer_labels", "sampled_gumbel"} | {
        f"masked_positions_{i}" for i in range(3)
    }


def test_published_files_come_back_as_the_same_model(tmp_path):
    pipeline = tiny()
    files = save_published(pipeline, tmp_path / "published")
    assert [file.name for file in files] == ["vae_ch8v16z4.pth", "hmar-d3.pth"]
    loaded = pipeline_from_published(files)
    assert loaded.configs["plan"].counts == COUNTS
    for name in ("tokenizer", "generator", "head", "head_mask"):
        theirs = loaded.parts[name].state_dict()
        assert all(torch.equal(theirs[k], v) for k, v in pipeline.parts[name].state_dict().items())
    loaded.settings = pipeline.settings
    for a, b in zip(pipeline.generate([0, 2]), loaded.generate([0, 2]), strict=True):
        assert a.tobytes() == b.tobytes()


def test_the_names_are_the_published_ones():
    case = Case.open(REFERENCE / "hmar_tiny.json")
    config, _ = hmar.generator_configs(case.state("state"), (1, 2, 3, 4))
    assert (config.depth, config.mask_depth) == (3, 2)
    states = hmar.generator_from_published(case.state("state"), (1, 2, 3, 4))
    ours = hmar.generator_to_published(states, config)
    shapes = {name: [list(t.shape), str(t.dtype).removeprefix("torch.")] for name, t in ours.items()}
    assert shapes == case.entry("state")


def test_biases_of_keys_must_be_zero():
    state = published(tiny())
    state["mask_blocks.1.attn.zero_k_bias"][0] = 1
    with pytest.raises(UserError, match="mask_blocks.1.attn.zero_k_bias of the HMAR checkpoint is not zero"):
        hmar.generator_from_published(state)


def test_splitting_and_merging_are_inverse():
    merged = published(tiny())
    first, second = hmar.split(merged)
    again = hmar.merge(first, second, own=2)
    assert again.keys() == merged.keys()
    assert all(torch.equal(again[name], merged[name]) for name in merged)
    assert first.keys() - second.keys() == {"word_embed.bias"}
    assert second.keys() - first.keys() == {"word_embed_bias", "mask_embed.weight"}
    with pytest.raises(UserError, match="3 blocks of a branch"):
        hmar.merge(first, second, own=3)


def test_stages_have_the_published_names():
    case = Case.open(REFERENCE / "hmar_tiny.json")
    left_out = set(case.entry("not_filled"))
    first, second = hmar.split(case.state("state"))
    assert first.keys() == case.entry("nsp_state").keys() - left_out
    assert second.keys() == case.entry("mp_state").keys() - left_out


def test_first_guesses_of_a_merged_model_are_those_of_stage_one():
    pipeline = tiny()
    first, _ = hmar.split(published(pipeline))
    config, head_config = var.generator_configs(first, SCHEDULE)
    generator, head = build_empty(config.build), build_empty(head_config.build)
    state, head_state = var.generator_from_published(first, SCHEDULE)
    load_state(generator, state, "stage 1")
    load_state(head, head_state, "its head")
    step = ScalePlan(Schedule.parse(SCHEDULE), history=0).training_step()
    canvas = pipeline.tokenizer.canvas(2)
    canvas.fill({"ids": torch.randint(0, CODES, (2, 14), generator=torch.Generator().manual_seed(1))})
    fed, logits = canvas.feed(step.feed), []
    with torch.no_grad():
        for network, reads in ((generator.eval(), head), (pipeline.generator, pipeline.model.heads["main"])):
            prepared = network.prepare({"label": torch.tensor([[0, 2]])})
            logits.append(reads.logits(network(fed, step, prepared, Packed.of(step))))
    assert torch.equal(*logits)


def test_a_generator_alone_asks_for_vars_tokenizer(tmp_path):
    files = save_published(tiny(), tmp_path / "published")
    with pytest.raises(UserError, match="no tokenizer is in .*vae_ch160v4096z32.pth"):
        pipeline_from_published(files[1:])


def test_what_the_layout_cannot_say_is_refused(tmp_path):
    pipeline = tiny()
    config = pipeline.configs["generator"]
    pipeline.configs["generator"] = HMARConfig(
        **(asdict(config) | {"condition": config.condition, "norm_eps": 1e-5})
    )
    with pytest.raises(UserError, match="norm_eps"):
        save_published(pipeline, tmp_path / "published")
