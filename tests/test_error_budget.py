"""What a likelihood says of its own error, against errors that are known."""

import pytest
import torch
from known_flows import PROCESSES, correlated, exact_flow, noised, seeded, vectors
from torch.testing import assert_close

from likelihood import (
    Adaptive,
    Exact,
    FixedGrid,
    Hutchinson,
    log_likelihood,
    plan,
)
from likelihood.result import student_quantile
from sde_lib import (
    EDMSDE,
    VESDE,
    VPSDE,
    probability_flow,
)
from sde_lib.oracles import Gaussian, GaussianMixture


@pytest.mark.parametrize("nodes", [12, 16, 24, 32, 48, 64])
def test_the_solver_error_covers_the_integration_error(nodes):
    sde, data = VPSDE(), vectors()
    x = noised(data, sde, 200).double()
    result = log_likelihood(exact_flow(sde, data), x, divergence=Exact(), solver=FixedGrid(nodes))
    error = (result.log_prob - data.log_prob(x, sde, sde.t_min)).abs()
    assert float(error.mean()) < 3 * float(result.solver_error.mean())
    assert float(result.solver_error.mean()) < 30 * float(error.mean()) + 1e-3


@pytest.mark.parametrize("num_probes", [1, 2, 4])
def test_intervals_cover_the_truth_in_95_percent_of_cases(num_probes):
    covered = []
    for sde in (VPSDE(), EDMSDE()):
        for data in (vectors(), correlated()):
            x = noised(data, sde, 600, seed=6)
            result = log_likelihood(
                exact_flow(sde, data),
                x,
                divergence=Hutchinson(num_probes),
                generator=seeded(7),
                solver=FixedGrid(48),
            )
            truth = data.log_prob(x.double(), sde, sde.t_min)
            low, high = result.interval()
            covered.append(float(((low <= truth) & (truth <= high)).double().mean()))
            assert float(result.standard_error.mean()) > 0.1, "the probes matter"
    assert 0.93 <= sum(covered) / 4 <= 0.97
    assert min(covered) > 0.92 and max(covered) < 0.99  # 0.95 +- 3 standard errors of 600 cases


@pytest.mark.parametrize("nodes", [32, 64, 96])
def test_intervals_of_an_exact_trace_hold_for_95_percent_or_more_of_any_target(nodes):
    sde, worst = VPSDE(), 1.0
    for seed in range(6):
        count = 2 + seed % 4
        means = 3 * torch.randn(count, 2, generator=seeded(seed))
        stds = torch.exp(2 * torch.rand(count, 2, generator=seeded(seed + 100)) - 2.5)
        data = GaussianMixture(means, stds)
        x = noised(data, sde, 400, seed=5)
        result = log_likelihood(exact_flow(sde, data), x, solver=FixedGrid(nodes))
        truth = data.log_prob(x.double(), sde, sde.t_min)
        low, high = result.interval()
        worst = min(worst, float(((low <= truth) & (truth <= high)).double().mean()))
        # and is not so wide that it says nothing
        error = (result.log_prob.double() - truth).abs()
        assert float(result.solver_error.double().median()) < 12 * float(error.median())
    assert worst >= 0.95


def test_an_interval_of_what_nobody_measured_has_no_ends():
    sde, data = VPSDE(), vectors()
    flow, x = exact_flow(sde, data), noised(data, sde, 5)
    for solver in (FixedGrid(24, halve=False), Adaptive(1e-3, 1e-3, compare=False)):
        result = log_likelihood(flow, x, solver=solver, divergence=Exact())
        assert bool(torch.stack(result.interval()).isnan().all())
        assert bool(result.total_error.isnan().all())
        low, high = result.interval(solver=False)
        assert torch.equal(low, result.log_prob) and torch.equal(high, result.log_prob)


def test_the_solver_error_of_an_adaptive_solver_is_how_far_ten_times_the_tolerance_is():
    sde, data = VPSDE(), vectors()
    flow, x = exact_flow(sde, data), noised(data, sde, 50)
    probes = {"divergence": Exact()}
    result = log_likelihood(flow, x, solver=Adaptive(1e-4, 1e-4), **probes)
    fine, loose = (
        log_likelihood(flow, x, solver=Adaptive(tol, tol, compare=False), **probes)
        for tol in (1e-4, 1e-3)
    )
    assert result.nfe == fine.nfe + loose.nfe and torch.equal(result.log_prob, fine.log_prob)
    apart = (fine.log_prob - loose.log_prob).abs()
    assert bool((result.solver_error >= 0.99 * apart / 2**0.5 - 1e-4).all())
    error = (result.log_prob.double() - data.log_prob(x.double(), sde, sde.t_min)).abs()
    assert float((error <= 2 * result.solver_error.double()).double().mean()) >= 0.94


@pytest.mark.parametrize(
    "sde", [VPSDE(t_min=1e-2), VESDE(sigma_min=0.05), EDMSDE(sigma_min=0.03)], ids=repr
)
def test_truncation_leads_from_t_min_to_the_density_of_the_data(sde):
    data = Gaussian(torch.tensor([0.3, -0.2, 0.5]), torch.tensor([0.5, 0.4, 0.8]))
    x = data.sample(200, generator=seeded()).double()
    result = log_likelihood(exact_flow(sde, data), x, solver=FixedGrid(96))
    gap = data.log_prob(x) - data.log_prob(x, sde, sde.t_min)
    assert float(gap.abs().mean()) > 1e-3
    # of second order in sigma² / variance, which is 0.016 at most
    assert float((result.truncation - gap).abs().mean()) < 0.1 * float(gap.abs().mean())


