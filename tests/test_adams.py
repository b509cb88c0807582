"""Multistep rules on uneven nodes: exact on polynomials, and of the order they state."""

import math

import pytest
import torch
from torch.testing import assert_close

from sde_lib.adams import Adams, interpolation_weights, quadrature_weights


def uneven(count, ratio=6.0):
    """Nodes on [0, 1] whose spacing varies by about ``ratio``, smoothly."""
    s = torch.linspace(0, 1, count, dtype=torch.float64)
    return s + (ratio - 1) / (ratio + 1) / (2 * math.pi) * torch.sin(2 * math.pi * s)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6])
def test_interpolation_weights_are_exact_for_polynomials(count):
    points = torch.tensor([-0.7, 0.1, 0.35, 0.8, 1.4, 2.2], dtype=torch.float64)[:count]
    weights = interpolation_weights(points, 0.2, 0.9)
    for power in range(count):
        exact = (0.9 ** (power + 1) - 0.2 ** (power + 1)) / (power + 1)
        assert_close(float(weights @ points**power), exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("order", [2, 3, 4, 5, 6])
def test_quadrature_is_exact_below_its_order_and_converges_with_it(order):
    nodes = uneven(12)
    for power in range(order):
        weights = quadrature_weights(nodes, order)
        assert_close(float(weights @ nodes**power), 1 / (power + 1), rtol=1e-10, atol=1e-12)
    error = {
        n: abs(
            float(quadrature_weights(uneven(n), order) @ (9 * uneven(n)).cos()) - math.sin(9) / 9
        )
        for n in (129, 513)
    }
    assert math.log(error[129] / error[513], 4) > order - 0.3


@pytest.mark.parametrize("fine", [False, True])
@pytest.mark.parametrize("order", [2, 3, 4, 5])
def test_adams_converges_at_its_stated_order_with_one_evaluation_a_node(order, fine):
    def error(count):
        nodes, calls = uneven(count), []

        def rate(i, y):
            calls.append(i)
            quiet_start = nodes[i] ** 4  # as that of a likelihood is: first steps are of low order
            return quiet_start * (torch.sin(9 * nodes[i]) - 4 * y * torch.cos(5 * nodes[i]))

        end = Adams(nodes, order, fine).solve(rate, torch.ones(1, dtype=torch.float64))
        assert calls == list(range(count)), "one evaluation a node, in turn"
        return float(end)

    # against the next finer solves: the truth has no closed form
    values = {n: error(n) for n in (65, 257, 2049)}
    slope = math.log(abs(values[65] - values[2049]) / abs(values[257] - values[2049]), 4)
    assert order - 0.3 < slope < order + 0.6


def test_a_sample_that_turns_sharply_is_predicted_at_one_order_less():
    nodes, seen = torch.linspace(0, 8, 9, dtype=torch.float64), []

    def rate(i, y):
        seen.append(y)
        return torch.tensor([[float(i)], [float(i == 4)]], dtype=torch.float64)

    Adams(nodes, 3).solve(rate, torch.zeros(2, 1, dtype=torch.float64))
    # the first sample's rate is a line, of which every order but the first predicts u² / 2
    assert_close(seen[6][0, 0].item(), 18.0)
    # the second has seen 0, 1, 0: corrected to 5/12 and 13/12, from there order 3 would go down
    # by 16/12, and order 2 by 6/12
    assert_close(seen[6][1, 0].item(), 13 / 12 - 6 / 12)

    seen.clear()
    Adams(nodes, 3, fine=True).solve(rate, torch.zeros(2, 1, dtype=torch.float64))
    assert_close(seen[5][1, 0].item(), 5 / 12 + 3 / 2)  # order 2 from 0, 1: where 3 gives 23/12


@pytest.mark.parametrize("order", [0, 1, 7, 2.5])
def test_orders_out_of_range_are_refused(order):
    with pytest.raises(ValueError, match="order"):
        Adams(torch.linspace(0, 1, 5), order)
    with pytest.raises(ValueError, match="two nodes"):
        Adams(torch.zeros(1), 2)
