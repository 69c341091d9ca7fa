"""Devices by name, batches made ahead in other processes, and what an accelerator is spared; on a CPU."""

import sys
from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from varkit.data.ahead import made_ahead
from varkit.data.scene_set import SceneSet
from varkit.devices import device_of, find_device, placed, workers_for
from varkit.errors import UserError
from varkit.tokenizers.pixels import PixelsConfig
from varkit.train import tokens
from varkit.train.casting import Together, in_dtype
from varkit.train.muon import StackedMuon, orthogonal
from varkit.train.run import Request
from varkit.train.task import Phase, Task, TrainConfig
from varkit.train.trainer import Batches, Trainer

META = torch.device("meta")
"""Stands for an accelerator: tensors there have shapes alone, and do not mix with others."""


def test_names_of_devices() -> None:
    assert find_device("cpu") == torch.device("cpu")
    assert find_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("abacus", "cuda:99", "xpu:99"):
        with pytest.raises(UserError, match=rf"--device '{name}' is .*; use cpu"):
            find_device(name)


def test_a_request_for_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match="cuda:99"):
        _ = Request("digits", device="cuda:99").place


def test_nested_tensors_are_placed_and_all_else_stays() -> None:
    pair = namedtuple("pair", "x y")
    given = {"a": [torch.ones(2), "word"], "b": pair(torch.zeros(1), None), "c": 3}
    moved = placed(given, META)
    assert moved["a"][0].device == META and moved["b"].x.device == META
    assert moved["a"][1:] == ["word"] and moved["b"].y is None and moved["c"] == 3
    assert given["a"][0].device.type == "cpu"  # type: ignore[index]


def test_tensors_that_would_be_left_behind_are_noticed() -> None:
    @dataclass
    class Hidden:
        x: Tensor

    with pytest.raises(AssertionError):
        placed(Hidden(torch.ones(1)), META)


def test_where_parts_are() -> None:
    assert device_of(nn.Linear(2, 2, device="meta")) == META
    assert device_of(nn.BatchNorm1d(2, affine=False, device="meta")) == META  # buffers alone
    assert device_of(nn.Identity()) == device_of("a plan") == torch.device("cpu")
    assert workers_for(torch.device("cpu")) == 0
    assert (1 if sys.platform == "linux" else 0) <= workers_for(torch.device("cuda")) <= 8


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_made_ahead_comes_in_order(workers: int) -> None:
    assert list(made_ahead(lambda n: {"square": n * n}, range(3, 23), workers)) == [
        {"square": n * n} for n in range(3, 23)
    ]


class Drawing(Task):
    """Batches of numbers that depend on torch's generator, and on where training is."""

    batch_size = 2
    recipe = {"name": "drawing"}
    phases = (Phase("net", ("net",)),)

    def __init__(self) -> None:
        self.modules = {"net": nn.Linear(2, 1)}

    def batch(self, step: int, micro: int) -> dict[str, Tensor]:
        return {"x": torch.randn(2, 2), "at": torch.tensor([step, micro])}

    def loss(
        self, phase: str, batch: dict[str, Tensor], step: int
    ) -> tuple[Tensor, dict[str, float | Tensor]]:
        return self.modules["net"](batch["x"]).square().mean(), {}


def test_batches_made_ahead_are_those_made_at_once() -> None:
    task, own = Drawing(), range(1, 4, 2)
    here, ahead = (Batches(task, 5, own, workers) for workers in (0, 2))
    places = [(0, 1), (0, 3), (1, 1), (1, 3), (7, 1), (7, 3), (2, 3)]  # on, and from elsewhere
    for step, micro in places:
        first, second = here.take(step, micro), ahead.take(step, micro)
        assert first["at"].tolist() == second["at"].tolist() == [step, micro]
        assert torch.equal(first["x"], second["x"])


