"""Draws: known answers of the generator, purity, independence, and distributions within five sigma."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from varkit.draws import Draws, Stream, philox
from varkit.errors import UserError


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    words = philox([np.array([c], np.uint64) for c in counter], [np.array([k], np.uint64) for k in key])
    assert [int(w[0]) for w in words] == expected


@given(
    st.lists(st.integers(0, 500), min_size=1, max_size=20, unique=True), st.integers(0, 30), st.integers(1, 9)
)
def test_a_draw_does_not_depend_on_what_is_drawn_with_it(positions: list[int], step: int, n: int):
    draws = Draws.start(3, 4)
    together = draws.uniform("token", step, torch.tensor(positions), n)
    for i, position in enumerate(positions):
        alone = draws.select([2]).uniform("token", step, torch.tensor([position]), n)
        assert torch.equal(alone[0, 0], together[2, i])


def test_each_coordinate_matters():
    place = torch.arange(64)
    base = Draws.start(0, 1).uniform("token", 0, place)
    others = [
        Draws.start(1, 1).uniform("token", 0, place),
        Draws.start(0, [1]).uniform("token", 0, place),
        Draws.start(0, 1).fork([0]).uniform("token", 0, place),
        Draws.start(0, 1).uniform("noise", 0, place),
        Draws.start(0, 1).uniform("token", 1, place),
        Draws.start(0, 1).uniform("token", 0, place + 64),
    ]
    for other in others:
        assert not bool((other == base).any())


def test_steps_and_positions_may_differ_per_sample():
    draws = Draws.start(0, 2)
    ragged = draws.normal("noise", torch.tensor([3, 5]), torch.tensor([[1, 2], [7, -1]]), 3)
    assert torch.equal(ragged[0], draws.select([0]).normal("noise", 3, torch.tensor([1, 2]), 3)[0])
    assert torch.equal(ragged[1, 0], draws.select([1]).normal("noise", 5, torch.tensor([7]), 3)[0, 0])


def test_distributions():
    n = 200_000
    draws, place = Draws.start(11, 1), torch.arange(n)
    uniform = draws.uniform("u", 0, place).double()
    assert 0 < float(uniform.min()) and float(uniform.max()) < 1
    assert abs(float(uniform.mean()) - 0.5) < 5 * (1 / 12 / n) ** 0.5
    normal = draws.normal("n", 0, place).double()
    assert abs(float(normal.mean())) < 5 / n**0.5 and abs(float(normal.var()) - 1) < 5 * (2 / n) ** 0.5
    gumbel = draws.gumbel("g", 0, place).double()
    assert abs(float(gumbel.mean()) - 0.5772156649) < 5 * (np.pi**2 / 6 / n) ** 0.5


def test_json_round_trip_and_bad_seed():
    draws = Draws.start(5, 3).fork([0, 1, 0])
    assert Draws.from_json(draws.to_json()).streams == draws.streams
    with pytest.raises(UserError, match="seed -1"):
        Stream(-1, 0)
