"""Offloaded generators: equal to resident ones bit for bit, two blocks in memory, the next one read meanwhile."""

import json
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.contracts import CASES, Case
from tests.launch import measured
from tests.programs.large_model import write_model
from varkit.cli.main import main
from varkit.decode.loop import run
from varkit.errors import UserError
from varkit.hub.offload import Streamed
from varkit.hub.pipeline import Pipeline, Settings, load
from varkit.hub.tensor_file import TensorFile

STACKED = [name for name, case in CASES.items() if case.generator.build().stacks]  # type: ignore[attr-defined]
GB = 10**9


@pytest.fixture(params=STACKED)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def hidden(pipeline: Pipeline, case: Case) -> list[Tensor]:
    """What the network gives at every step of a run, and what it prepared."""
    seen: list[Tensor] = []
    keep = {("output", 0): lambda h, step, prepared: seen.append(h.clone()) or h}
    pipeline = pipeline.using(ports=keep)
    state = pipeline.start_from(case.conditions(2), 3, [0, 1], pipeline.settings)
    run(pipeline.model, state)
    return [*seen, *state.prepared.values(), *state.canvas.tensors().values()]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(
        x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("place", ["disk", "ram"])
def test_offloaded_equals_resident(case: Case, place: str, dtype: str | None, tmp_path: Path):
    case.pipeline(Settings(guidance=2.0)).save(tmp_path / "model")
    resident, offloaded = load(tmp_path / "model", dtype), load(tmp_path / "model", dtype, place)
    stacks = [getattr(offloaded.generator, stack) for stack in offloaded.generator.stacks]
    assert all(isinstance(stack, Streamed) and len(stack) > 0 for stack in stacks)
    assert equal(hidden(resident, case), hidden(offloaded, case))


def test_stored_smaller_than_computed_and_cast_later(tmp_path: Path):
    case = CASES["var-text"]
    case.pipeline(Settings(guidance=2.0)).save(tmp_path / "model", dtype=torch.float16)
    resident = hidden(load(tmp_path / "model"), case)
    for place in ("disk", "ram"):
        offloaded = load(tmp_path / "model", offload=place)
        assert equal(hidden(offloaded, case), resident)
        assert equal(
            hidden(offloaded.to(torch.float64), case),
            hidden(load(tmp_path / "model").to(torch.float64), case),
        )


def test_the_command_draws_the_same_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    CASES["var-text"].pipeline(Settings(guidance=2.0)).save(tmp_path / "model")
    drawn = {}
    for name, options in {
        "plain": [],
        "disk": ["--offload", "disk"],
        "half": ["--dtype", "bfloat16"],
    }.items():
        out = tmp_path / f"{name}.png"
        assert (
            main(["generate", "red ring", "--model", str(tmp_path / "model"), "--out", str(out), *options])
            == 0
        )
        drawn[name] = out.read_bytes()
    assert drawn["plain"] == drawn["disk"] != drawn["half"]
    capsys.readouterr()
    for option, value in (("--offload", "tape"), ("--dtype", "int8")):
        assert main(["generate", "a", "--model", str(tmp_path / "model"), option, value]) == 2
        assert capsys.readouterr().err.count("\n") == 1


# What is streamed


@pytest.fixture
def weights() -> list[Tensor]:
    return [torch.full((3, 3), float(i)) for i in range(5)]


def stream(weights: list[Tensor], fill=None) -> Streamed:
    def copy(name: str, out: Tensor) -> None:
        out.copy_(weights[int(name.partition(".")[0])])

    return Streamed(nn.Linear(3, 3, bias=False, device="meta"), len(weights), fill or copy, torch.float32)


def test_the_next_block_is_read_while_one_computes(weights: list[Tensor]):
    read = [threading.Event() for _ in weights]

    def fill(name: str, out: Tensor) -> None:
        number = int(name.partition(".")[0])
        out.copy_(weights[number])
        read[number].set()

    for i, block in enumerate(stream(weights, fill)):
        assert i + 1 == len(weights) or read[i + 1].wait(timeout=10), (
            f"block {i + 1} was not read during block {i}"
        )
        assert i + 2 >= len(weights) or not read[i + 2].wait(timeout=0.01), f"block {i + 2} came too early"
        assert torch.equal(block.weight, weights[i])  # type: ignore[arg-type]


def test_two_blocks_of_memory_serve_all(weights: list[Tensor]):
    assert len({block.weight.data_ptr() for block in stream(weights)}) == 2  # type: ignore[operator]
    assert [block.weight.tolist() for block in stream(weights[:1])] == [weights[0].tolist()]  # type: ignore[operator]


def test_runs_beside_each_other_and_broken_off_do_not_mix(weights: list[Tensor]):
    blocks = stream(weights)
    for started in (iter(blocks), iter(blocks)):
        next(started)  # and never ended
    sums: list[list[float]] = []

    def walk() -> None:
        for _ in range(20):
            sums.append([block.weight.sum().item() for block in blocks])  # type: ignore[operator]

    walkers = [threading.Thread(target=walk) for _ in range(3)]
    for walker in walkers:
        walker.start()
    for walker in walkers:
        walker.join()
    assert sums == [[9.0 * i for i in range(5)]] * 60


# What goes wrong


def test_what_cannot_be_offloaded(tmp_path: Path):
    CASES["pixelcnn-class"].pipeline(Settings()).save(tmp_path / "pixels")
    with pytest.raises(UserError, match="a PixelCNN has no stack of like blocks to offload"):
        load(tmp_path / "pixels", offload="disk")
    CASES["var-class"].pipeline(Settings()).save(tmp_path / "model")
    with pytest.raises(UserError, match="unknown place to offload to 'dsk'; did you mean 'disk'"):
        load(tmp_path / "model", offload="dsk")
    with pytest.raises(UserError, match="load it without offload, or copy its folder"):
        load(tmp_path / "model", offload="disk").save(tmp_path / "again")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "pixels"]


