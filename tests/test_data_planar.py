"""Sets that need no file: six densities of the plane, the digits, the checks of every set."""

import math
from functools import cache

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from experiment.data import (
    Dataset,
    checkerboard,
    digits,
    eight_gaussians,
    rings,
    swiss_roll,
    two_moons,
    two_spirals,
)
from experiment.data.split import split
from likelihood import Standardization, UniformDequantization

# Entropies as published with the definitions, in nats, by quadrature good to about 1e-4; then the
# std of the Gaussian noise and the half-width of the square that holds the noise-free points.
SMOOTH = {
    eight_gaussians: (2.83188, 0.5 / 1.414, 2.83),
    rings: (2.6231, 0.08, 3.0),
    two_moons: (2.3939, 0.2, 3.0),
    swiss_roll: (2.6697, 0.2, 2.83),
    two_spirals: (2.6454, 0.1, 3.31),
}
ALL = [*SMOOTH, checkerboard]
# A mean of n terms of variance up to 1 is within 5/sqrt(n) of its expectation: 0.05 nats, the
# error that a trained model of these sets is allowed.
N = 10_000


def named(source):
    return source.__name__


@cache
def drawn(source):
    return source(train_size=100, test_size=N)


@cache
def on_grid(source):
    """Points [n, 2] of a square grid, log-density there, and the area of a cell.

    The density is a convolution with a Gaussian of std s, so the midpoint rule of step h errs by
    about exp(-2 pi² (s/h)²), 1e-13 for s/h = 1.25; beyond 8 s there is 1e-15 of the mass.
    """
    _, std, reach = SMOOTH[source]
    step = std / 1.25
    half = math.ceil((reach + 8 * std) / step)
    axis = step * torch.arange(-half, half + 1, dtype=torch.float64)
    points = torch.cartesian_prod(axis, axis)
    return points, drawn(source).log_density(points), step**2


def noise_free(source, n, rng):
    """Points [n, 2] of the definition before the Gaussian noise is added, by numpy alone."""
    u = rng.uniform(size=n)
    if source is eight_gaussians:
        angle = np.pi / 4 * rng.integers(8, size=n)
        return 4 / 1.414 * np.stack([np.cos(angle), np.sin(angle)], 1)
    if source is rings:
        radius = rng.choice([3.0, 2.25, 1.5, 0.75], size=(n, 1))
        return radius * np.stack([np.cos(2 * np.pi * u), np.sin(2 * np.pi * u)], 1)
    if source is two_moons:
        x, y = np.cos(np.pi * u), np.sin(np.pi * u)
        outer, inner = np.stack([x, y], 1), np.stack([1 - x, 0.5 - y], 1)
        return 2 * np.where(rng.random((n, 1)) < 0.5, outer, inner) + [-1, -0.2]
    if source is swiss_roll:
        t = 1.5 * np.pi * (1 + 2 * u)
        return np.stack([t * np.cos(t), t * np.sin(t)], 1) / 5
    turn = 3 * np.pi * np.sqrt(u)
    arm = np.stack([-turn * np.cos(turn), turn * np.sin(turn)], 1) + rng.uniform(0, 0.5, (n, 2))
    return rng.choice([-1, 1], size=(n, 1)) * arm / 3


@pytest.mark.parametrize("source", SMOOTH, ids=named)
def test_the_density_is_the_mean_of_the_noise_kernel_over_the_definition(source):
    n, std = 40_000, SMOOTH[source][1]
    centres = torch.from_numpy(noise_free(source, n, np.random.default_rng(0)))
    x = drawn(source).test[:100].double()
    squares = (x[:, None] - centres).square().sum(2)
    kernel = torch.exp(-squares / (2 * std**2)) / (2 * math.pi * std**2)  # [100, n]
    error = (kernel.mean(1) - drawn(source).log_density(x).exp()).abs()
    assert bool((error < 5 * kernel.std(1) / math.sqrt(n)).all())


@pytest.mark.parametrize("source", SMOOTH, ids=named)
def test_the_density_integrates_to_1(source):
    _, log_density, area = on_grid(source)
    assert_close(float(log_density.exp().sum() * area), 1.0, rtol=0, atol=1e-12)  # see on_grid


@pytest.mark.parametrize("source", SMOOTH, ids=named)
def test_the_stated_entropy_is_the_published_one_and_the_integral_of_minus_p_log_p(source):
    _, log_density, area = on_grid(source)
    integral = -float((log_density.exp() * log_density).sum() * area)
    assert drawn(source).entropy == SMOOTH[source][0]
    assert integral == pytest.approx(SMOOTH[source][0], abs=1e-4)  # what the table promises