def test_training_with_workers_is_training_without(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = []
    for workers in (0, 2):
        monkeypatch.setattr("varkit.train.trainer.workers_for", lambda device, n=workers: n)
        torch.manual_seed(0)
        task = Drawing()
        trainer = Trainer(task, TrainConfig(steps=5, accumulation=2, lr=1e-2))
        for _ in range(5):
            trainer.step(5)
        ends.append(task.modules["net"].weight.detach().clone())
    assert torch.equal(*ends)


def test_pictures_drawn_by_workers_are_encoded_alike(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = PixelsConfig(32).build()
    made = []
    for workers in (0, 2):
        monkeypatch.setattr(tokens, "workers_for", lambda device, n=workers: n)
        made.append(tokens.encode(tokenizer, SceneSet().split("train"), 150, tmp_path / str(workers)))
    assert made[0].captions == made[1].captions and len(made[0]) == 150
    for name, values in made[0].latents.items():
        assert (values == made[1].latents[name]).all()


SHAPES = [(12, 8)] * 3 + [(8, 12)] * 2 + [(8, 8)]


def _moved_by(kind: type[torch.optim.Muon]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    matrices = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    groups = [{"params": matrices[:4], "weight_decay": 0.1}, {"params": matrices[4:], "weight_decay": 0.0}]
    optimizer = kind(groups, lr=0.1, adjust_lr_fn="match_rms_adamw")
    for step in range(3):
        for i, matrix in enumerate(matrices):
            matrix.grad = torch.randn(matrix.shape, generator=generator)
            if step == 1 and i == 2:
                matrix.grad = None  # no part of this step
        optimizer.step()
    return [matrix.detach() for matrix in matrices]


def test_stacked_muon_is_muon() -> None:
    for one, other in zip(_moved_by(StackedMuon), _moved_by(torch.optim.Muon), strict=True):
        # the same products in bfloat16, whose sums may round otherwise in a batch
        torch.testing.assert_close(one, other, rtol=0, atol=2e-3)


def test_directions_are_nearly_orthogonal() -> None:
    x = torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(1))
    made = orthogonal(x, (3.4445, -4.775, 2.0315), 5, 1e-7)
    singular = torch.linalg.svdvals(made.float())
    assert made.shape == x.shape and singular.min() > 0.6 and singular.max() < 1.3


def test_casts_together_are_casts_one_by_one() -> None:
    generator = torch.Generator().manual_seed(2)
    together, alone = (
        [nn.Parameter(torch.randn(shape, generator=generator.manual_seed(2))) for shape in SHAPES]
        for _ in range(2)
    )
    weights = [torch.randn(shape, generator=generator).bfloat16() for shape in SHAPES]
    made = Together.apply(torch.bfloat16, *together)
    torch.stack([(m * w).sum() for m, w in zip(made, weights, strict=True)]).sum().backward()
    for p, q, m, w in zip(together, alone, made, weights, strict=True):
        one = q.bfloat16()
        (one * w).sum().backward()
        assert torch.equal(m, one) and torch.equal(p.grad, q.grad) and p.grad.dtype == torch.float32  # type: ignore[union-attr,arg-type]


def test_what_begins_at_odd_places_or_lies_on_a_cpu_is_cast_by_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(Together, "apply", lambda dtype, *tensors: calls.append(len(tensors)) or tensors)
    shapes = {"a": (3, 1), "b": (4, 2), "c": (16,)}
    here = in_dtype({n: torch.ones(s) for n, s in shapes.items()}, torch.bfloat16)
    assert not calls and {t.dtype for t in here.values()} == {torch.bfloat16} and list(here) == list(shapes)
    there = {n: nn.Parameter(torch.ones(s, device="meta")) for n, s in shapes.items()}
    assert set(in_dtype(there, torch.bfloat16)) == set(shapes) and calls == [2]
    there["c"].requires_grad_(False)  # frozen
    in_dtype(there, torch.bfloat16)
    assert calls == [2, 1]


def test_what_no_loss_reaches_has_no_gradient() -> None:
    used, other = (nn.Parameter(torch.ones(8)) for _ in range(2))
    Together.apply(torch.bfloat16, used, other)[0].sum().backward()
    assert used.grad is not None and used.grad.dtype == torch.float32 and other.grad is None