def test_a_file_that_changes_underneath(tmp_path: Path):
    CASES["var-class"].pipeline(Settings()).save(tmp_path / "model")
    file = tmp_path / "model" / "generator.safetensors"
    pipeline = load(tmp_path / "model", offload="disk")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(UserError, match="became shorter while it was read"):
        pipeline.generate([1])
    with pytest.raises(UserError, match="is damaged or not safetensors"):
        load(tmp_path / "model", offload="disk")
    file.unlink()
    with pytest.raises(UserError, match="there is no file"):
        load(tmp_path / "model", offload="disk")


@pytest.mark.parametrize("change", ["missing", "misshapen"])
def test_weights_that_do_not_fit_are_told_before_anything_is_read(change: str, tmp_path: Path):
    from safetensors.torch import load_file, save_file

    CASES["var-class"].pipeline(Settings()).save(tmp_path / "model")
    file = tmp_path / "model" / "generator.safetensors"
    state = {name: tensor.clone() for name, tensor in load_file(file).items()}
    name = "blocks.1.ffn.up.weight"
    state = (
        {n: t for n, t in state.items() if n != name}
        if change == "missing"
        else state | {name: torch.zeros(2)}
    )
    save_file(state, file)
    with pytest.raises(UserError, match=f"{name} .*|missing {name}"):
        load(tmp_path / "model", offload="disk")


# Tensors read into memory that is there


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]
)
def test_tensor_files_give_what_the_library_gives(dtype: torch.dtype, tmp_path: Path, monkeypatch):
    from safetensors.torch import load_file, save_file

    monkeypatch.setattr("varkit.hub.tensor_file.STAGING", 24)
    torch.manual_seed(0)
    state = {
        "a": torch.randn(5, 3).mul(3).to(dtype),
        "b": torch.ones((), dtype=dtype),
        "c": torch.zeros(0, 2, dtype=dtype),
    }
    save_file(state, tmp_path / "x.safetensors", metadata={"format": "pt"})
    file, stock = TensorFile(tmp_path / "x.safetensors"), load_file(tmp_path / "x.safetensors")
    assert {n: (t.shape, t.dtype) for n, t in file.described().items()} == {
        n: (t.shape, t.dtype) for n, t in stock.items()
    }
    for name, tensor in stock.items():
        assert torch.equal(file.read(name), tensor) and file.read(name).dtype == dtype
        assert torch.equal(file.read(name, torch.float64), tensor.to(torch.float64))


# A model larger than the memory it is given


@pytest.mark.slow
def test_a_model_larger_than_its_memory(tmp_path: Path):
    """Infinity-8B's width, bits and tokenizer at 8 of its 40 blocks: 4.1 GB of bfloat16 weights in less than 2.6."""
    size = write_model(tmp_path / "model", depth=8)
    limit = 2.6 * GB
    assert size > 1.4 * limit
    found = measured("large_model", tmp_path / "model", "disk", int(limit))
    assert found["picture"] == [256, 256] and found["peak"] < limit
    resident = measured("large_model", tmp_path / "model", "none", int(limit), fails=True)
    assert "memory" in resident["error"].lower(), json.dumps(resident)
