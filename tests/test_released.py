"""Published checkpoints by name: what is fetched, what is told without a network, and folders of published files."""

import fnmatch
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from tests.models import tiny_pipeline
from tests.test_llamagen_checkpoints import state_of as llamagen_states
from tests.test_llamagen_checkpoints import tiny as llamagen_pipeline
from tests.test_mar import published_pipeline as mar_pipeline
from varkit.cli.main import main
from varkit.errors import UserError
from varkit.generators.conditioning import ClassConfig
from varkit.generators.infinity import InfinityConfig
from varkit.generators.prompt import TextFeaturesConfig
from varkit.heads.bits import BitsConfig
from varkit.hub.pipeline import Pipeline, Settings, load
from varkit.hub.published import pipeline_from_published, save_published
from varkit.hub.released import RELEASED, VARIANTS, Repository
from varkit.plans.ratios import scales
from varkit.tokenizers.bitwise import BitwiseConfig
from varkit.tokenizers.conv import ConvConfig

TOKENIZER = "vae_ch160v4096z32.pth"


def write_var(folder: Path, *names: str) -> Path:
    """A tokenizer and generators of two blocks."""
    tokenizer, generator = save_published(tiny_pipeline(ClassConfig(3)), folder)
    tokenizer.rename(folder / TOKENIZER)
    for name in names:
        shutil.copy(generator, folder / name)
    generator.unlink()
    return folder


def write_mar(folder: Path) -> Path:
    """Both files, the generator in the folder of its size."""
    files = {file.name: file for file in save_published(mar_pipeline(), folder)}
    (folder / "mar_base").mkdir()
    files["checkpoint-last.pth"].rename(folder / "mar_base" / "checkpoint-last.pth")
    return folder


def write_infinity(folder: Path) -> Path:
    """A patched tokenizer's model, the generator in two shards beside their index."""
    torch.manual_seed(0)
    plan = scales(1.0, "0.06M")
    conv = ConvConfig(32, (1, 1), res_blocks=2, latent_channels=4, attention=False)
    generator = InfinityConfig(4, 24, 2, 16, TextFeaturesConfig(16, 6))
    configs = {
        "tokenizer": BitwiseConfig(conv, plan.schedule, patch=2),
        "generator": generator,
        "head": BitsConfig(24, 16),
        "plan": plan,
    }
    parts = {name: config.build() for name, config in configs.items()}  # type: ignore[attr-defined]
    tokenizer, whole = save_published(Pipeline(parts, configs, Settings()), folder)
    tokenizer.rename(folder / "infinity_vae_d56_f8_14_patchify.pth")
    state = torch.load(whole, weights_only=True)
    whole.unlink()
    (folder / "infinity_8b_weights").mkdir()
    for i in range(2):
        shard = {n: t for k, (n, t) in enumerate(state.items()) if k % 2 == i}
        torch.save(shard, folder / "infinity_8b_weights" / f"pytorch_model-0000{i + 1}-of-00002.bin")
    (folder / "infinity_8b_weights" / "pytorch_model.bin.index.json").write_text("{}")
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that stands for what is on the hub; what is fetched is copied from it into the folder `cache`."""
    remote, cache = tmp_path / "hub", tmp_path / "cache"
    cache.mkdir()

    def snapshot_download(
        name: str, revision: str | None = None, allow_patterns: list[str] | None = None
    ) -> str:
        if not (remote / name).is_dir():
            raise LocalEntryNotFoundError("no network\nand nothing in the cache")
        for file in (remote / name).rglob("*"):
            relative = str(file.relative_to(remote / name))
            if file.is_file() and any(fnmatch.fnmatch(relative, pattern) for pattern in allow_patterns or []):
                (cache / relative).parent.mkdir(exist_ok=True)
                shutil.copy(file, cache / relative)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return remote


def same(a: Pipeline, b: Pipeline) -> bool:
    return a.configs == b.configs and all(
        torch.equal(p, q)
        for name in ("tokenizer", "generator", "head")
        for p, q in zip(a.parts[name].parameters(), b.parts[name].parameters(), strict=True)
    )


def test_a_variant_is_fetched_alone_and_converted(hub: Path, tmp_path: Path):
    files = write_var(hub / "FoundationVision" / "var", "var_d16.pth", "var_d20.pth")
    found = Pipeline.from_pretrained("FoundationVision/var", variant="d16")
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [TOKENIZER, "var_d16.pth"]
    assert same(found, pipeline_from_published([files / TOKENIZER, files / "var_d16.pth"]))
    assert same(found, Pipeline.from_pretrained("foundationvision/VAR", variant="d16"))
    assert found.generate([1], seed=0)[0].size == found.size[::-1]
    half = Pipeline.from_pretrained("FoundationVision/var", variant="d16", dtype="bfloat16")
    assert {p.dtype for p in half.generator.parameters()} == {torch.bfloat16}


def test_shards_come_as_a_folder(hub: Path, tmp_path: Path):
    write_infinity(hub / "FoundationVision" / "Infinity")
    found = Pipeline.from_pretrained("FoundationVision/Infinity", variant="8b")
    assert len(list((tmp_path / "cache" / "infinity_8b_weights").iterdir())) == 3
    assert found.configs["generator"].depth == 4 and found.settings.guidance == 3.0
    assert found.schedule.sides[-1] == (16, 16)
    assert found.about["converted_from"][-1] == "infinity_8b_weights/pytorch_model-00002-of-00002.bin"
    with pytest.raises(UserError, match=r"'8b_512x512' of .*no infinity_8b_512x512_weights/ in its cache"):
        Pipeline.from_pretrained("FoundationVision/Infinity", variant="8b_512x512")


@pytest.mark.parametrize(
    "repository, variant, tokenizer",
    [
        ("FoundationVision/LlamaGen", "c2i_B_256", "vq_ds16_c2i.pt"),
        ("peizesun/llamagen_t2i", "t2i_XL_stage1_256", "vq_ds16_t2i.pt"),
    ],
)
def test_llamagens_repositories(repository: str, variant: str, tokenizer: str, hub: Path):
    folder = hub / repository
    folder.mkdir(parents=True)
    generator, autoencoder = llamagen_states(llamagen_pipeline(variant[:3]))
    torch.save({"model": generator}, folder / f"{variant}.pt")
    torch.save({"model": autoencoder}, folder / tokenizer)
    found = Pipeline.from_pretrained(repository, variant)
    assert same(found, pipeline_from_published([folder / f"{variant}.pt", folder / tokenizer]))


def test_a_variant_may_have_a_file_in_another_repository(hub: Path, monkeypatch: pytest.MonkeyPatch):
    """SAR's generators go with FlexVAR's tokenizer; here VAR's stand for both."""
    here, there = (write_var(hub / "someone" / name, "g.pth") for name in ("here", "there"))
    (here / TOKENIZER).unlink()
    released = Repository({"both": (TOKENIZER, "g.pth")}, elsewhere={TOKENIZER: "someone/there"})
    monkeypatch.setitem(RELEASED, "someone/here", released)
    found = Pipeline.from_pretrained("someone/here", "both")
    assert same(found, pipeline_from_published([there / TOKENIZER, here / "g.pth"]))
    (there / TOKENIZER).unlink()
    shutil.rmtree(hub.parent / "cache")
    (hub.parent / "cache").mkdir()
    with pytest.raises(UserError, match=f"{TOKENIZER} from https://huggingface.co/someone/there/"):
        Pipeline.from_pretrained("someone/here", "both")


