"""MAR: the network, its autoencoder, its training, its published checkpoints and the effect that the paper claims."""

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.contracts import CASES, start, true_latents
from varkit.cli.main import main
from varkit.data.registry import open_dataset
from varkit.decode.loop import Model, decode, run
from varkit.draws import Draws
from varkit.errors import UserError
from varkit.generators.conditioning import ClassConfig
from varkit.generators.mar import HEADS, MARConfig, kept
from varkit.generators.text import TextConfig
from varkit.heads.base import Ask, Head
from varkit.heads.diffusion import DiffusionConfig
from varkit.hub import fill
from varkit.hub.pipeline import Pipeline, Settings, load
from varkit.hub.published import pipeline_from_published, save_published
from varkit.hub.states import build_empty
from varkit.hub.verify import Case, verify_case
from varkit.nn.attention import Packed
from varkit.plans.masked import MaskedConfig
from varkit.tokenizers.conv import ConvConfig
from varkit.tokenizers.kl import KLConfig
from varkit.train.generator_task import Forced, NextStepTask
from varkit.train.loop import load_run, train
from varkit.train.masked_lessons import MaskedLessons
from varkit.train.task import TrainConfig
from varkit.train.tokenizer_loss import TokenizerLossConfig
from varkit.train.tokenizer_task import ReconstructionTask
from varkit.train.tokens import Tokens

REFERENCE = Path(__file__).parent / "reference"


# The network


@pytest.mark.parametrize(
    ("size", "parameters"), [("base", 207_924_768), ("large", 478_326_304), ("huge", 942_403_104)]
)
def test_published_sizes_have_the_published_parameters(size: str, parameters: int):
    config = MARConfig.published(size)
    parts = config.fitted(KLConfig())
    modules = [build_empty(parts[name].build) for name in ("generator", "head")]
    assert sum(p.numel() for module in modules for p in module.parameters()) == parameters
    assert (parts["head"].depth, parts["head"].mlp_width) == HEADS[size]
    assert parts["plan"] == MaskedConfig((16, 16), 64, 64) and parts["generator"] == config


def half_known(batch: int = 2) -> tuple[Model, Tensor, Tensor, dict[str, Tensor]]:
    """A model, latents (B, 12, 8), which of them are known, and a prepared condition."""
    tokenizer, model = CASES["mar-class"].build()
    latents = true_latents(tokenizer, model, batch)["latents"]
    known = torch.rand(batch, 12, generator=torch.Generator().manual_seed(1)).argsort(dim=1) < 5
    with torch.no_grad():
        prepared = model.generator.prepare(CASES["mar-class"].conditions(batch))
    return model, latents, known, prepared


def vectors(model: Model, latents: Tensor, step, prepared) -> Tensor:
    blank = torch.zeros(len(latents), 8, latents.shape[-1])
    with torch.no_grad():
        return model.generator({"latents": torch.cat([blank, latents], dim=1)}, step, prepared, Packed(None))


def test_values_at_masked_positions_do_not_matter():
    model, latents, known, prepared = half_known()
    step = model.plan.step(known, torch.arange(12).expand(2, -1))
    other = torch.where(known[..., None], latents, 100.0)
    assert torch.equal(vectors(model, latents, step, prepared), vectors(model, other, step, prepared))
    seen = torch.where(known[..., None], latents + 1, latents)
    assert not torch.allclose(vectors(model, seen, step, prepared), vectors(model, latents, step, prepared))


def test_slots_may_come_in_any_order():
    model, latents, known, prepared = half_known()
    step = model.plan.step(known, torch.arange(12).expand(2, -1))
    order = torch.cat([torch.arange(8), 8 + torch.randperm(12, generator=torch.Generator().manual_seed(2))])
    feed = step.feed
    moved = replace(
        feed, ids=feed.ids[order], shows=feed.shows[:, order], coords=feed.coords[order], segment=feed.segment[order]
    )  # fmt: skip
    straight = vectors(model, latents, step, prepared)
    shuffled = vectors(model, latents[:, order[8:] - 8], replace(step, feed=moved), prepared)
    assert torch.allclose(shuffled, straight[:, order], atol=1e-5)


