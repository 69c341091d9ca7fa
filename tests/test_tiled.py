"""Decoding in tiles: the whole picture again where layers are local, close to it elsewhere, in less memory."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.contracts import CASES
from tests.launch import measured
from varkit.cli.main import main
from varkit.errors import UserError
from varkit.hub.pipeline import Settings, load
from varkit.tokenizers.conv import ConvConfig, Decoder
from varkit.tokenizers.tiled import halo

LOCAL = ConvConfig(8, (1, 2, 2), res_blocks=1, latent_channels=4, groups=0)


def decoder(config: ConvConfig, seed: int = 0) -> Decoder:
    torch.manual_seed(seed)
    return Decoder(config).eval()


@torch.no_grad()
def difference(network: Decoder, tile: int, height: int = 11, width: int = 14) -> float:
    """The largest difference of any sub-pixel from the whole picture, in its deviations."""
    features = torch.randn(
        2, network.conv_in.in_channels, height, width, generator=torch.Generator().manual_seed(1)
    )
    network.tile = 0
    whole = network(features)
    network.tile = tile
    tiled = network(features)
    assert tiled.shape == whole.shape
    return float((tiled - whole).abs().max() / whole.std())


@settings(max_examples=12)
@given(
    st.lists(st.sampled_from((1, 2)), min_size=1, max_size=4), st.integers(1, 2), st.sampled_from((1, 2)),
    st.booleans(), st.integers(1, 16),
)  # fmt: skip
def test_local_decoders_give_the_whole_picture_again(
    multipliers: list[int], res_blocks: int, patch: int, attention: bool, tile: int
):
    """Attention too, since it is all at the lowest level, which is never split."""
    config = ConvConfig(4, tuple(multipliers), res_blocks, 4, attention, groups=0, patch=patch)
    assert difference(decoder(config), tile) < 1e-5


@pytest.mark.parametrize("multipliers", [(1,), (1, 2), (1, 2, 2)])
def test_the_reach_is_no_more_than_is_needed(multipliers: tuple[int, ...]):
    network = decoder(replace(LOCAL, multipliers=multipliers))
    assert difference(network, 2) < 1e-5
    network.halo -= 1
    assert difference(network, 2) > 1e-3


def test_a_pixel_depends_on_its_reach_and_no_further():
    """Measured by gradients: the published layouts' widest."""
    for levels, res_blocks, expected in ((5, 2, 13), (4, 2, 12), (2, 2, 7), (3, 1, 7)):
        assert halo(levels, res_blocks) == expected
        network = decoder(ConvConfig(2, (1,) * levels, res_blocks, 2, attention=False, groups=0)).double()
        side = 2 * expected + 4
        grid = torch.randn(1, 2, side, side, dtype=torch.float64, requires_grad=True)
        middle = network.upper(grid)[0, 0, :, network.stride // 2 * (side // 2)]
        middle[network.stride // 2 * (side // 2)].backward()
        reached = grid.grad.abs().sum(dim=(0, 1, 3)).nonzero()[:, 0]  # type: ignore[union-attr]
        assert int(reached.min()) == side // 2 - expected


def test_group_statistics_make_a_difference_that_shrinks_with_larger_tiles():
    network = decoder(replace(LOCAL, groups=4))
    differences = [difference(network, tile, 32, 32) for tile in (4, 8, 16, 32)]
    assert differences[-1] == 0.0 < differences[2] < differences[0] / 2, differences


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's account of memory")
def test_tiles_take_less_memory():
    grown = measured("tiles")["grown"]
    assert grown[0] > 40e6 and grown[1] < grown[0] / 3, grown


@pytest.mark.parametrize("name", [name for name in CASES if name != "pixelcnn-class"])
def test_every_tokenizer_takes_tiles(name: str):
    case = CASES[name]
    pipeline = case.pipeline(Settings())
    prompts: list = ["red ring", "a"] if "text" in case.conditions(1) else [3, 1]
    whole = pipeline.generate(prompts)
    tiled = pipeline.tiled(pipeline.size[0]).generate(prompts)
    assert [image.size for image in tiled] == [image.size for image in whole]
    assert pipeline.tokenizer.decoder.tile == pipeline.size[0] // pipeline.tokenizer.decoder.stride


def test_the_command_and_what_it_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "model"
    CASES["var-class"].pipeline(Settings()).save(folder)
    plain, tiled = tmp_path / "plain.png", tmp_path / "tiled.png"
    command = ["generate", "--model", str(folder), "--label", "1", "--out"]
    assert main([*command, str(plain)]) == 0
    assert main([*command, str(tiled), "--tile", "64"]) == 0  # one tile
    assert plain.read_bytes() == tiled.read_bytes()
    capsys.readouterr()
    for tile in ("3", "0", "-2"):
        assert main([*command, str(tmp_path / "no.png"), f"--tile={tile}"]) == 2
        assert f"tile {tile} must be a multiple of 2" in capsys.readouterr().err
    assert not (tmp_path / "no.png").exists()
    CASES["pixelcnn-class"].pipeline(Settings()).save(tmp_path / "pixels")
    with pytest.raises(UserError, match="a Pixels tokenizer has no decoder to tile"):
        load(tmp_path / "pixels").tiled(8)