@pytest.mark.parametrize("source", ALL, ids=named)
def test_samples_score_the_stated_entropy_on_average(source):
    score = -drawn(source).log_density(drawn(source).test).double()
    standard_error = float(score.std()) / math.sqrt(N)  # of the checkerboard: 0
    rounding = 1e-4 if source in SMOOTH else 1e-6  # of the entropy; of float32
    assert abs(float(score.mean()) - drawn(source).entropy) < 5 * standard_error + rounding


@pytest.mark.parametrize("source", SMOOTH, ids=named)
def test_samples_have_the_characteristic_function_of_the_density(source):
    points, log_density, area = on_grid(source)
    frequencies = torch.tensor([[1, 0, 1, 2, -1], [0, 1, 1, 1, 3]], dtype=torch.float64)
    for wave in (torch.cos, torch.sin):
        expected = (log_density.exp() * area) @ wave(points @ frequencies)
        found = wave(drawn(source).test.double() @ frequencies)
        error = (found.mean(0) - expected).abs()
        assert bool((error < 5 * found.std(0) / math.sqrt(N)).all())


@pytest.mark.parametrize("source", SMOOTH, ids=named)
def test_far_from_the_data_the_log_density_is_finite_and_falls(source):
    far = torch.tensor([[0.0, 10.0], [0.0, -30.0], [100.0, 0.0]])
    log_density = drawn(source).log_density(far)
    assert bool(torch.isfinite(log_density).all())
    assert bool((log_density.diff() < 0).all())


@pytest.mark.parametrize("source", ALL, ids=named)
def test_the_log_density_keeps_the_dtype_and_takes_each_point_by_itself(source):
    x = drawn(source).test[:600]  # more than one chunk
    whole = drawn(source).log_density(x)
    assert whole.dtype == torch.float32
    assert drawn(source).log_density(x.double()).dtype == torch.float64
    assert_close(drawn(source).log_density(x[590:]), whole[590:], rtol=1e-6, atol=1e-6)
    assert drawn(source).log_density(x[:0]).shape == (0,)


def test_the_checkerboard_is_1_over_32_on_the_black_squares_and_0_elsewhere():
    rng = np.random.default_rng(0)  # the definition: [-2, 2]² first, then twice as large
    first = rng.uniform(-2, 2, 4000)
    second = rng.random(4000) - 2 * rng.integers(2, size=4000) + np.floor(first) % 2
    black = torch.from_numpy(2 * np.stack([first, second], 1))
    data = drawn(checkerboard)
    assert_close(data.log_density(black), torch.full((4000,), -math.log(32)).double())

    axis = torch.arange(-4.9375, 5, 0.125, dtype=torch.float64)  # no midpoint lies on an edge
    density = data.log_density(torch.cartesian_prod(axis, axis)).exp()
    assert float(density.sum()) * 0.125**2 == pytest.approx(1, abs=1e-12)  # exact but for rounding
    assert data.entropy == pytest.approx(3.46574, abs=5e-6)


def test_the_checkerboard_fills_its_squares_evenly():
    x = drawn(checkerboard).test.double()
    square = torch.floor(x / 2).long() + 2
    counts = torch.bincount(4 * square[:, 0] + square[:, 1], minlength=16)
    assert int((counts > 0).sum()) == 8
    share = counts[counts > 0] / N
    assert float((share - 1 / 8).abs().max()) < 5 * math.sqrt(1 / 8 * 7 / 8 / N)
    inside = x / 2 - torch.floor(x / 2)
    assert float((inside.mean(0) - 1 / 2).abs().max()) < 5 * math.sqrt(1 / 12 / N)
    assert float((inside.var(0) - 1 / 12).abs().max()) < 5 * math.sqrt(1 / 180 / N)


@pytest.mark.parametrize("source", ALL, ids=named)
def test_the_test_set_does_not_change_with_train_size(source):
    few, many = source(train_size=3, test_size=50), source(train_size=700, test_size=50)
    assert len(few.train) == 3 and len(many.train) == 700
    assert torch.equal(few.test, many.test)


@pytest.mark.parametrize("source", ALL, ids=named)
def test_the_same_seed_gives_the_same_data_and_no_sample_twice(source):
    first, again, other = source(50, 40, seed=1), source(50, 40, seed=1), source(50, 40, seed=2)
    assert torch.equal(first.train, again.train) and torch.equal(first.test, again.test)
    samples = torch.cat([first.train, first.test, other.train, other.test])
    assert len(samples.unique(dim=0)) == 180
    assert first.shape == (2,) and first.levels is None and first.name == source.__name__