def test_the_encoder_takes_the_known_slots_alone():
    model, latents, known, prepared = half_known()
    step = model.plan.step(known, torch.arange(12).expand(2, -1))
    assert kept(step.feed, 2).sum(dim=1).tolist() == [13, 13]
    seen = {}

    def port(name):
        return lambda h, step, prepared: seen.setdefault(name, tuple(h.shape)) and h

    sites = [("input", 0), ("attention", 0), ("block", 0), ("attention", 1), ("block", 1), ("output", 0)]
    with torch.no_grad():
        fed = {"latents": torch.cat([torch.zeros(2, 8, 8), latents], dim=1)}
        model.generator(fed, step, prepared, Packed(None), {site: port(site) for site in sites})
    assert [seen[site][1] for site in sites] == [13, 13, 13, 20, 20, 20] and model.generator.depth == 2


def test_every_decoding_step_is_the_training_pass_over_the_same_mask():
    """There is nothing to cache: a step through the loop equals a packed pass over what is known then."""
    tokenizer, model = CASES["mar-class"].build(torch.float64)
    state = start(tokenizer, model, CASES["mar-class"].conditions(3))
    outputs, inputs = [], []

    def port(h, step, prepared):
        outputs.append((h, step))
        return h

    state.options = replace(state.options, ports={("output", 0): port})
    known = state.canvas.known.clone()
    for _ in decode(model, state):
        inputs.append(known)
        known = state.canvas.known.clone()
    latents = state.canvas.latents()
    assert len(outputs) == 5 and state.cache.nbytes == 0
    for (h, decoded), known in zip(outputs, inputs, strict=True):
        canvas = tokenizer.canvas(3)
        canvas.fill(latents)
        step = model.plan.step(known, decoded.target)
        fed = canvas.feed(step.feed)
        assert torch.equal(step.feed.shows, decoded.feed.shows) and torch.equal(step.read, decoded.read)
        with torch.no_grad():
            twin = model.generator(fed, step, state.prepared, Packed(None))
        assert (twin - h).abs().max() <= 1e-9 * h.std()


def test_a_prompt_is_the_same_however_far_it_is_padded():
    tokenizer, model = CASES["mar-text"].build()
    text = CASES["mar-text"].generator.condition
    assert isinstance(text, TextConfig)
    prompts = ["a red ring", "a"]
    with torch.no_grad():
        tight, loose = (
            model.generator.prepare({"text": text.encode(prompts, tight=tight)[None]})["buffer"]
            for tight in (True, False)
        )
    assert tight.shape == loose.shape == (1, 2, 8, 24) and torch.allclose(tight, loose, atol=1e-5)
    assert torch.allclose(tight[0, 1, 2:], tight[0, 1, -1:].expand(6, -1)), "no word, no difference"
    assert not torch.allclose(tight[0, 0, 2], tight[0, 0, -1])


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: MARConfig(1, 25, 2, ClassConfig(2)), "width 25.*2 heads"),
        (lambda: MARConfig(0, 24, 2, ClassConfig(2)), "depth is 0"),
        (lambda: MARConfig(1, 24, 2, ClassConfig(2), dropout=1.0), "dropout is 1.0"),
        (lambda: MARConfig(1, 24, 2, TextConfig(length=65)), "65 tokens.*buffer of 64"),
        (lambda: MARConfig.published("bass"), "'bass'.*base"),
        (lambda: KLConfig(patch=0), "patch is 0"),
        (lambda: KLConfig(scale=0.0), "scale is 0.0"),
        (lambda: KLConfig(kl=-1.0), "kl is -1.0"),
        (lambda: KLConfig().build().encode(torch.zeros(1, 3, 250, 256)), r"250, 256.*256, 256"),
    ],
)
def test_wrong_input_is_one_clear_line(make, says):
    with pytest.raises(UserError, match=says) as error:
        build_empty(make)
    assert "\n" not in str(error.value)


# The autoencoder


