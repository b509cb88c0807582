"""Distances between samples: closed forms, brute force, lack of bias, intervals that cover."""

from __future__ import annotations

import math
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from sde_lib import distances
from sde_lib.distances import (
    SCALES,
    Estimate,
    energy_distance,
    median_bandwidths,
    mmd_squared,
    root_mean_square,
    sliced_wasserstein,
)

WIDTHS = (0.5, 1.0, 3.0)
PAIRS = {"energy": energy_distance, "mmd": partial(mmd_squared, bandwidths=WIDTHS)}
pairs = pytest.mark.parametrize("distance", PAIRS.values(), ids=PAIRS.keys())


def normal(seed, *shape, shift=0.0, std=1.0):
    generator = torch.Generator().manual_seed(seed)
    return shift + std * torch.randn(*shape, generator=generator, dtype=torch.float64)


def mean_distance(shift, std):
    """E|Z| of Z ~ N(shift, std²) in one dimension."""
    erf = math.erf(shift / (std * math.sqrt(2)))
    return std * math.sqrt(2 / math.pi) * math.exp(-0.5 * (shift / std) ** 2) + shift * erf


def exact_energy(shift, std, dimensions=1):
    """Between N(0, 1) and N(shift, std²) on the line."""
    own = math.sqrt(2) * (mean_distance(0, 1) + mean_distance(0, 1) * std)
    return 2 * mean_distance(shift, math.hypot(1, std)) - own


def exact_mmd(shift, std, dimensions=1):
    """Between N(0, I) and N(shift, std² I): each kernel integrates against N(shift, v I)."""

    def kernel(variance, distance):
        return sum(
            (b**2 / (b**2 + variance)) ** (dimensions / 2)
            * math.exp(-0.5 * dimensions * distance**2 / (b**2 + variance))
            for b in WIDTHS
        ) / len(WIDTHS)

    return kernel(2, 0) + kernel(2 * std**2, 0) - 2 * kernel(1 + std**2, shift)


EXACT = [(energy_distance, exact_energy), (PAIRS["mmd"], exact_mmd)]


def repeated(distance, count, *, n, m, dimensions=1, shift=0.0, std=1.0):
    """The estimates of ``count`` independent pairs of samples."""
    x = normal(1, count, n, dimensions)
    y = normal(2, count, m, dimensions, shift=shift, std=std)
    return [distance(*pair) for pair in zip(x, y, strict=True)]


def values(estimates):
    return torch.tensor([estimate.value for estimate in estimates], dtype=torch.float64)


def covered(estimates, truth):
    """Share of the intervals that hold ``truth``."""
    return sum(e.low <= truth <= e.high for e in estimates) / len(estimates)


def by_chance(count):
    """Five standard errors of the share, of ``count``, of intervals of 95 %."""
    return 5 * math.sqrt(0.95 * 0.05 / count)


@pytest.mark.parametrize(("distance", "exact"), EXACT, ids=PAIRS)
@pytest.mark.parametrize(("shift", "std"), [(0.0, 1.0), (0.7, 1.5)])
def test_pair_distances_are_unbiased(distance, exact, shift, std):
    found = values(repeated(distance, 500, n=5, m=7, shift=shift, std=std))

    error = float(found.mean()) - exact(shift, std)

    assert abs(error) < 5 * float(found.std()) / math.sqrt(len(found))


def test_mmd_is_unbiased_in_several_dimensions():
    found = values(repeated(PAIRS["mmd"], 300, n=6, m=9, dimensions=4, shift=0.5, std=0.8))

    error = float(found.mean()) - exact_mmd(0.5, 0.8, 4)

    assert abs(error) < 5 * float(found.std()) / math.sqrt(len(found))


@pytest.mark.parametrize("atoms", [(0.0, 1.0), (0.5, 2.5)], ids=["equal", "different"])
@pairs
def test_value_and_variance_of_pair_distances_are_unbiased_over_all_samples_there_are(
    distance, atoms, monkeypatch
):
    """Two atoms each, N = 4 and M = 5: each of the 512 pairs of samples is as likely."""
    parts = []

    def kept(*sums):
        parts.append(variances(*sums))
        return parts[-1]

    variances = distances._variances
    monkeypatch.setattr(distances, "_variances", kept)
    x, y = (
        torch.tensor(list(product(points, repeat=n)), dtype=torch.float64)[..., None]
        for n, points in ((4, (0.0, 1.0)), (5, atoms))
    )
    found = values(distance(*pair) for pair in product(x, y))

    def kernel(a, b):
        a, b = (torch.tensor(points, dtype=torch.float64) for points in (a, b))
        apart = (a[:, None] - b).abs()
        gauss = sum(torch.exp(-0.5 * (apart / w) ** 2) for w in WIDTHS) / len(WIDTHS)
        return float((-apart if distance is energy_distance else gauss).mean())

    own = (0.0, 1.0)
    exact = kernel(own, own) + kernel(atoms, atoms) - 2 * kernel(own, atoms)
    assert float(found.mean()) == pytest.approx(exact, abs=1e-12)
    assert float(torch.tensor(parts).double().sum(1).mean()) == pytest.approx(
        float(found.var(correction=0)), rel=1e-6
    )


