"""Compiled training against plain training."""

import shutil

import pytest
import torch

from tests.contracts import CASES
from tests.test_objective import constant_tokens
from varkit.errors import UserError
from varkit.nn import linear
from varkit.train.generator_task import Forced, NextStepTask
from varkit.train.task import TrainConfig
from varkit.train.trainer import Trainer

COMPILER = any(map(shutil.which, ("g++", "clang++")))


def trainer(case: str, **config) -> Trainer:
    tokenizer, model = CASES[case].build()
    tokens = constant_tokens(tokenizer.canvas(1).revealed_at.shape[1])
    parts = Forced(tokenizer, model.generator, model.heads["main"], model.plan)
    return Trainer(NextStepTask(parts, tokens, tokens, 8, {}), TrainConfig(steps=8, lr=1e-3, **config))


@pytest.mark.slow
@pytest.mark.skipif(not COMPILER, reason="no C++ compiler")
@pytest.mark.parametrize("case", ["var-class", "llamagen-class"])
def test_compiled_training_is_plain_training(case: str) -> None:
    plain, compiled = trainer(case), trainer(case, compile=True)
    for _ in range(4):
        ours, theirs = plain.step(8), compiled.step(8)
        assert ours is not None and theirs is not None
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    for (name, a), (_, b) in zip(
        plain.model.named_parameters(), compiled.model.named_parameters(), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)
    assert plain.validate()[0].keys() == compiled.validate()[0].keys()


@pytest.mark.parametrize("case", ["var-class", "llamagen-class"])
def test_compiled_parts_are_traced_whole(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that breaks compiles in pieces, slowly and to little use; what is compiled with is left out here."""
    monkeypatch.setattr(linear, "AMD", True)
    monkeypatch.setattr(linear, "_SMALLEST_WORK", 0)
    monkeypatch.setattr(linear, "_SMALLEST_PRODUCT", 0)
    run, parts = trainer(case), 0
    for module in run.model.modules():
        for name in getattr(module, "compilable", ()):
            whole = torch.compile(getattr(module, name), fullgraph=True, backend="eager")
            monkeypatch.setattr(module, name, whole)
            parts += 1
    assert parts
    assert run.step(8) is not None


def test_without_a_compiler_it_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="needs a C\\+\\+ compiler"):
        trainer("var-class", compile=True)