def small(patch: int = 1, **options) -> KLConfig:
    conv = ConvConfig(channels=16, multipliers=(1, 2), res_blocks=1, latent_channels=4, groups=4)
    return KLConfig(conv, grid=(4, 6), patch=patch, **options)


def test_grids_need_not_be_square_and_patches_fold_channel_first():
    torch.manual_seed(0)
    plain, folded = small().build().eval(), replace(small(2), grid=(2, 3)).build().eval()
    folded.load_state_dict(plain.state_dict())
    images = torch.rand(2, 3, 8, 12) * 2 - 1
    one, four = plain.encode(images)["latents"], folded.encode(images)["latents"]
    assert one.shape == (2, 24, 4) and four.shape == (2, 6, 16) and folded.stride == 4
    grid = one.mT.unflatten(2, (4, 6))
    assert torch.equal(four[:, 1], grid[:, :, 0:2, 2:4].flatten(1))  # (channel, row, column)
    assert torch.equal(folded.decode({"latents": four}), plain.decode({"latents": one}))
    assert folded.decode({"latents": four}).shape == images.shape


def test_latents_are_the_scaled_mean_or_the_draw_that_noise_stands_for():
    torch.manual_seed(0)
    tokenizer = small(scale=0.5).build().eval()
    images, noise = torch.rand(2, 3, 8, 12) * 2 - 1, torch.randn(2, 4, 4, 6)
    with torch.no_grad():
        posterior = tokenizer.posterior(images)
    drawn = 0.5 * (posterior.mean + torch.exp(0.5 * posterior.log_variance) * noise)
    assert torch.equal(tokenizer.encode(images)["latents"], 0.5 * posterior.mean.flatten(2).mT)
    assert torch.allclose(tokenizer.encode(images, noise=noise)["latents"], drawn.flatten(2).mT, atol=1e-6)
    normals = torch.distributions.Normal(posterior.mean, torch.exp(0.5 * posterior.log_variance))
    kl = torch.distributions.kl_divergence(normals, torch.distributions.Normal(0.0, 1.0))
    assert torch.allclose(posterior.divergence(), kl.flatten(1).sum(dim=1), rtol=1e-5)


def test_the_autoencoder_trains_and_finds_its_scale(tmp_path: Path):
    torch.manual_seed(0)
    conv = ConvConfig(
        channels=8, multipliers=(1, 2), res_blocks=1, latent_channels=4, attention=False, groups=4
    )
    tokenizer = KLConfig(conv, grid=4, kl=1e-3).build()
    task = ReconstructionTask(tokenizer, open_dataset("digits"), TokenizerLossConfig(), 8, {})
    before = task.validate()
    config = TrainConfig(
        steps=150, lr=5e-3, ema=0.9, validate_every=1000, checkpoint_every=1000, dtype="bfloat16"
    )
    result = train(task, config, tmp_path / "run", quiet=True)
    assert result.metrics["psnr"] > before["psnr"] + 3 and "usage" not in before
    trained = replace(tokenizer.config).build().eval()
    trained.load_state_dict(load_run(tmp_path / "run")["tokenizer"])
    latents = trained.encode(next(iter(task._held_out(32))))["latents"]
    assert 0.75 < latents.std().item() < 1.25, "latents have unit deviation"
    assert trained.scale.item() != pytest.approx(0.2325, rel=0.1)


# Training the generator


