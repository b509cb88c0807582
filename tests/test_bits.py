"""Bits per dimension: exact on uniform data, free of units, refused where they mean nothing."""

import math

import pytest
import torch
from torch.testing import assert_close

from likelihood import Standardization, UniformDequantization, bits_per_dim
from sde_lib.oracles import Gaussian


@pytest.mark.parametrize("levels", [2, 17, 256, 65536])
@pytest.mark.parametrize("low, high", [(-1.0, 1.0), (0.0, 1.0), (-3.0, 10.0)])
def test_uniform_data_of_k_levels_score_log2_k(levels, low, high):
    units = UniformDequantization(levels, low, high)
    values = torch.randint(levels, (50, 3, 4), generator=torch.Generator().manual_seed(0))
    x = units.encode(values, torch.Generator().manual_seed(1))
    log_prob = torch.full(
        (50,), -12 * math.log(high - low), dtype=torch.float64
    )  # the uniform density on the cube

    assert bool(((x >= low) & (x <= high)).all())
    assert_close(
        units.measure(log_prob, (3, 4)), torch.full((50,), math.log2(levels), dtype=torch.float64)
    )


def test_bits_do_not_depend_on_the_scaling_of_the_model():
    values = torch.randint(8, (20, 5), generator=torch.Generator().manual_seed(0))
    results = []
    for low, high in ((-1.0, 1.0), (0.0, 8.0), (5.0, 5.5)):
        units = UniformDequantization(8, low, high)
        density = Gaussian(
            torch.full((5,), (low + high) / 2).double(), 0.2 * (high - low)
        )  # the same, in other units
        x = units.encode(values, torch.Generator().manual_seed(1)).double()
        results.append(units.measure(density.log_prob(x), (5,)))
    for other in results[1:]:
        assert_close(other, results[0], rtol=1e-4, atol=1e-4)  # x is float32


def test_bits_bound_the_code_length_of_the_discrete_data_and_meet_it_for_flat_bins():
    probabilities = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64)
    units = UniformDequantization(4)
    values = torch.arange(4)[:, None]
    log_prob = (
        probabilities / units.bin_width
    ).log()  # density constant on each bin: Jensen's gap is zero
    assert_close(
        units.measure(log_prob, (1,)), torch.tensor([1.0, 2.0, 3.0, 3.0], dtype=torch.float64)
    )
    assert bool((units.decode(units.encode(values)) == values).all())


def test_bin_widths_may_differ_by_dimension():
    log_prob = torch.zeros(3, dtype=torch.float64)
    widths = torch.tensor([0.5, 2.0, 0.25, 1.0])
    assert_close(
        bits_per_dim(log_prob, 4, 256, bin_width=widths),
        torch.full((3,), 0.5, dtype=torch.float64),
    )


def test_the_score_sde_offset_is_recovered_for_8_bit_images():
    log_prob = torch.tensor(
        [-1000.0], dtype=torch.float64
    )  # data scaled to [-1, 1]: bits = nats / (D ln 2) + 7
    assert_close(
        bits_per_dim(log_prob, 3072),
        1000 / (3072 * math.log(2)) + torch.tensor([7.0], dtype=torch.float64),
    )


def test_continuous_data_are_refused():
    with pytest.raises(ValueError, match="changes with the unit"):
        bits_per_dim(torch.zeros(1), 4, None)


@pytest.mark.parametrize("levels", [0, 1, -3, 2.5])
def test_levels_must_be_a_whole_number_of_at_least_two(levels):
    with pytest.raises(ValueError, match="levels"):
        bits_per_dim(torch.zeros(1), 4, levels)
    with pytest.raises(ValueError, match="levels"):
        UniformDequantization(levels)


@pytest.mark.parametrize("levels", [17, 256])
def test_decode_inverts_encode_for_every_level_and_draw(levels):
    units = UniformDequantization(levels)
    values = torch.arange(levels).repeat(200, 1)
    assert bool(
        (
            units.decode(units.encode(values, torch.Generator().manual_seed(0)).double()) == values
        ).all()
    )
    assert units.decode(torch.tensor([[-9.0, 9.0]])).tolist() == [[0, levels - 1]]


def test_encode_is_uniform_within_the_bin():
    n, units = 100_000, UniformDequantization(4, 0.0, 4.0)
    x = units.encode(torch.full((n, 1), 2), torch.Generator().manual_seed(0))
    assert abs(float(x.mean()) - 2.5) < 5 * (1 / 12) ** 0.5 / n**0.5
    assert (
        abs(float(x.var()) - 1 / 12) < 5 * (1 / 180 / n) ** 0.5
    )  # variance of (u - 1/2)² is 1/180


def test_standardization_reports_nats_in_data_units():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(5000, 3, generator=generator) * torch.tensor(
        [1.0, 10.0, 0.1]
    ) + torch.tensor([0.0, 5.0, 2.0])
    units = Standardization.of(values)
    x = units.encode(values)
    assert_close(x.mean(0), torch.zeros(3), atol=1e-4, rtol=0)
    assert_close(x.std(0), torch.ones(3), atol=1e-4, rtol=0)
    assert_close(units.decode(x), values, atol=1e-4, rtol=1e-5)

    normal = Gaussian(torch.zeros(3), 1.0)  # a density in model units, and the same in data units
    data = Gaussian(units.shift, units.scale)
    assert_close(
        units.log_prob(normal.log_prob(x), (3,)), data.log_prob(values), atol=1e-4, rtol=1e-4
    )
    assert_close(
        units.measure(normal.log_prob(x), (3,)), -data.log_prob(values), atol=1e-4, rtol=1e-4
    )


def test_standardization_of_images_is_one_number_a_channel():
    images = torch.randn(100, 2, 5, 5)
    units = Standardization.of(images)
    assert units.scale.shape == (2, 1, 1)
    log_volume = 25 * units.scale.double().log().sum()
    assert_close(
        units.log_prob(torch.zeros(1, dtype=torch.float64), (2, 5, 5)),
        -log_volume[None],
        atol=1e-4,
        rtol=1e-5,
    )


@pytest.mark.parametrize("levels", [2, 17, 256, 65536])
@pytest.mark.parametrize("u", [0.0, 1 - 2**-24, 1 - 2**-53], ids=["first", "last", "very last"])
def test_dequantized_data_stay_in_their_bin_at_both_ends_of_the_noise(monkeypatch, levels, u):
    monkeypatch.setattr(
        "likelihood.dequantize.rand", lambda shape, *_, **__: torch.full(tuple(shape), u).double()
    )
    units = UniformDequantization(levels)
    values = torch.arange(levels)[:, None]
    assert torch.equal(units.decode(units.encode(values)).long(), values)
