"""The harness: rules decide from values alone, models are trained once and shared, measuring resumes."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests.models import tiny_recipe
from varkit.catalog import harness
from varkit.catalog.experiment import All, Arm, AtLeast, AtMost, Experiment, Metric, Part, PowerLaw, Subject
from varkit.catalog.measures import scenes_rebuilt
from varkit.catalog.models import Store, Trained
from varkit.errors import UserError
from varkit.hub.pipeline import Settings

VALUES = {"base": {"fid": [10.0, 20.0]}, "new": {"fid": [9.0, 10.0]}}


def small(seed: int = 0, **changes) -> Trained:
    return Trained(dataclasses.replace(tiny_recipe(), **changes), seed)


def test_rules_compare_seed_by_seed() -> None:
    assert AtMost("fid", "new", "base", 0.7)(VALUES).holds  # (0.9 + 0.5) / 2
    assert not AtMost("fid", "new", "base", 0.69)(VALUES).holds
    assert AtLeast("fid", "new", "base", 0.7)(VALUES).holds
    assert AtMost("fid", "new", "base", -5.5, difference=True)(VALUES).holds
    assert not AtLeast("fid", "new", "base", -5.4, difference=True)(VALUES).holds
    verdict = AtMost("fid", "new", "base", 0.7)(VALUES)
    assert verdict.details["compared"] == [0.9, 0.5]
    assert verdict.measured == "fid 9.5 ± 0.71 against 15 ± 7.1 of base"


def test_a_power_law_is_found() -> None:
    values = {str(n): {"M": [n], "loss": [5.0 * n**-0.2]} for n in (1.0, 3.0, 10.0, 40.0)}
    verdict = PowerLaw("loss", "M", -0.98)(values)
    assert verdict.holds
    assert verdict.details["exponent"] == pytest.approx(-0.2)
    assert verdict.details["correlation"] == pytest.approx(-1.0)
    values["1.0"]["loss"] = [3.0]
    assert not PowerLaw("loss", "M", -0.98)(values).holds


def test_all_holds_when_every_rule_does() -> None:
    yes, no = AtMost("fid", "new", "base", 1.0), AtLeast("fid", "new", "base", 1.0)
    assert All((yes, yes))(VALUES).holds and not All((yes, no))(VALUES).holds
    assert str(yes) in str(All((yes, no))) and str(no) in str(All((yes, no)))


def test_an_address_tells_apart_all_that_makes_a_model() -> None:
    recipe = tiny_recipe()
    wider = dataclasses.replace(recipe.generator, condition_drop=0.5)
    others = [
        Trained(recipe, 1),
        Trained(dataclasses.replace(recipe, generator=wider)),
        Trained(recipe, 0, tokenizer=Trained(recipe, 7)),
    ]
    addresses = {model.address for model in [Trained(recipe), *others]}
    assert len(addresses) == 4
    assert Trained(tiny_recipe()).address in addresses


def test_how_a_model_samples_makes_no_other_model() -> None:
    recipe = tiny_recipe()
    colder = dataclasses.replace(recipe.generator, settings=Settings(temperature=0.5))
    assert (
        Trained(dataclasses.replace(recipe, generator=colder, prompts=())).address == Trained(recipe).address
    )


def test_missing_names_tokenizers_first_and_each_once(tmp_path: Path) -> None:
    base = small()
    first, second = Trained(tiny_recipe(), 1, tokenizer=base), Trained(tiny_recipe(), 2, tokenizer=base)
    assert Store(tmp_path).missing([first, second, first]) == [base, first, second]


class Counting:
    """A metric that remembers its calls, and can break."""

    def __init__(self) -> None:
        self.calls: list[int] = []
        self.breaks_at = -1

    def __call__(self, subject: Subject) -> float:
        if len(self.calls) == self.breaks_at:
            raise KeyboardInterrupt
        self.calls.append(subject.seed)
        subject.kept[harness.PICTURES] = np.full((4, 8, 8, 3), 100, np.uint8)
        return float(len(self.calls))


def toy(metric: Counting) -> Experiment:
    arms = (Arm("base", lambda seed: small()), Arm("new", lambda seed: small()))
    rule = AtLeast("count", "new", "base", 1.0)
    part = Part(
        "main", "twice as good", arms, (Metric("count", metric, "calls"),), rule, (0, 1), sampling=True
    )
    return Experiment("toy", "Counts.", (part,))


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store whose models are there without training."""
    monkeypatch.setattr(Store, "load", lambda self, model: object())
    monkeypatch.setattr(Store, "has", lambda self, model: True)
    return Store(tmp_path / "cache")