def paired_tokens(positions: int = 12, channels: int = 8, items: int = 64) -> Tokens:
    """Each label always comes with the same vectors."""
    table = np.random.default_rng(0).standard_normal((5, positions, channels)).astype(np.float32)
    labels = np.arange(items) % 5
    return Tokens({"latents": table[labels]}, labels.astype(np.int64))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_learns_through_the_one_trainer_and_a_pipeline_draws(dtype: str, tmp_path: Path):
    case = CASES["mar-class"]
    torch.manual_seed(0)
    parts = {name: getattr(case, name).build() for name in ("tokenizer", "generator", "head", "plan")}
    tokens = paired_tokens()
    task = NextStepTask(
        Forced(**parts, lessons=MaskedLessons(parts["tokenizer"], parts["plan"])), tokens, tokens, 16, {}
    )
    before = task.validate()
    assert set(before) == {"loss"} and task.validate() == before
    config = TrainConfig(steps=60, lr=5e-3, dtype=dtype, ema=0.8, validate_every=1000, checkpoint_every=1000)
    result = train(task, config, tmp_path / "run", quiet=True)
    assert result.metrics["loss"] < 0.9 * before["loss"]
    configs = {name: getattr(case, name) for name in parts}
    pipeline = Pipeline(parts, configs, Settings(guidance=2.0, ramp=True))
    pictures = pipeline.generate([0, 1], seed=1)
    assert [picture.size for picture in pictures] == [(16, 12)] * 2
    assert len(list(pipeline.stream([0], temperature=(0.5, 1.0)))) == 5


class Regression(Head):
    """The plain squared error that the paper compares with: one value for each vector."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.out = nn.Linear(width, channels)

    def loss(self, h: Tensor, targets: dict[str, Tensor], draws=None) -> Tensor:
        return (self.out(h) - targets["latents"]).square().mean(dim=-1)

    def sample(self, h: Tensor, ask: Ask) -> dict[str, Tensor]:
        return {"latents": ask.combine(self.out(h), ask.progress)}


def energy_distance(a: Tensor, b: Tensor) -> float:
    """2 E|a - b| - E|a - a'| - E|b - b'| of rows."""
    return (2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean()).item()


@pytest.mark.slow
def test_the_diffusion_head_keeps_modes_that_regression_averages(tmp_path: Path):
    """The paper's claim on a toy: at an equal backbone the diffusion head is much closer to a bimodal truth."""
    rng = np.random.default_rng(0)
    count = 4096
    signs = rng.integers(0, 2, (count, 4, 1)) * 2.0 - 1
    signs[:, 1:2] = signs[:, :1]  # two positions agree, so that the backbone has something to say
    latents = (signs * np.array([1.0, -0.5]) + 0.1 * rng.standard_normal((count, 4, 2))).astype(np.float32)
    tokens = Tokens({"latents": latents}, np.zeros(count, np.int64))
    conv = ConvConfig(channels=8, multipliers=(1,), res_blocks=1, latent_channels=2, attention=False)
    tokenizer, plan = KLConfig(conv, grid=2).build(), MaskedConfig((2, 2), 4, prefix=4).build()
    config = MARConfig(1, 32, 2, ClassConfig(1), 2, 2, buffer=4, dropout=0.0, attention_dropout=0.0)
    distances = {}
    for name in ("diffusion", "regression"):
        torch.manual_seed(0)
        generator = config.build()
        head = (
            DiffusionConfig(32, 2, mlp_width=64, depth=2, noisiest=990).build()
            if name == "diffusion"
            else Regression(32, 2)
        )
        lessons = MaskedLessons(tokenizer, plan, least=0.3)
        task = NextStepTask(Forced(tokenizer, generator, head, plan, lessons), tokens, tokens, 128, {})
        settings = TrainConfig(steps=1500, lr=3e-3, ema=0.99, validate_every=10_000, checkpoint_every=10_000)
        train(task, settings, tmp_path / name, quiet=True)
        averaged = load_run(tmp_path / name)
        generator.load_state_dict(averaged["generator"])
        head.load_state_dict(averaged["head"])
        model = Model(plan, generator.eval(), {"main": head.eval()})
        state = run(
            model, start(tokenizer, model, {"label": torch.zeros(1, 1000, dtype=torch.int64)}, guidance=1.0)
        )
        drawn = state.canvas.latents()["latents"].flatten(1)
        distances[name] = energy_distance(drawn, torch.from_numpy(latents[:1000]).flatten(1))
    assert distances["diffusion"] < 0.3 * distances["regression"], distances


# Published checkpoints