@pytest.mark.parametrize("sizes", [{"train_size": 0}, {"test_size": 2.5}, {"test_size": "many"}])
def test_sizes_of_drawn_sets_are_whole_numbers_and_may_be_written_1e3(sizes):
    assert len(rings(train_size=1e3, test_size=2).train) == 1000
    with pytest.raises(ValueError, match=f"rings needs {next(iter(sizes))}"):
        rings(**sizes)


# ---------------------------------------------------------------------------- digits


def test_digits_are_split_as_by_scikit_learn():
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images = load_digits().images  # [1797, 8, 8], float64
    train, test = train_test_split(images, test_size=360, random_state=0)
    data = digits()
    assert data.train.shape == (1437, 1, 8, 8) and data.test.shape == (360, 1, 8, 8)
    assert_close(data.train[:, 0].double(), torch.from_numpy(train), rtol=0, atol=0)
    assert_close(data.test[:, 0].double(), torch.from_numpy(test), rtol=0, atol=0)


def test_digits_have_17_levels_and_all_of_them_occur():
    data = digits()
    assert data.levels == 17 and data.train.dtype == torch.uint8
    assert data.train.unique().tolist() == list(range(17))


@pytest.mark.parametrize("size", [1797, 5000, 0, 1.5])
def test_digits_refuse_a_test_size_that_is_no_part_of_them(size):
    with pytest.raises(ValueError, match=f"digits needs test_size.*test_size={size}"):
        digits(test_size=size)


# ---------------------------------------------------------------------------- Dataset

POINTS = torch.tensor([[0.0, 5.0], [2.0, 3.0], [4.0, 1.0]])
LEVELS = torch.tensor([[0, 1], [2, 3], [3, 0]])
both_parts = pytest.mark.parametrize("part", ["train", "test"])


def dataset(good, part, bad, levels=None):
    """A set whose other part is faultless."""
    return Dataset("mine", **{"train": good, "test": good, part: bad}, levels=levels)


@both_parts
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_are_refused_with_the_first_index(part, value):
    bad = POINTS.clone()
    bad[1, 1], bad[2, 0] = value, math.nan
    message = rf"mine: the {part} set holds NaN or Inf, first {value} at index \(1, 1\), 2 in all"
    with pytest.raises(ValueError, match=message):
        dataset(POINTS, part, bad)


@both_parts
@pytest.mark.parametrize("value, lowest, highest", [(4, 0, 4), (-1, -1, 3)])
def test_what_is_no_level_is_refused_with_the_first_index_and_the_range(
    part, value, lowest, highest
):
    bad = LEVELS.clone()
    bad[1, 0] = value
    message = (
        rf"mine: data of 4 levels must be in 0..3; the {part} set has values from {lowest} to "
        rf"{highest}, first {value} at index \(1, 0\)"
    )
    with pytest.raises(ValueError, match=message):
        dataset(LEVELS, part, bad, levels=4)


@both_parts
def test_levels_scaled_to_0_to_1_are_refused_with_their_range(part):
    message = rf"256 levels must be integers in 0..255; the {part} set is float32.*from 0 to 0.5"
    with pytest.raises(ValueError, match=message):
        dataset(LEVELS, part, POINTS / 10, levels=256)


@both_parts
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64, torch.uint8])
def test_continuous_data_of_another_dtype_than_float32_are_refused(part, dtype):
    message = rf"must be float32; the {part} set is {str(dtype)[6:]} of shape \(3, 2\).*levels=K"
    with pytest.raises(ValueError, match=message):
        dataset(POINTS, part, POINTS.to(dtype))


@both_parts
@pytest.mark.parametrize("dtype", [torch.bool, torch.complex64])
def test_levels_of_a_dtype_without_order_are_refused(part, dtype):
    with pytest.raises(ValueError, match=f"must be integers.*{str(dtype)[6:]}.*no range"):
        dataset(LEVELS, part, LEVELS.to(dtype), levels=4)


@both_parts
@pytest.mark.parametrize(
    "bad, words",
    [
        (torch.zeros(0, 2), "at least two samples.*got 0"),
        (torch.zeros(1, 2), "at least two samples.*got 1"),
        (torch.zeros(3), r"got \(3,\). Scalars are samples of shape \[1\]"),
        (torch.zeros(3, 0), r"one number or more; got \(3, 0\)"),
        (torch.zeros(3, 2, 0), r"one number or more; got \(3, 2, 0\)"),
    ],
    ids=["empty set", "one sample", "scalars", "no numbers", "no pixels"],
)
def test_sets_that_are_too_small_are_refused_with_their_shape(part, bad, words):
    with pytest.raises(ValueError, match=f"mine: the {part} set.*{words}"):
        dataset(POINTS, part, bad)