def test_a_result_says_everything(store: Store, tmp_path: Path) -> None:
    metric = Counting()
    result = harness.reproduce(toy(metric), store, tmp_path / "out")
    assert metric.calls == [0, 0, 1, 1]  # arms in turn
    assert json.loads((tmp_path / "out" / "toy.json").read_text()) == result
    assert (tmp_path / "out" / "toy.png").is_file()
    part = result["parts"][0]
    assert part["arms"]["base"]["count"]["values"] == [1.0, 3.0]
    assert part["arms"]["new"]["count"]["values"] == [2.0, 4.0]
    assert result["holds"] is True and result["paper"] == "twice as good" and "hardware" in result
    assert part["kind"] == "sampling seeds of one training an arm"
    harness.reproduce(toy(metric), store, tmp_path / "out", seeds=1)
    assert metric.calls == [0, 0, 1, 1, 0, 0]  # measured anew, one seed


def test_an_interrupted_measurement_goes_on(store: Store, tmp_path: Path) -> None:
    metric = Counting()
    metric.breaks_at = 3
    with pytest.raises(KeyboardInterrupt):
        harness.reproduce(toy(metric), store, tmp_path / "out")
    assert not (tmp_path / "out" / "toy.json").exists()
    metric.breaks_at = -1
    result = harness.reproduce(toy(metric), store, tmp_path / "out")
    assert metric.calls == [0, 0, 1, 1]
    assert result["parts"][0]["arms"]["new"]["count"]["values"] == [2.0, 4.0]


def test_what_was_measured_otherwise_is_measured_again() -> None:
    part = toy(Counting()).parts[0]
    (metric,), arm = part.metrics, part.arms[0]
    keyed = dataclasses.replace(part, metrics=(dataclasses.replace(metric, key="300"),))
    told = dataclasses.replace(arm, options={"fill": "grey"})
    prints = {harness._fingerprint(*each, 0) for each in ((part, arm), (keyed, arm), (part, told))}
    assert len(prints) == 3 and harness._fingerprint(part, arm, 0) in prints


def test_untrained_models_are_told_with_their_minutes(tmp_path: Path) -> None:
    minutes = small().minutes
    with pytest.raises(UserError, match=rf"1 models .* about {minutes:.0f} minutes.*--train"):
        harness.prepare(toy(Counting()), Store(tmp_path), None, train=False, say=lambda text: None)


def test_an_unknown_experiment_is_one_line() -> None:
    with pytest.raises(UserError, match="unknown experiment 'vra'"):
        harness.find_experiment("vra")


def test_a_store_trains_loads_and_shares_a_tokenizer(tmp_path: Path) -> None:
    store = Store(tmp_path)
    base = small()
    second = Trained(tiny_recipe(), 1, tokenizer=base)
    for model in store.missing([second]):
        store.train(model, lambda text: None)
    assert not store.missing([second])
    shared = store.load(second).tokenizer.state_dict()
    own = store.load(base).tokenizer.state_dict()
    assert all((shared[name] == own[name]).all() for name in own)


@pytest.mark.parametrize("name", harness.available())
def test_experiments_are_well_formed(name: str) -> None:
    experiment = harness.find_experiment(name)
    assert experiment.name == name
    for part in experiment.parts:
        assert len(part.arms) >= 2 and part.metrics and str(part.rule)
        assert len(part.seeds) >= 3 or part.sampling
    assert all(model.minutes > 0 for model in experiment.models())


def test_rebuilt_scenes_are_scored_by_what_is_left_of_them() -> None:
    tokenizer = SimpleNamespace(encode=lambda images: images, decode=lambda images: images)
    subject = Subject(SimpleNamespace(tokenizer=tokenizer, size=(64, 64)), 0)  # type: ignore[arg-type]
    metric = scenes_rebuilt("scenes-tidy", 40)
    assert metric.measure(subject) == 1
    tokenizer.decode = lambda images: images.flip(-1)  # left becomes right, and nothing else
    assert 0.8 < metric.measure(subject) < 1