def test_a_folder_of_published_files_is_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = write_var(tmp_path / "var", "var_d16.pth")
    wanted = pipeline_from_published([folder / TOKENIZER, folder / "var_d16.pth"])
    for found in (
        load(folder),
        Pipeline.from_pretrained(str(folder)),
        Pipeline.from_pretrained(str(folder), "d16"),
    ):
        assert same(found, wanted)
    out = tmp_path / "x.png"
    assert (
        main(["generate", "--model", str(folder), "--label", "1", "--dtype", "bfloat16", "--out", str(out)])
        == 0
    )
    assert capsys.readouterr().out == f"{out}\n" and out.stat().st_size > 0
    assert same(
        Pipeline.from_pretrained(str(write_mar(tmp_path / "mar"))), mar_pipeline_as_published(tmp_path)
    )
    own = tmp_path / "own"  # names that nobody publishes
    save_published(tiny_pipeline(ClassConfig(3)), own)
    assert same(load(own), tiny_pipeline(ClassConfig(3)))


def mar_pipeline_as_published(tmp_path: Path) -> Pipeline:
    return pipeline_from_published(
        [tmp_path / "mar" / "kl16.ckpt", tmp_path / "mar" / "mar_base" / "checkpoint-last.pth"]
    )


def test_the_hubs_own_cache_serves_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The real library, told to stay offline."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    root = tmp_path / "models--FoundationVision--var"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("0" * 40)
    files = write_var(root / "snapshots" / ("0" * 40), "var_d16.pth")
    found = Pipeline.from_pretrained("FoundationVision/var", "d16")
    assert same(found, pipeline_from_published([files / TOKENIZER, files / "var_d16.pth"]))
    with pytest.raises(UserError, match="no var_d20.pth in its cache"):
        Pipeline.from_pretrained("FoundationVision/var", "d20")


