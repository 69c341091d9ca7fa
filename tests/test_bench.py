"""`varkit bench`: time is charged to the right part, and work is counted to the last multiply-add."""

import json
import time
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from tests.contracts import CASES
from varkit.bench.machine import Limits, limits
from varkit.bench.measure import any_condition, measure
from varkit.bench.parts import REST, Parts
from varkit.bench.sizes import SIZES
from varkit.bench.work import Product, Work
from varkit.cli.main import main
from varkit.hub.pipeline import Settings
from varkit.hub.states import build_empty
from varkit.nn.linear import linear


def test_time_within_an_inner_part_is_the_inner_ones_alone():
    parts = Parts()
    with parts.of("outer"):
        time.sleep(0.02)
        with parts.of("inner"):
            time.sleep(0.05)
    parts.settle()
    assert 0.05 <= parts.seconds["inner"] < 0.5
    assert 0.02 <= parts.seconds["outer"] < parts.seconds["inner"]
    assert parts.seconds[REST] < 0.02 and parts.current == REST


def test_a_part_that_fails_is_left():
    parts = Parts()
    with pytest.raises(RuntimeError), parts.of("outer"):
        raise RuntimeError
    assert parts.current == REST


def test_products_convolutions_and_attention_are_counted_exactly():
    x, w, b = torch.randn(5, 3), torch.randn(7, 3), torch.randn(7)
    image, filters = torch.randn(1, 2, 6, 6), torch.randn(4, 2, 3, 3)
    q, k = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 6, 8)
    work = Work(lambda: "here")
    with torch.no_grad(), work:
        F.linear(x, w, b)
        F.conv2d(image, filters, padding=1)
        F.scaled_dot_product_attention(q, k, k)
        linear(torch.randn(2, 3, 512), torch.randn(256, 512))
    counted = {p.op: p for p in work.products["here"]}
    small = counted.pop("addmm")
    assert small.flops == 2 * 5 * 3 * 7 and small.bytes == 4 * (5 * 3 + 7 * 3 + 7 + 5 * 7)
    assert counted.pop("convolution").flops == 2 * 36 * 2 * 9 * 4
    large = next(p for p in counted.values() if 2 * 6 * 512 * 256 == p.flops)
    assert large.bytes == 4 * (6 * 512 + 512 * 256 + 6 * 256)
    del counted[large.op]
    (attention,) = counted.values()
    assert attention.flops == 2 * (2 * 2 * 4 * 6 * 8)
    assert set(work.products["here"].values()) == {1}


@pytest.mark.parametrize("name", ["var-class", "mar-class", "infinity-text"])
def test_a_model_is_measured_and_left_as_it_was(name: str):
    pipeline = CASES[name].pipeline(Settings(guidance=2.0))
    before = pipeline.generate([0] if "class" in name else ["a"], seed=3)[0].tobytes()
    result = measure(pipeline, any_condition(pipeline), rounds=2)
    assert {"generator", "head", "decoder", "condition", REST} <= set(result["parts"])
    for part in ("generator", "decoder"):
        assert 0 < result["parts"][part]["limit"] < 10 and result["parts"][part]["seconds"] > 0
    assert result["limit"] == pytest.approx(sum(part["limit"] for part in result["parts"].values()))
    assert "forward" not in vars(pipeline.generator)
    assert pipeline.generate([0] if "class" in name else ["a"], seed=3)[0].tobytes() == before


def test_the_limit_is_the_longer_of_both_times():
    machine = Limits(flops=100.0, bytes=10.0)
    assert machine.seconds(Product("mm", (), 1000, 10)) == 10.0
    assert machine.seconds(Product("mm", (), 100, 50)) == 5.0


def test_rates_are_those_of_kernels_at_the_works_shapes():
    shapes = ((512, 256), (256, 512))  # of some milliseconds, so that waiting for a thread counts little
    found = limits([Product("mm", shapes, 2 * 512 * 256 * 512, 0)], torch.float32, rounds=2)
    assert 1e7 < found.flops < 1e14 and 1e8 < found.bytes < 1e13


@pytest.mark.parametrize("name", sorted(SIZES))
def test_released_sizes_fit_together(name: str):
    configs, _ = SIZES[name]()
    parts = {part: build_empty(config.build) for part, config in configs.items()}
    total = Counter(
        {
            part: sum(p.numel() for p in m.parameters())
            for part, m in parts.items()
            if hasattr(m, "parameters")
        }
    )
    published = {
        "var-d16": 310e6,
        "var-d20": 600e6,
        "llamagen-b": 111e6,
        "mar-base": 208e6,
        "infinity-125m": 125e6,
    }
    assert total["generator"] + total["head"] == pytest.approx(published[name], rel=0.15)


def test_the_command_prints_one_json_object(capsys):
    assert main(["bench", "digits", "--rounds", "1", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["what"] == "digits" and told["batch"] == 1 and 0 < told["fraction_of_limit"]
    assert told["hardware"]["cores"] and told["parts"]["decoder"]["flops"] > 0


def test_rounds_below_one_are_refused(capsys):
    assert main(["bench", "digits", "--rounds", "0"]) != 0
    assert "--rounds is 0" in capsys.readouterr().err


def test_an_unknown_name_lists_models_and_released_sizes(capsys):
    assert main(["bench", "infinity-2b"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and all(name in err for name in ("infinity-125m", "var-d16", "scenes-tidy"))
