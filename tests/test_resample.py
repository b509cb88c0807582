"""Resampling filters: the published operation, constants kept, up the transpose of down."""

import itertools

import pytest
import torch
from torch.testing import assert_close

from score_models.networks.resample import Resample

KERNELS = [(1, 1), (1, 3, 3, 1), (1, 5, 10, 10, 5, 1)]


def drawn(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def down_by_hand(x, kernel):
    """One axis, from the definition: out[i] = sum_j w[j] x[2 i + j - pad], zeros outside."""
    total, pad = sum(kernel), (len(kernel) - 2) // 2
    rows = []
    for i in range(len(x) // 2):
        places = [(2 * i + j - pad, w / total) for j, w in enumerate(kernel)]
        rows.append(sum(w * x[p] for p, w in places if 0 <= p < len(x)))
    return torch.stack(rows)


@pytest.mark.parametrize("kernel", KERNELS)
def test_down_is_the_sum_that_it_says(kernel):
    x = drawn(1, 1, 8, 10)
    by_hand = down_by_hand(x[0, 0], kernel)
    by_hand = down_by_hand(by_hand.T, kernel).T
    assert_close(Resample(kernel).down(x)[0, 0], by_hand)


@pytest.mark.parametrize("kernel, axes", list(itertools.product(KERNELS, (1, 2, 3))))
def test_up_is_the_transpose_of_down_times_two_for_each_axis(kernel, axes):
    filters = Resample(kernel, axes)
    coarse, fine = drawn(2, 3, *(4, 3, 5)[:axes]), drawn(2, 3, *(8, 6, 10)[:axes])
    up = filters.up(coarse, fine.shape[2:])
    assert_close((up * fine).sum(), 2**axes * (coarse * filters.down(fine)).sum())


@pytest.mark.parametrize("kernel, axes", list(itertools.product(KERNELS, (1, 2, 3))))
def test_both_ways_have_gain_one_away_from_the_edges(kernel, axes):
    filters = Resample(kernel, axes)
    x = torch.ones(1, 2, *(12,) * axes, dtype=torch.float64)
    inside = (..., *(slice(2, -2),) * axes)
    assert_close(filters.down(x)[inside], filters.down(x)[inside] * 0 + 1)
    assert_close(
        filters.up(x, (24,) * axes)[inside], torch.ones_like(filters.up(x, (24,) * axes))[inside]
    )


def test_the_shortest_kernel_averages_pairs_and_repeats_points_of_any_size():
    x = torch.tensor([[[1.0, 3.0, 5.0, 7.0, 9.0]]])
    half = Resample((1, 1), axes=1).down(x)
    assert_close(half, torch.tensor([[[2.0, 6.0, 9.0]]]))  # the last point is repeated, not halved
    back = Resample((1, 1), axes=1).up(half, (5,))
    assert_close(back, torch.tensor([[[2.0, 2.0, 6.0, 6.0, 9.0]]]))


@pytest.mark.parametrize("kernel", [(), (1, 2, 1), (1, 2), (1, -1, -1, 1), (0, 0)])
def test_a_kernel_that_shifts_or_changes_constants_is_refused(kernel):
    with pytest.raises(ValueError, match=r"symmetric.*Take \[1, 1\], or \[1, 3, 3, 1\]"):
        Resample(kernel)
