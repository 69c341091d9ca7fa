"""Embedding what lies around a slot: exactly a convolution over each scale's map."""

import pytest
import torch
import torch.nn.functional as F

from tests.contracts import PYRAMID, _var
from varkit.errors import UserError
from varkit.nn.surroundings import Surroundings
from varkit.plans.schedule import Schedule

SCHEDULE = Schedule.of(1, (2, 3), (3, 5))


@pytest.mark.parametrize("reach", [1, 2])
def test_a_linear_map_over_surroundings_is_a_convolution_of_each_map(reach: int):
    torch.manual_seed(0)
    side, width, out = 2 * reach + 1, 4, 6
    vectors = torch.randn(2, SCHEDULE.total, width, dtype=torch.float64)
    kernel = torch.randn(out, side, side, width, dtype=torch.float64)
    around = Surroundings(SCHEDULE, reach)(vectors, torch.arange(SCHEDULE.total))
    got = around @ kernel.flatten(1).T
    want = []
    for (h, w), a, b in zip(SCHEDULE.sides, SCHEDULE.offsets, SCHEDULE.offsets[1:], strict=False):
        grid = vectors[:, a:b].transpose(1, 2).unflatten(2, (h, w))
        want.append(F.conv2d(grid, kernel.permute(0, 3, 1, 2), padding=reach).flatten(2).transpose(1, 2))
    assert torch.allclose(got, torch.cat(want, dim=1), atol=1e-12)


def test_rows_may_stand_at_different_maps():
    torch.manual_seed(0)
    around = Surroundings(SCHEDULE, 1)
    maps = [torch.arange(a, b) for a, b in zip(SCHEDULE.offsets, SCHEDULE.offsets[1:], strict=False)]
    middle, last = torch.randn(1, len(maps[1]), 3), torch.randn(1, len(maps[2]), 3)
    ids = torch.stack([torch.cat([maps[1], torch.zeros(9, dtype=torch.int64)]), maps[2]])
    padded = F.pad(middle, (0, 0, 0, 9))
    both = around(torch.cat([padded, last]), ids)
    assert torch.equal(both[0, : len(maps[1])], around(middle, maps[1])[0])
    assert torch.equal(both[1], around(last, maps[2])[0])


def test_reach_must_not_be_negative():
    with pytest.raises(UserError, match="reach -1"):
        _var(schedule=PYRAMID, reach=-1)