def published_pipeline(seed: int = 0) -> Pipeline:
    """A tiny model that the published layout can express."""
    conv = ConvConfig(channels=16, multipliers=(1, 2), res_blocks=1, latent_channels=2, groups=32)
    configs = {
        "tokenizer": KLConfig(conv, grid=3, patch=2),
        "generator": MARConfig(1, 64, 1, ClassConfig(5), 3, channels=8, buffer=4),
        "head": DiffusionConfig(64, 8, mlp_width=16, depth=2, sampling_steps=5),
        "plan": MaskedConfig((3, 3), 9, prefix=4),
    }
    torch.manual_seed(seed)
    parts = {name: config.build() for name, config in configs.items()}
    return Pipeline(parts, configs, Settings(guidance=3.0, ramp=True))


def tensors_of(pipeline: Pipeline) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": value
        for name in ("tokenizer", "generator", "head")
        for key, value in pipeline.parts[name].state_dict().items()
    }


def test_published_files_and_back_are_exact(tmp_path: Path, capsys):
    ours = published_pipeline()
    ours.save(tmp_path / "ours")
    assert (
        main(["convert", "--to", "published", "--out", str(tmp_path / "files"), str(tmp_path / "ours")]) == 0
    )
    files = [tmp_path / "files" / name for name in ("kl16.ckpt", "checkpoint-last.pth")]
    assert capsys.readouterr().out.splitlines() == [str(file) for file in files]
    inside = torch.load(files[1], weights_only=True)
    assert inside["model_ema"]["fake_latent"].shape == (1, 64) and "model" in inside
    assert main(["convert", "--out", str(tmp_path / "model"), *map(str, files[::-1])]) == 0
    back = load(tmp_path / "model")
    theirs = tensors_of(ours)
    assert tensors_of(back).keys() == theirs.keys()
    assert all(torch.equal(value, theirs[key]) for key, value in tensors_of(back).items())
    told = {**back.configs, "head": replace(back.configs["head"], sampling_steps=5)}
    assert told == ours.configs and back.settings == Settings(guidance=3.0, ramp=True)
    assert back.about == {"converted_from": ["checkpoint-last.pth", "kl16.ckpt"]}
    save_published(back, tmp_path / "again")
    for file in files:
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


def test_trainer_checkpoints_give_the_averaged_weights_and_run_nothing(tmp_path: Path):
    save_published(published_pipeline(), tmp_path / "files")
    averaged = torch.load(tmp_path / "files" / "checkpoint-last.pth", weights_only=True)["model_ema"]
    whole = {
        "model": {name: tensor + 1 for name, tensor in averaged.items()},
        "model_ema": averaged,
        "optimizer": {"state": {}, "param_groups": [{"lr": 1e-4}]},
        "epoch": 3,
        "scaler": {"scale": 1.0},
        "args": argparse.Namespace(batch_size=64, blr=1e-4, output_dir="./output"),
    }
    file = tmp_path / "checkpoint.pth"
    torch.save(whole, file)
    found = pipeline_from_published([file, tmp_path / "files" / "kl16.ckpt"])
    theirs = tensors_of(published_pipeline())
    assert all(torch.equal(value, theirs[key]) for key, value in tensors_of(found).items())
    torch.save(whole | {"args": Path("x")}, file)
    with pytest.raises(UserError, match=r"holds more than tensors \(pathlib"):
        pipeline_from_published([file, tmp_path / "files" / "kl16.ckpt"])


def spoiled(tmp_path: Path, change) -> list[Path]:
    """Both published files, the generator's state changed."""
    save_published(published_pipeline(), tmp_path / "files")
    file = tmp_path / "files" / "checkpoint-last.pth"
    state = torch.load(file, weights_only=True)["model"]
    change(state)
    torch.save(state, file)
    return [file, tmp_path / "files" / "kl16.ckpt"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s.pop("mask_token"), "missing mask_token"),
        (lambda s: s.pop("fake_latent"), "lacks fake_latent"),
        (lambda s: s.update({"z_proj.weight": torch.zeros(64, 10)}), "10 numbers, no square patches"),
        (lambda s: s.update({"decoder_blocks.1.norm1.weight": torch.zeros(64)}), r"differ in depth \[1, 2\]"),
        (lambda s: s.update({"diffusion_pos_embed_learned": torch.zeros(1, 8, 64)}), "8 positions"),
    ],
)
def test_damaged_checkpoints_are_one_clear_line(tmp_path: Path, change, says):
    with pytest.raises(UserError, match=says) as error:
        pipeline_from_published(spoiled(tmp_path, change))
    assert "\n" not in str(error.value)


