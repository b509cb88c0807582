"""Time reversal: drift, diffusion and probability flow against closed forms of Gaussian data."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from sde_lib import SDE, VPSDE, probability_flow, reverse
from sde_lib.oracles import Gaussian

DATA = Gaussian(0.5, 0.8)


def middle_times(sde: SDE, n: int = 9) -> Tensor:
    """Times strictly inside the range, even in log t, float64."""
    steps = torch.linspace(math.log(sde.t_min), math.log(sde.t_max), n + 2, dtype=torch.float64)
    return steps[1:-1].exp()


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, 2.0])
def test_every_reverse_process_carries_the_marginals_of_the_forward_one(
    any_sde: SDE, eta: float
) -> None:
    """For Gaussian data the drift is a x + b, so that m' = a m + b and v' = 2 a v - eta² g²."""
    t = middle_times(any_sde)
    drift, diffusion = reverse(any_sde, DATA.score(any_sde), eta)

    def mean(s: Tensor) -> Tensor:
        return 0.5 * any_sde.alpha(s)

    def variance(s: Tensor) -> Tensor:
        return 0.64 * any_sde.alpha(s) ** 2 + any_sde.sigma(s) ** 2

    m, mean_rate = torch.func.jvp(mean, (t,), (torch.ones_like(t),))
    v, variance_rate = torch.func.jvp(variance, (t,), (torch.ones_like(t),))
    b = drift(torch.zeros_like(t), t)
    a = drift(torch.ones_like(t), t) - b

    assert_close(a * m + b, mean_rate, rtol=1e-6, atol=1e-8)
    assert_close(2 * a * v - diffusion(t) ** 2, variance_rate, rtol=1e-6, atol=1e-8)
    assert_close(diffusion(t), eta * any_sde.diffusion(t))


def test_eta_zero_is_the_probability_flow(any_sde: SDE) -> None:
    t = middle_times(any_sde)
    x = torch.linspace(-2, 2, len(t), dtype=torch.float64)
    drift, _ = reverse(any_sde, DATA.score(any_sde), eta=0.0)

    assert_close(probability_flow(any_sde, DATA.score(any_sde))(x, t), drift(x, t))


def test_velocity_is_the_time_derivative_of_the_exact_flow(any_sde: SDE) -> None:
    t = middle_times(any_sde)
    z = torch.linspace(-2, 2, len(t), dtype=torch.float64)

    def push(s: Tensor) -> Tensor:
        alpha, sigma = any_sde.alpha(s), any_sde.sigma(s)
        return 0.5 * alpha + (0.64 * alpha**2 + sigma**2).sqrt() * z

    x, rate = torch.func.jvp(push, (t,), (torch.ones_like(t),))

    velocity = probability_flow(any_sde, DATA.score(any_sde))(x, t)
    assert_close(velocity, rate, rtol=1e-6, atol=1e-8)


def test_scaled_velocity_is_the_derivative_of_the_scaled_flow_in_its_clock(any_sde: SDE) -> None:
    """In rho = exp(u) the flow of a Gaussian is z = (m + sqrt(s² + rho²) w) / sqrt(1 + rho²)."""
    flow = probability_flow(any_sde, DATA.score(any_sde))
    w = torch.tensor([-1.5, 0.3, 2.0], dtype=torch.float64)
    low, high = flow.clock_range()

    def scaled(u: Tensor) -> Tensor:
        rho2 = torch.exp(2 * u)
        return (0.5 + (0.64 + rho2).sqrt() * w) / (1 + rho2).sqrt()

    for clock in torch.linspace(low, high, 7, dtype=torch.float64)[1:-1]:
        z, rate = torch.func.jvp(scaled, (clock,), (torch.ones_like(clock),))
        assert_close(flow.scaled_velocity(z, flow.level_at(clock)), rate, rtol=1e-6, atol=1e-8)


def test_clock_runs_from_the_data_to_the_noise(any_sde: SDE) -> None:
    flow = probability_flow(any_sde, DATA.score(any_sde))
    low, high = (torch.tensor(end, dtype=torch.float64) for end in flow.clock_range())

    assert low < high
    assert float(flow.level_at(low).t) == pytest.approx(any_sde.t_min, rel=1e-6)
    assert float(flow.level_at(high).t) == pytest.approx(any_sde.t_max, rel=1e-6)
    assert float(flow.level_at(high).noise_ratio.log()) == pytest.approx(float(high), abs=1e-6)


def test_prior_at_the_end_of_the_flow_is_that_of_the_process(sde: SDE) -> None:
    x = torch.linspace(-1, 1, 6).reshape(2, 3)
    flow = probability_flow(sde, DATA.score(sde))

    assert torch.equal(flow.prior_log_prob(x), sde.prior_log_prob(x))


def test_reverse_process_takes_one_time_for_each_sample() -> None:
    sde, x = VPSDE(), torch.ones(3, 2, 2)
    t = torch.tensor([0.1, 0.5, 0.9])
    drift, _ = reverse(sde, Gaussian(torch.zeros(2, 2), 0.8).score(sde))

    rows = [drift(x[i : i + 1], t[i]) for i in range(3)]

    assert_close(drift(x, t), torch.cat(rows))


@pytest.mark.parametrize("eta", [-0.1, math.nan, "1"])
def test_reverse_refuses_an_eta_that_is_no_amount(eta: float) -> None:
    with pytest.raises(ValueError, match="reverse needs eta to be a finite number >= 0; got eta="):
        reverse(VPSDE(), DATA.score(VPSDE()), eta)
