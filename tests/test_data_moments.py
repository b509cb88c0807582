"""Mean and std in one pass, against the direct ones in float64."""

import pytest
import torch
from torch.testing import assert_close

from likelihood import Standardization
from likelihood.standardize import Moments, slices


def direct(values):
    rows = values.double().transpose(0, 1).flatten(1)
    return rows.mean(1), rows.std(1)


@pytest.mark.parametrize("offset", [0.0, 1e6])
@pytest.mark.parametrize("shape", [(1000, 3), (200, 3, 4, 5), (100, 1, 7)], ids=str)
@pytest.mark.parametrize("sizes", [[1], [7, 1, 13], [1000]], ids=str)
def test_moments_merged_block_by_block_are_those_of_all(shape, offset, sizes):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(shape, generator=generator, dtype=torch.float64) * 3 + offset
    moments, start, turn = Moments(), 0, 0
    while start < len(values):
        size = sizes[turn % len(sizes)]
        moments.add(values[start : start + size])
        start, turn = start + size, turn + 1
    mean, std = direct(values)
    # the numbers themselves are known to 2e-16 of the offset; the merging adds nothing to speak of
    assert_close(moments.mean, mean, rtol=1e-12, atol=1e-12)
    assert_close(moments.std, std, rtol=1e-12, atol=2e-16 * offset)


def test_sums_of_squares_would_have_lost_what_moments_keep():
    values = 1e8 + torch.randn(1000, 1, generator=torch.Generator().manual_seed(0)).double()
    squares = (values.square().mean() - values.mean().square()).abs().sqrt()
    moments = Moments()
    for block in values.split(10):
        moments.add(block)
    _, std = direct(values)
    assert_close(moments.std, std, rtol=1e-7, atol=0)
    assert abs(float(squares / std) - 1) > 1e-2


def test_empty_blocks_change_nothing():
    moments = Moments()
    for block in (torch.zeros(0, 2), torch.tensor([[1.0, 2.0], [3.0, 6.0]]), torch.zeros(0, 2)):
        moments.add(block)
    assert moments.mean.tolist() == [2.0, 4.0]


@pytest.mark.parametrize("shape", [(10, 3), (5, 2, 2**10, 2**10), (3 * 2**20, 1), (0, 4)], ids=str)
def test_slices_cover_all_samples_once_and_hold_a_million_numbers_at_most(shape):
    found = slices(shape)
    rows = [row for part in found for row in range(*part.indices(shape[0]))]
    assert rows == list(range(shape[0]))
    each = max((len(range(*part.indices(shape[0]))) for part in found), default=0)
    assert each == 1 or each * torch.Size(shape[1:]).numel() <= 2**20


def test_a_standardization_reads_a_slice_at_a_time():
    values = torch.randn(3 * 2**18, 8, generator=torch.Generator().manual_seed(0))

    class OnDisk:
        shape, asked = values.shape, []

        def __getitem__(self, rows):
            self.asked.append(rows)
            return values[rows]

    units = Standardization.of(OnDisk())
    mean, std = direct(values)
    assert len(OnDisk.asked) == 6
    assert_close(units.shift, mean.float())
    assert_close(units.scale, std.float())