@pytest.mark.parametrize(
    "train, test, levels, kind",
    [
        (POINTS, POINTS[:, :1], None, r"float32 of shape \(3, 1\)"),
        (POINTS, POINTS[..., None], None, r"float32 of shape \(3, 2, 1\)"),
        (LEVELS, LEVELS.byte(), 4, r"uint8 of shape \(3, 2\)"),
    ],
    ids=["width", "axes", "dtype"],
)
def test_two_parts_of_two_kinds_are_refused_with_both(train, test, levels, kind):
    own = rf"{str(train.dtype)[6:]} of shape \(3, 2\)"
    with pytest.raises(ValueError, match=f"mine: .* must be alike; got {own} and {kind}"):
        Dataset("mine", train, test, levels=levels)


@pytest.mark.parametrize("levels", [None, 256])
def test_constant_data_are_refused_with_the_value(levels):
    constant = torch.full((5, 1, 4, 4), 7.0 if levels is None else 7)
    with pytest.raises(ValueError, match="every value of the train set is 7; constant data"):
        dataset(constant, "train", constant, levels)


def test_a_constant_column_is_refused_by_its_number_but_a_constant_pixel_is_not():
    still = torch.tensor([[0.0, 1.0, 8.0], [2.0, 1.0, 8.0], [4.0, 1.0, 9.0]])
    with pytest.raises(ValueError, match="column 1 is the same in all training samples"):
        dataset(still, "train", still)
    images = still[:, None, :, None]  # [3, 1, 3, 1]: an image may have a black border
    assert dataset(images, "train", images).shape == (1, 3, 1)


@pytest.mark.parametrize("levels", [1, 0, -4, 2.5, True])
def test_a_set_has_two_levels_or_more(levels):
    with pytest.raises(ValueError, match=f"mine needs levels to be .* >= 2; got levels={levels}"):
        dataset(LEVELS, "train", LEVELS, levels)


def test_levels_may_outnumber_the_dtype_and_be_written_1e3():
    assert dataset(LEVELS.byte(), "train", LEVELS.byte(), levels=1e3).levels == 1000


def test_units_of_levels_are_bins_and_those_of_continuous_data_are_mean_and_std_of_train():
    assert dataset(LEVELS, "test", LEVELS[:2], 4).units == UniformDequantization(4)
    units = dataset(POINTS, "test", POINTS[:2]).units
    assert isinstance(units, Standardization)
    assert_close(units.encode(POINTS), (POINTS - POINTS.mean(0)) / POINTS.std(0))


# ---------------------------------------------------------------------------- split


@pytest.mark.parametrize("test_size, size", [(0.1, 20), (0.333, 67), (30, 30), (3e1, 30)])
def test_a_split_parts_the_samples_without_loss_or_repetition(test_size, size):
    train, test = split("mine", torch.arange(200)[:, None], test_size, seed=0)
    assert len(test) == size
    assert sorted(torch.cat([train, test]).flatten().tolist()) == list(range(200))


def test_a_split_depends_on_the_seed_and_on_nothing_else():
    samples = torch.arange(100)[:, None]
    torch.manual_seed(0)
    first = split("mine", samples, 0.2, seed=3)
    torch.manual_seed(1)
    again, other = split("mine", samples, 0.2, seed=3), split("mine", samples, 0.2, seed=4)
    assert torch.equal(first[1], again[1]) and torch.equal(first[0], again[0])
    assert not torch.equal(first[1], other[1])
    assert not torch.equal(first[1], first[1].sort(0).values), "shuffled, not cut off"


def test_a_share_of_few_samples_keeps_two_for_the_test_as_a_standard_error_needs():
    train, test = split("mine", torch.arange(8)[:, None], 0.1, seed=0)
    assert (len(train), len(test)) == (6, 2)


@pytest.mark.parametrize("test_size, count", [(0.1, 0), (0.1, 1), (5, 5), (0.99, 40), (8, 5)])
def test_a_split_that_leaves_nothing_to_train_on_is_refused_with_the_number_there_is(
    test_size, count
):
    message = f"mine: test_size={test_size} leaves nothing to train on; there are {count} samples"
    with pytest.raises(ValueError, match=message):
        split("mine", torch.zeros(count, 1), test_size, seed=0)


@pytest.mark.parametrize("test_size", [0, -1, 1.5, math.nan, math.inf, "half"])
def test_a_test_size_that_is_neither_a_share_nor_a_number_is_refused(test_size):
    with pytest.raises(ValueError, match="mine needs test_size"):
        split("mine", torch.zeros(10, 1), test_size, seed=0)