@pairs
def test_intervals_of_pair_distances_cover_as_often_as_they_say(distance):
    exact = dict(EXACT)[distance](0.8, 1.2)

    share = covered(repeated(distance, 300, n=80, m=60, shift=0.8, std=1.2), exact)

    # 0.02: the statistic is not quite normal at these sizes
    assert abs(share - 0.95) < by_chance(300) + 0.02


@pairs
def test_intervals_of_pair_distances_cover_zero_where_the_laws_are_equal(distance):
    found = repeated(distance, 400, n=80, m=60)

    assert covered(found, 0.0) > 0.95 - by_chance(400)
    assert 0.2 < float((values(found) < 0).double().mean()) < 0.8, "unbiased: also below zero"


@pairs
def test_pair_distances_are_those_of_all_pairs_block_by_block(distance, monkeypatch):
    monkeypatch.setattr(distances, "TILE", 3)
    x, y = normal(3, 8, 2), normal(4, 5, 2, shift=0.5)

    def kernel(a, b):
        apart = math.dist(a.tolist(), b.tolist())
        if distance is energy_distance:
            return -apart
        return sum(math.exp(-0.5 * (apart / b) ** 2) for b in WIDTHS) / len(WIDTHS)

    def mean(a, b):
        found = [
            kernel(u, v)
            for (i, u), (j, v) in product(enumerate(a), enumerate(b))
            if a is not b or i != j
        ]
        return sum(found) / len(found)

    wanted = mean(x, x) + mean(y, y) - 2 * mean(x, y)
    assert distance(x, y).value == pytest.approx(wanted, abs=1e-12)


def test_bandwidths_are_multiples_of_the_median_distance():
    points = torch.tensor([[0.0], [1.0], [3.0], [7.0]])  # distances 1 2 3 4 6 7: the lower median

    assert median_bandwidths(points) == pytest.approx([3 * scale for scale in SCALES])