@pytest.mark.parametrize("sde", PROCESSES, ids=repr)
def test_prior_mismatch_is_the_log_ratio_of_the_noised_density_to_the_prior(sde):
    data = GaussianMixture(2 * torch.randn(5, 24, generator=seeded()), 0.5)
    x = noised(data, sde, 100)
    result = log_likelihood(
        probability_flow(sde, data.score(sde)), x.double(), solver=FixedGrid(64)
    )
    gap = data.log_prob(result.latent, sde, sde.t_max) - sde.prior_log_prob(result.latent)
    size = float(gap.square().mean().sqrt())
    assert 1e-3 < size < 0.2
    assert float((result.prior_mismatch - gap).square().mean().sqrt()) < 0.15 * size
    known = log_likelihood(exact_flow(sde, data), x.double(), solver=FixedGrid(64))
    assert float(known.prior_mismatch.square().mean().sqrt()) < 0.15 * size


@pytest.mark.parametrize("data", [vectors(), correlated(64)], ids=["mixture", "gaussian"])
@pytest.mark.parametrize("target", [1.6, 0.8])
def test_a_plan_reaches_its_error_and_a_smaller_one_costs_more(target, data):
    sde = VPSDE()
    flow, x = exact_flow(sde, data), noised(data, sde, 300)
    solver, probes = plan(flow, x[:1], target, divergence=Hutchinson())
    result = log_likelihood(flow, x, solver=solver, divergence=probes, generator=seeded())
    error = result.log_prob.double() - data.log_prob(x.double(), sde, sde.t_min)
    # the root mean square of 300 of which a few have most of it
    assert 0.15 * target < float(result.standard_error.square().mean().sqrt()) < 1.1 * target
    assert float(error.abs().quantile(0.9)) < 1.65 * target
    finer, more = plan(flow, x[:1], target / 4, divergence=Hutchinson())
    assert finer.nodes * more.passes(x) > solver.nodes * probes.passes(x)


def test_a_plan_takes_the_exact_trace_where_probes_would_cost_more():
    sde, data = VPSDE(), correlated()
    flow = exact_flow(sde, data)
    solver, divergence = plan(flow, torch.zeros(1, 24), 0.01, divergence=Hutchinson())
    assert divergence == Exact() and solver.nodes >= 64
    x = noised(data, sde, 300)
    result = log_likelihood(flow, x, solver=solver, divergence=divergence)
    error = result.log_prob.double() - data.log_prob(x.double(), sde, sde.t_min)
    assert float(error.square().mean().sqrt()) < 0.01
    assert plan(flow, torch.zeros(1, 24), 0.01, divergence=Exact()) == (solver, Exact())


def test_a_plan_out_of_reach_says_what_can_be_had():
    sde, data = VPSDE(), correlated(784)
    flow = probability_flow(sde, data.score(sde))
    with pytest.raises(ValueError, match=r"out of reach: 512 nodes of 32 probes leave \d\.\d+"):
        plan(flow, torch.zeros(1, 784), 0.05)
    with pytest.raises(ValueError, match="out of reach"):
        plan(flow, torch.zeros(1, 784), 1e-9)


def test_noise_of_the_probes_is_not_taken_for_solver_error():
    sde, data = VPSDE(), correlated()
    x = noised(data, sde, 300)
    probes = Hutchinson(2, "gaussian")
    result = log_likelihood(exact_flow(sde, data), x, divergence=probes, generator=seeded())
    assert float(result.solver_error.median()) < 0.01 * float(result.standard_error.median())


def test_the_prior_mismatch_knows_where_the_data_are():
    sde, data = VPSDE(beta_max=8.0), Gaussian(3 * torch.ones(4), 0.5)
    x = noised(data, sde, 100)
    result = log_likelihood(probability_flow(sde, data.score(sde)), x)
    end = result.latent.double()
    truth = data.log_prob(end, sde, sde.t_max) - sde.prior_log_prob(end)
    assert float(truth.abs().mean()) > 0.3
    assert_close(result.prior_mismatch.double(), truth, rtol=0, atol=0.01)


def test_student_quantiles_are_those_of_the_tables():
    freedom = torch.tensor([1.0, 2.0, 5.0, 30.0, 1e9], dtype=torch.float64)
    wanted = torch.tensor([12.706, 4.303, 2.571, 2.042, 1.965], dtype=torch.float64)
    assert_close(student_quantile(0.95, freedom), wanted, rtol=3e-3, atol=0)


def test_the_interval_of_an_exact_trace_is_two_solver_errors_wide_each_way():
    sde, data = VPSDE(), vectors()
    result = log_likelihood(
        exact_flow(sde, data), noised(data, sde, 5), divergence=Exact(), solver=FixedGrid(16)
    )
    low, high = result.interval()
    assert float(result.solver_error.min()) > 1e-3
    assert_close(high - result.log_prob, 2 * result.solver_error, rtol=1e-3, atol=1e-4)
    assert_close(result.log_prob - low, 2 * result.solver_error, rtol=1e-3, atol=1e-4)
