"""Decoding on another device: nothing meets there that CUDA keeps apart, the host waits for nothing but pictures, and
steps replayed as CUDA graphs replay them give the same latents."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.contracts import CASES, drawn, same
from tests.pretend import Pretended
from tests.tape import record
from varkit.decode.graphs import Graphs, cuda_graphs
from varkit.decode.loop import advance, run
from varkit.errors import UserError
from varkit.hub.graphed import graphed
from varkit.hub.pipeline import Pipeline, Settings

SETTINGS = Settings(guidance=2.0, ramp=True, top_k=5, top_p=0.9)
BATCH = 3
WAITING = ("hmar",)
"""Families that wait within a run: how sure a choice is decides what is fed next."""

RECORDABLE = [name for name, case in CASES.items() if case.build()[1].generator.recordable]


def family(name: str) -> str:
    """The part of a case's name before its variant."""
    return name.partition("-")[0]


def run_of(name: str, pipeline: Pipeline, seed: int = 0, settings: Settings = SETTINGS, shift: int = 0):
    """A state at its beginning; `shift` asks for other conditions."""
    condition = CASES[name].conditions(BATCH + shift)
    here = {k: v[:, shift:].to(pipeline.device) for k, v in condition.items()}
    return pipeline.start_from(here, seed, range(BATCH), settings)


def latents(name: str, pipeline: Pipeline, **asked) -> Tensor:
    """What is drawn, on the CPU."""
    return drawn(run(pipeline.model, run_of(name, pipeline, **asked))).cpu()


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_a_run_on_another_device_meets_nothing_of_the_cpu_and_waits_for_nothing(name: str) -> None:
    pipeline = CASES[name].pipeline(SETTINGS)
    state = run(pipeline.model, run_of(name, pipeline))
    expected, picture = drawn(state), state.canvas.preview()
    with Pretended() as device:
        pipeline.to(device.name)
        state = run_of(name, pipeline)
        device.waits.clear()
        for _ in range(64):
            if bool(state.finished.all()):
                break
            advance(pipeline.model, state)
        waits = dict(device.waits)
        found, shown = drawn(state).cpu(), state.canvas.preview().cpu()
    assert same(found, expected) and (shown - picture).abs().max() < 1e-4
    assert not waits or family(name) in WAITING, f"the host waited: {waits}"


@pytest.mark.parametrize(
    "settings",
    [
        Settings(guidance=(1.5,) * 12, temperature=(1.0, 0.0, 0.7)),
        Settings(guidance=2.0, ramp=(0.0, 1.0, 2.0)),
        Settings(guidance=2.0, temperature=0.0),
    ],
    ids=["lists", "ramp", "greedy"],
)
@pytest.mark.parametrize("name", ["var-class", "llamagen-class", "mar-class"])
@torch.no_grad()
def test_settings_for_each_step_follow_the_device(name: str, settings: Settings) -> None:
    pipeline = CASES[name].pipeline(SETTINGS)
    expected = latents(name, pipeline, settings=settings)
    with Pretended() as device:
        pipeline.to(device.name)
        found = latents(name, pipeline, settings=settings)
    assert same(found, expected)


@torch.no_grad()
def test_the_pretended_device_keeps_tensors_apart() -> None:
    with Pretended() as device:
        far = torch.ones(3, device=device.name)
        with pytest.raises(AssertionError, match="meets a tensor of the CPU"):
            far + torch.ones(3)
        assert (far + torch.tensor(1.0)).cpu().tolist() == [2.0] * 3
        assert far.sum().item() == 3 and device.waits["aten._local_scalar_dense"] == 1


def replayed(pipeline: Pipeline) -> Pipeline:
    """`graphed`, on tape."""
    graphs = Graphs(pipeline.model, record)
    other = pipeline.using(cache=graphs.cache)
    other.model = graphs.model
    return other


@pytest.mark.parametrize("name", RECORDABLE)
@torch.no_grad()
def test_replayed_runs_draw_what_plain_ones_draw(name: str) -> None:
    at_layer = replace(SETTINGS, ramp=False, guidance_layer=-1)
    settings = at_layer if name == "infinity-text" else SETTINGS
    pipeline = CASES[name].pipeline(settings)
    asked = [{"seed": seed, "shift": seed, "settings": settings} for seed in range(3)]
    expected = [latents(name, pipeline, **each) for each in asked]
    assert not torch.equal(expected[0], expected[1])
    with Pretended() as device:
        pipeline.to(device.name)
        other = replayed(pipeline)
        found = [latents(name, other, **each) for each in asked]
    for one, another in zip(found, expected, strict=True):
        assert same(one, another)
    made = sum(len(places.recordings.made) for places in other.how.cache.__self__._places.values())  # type: ignore[union-attr]
    static = CASES[name].static
    assert made == (len(pipeline.model.plan.steps) if static else made), (
        "a step was not recorded, or more than once"
    )
    assert made or family(name) == "hmar"


@torch.no_grad()
def test_a_later_run_takes_the_places_of_an_earlier_one() -> None:
    pipeline = replayed(CASES["var-class"].pipeline(SETTINGS))
    first = advance(pipeline.model, run_of("var-class", pipeline))
    kept = first.select(range(BATCH))  # copies in places of its own
    expected = latents("var-class", pipeline, seed=1)
    with pytest.raises(UserError, match="finish one run before the next"):
        advance(pipeline.model, first)
    assert same(drawn(run(pipeline.model, kept)), latents("var-class", CASES["var-class"].pipeline(SETTINGS)))
    assert same(expected, latents("var-class", CASES["var-class"].pipeline(SETTINGS), seed=1))


@torch.no_grad()
def test_generators_without_fixed_places_are_refused() -> None:
    assert {family(name) for name in CASES.keys() - RECORDABLE} == {"m", "pixelcnn"}
    with pytest.raises(UserError, match="MVar cannot be CUDA graphs"):
        replayed(CASES["m-var-class"].pipeline(SETTINGS))


def test_graphs_need_a_cuda_device() -> None:
    pipeline = CASES["var-class"].pipeline(SETTINGS)
    with pytest.raises(UserError, match="need a CUDA device") as error:
        graphed(pipeline)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="without `graphed`"):
        graphed(pipeline.using(ports={("block", 0): lambda h, step, prepared: h}))
    with pytest.raises(UserError, match="CUDA"):
        cuda_graphs(pipeline.model, torch.device("cpu"))