def w2_by_quantiles(x, y):
    """Squared W2 on the line, by a rule on a grid that both numbers of samples divide."""
    n, m = len(x), len(y)
    at = np.arange(n * m)
    return float(np.mean((np.sort(x)[at // m] - np.sort(y)[at // n]) ** 2))


@pytest.mark.parametrize(("n", "m"), [(6, 6), (6, 9), (5, 7), (4, 40)])
def test_sliced_w2_on_the_line_is_that_of_the_quantiles(n, m):
    x, y = normal(5, n, 1), normal(6, m, 1, shift=0.3, std=2.0)

    found = sliced_wasserstein(x, y).value

    assert found**2 == pytest.approx(w2_by_quantiles(x[:, 0].numpy(), y[:, 0].numpy()), rel=1e-12)


@pytest.mark.parametrize("shape", [(5,), (2, 3, 4)])
def test_sliced_w2_of_a_shift_is_its_length_by_coordinate(shape):
    """W2² along theta is (theta·m)², on average |m|²/D; the error left is that of directions."""
    x = normal(7, 50, *shape)
    shift = normal(8, *shape)
    size, dimensions = float(shift.norm()), shift.numel()

    found = sliced_wasserstein(x, x + shift, projections=2000, generator=_seeded())

    # Var (theta·m)² = |m|⁴ (3 / (D (D + 2)) - 1 / D²)
    error = size**2 * math.sqrt((3 / (dimensions + 2) - 1 / dimensions) / dimensions / 2000)
    assert abs(found.value**2 - size**2 / dimensions) < 5 * error
    half = 0.5 * (found.high**2 - found.low**2)
    # the potentials of a shift are of one sample, and it is in both: W2² moves by 2 (theta·m)
    spread = 2 * math.sqrt(2 / 50) * size**2 / dimensions
    assert half < 1.96 * (error + 3 * spread), "the interval is of this size, not of any"


def _seeded():
    return torch.Generator().manual_seed(0)


def test_sliced_w2_between_normals_of_different_width_is_the_difference_of_the_widths():
    """N(0, 1) and N(0, s²) on each line: W2 = |s - 1|; here at n = 20 000 and sampling error."""
    x, y = normal(9, 20_000, 3), normal(10, 20_000, 3, std=1.5)

    found = sliced_wasserstein(x, y, projections=50, generator=_seeded())

    assert abs(found.value - 0.5) < 5 * (found.high - found.low) / 2 / 1.96
    assert found.high - found.low < 0.05


@pytest.mark.parametrize(("n", "m"), [(60, 60), (60, 90)])
def test_intervals_of_sliced_w2_cover_as_often_as_they_say_away_from_zero(n, m):
    found = repeated(sliced, 400, n=n, m=m, dimensions=2, shift=1.0, std=1.3)
    mean = math.sqrt(float(values(found).square().mean()))

    assert abs(covered(found, mean) - 0.95) < by_chance(400) + 0.02  # not quite normal


def test_intervals_of_sliced_w2_are_wide_enough_where_the_laws_are_equal():
    found = repeated(sliced, 400, n=60, m=60, dimensions=8)
    mean = math.sqrt(float(values(found).square().mean()))

    assert covered(found, mean) > 0.95 - by_chance(400)


def sliced(x, y):
    return sliced_wasserstein(x, y, projections=30, generator=_seeded())


def test_the_same_seed_gives_the_same_directions_and_order_of_samples_does_not_matter():
    x, y = normal(11, 40, 4), normal(12, 30, 4)

    first = sliced_wasserstein(x, y, generator=_seeded())
    again = sliced_wasserstein(x.flip(0), y.roll(7, 0), generator=_seeded())

    for end in ("value", "low", "high"):
        assert getattr(again, end) == pytest.approx(getattr(first, end), rel=1e-12)


def test_root_mean_square_has_the_interval_of_a_mean():
    errors = torch.tensor([[3.0, 4.0], [0.0, 0.0]])

    found = root_mean_square(errors)

    squares = torch.tensor([12.5, 0.0])
    half = 1.959964 * float(squares.std()) / math.sqrt(2)
    assert_close(
        torch.tensor([found.value, found.low, found.high]),
        torch.tensor([6.25**0.5, 0.0, (6.25 + half) ** 0.5]),
    )


def test_a_square_below_zero_has_root_zero():
    assert Estimate(-1.0, -2.0, 4.0).root() == Estimate(0.0, 0.0, 2.0)


EVERY = {**PAIRS, "sliced": sliced_wasserstein}


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        (torch.zeros(5, 2), torch.zeros(5, 3), "samples of one shape; got .2,. and .3,."),
        (torch.zeros(3, 2), torch.zeros(5, 2), "4 at least.*got torch.float32 .3, 2."),
        (torch.zeros(5), torch.zeros(5), "floating-point samples .N, ....*got"),
        (torch.zeros(5, 2, dtype=torch.uint8), torch.zeros(5, 2), "floating-point.*uint8"),
        (torch.full((5, 2), math.nan), torch.zeros(5, 2), "finite samples; 5 of 5 are not"),
    ],
)
@pytest.mark.parametrize("distance", EVERY.values(), ids=EVERY.keys())
def test_samples_that_cannot_be_compared_are_refused(distance, x, y, words):
    with pytest.raises(ValueError, match=words):
        distance(x, y)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: mmd_squared(x, x, ()), "at least one bandwidth"),
        (lambda x: mmd_squared(x, x, (1.0, 0.0)), "bandwidths.* > 0"),
        (lambda x: sliced_wasserstein(x, x, projections=1), "projections.* >= 2"),
        (lambda x: median_bandwidths(0 * x), "median distance between those given is 0"),
    ],
)
def test_numbers_that_make_no_distance_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call(normal(13, 6, 2))


def seeded_slices(x: Tensor, y: Tensor) -> Estimate:
    return sliced_wasserstein(x, y, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    "distance", [energy_distance, seeded_slices, partial(mmd_squared, bandwidths=(1.0,))]
)
def test_samples_of_two_dtypes_are_compared(distance) -> None:  # noqa: ANN001
    x, y = (torch.randn(20, 3, generator=torch.Generator().manual_seed(k)) for k in (0, 1))

    assert distance(x, y.double()).value == pytest.approx(distance(x.double(), y.double()).value)


def test_mmd_takes_the_median_distance_if_no_bandwidth_is_given() -> None:
    x, y = (torch.randn(30, 2, generator=torch.Generator().manual_seed(k)) for k in (0, 1))

    assert mmd_squared(x, y) == mmd_squared(x, y, median_bandwidths(y))
    for wrong in (1.0, (), "wide"):
        with pytest.raises(ValueError, match="a sequence of at least one bandwidth|finite number"):
            mmd_squared(x, y, wrong)
    with pytest.raises(ValueError, match="compares tensors of samples; got list"):
        energy_distance([1.0], y)
