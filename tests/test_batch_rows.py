"""Numbers of a row do not depend on the rows drawn beside it, and they are what they should be."""

from __future__ import annotations

import math

import pytest
import torch

from score_models import DenoisingScoreMatching
from sde_lib import VPSDE, BatchRows
from sde_lib.noise import rand, randn

KINDS = [
    (rand, torch.float32),
    (rand, torch.float64),
    (randn, torch.float32),
    (randn, torch.float64),
]


def calls(rows: range, shape=(3, 5), key: int = 7) -> list[torch.Tensor]:
    generator = BatchRows(key, 12, rows)
    return [draw((len(rows), *shape), generator, dtype=dtype) for draw, dtype in KINDS]


@pytest.mark.parametrize("shape", [(), (1,), (2,), (3, 5), (1, 8, 8)], ids=str)
@pytest.mark.parametrize("rows", [range(0, 5), range(5, 6), range(4, 12)], ids=str)
def test_a_row_has_the_same_numbers_whichever_rows_are_drawn(shape, rows):
    whole, some = calls(range(12), shape), calls(rows, shape)
    for a, b in zip(whole, some, strict=True):
        assert torch.equal(a[rows.start : rows.stop], b)


def test_keys_calls_and_rows_differ():
    drawn = [*calls(range(12)), *calls(range(12), key=8), *calls(range(12))[2:3]]
    rows = torch.cat([d.double().flatten(1) for d in drawn[:-1]])
    assert len(rows.unique(dim=0)) == len(rows)
    generator = BatchRows(7, 12)
    first, second = rand((12, 4), generator), rand((12, 4), generator)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_moments_are_those_of_uniform_and_normal_numbers(dtype):
    n, generator = 400_000, BatchRows(0, 400)
    u, z = (draw((400, n // 400), generator, dtype=dtype).double() for draw in (rand, randn))
    assert 0 <= u.min() and u.max() < 1
    bound = 5 / math.sqrt(n)  # five standard errors
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float(z.pow(power).mean()) - mean) < bound * math.sqrt(variance)
    assert abs(float(u.mean()) - 0.5) < bound * math.sqrt(1 / 12)
    assert abs(float(u.square().mean()) - 1 / 3) < bound * math.sqrt(4 / 45)
    for drawn in (u - 0.5, z):  # neighbours, along a row and from row to row
        scale = float(drawn.square().mean())
        assert abs(float((drawn[:, 1:] * drawn[:, :-1]).mean())) < 1.01 * bound * scale
        assert abs(float((drawn[1:] * drawn[:-1]).mean())) < 1.01 * bound * scale


def test_a_view_of_some_rows_goes_on_counting():
    generator = BatchRows(3, 12, range(2, 12))
    whole = BatchRows(3, 12)
    first = rand((10, 2), generator), rand((12, 2), whole)
    part = rand((3, 2), generator.select(range(1, 4))), rand((12, 2), whole)
    assert torch.equal(first[0], first[1][2:]) and torch.equal(part[0], part[1][3:6])


def test_an_objective_draws_the_same_for_a_row_whoever_draws_it():
    objective, sde = DenoisingScoreMatching(), VPSDE()
    whole = objective.draw(sde, (12, 2), BatchRows(1, 12))
    for rows in (range(0, 6), range(6, 12), range(3, 4)):
        some = objective.draw(sde, (len(rows), 2), BatchRows(1, 12, rows))
        for name, values in whole.items():
            assert torch.equal(values[rows.start : rows.stop], some[name]), name
    slices = (whole["t"] - sde.t_min).div(sde.t_max - sde.t_min).mul(12).floor()
    assert sorted(slices.tolist()) == list(range(12)), "one time in each part of probability"


@pytest.mark.parametrize("rows", [range(0), range(0, 13), range(-1, 3), range(0, 8, 2)], ids=str)
def test_rows_outside_the_batch_are_refused(rows):
    with pytest.raises(ValueError, match="within a batch of 12"):
        BatchRows(0, 12, rows)


def test_another_number_of_rows_is_refused():
    with pytest.raises(ValueError, match="batch of 3"):
        rand((3, 2), BatchRows(0, 12))
    with pytest.raises(ValueError, match="one after the other"):
        BatchRows(0, 12).select([0, 2])