def test_what_the_published_layout_cannot_say_is_refused(tmp_path: Path):
    pipeline = published_pipeline()
    pipeline.tokenizer.scale.fill_(0.5)
    with pytest.raises(UserError, match="scaled by 0.5"):
        save_published(pipeline, tmp_path / "a")
    other = published_pipeline()
    other.configs["generator"] = replace(other.configs["generator"], heads=4)
    with pytest.raises(UserError, match="heads of the generator is 4"):
        save_published(other, tmp_path / "b")
    assert not list(tmp_path.iterdir())


def test_files_of_two_families_are_refused(tmp_path: Path):
    from tests.models import tiny_pipeline

    save_published(tiny_pipeline(ClassConfig(3)), tmp_path / "var")
    save_published(published_pipeline(), tmp_path / "mar")
    files = [tmp_path / "var" / "var_d2.pth", tmp_path / "mar" / "kl16.ckpt"]
    with pytest.raises(UserError, match="the tokenizer is MAR's and the generator VAR's"):
        pipeline_from_published(files)
    with pytest.raises(UserError, match="no tokenizer.*kl16.ckpt"):
        pipeline_from_published([tmp_path / "mar" / "checkpoint-last.pth"])


# Reference vectors


def test_the_tiny_case_passes_and_every_array_is_used():
    rows = verify_case(Case.open(REFERENCE / "mar_tiny.json"))
    assert all(row.passed for row in rows), rows
    with np.load(REFERENCE / "mar_tiny.npz") as arrays:
        assert {row.array for row in rows} == set(arrays)
    compared = {row.array for row in rows if row.role == "compared"}
    assert {"mask", "z", "z_eval", "mse", "vb", "loss", "net_out", "head_x_previous"} < compared
    assert all(row.error < 1e-4 for row in rows if row.error is not None)


@pytest.mark.parametrize(
    ("key", "first"),
    [
        ("encoder_blocks.1.mlp.fc1.bias", "z"),
        ("diffloss.net.res_blocks.1.in_ln.bias", "net_out"),
        ("diffloss.net.time_embed.mlp.2.bias", "head_x_previous"),
    ],
)
def test_a_wrong_weight_is_noticed(monkeypatch, key: str, first: str):
    true = fill.fill_array
    monkeypatch.setattr(fill, "fill_array", lambda n, *rest: true(n, *rest) * (1.5 if n == key else 1))
    passed = {row.array: row.passed for row in verify_case(Case.open(REFERENCE / "mar_tiny.json"))}
    assert not passed[first]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mar_kl16", "mar_kl16_256", "mar_base_256"])
def test_released_sizes_pass(name: str):
    file = REFERENCE / f"{name}.json"
    if not file.exists():
        pytest.skip("the large reference cases are not here")
    rows = verify_case(Case.open(file))
    assert all(row.passed for row in rows), rows
    if name == "mar_base_256":
        parts = json.loads(file.read_text())["state"].values()
        assert sum(math.prod(shape) for shape, _ in parts) == 207_924_768


def test_draws_of_a_run_do_not_depend_on_how_many_are_drawn_with_it():
    """Orders and noise come from each sample's stream: sample 2 alone is sample 2 of three."""
    pipeline = published_pipeline()
    three = run(pipeline.model, pipeline.start([0, 1, 2], seed=4))
    alone = run(pipeline.model, pipeline.start([2], seed=4, samples=[2]))
    ours, theirs = (s.canvas.latents()["latents"] for s in (alone, three))
    assert (ours[0] - theirs[2]).abs().max() < 1e-3 * theirs.std()
    assert alone.draws.to_json() == Draws.start(4, [2]).to_json()
