"""What a pipeline lets methods change: cache, ports, overrides, the sampler; heads of further routes."""

import dataclasses

import pytest
import torch

from tests import models
from tests.contracts import CASES
from varkit.decode.cache.full import FullCache
from varkit.draws import Stream
from varkit.errors import UserError
from varkit.generators.conditioning import ClassConfig
from varkit.hub.pipeline import Pipeline, Settings, route_of


def pipeline() -> Pipeline:
    return models.tiny_pipeline(ClassConfig(3))


def test_using_changes_how_it_is_decoded_and_nothing_else() -> None:
    plain = pipeline()
    made: list[tuple[int, int, int | None]] = []

    def cache(batch: int, branches: int, slots: int | None) -> FullCache:
        made.append((batch, branches, slots))
        return FullCache(batch, branches, slots)

    seen = []
    port = {("block", 0): lambda h, step, prepared: seen.append(len(step.feed)) or h}
    other = plain.using(cache=cache).using(ports=port)
    assert other.generator is plain.generator
    assert [i.tobytes() for i in other.generate([0, 1])] == [i.tobytes() for i in plain.generate([0, 1])]
    assert made == [(2, 2, plain.model.plan.slots)] and seen == [1, 4, 9]
    assert not plain.how.ports


def test_an_override_and_a_sampler_in_place_of_the_own() -> None:
    plain = pipeline()

    def zeros(step, values, state):
        return {**values, "ids": torch.zeros_like(values["ids"])}

    def likeliest(pick):
        return lambda logits, ask: {"ids": logits.argmax(dim=-1)}

    drawn = [
        list(p.starts([1], 0)) and p.generate([1])[0].tobytes() for p in (plain, plain.using(override=zeros))
    ]
    assert drawn[0] != drawn[1]
    greedy = plain.using(wrap=likeliest)
    assert (
        greedy.generate([1], seed=0)[0].tobytes() == plain.generate([1], seed=5, temperature=0.0)[0].tobytes()
    )


def test_batches_give_each_sample_its_own_number() -> None:
    plain = pipeline()
    states = list(plain.starts([0, 1, 2], seed=3, batch_size=2))
    assert [state.batch for state in states] == [2, 1]
    assert [stream for state in states for stream in state.draws.streams] == [Stream(3, n) for n in range(3)]


def test_parts_named_after_routes_serve_them(tmp_path) -> None:
    assert (route_of("head"), route_of("head_fine"), route_of("plan")) == ("main", "fine", None)
    case = CASES["var-class"]
    parts = case.pipeline(Settings()).parts
    torch.manual_seed(1)
    fine = case.head.build()  # type: ignore[attr-defined]
    configs = {name: getattr(case, name) for name in parts} | {"head_fine": case.head}
    both = Pipeline(parts | {"head_fine": fine}, configs, Settings())
    assert both.model.heads.keys() == {"main", "fine"}
    both.save(tmp_path / "model")
    loaded = Pipeline.from_folder(tmp_path / "model")
    assert torch.equal(loaded.model.heads["fine"].out.weight, fine.out.weight)
    steps = [dataclasses.replace(step, route="fine") for step in parts["plan"].steps]
    loaded.model.plan.steps[:] = steps  # type: ignore[attr-defined]
    assert loaded.generate([0])[0].size == both.generate([0])[0].size


def test_numbers_for_each_step_may_be_lists() -> None:
    lists = Settings(guidance=[1.0, 2.0, 3.0], temperature=[1.0, 0.5, 0.2])  # type: ignore[arg-type]
    assert lists == Settings(guidance=(1.0, 2.0, 3.0), temperature=(1.0, 0.5, 0.2))
    assert Settings(ramp=[0.0, 1.0]).ramp == (0.0, 1.0)  # type: ignore[arg-type]
    drawn = [
        pipeline().generate([0, 1], guidance=kind((1.0, 2.0, 3.0)), temperature=kind((1.0, 0.5, 0.2)))
        for kind in (list, tuple)
    ]
    assert [image.tobytes() for image in drawn[0]] == [image.tobytes() for image in drawn[1]]


@pytest.mark.parametrize("name", ["guidance", "ramp", "temperature"])
@pytest.mark.parametrize("empty", [[], ()])
def test_an_empty_list_says_nothing_of_any_step(name: str, empty: object) -> None:
    with pytest.raises(UserError, match=f"{name} is an empty list; give one number"):
        Settings(**{name: empty})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["llamagen-class", "pixelcnn-class", "mar-class", "infinity-text"])
def test_smooth_is_refused_where_codes_do_not_add_up(name: str) -> None:
    prompt = "a ring" if name.endswith("text") else 1
    with pytest.raises(UserError, match="smooth .*; leave it out"):
        CASES[name].pipeline(Settings()).generate(prompt, smooth=True)


@pytest.mark.parametrize(("name", "value"), [("top_k", 3), ("top_p", 0.5)])
def test_the_likeliest_codes_are_no_choice_for_a_model_of_real_numbers(name: str, value: float) -> None:
    mar = CASES["mar-class"].pipeline(Settings())
    for call in (mar.generate, lambda *given, **more: next(mar.stream(*given, **more))):
        with pytest.raises(UserError, match=f"{name} {value} .* draws real numbers; leave it out"):
            call([1], **{name: value})
    mar.generate(1, **{name: 0})  # says that all are kept