def test_names_tell_the_pixels_to_draw_unless_asked(tmp_path: Path):
    """Shapes do not, and both of 8B have the same. Tokens of 4 pixels here stand for the published 16."""
    folder = write_infinity(tmp_path / "files")
    (folder / "infinity_8b_weights").rename(folder / "infinity_8b_512x512_weights")
    large = load(folder)
    assert large.configs["plan"] == scales(1.0, "0.25M")
    _, written = save_published(large, tmp_path / "back")
    assert written.name == "infinity_layer4_512x512.pth"
    assert load(tmp_path / "back").configs["plan"] == large.configs["plan"]
    written.rename(written.with_name("infinity_layer4_123x123.pth"))  # no size of Infinity's
    assert load(tmp_path / "back").configs["plan"] == scales(1.0, "0.06M")


def test_a_command_takes_a_name_on_the_hub(
    hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
):
    monkeypatch.chdir(tmp_path)
    write_var(hub / "FoundationVision" / "var", "var_d16.pth")
    words = ["generate", "--label", "1", "--out", "a.png", "--model"]
    assert main([*words, "FoundationVision/var:d16"]) == 0 and Path("a.png").is_file()
    assert main(["bench", "foundationvision/var:d16", "--rounds", "1", "--json"]) == 0
    tiny_pipeline(ClassConfig(3)).save(hub / "someone" / "own")
    assert main([*words, "someone/own"]) == 0
    for name, says in (
        (
            "FoundationVision/var",
            "choose one by variant=, or FoundationVision/var:VARIANT on the command line",
        ),
        ("FoundationVision/var:d17", "unknown variant 'd17'"),
        ("someone/else", "could not be fetched from the Hugging Face hub (no network)"),
    ):
        capsys.readouterr()
        assert main([*words, name]) == 2
        said = capsys.readouterr().err
        assert says in said and said.count("\n") == 1


# What is told


@pytest.mark.parametrize("name", RELEASED)
def test_without_a_network_every_file_is_named_with_its_address(name: str, hub: Path):
    for variant, files in RELEASED[name].variants.items():
        with pytest.raises(UserError) as caught:
            Pipeline.from_pretrained(name, variant)
        line = str(caught.value)
        assert "\n" not in line and "give that folder in place of the name" in line
        for file in files:
            assert f"{file} from https://" in line
        assert ("huggingface.co" in line) == (name != "LTH14/mar") and ("dropbox" in line) == (
            name == "LTH14/mar"
        )


def test_no_two_variants_share_a_name():
    assert len(VARIANTS) == sum(len(repository.variants) for repository in RELEASED.values())


@pytest.mark.parametrize(
    "name, variant, says",
    [
        (
            "FoundationVision/var",
            None,
            "holds several models; choose one by variant=, or .*:VARIANT on the command line: d16, d20",
        ),
        ("FoundationVision/var", "d17", "unknown variant 'd17'; did you mean 'd16'"),
        ("LTH14/mar", "base", "did you mean 'mar_base'"),
        ("someone/else", "d16", "'someone/else' has no variants"),
        ("digits", "d16", "'digits' has no variants"),
        ("someone/else", None, r"could not be fetched from the Hugging Face hub \(no network\)"),
    ],
)
def test_wrong_names(name: str, variant: str | None, says: str, hub: Path):
    with pytest.raises(UserError, match=says) as caught:
        Pipeline.from_pretrained(name, variant)
    assert "\n" not in str(caught.value)


def test_folders_that_do_not_tell_one_model(tmp_path: Path):
    folder = write_var(tmp_path / "var", "var_d16.pth", "var_d20.pth")
    with pytest.raises(UserError, match="holds the models d16, d20; give from_pretrained a variant="):
        load(folder)
    assert Pipeline.from_pretrained(str(folder), "d20").configs["generator"].depth == 2
    with pytest.raises(UserError, match="var' lacks var_d24.pth of 'd24'; put it there"):
        Pipeline.from_pretrained(str(folder), "d24")
    with pytest.raises(UserError, match="unknown variant 'd3'"):
        Pipeline.from_pretrained(str(folder), "d3")
    (folder / "var_d20.pth").unlink()
    with pytest.raises(UserError, match="run: varkit convert '.*var_d16.pth' --out DIR"):
        load(folder, offload="disk")
    (folder / TOKENIZER).unlink()
    with pytest.raises(UserError, match="no tokenizer is in '.*var_d16.pth'; give its file too"):
        load(folder)


@pytest.mark.parametrize("damage", ["cut", "code", "html"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_files_are_told_and_nothing_is_run(damage: str, tmp_path: Path):
    folder = write_var(tmp_path / "var", "var_d16.pth")
    file = folder / "var_d16.pth"
    if damage == "code":
        torch.save({"pos_1LC": _Code(tmp_path / "ran")}, file)
    else:
        file.write_bytes({"cut": file.read_bytes()[:-1000], "html": b"<html>404</html>"}[damage])
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(
        UserError, match="code in checkpoints is never run" if damage == "code" else "is damaged"
    ):
        load(folder)
    assert sorted(tmp_path.rglob("*")) == before


class _Code:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return Path.mkdir, (self.marker,)
