"""The fixed grid: unbiased with fresh probes, and every part of its error budget against truth."""

import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from likelihood import (
    Adaptive,
    Cosine,
    Exact,
    FixedGrid,
    Hutchinson,
    Pilot,
    Pixel,
    Principal,
    encode,
    log_likelihood,
    plan,
)
from likelihood.divergence import colours
from likelihood.result import student_quantile
from sde_lib import (
    EDMSDE,
    VESDE,
    VPSDE,
    PerSample,
    SubVPSDE,
    probability_flow,
)
from sde_lib.oracles import Gaussian, GaussianMixture
from sde_lib.samplers import SamplingError

PROCESSES = [VPSDE(), SubVPSDE(), VESDE(), EDMSDE()]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def vectors(dims=24):
    """A mixture of 4 components with standard deviations from 0.05 to 1."""
    means = torch.randn(4, dims, generator=seeded(1))
    stds = torch.exp(torch.linspace(math.log(0.05), 0, dims)).expand(4, dims)
    return GaussianMixture(means, stds)


def correlated(dims=24):
    """A Gaussian far from diagonal: probes in its coordinates say little of the trace."""
    a = torch.randn(dims, dims, generator=seeded(2))
    return Gaussian(torch.zeros(dims), covariance=a @ a.T / dims + 0.01 * torch.eye(dims))


def exact_flow(sde, data):
    return probability_flow(
        sde, data.score(sde), log_prior=lambda x: data.log_prob(x, sde, sde.t_max)
    )


def noised(data, sde, count, seed=0):
    return data.sample(count, generator=seeded(seed), sde=sde, t=sde.t_min)


@pytest.mark.parametrize("sde", PROCESSES, ids=repr)
@pytest.mark.parametrize("data", [vectors(), correlated()], ids=["mixture", "gaussian"])
def test_integration_error_is_below_a_tenth_of_a_nat_by_96_nodes(sde, data):
    x = noised(data, sde, 32).double()
    result = log_likelihood(exact_flow(sde, data), x, divergence=Exact(), solver=FixedGrid(96))
    error = result.log_prob - data.log_prob(x, sde, sde.t_min)
    assert float(error.square().mean().sqrt()) < 0.01
    # what the halved grid says of it is neither silent nor wild
    assert float(error.abs().mean()) < 2 * float(result.solver_error.mean()) + 1e-4
    assert float(result.solver_error.mean()) < 0.1


@pytest.mark.parametrize("nodes", [12, 16, 24, 32, 48, 64])
def test_the_solver_error_covers_the_integration_error(nodes):
    sde, data = VPSDE(), vectors()
    x = noised(data, sde, 200).double()
    result = log_likelihood(exact_flow(sde, data), x, divergence=Exact(), solver=FixedGrid(nodes))
    error = (result.log_prob - data.log_prob(x, sde, sde.t_min)).abs()
    assert float(error.mean()) < 3 * float(result.solver_error.mean())
    assert float(result.solver_error.mean()) < 30 * float(error.mean()) + 1e-3


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian", "orthogonal"])
@pytest.mark.parametrize("basis", ["pixel", "cosine", "principal"])
@pytest.mark.parametrize("num_probes", [1, 2])
def test_fresh_probes_are_unbiased_in_every_basis(distribution, basis, num_probes):
    sde, data = VPSDE(), correlated()
    axes = {
        "pixel": Pixel(),
        "cosine": Cosine(1),
        "principal": Principal.of(data.sample(5000, generator=seeded(3))),
    }[basis]
    x = noised(data, sde, 1, seed=4).expand(300, 24)  # one point, 300 sets of probes
    probes = Hutchinson(num_probes, distribution, axes)
    result = log_likelihood(
        exact_flow(sde, data), x, divergence=probes, generator=seeded(5), solver=FixedGrid(40)
    )
    error = result.log_prob.double() - data.log_prob(x[:1].double(), sde, sde.t_min)
    assert abs(float(error.mean())) < 5 * float(error.std()) / 300**0.5 + 2e-3
    if distribution != "orthogonal":  # whose error bar is too long, by its docstring
        ratio = float(error.square().mean() / result.standard_error.square().mean())
        assert ratio < 1 + 5 * (2 / 300) ** 0.5 + 0.1
        # a single probe cannot tell little noise from a bend of the trace
        assert num_probes == 1 or ratio > 1 - 5 * (2 / 300) ** 0.5 - 0.1
    elif basis == "pixel":
        assert float(error.square().mean()) < float(result.standard_error.square().mean())


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


def test_orders_that_the_half_grid_cannot_have_are_refused():
    with pytest.raises(ValueError, match="nodes >= 40 for order 5; got nodes=9"):
        FixedGrid(9, order=5)
    with pytest.raises(ValueError, match="at most 100000 nodes"):
        FixedGrid(10**9)
    assert FixedGrid(40, order=5).chosen_order == 5


def test_fresh_probes_have_a_fraction_of_the_variance_of_kept_ones():
    sde, data = VPSDE(), correlated()
    x = noised(data, sde, 200)

    def variance(fresh):
        result = log_likelihood(
            exact_flow(sde, data),
            x,
            divergence=Hutchinson(1, basis=Pixel()),
            generator=seeded(8),
            solver=FixedGrid(48, fresh=fresh),
        )
        return float((result.log_prob - data.log_prob(x, sde, sde.t_min)).square().mean())

    assert variance(True) < variance(False) / 8


def test_orthogonal_signs_of_successive_nodes_are_orthogonal_and_each_is_unbiased():
    probes = Hutchinson(1, "orthogonal", Pixel()).probes(torch.zeros(4000, 8), seeded())
    rows = torch.stack([probes()[0] for _ in range(8)])  # [8 nodes, B, 8]
    assert set(rows.unique().tolist()) == {-1.0, 1.0}
    gram = torch.einsum("nbd,mbd->bnm", rows, rows)
    assert_close(gram, 8 * torch.eye(8).expand(4000, 8, 8))
    second = torch.einsum("bd,be->de", rows[3], rows[3]) / 4000
    assert_close(second, torch.eye(8), rtol=0, atol=5 / 4000**0.5)


@pytest.mark.parametrize("shape", [(6,), (3, 5), (1, 4, 6), (3, 4, 4), (1, 2, 3, 4)])
def test_bases_are_orthonormal(shape):
    size = math.prod(shape)
    data = torch.randn(4 * size, *shape, generator=seeded())
    eye = torch.eye(size, dtype=torch.float64).reshape(size, *shape)
    for basis in (Pixel(), Cosine(len(shape)), Principal.of(data)):
        q = basis.to_data(eye).reshape(size, size)
        assert_close(q @ q.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)


def test_principal_axes_are_those_of_the_data_and_leave_no_noise_for_a_gaussian():
    sde, data = VPSDE(), correlated(12)
    axes = Principal.of(data.sample(200_000, generator=seeded()))
    overlap = (axes.axes.T @ data.axes).abs().max(1).values
    assert float(overlap.min()) > 0.98
    exact = Principal(data.axes)
    result = log_likelihood(
        exact_flow(sde, data), noised(data, sde, 8), divergence=Hutchinson(2, basis=exact)
    )
    assert float(result.standard_error.max()) < 1e-3


def test_the_pilot_chooses_the_basis_in_which_probes_say_most():
    sde = VPSDE()
    cosines = Cosine(3).to_data(torch.eye(64, dtype=torch.float64).reshape(64, 1, 8, 8))
    q = cosines.reshape(64, 64)
    variances = torch.logspace(0, -3, 64, dtype=torch.float64)
    smooth = Gaussian(torch.zeros(1, 8, 8), covariance=q.T @ torch.diag(variances) @ q)
    rough = Gaussian(torch.zeros(1, 8, 8), variances.sqrt().reshape(1, 8, 8))
    for data, basis in ((smooth, Cosine(3)), (rough, Pixel())):
        pilot = Pilot.of(
            probability_flow(sde, data.score(sde)), torch.zeros(1, 1, 8, 8), Hutchinson()
        )
        assert pilot.divergence.basis == basis


def test_the_pilot_finds_the_range_of_scales_and_puts_the_nodes_there():
    sde = VPSDE()
    data = GaussianMixture(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), 0.05)
    pilot = Pilot.of(probability_flow(sde, data.score(sde)), torch.zeros(1, 2), Exact())
    low, high = pilot.scales()
    # T = D rho² / (rho² + std²) is half a dimension of two at rho = std / sqrt(3)
    assert low == pytest.approx(math.log(0.05 / 3**0.5), abs=0.15)
    assert math.log(0.5) < high < math.log(3.0)
    nodes = pilot.nodes(64)
    assert bool((nodes.diff() > 0).all())
    start, end = probability_flow(sde, data.score(sde)).clock_range()
    assert (float(nodes[0]), float(nodes[-1])) == (start, end)
    inside = ((nodes > low) & (nodes < high)).double().mean()
    assert float(inside) > 1.2 * (high - low) / (end - start)


def test_the_pilot_looks_at_no_sample_and_only_once():
    sde, data = VPSDE(), vectors()
    calls = []

    def score(x, t):
        calls.append(len(x))
        return data.score(sde)(x, t)

    flow = probability_flow(sde, score)
    first = log_likelihood(flow, noised(data, sde, 3), solver=FixedGrid(16))
    before = len(calls)
    second = log_likelihood(flow, noised(data, sde, 3, seed=9), solver=FixedGrid(16))
    assert calls.count(16) == 33 and len(calls) - before < before
    assert first.pilot_nfe == 33 * 16 + 1 and second.pilot_nfe == 1
    assert torch.equal(first.clock, second.clock)


@pytest.mark.parametrize("probes", [Hutchinson(2), Exact()], ids=str)
def test_a_sample_is_the_same_in_every_batch(probes):
    sde, data = VPSDE(), vectors()
    x = noised(data, sde, 9)
    flow = probability_flow(sde, data.score(sde))

    def run(rows):
        return log_likelihood(
            flow, x[rows], divergence=probes, generator=PerSample(rows), solver=FixedGrid(24)
        )

    together = run(range(9))
    for rows in ([0], [4, 5], [8, 1, 3]):
        alone = run(rows)
        for name in ("log_prob", "standard_error", "latent", "truncation", "solver_error"):
            assert_close(getattr(alone, name), getattr(together, name)[rows], rtol=1e-3, atol=1e-4)


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


def test_information_by_noise_level_is_the_posterior_variance_over_that_of_the_noise():
    sde, std = VPSDE(), torch.tensor([0.1, 1.0, 0.5])
    data = Gaussian(torch.zeros(3), std)
    result = log_likelihood(exact_flow(sde, data), noised(data, sde, 4).double())
    rho = result.clock.exp()[:, None]
    wanted = (std**2 / (std**2 + rho**2)).sum(1)  # posterior variance s² rho² / (s² + rho²)
    assert_close(result.information(), wanted[:, None].expand(-1, 4), rtol=0, atol=1e-5)


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


def test_one_pilot_serves_every_number_of_probes_and_no_other_score():
    sde, data = VPSDE(), vectors()
    flow, x = exact_flow(sde, data), noised(data, sde, 2)
    first = log_likelihood(flow, x, divergence=Hutchinson(2), solver=FixedGrid(16))
    assert first.pilot_nfe == 33 * 16 + 1
    other = log_likelihood(flow, x, divergence=Hutchinson(5), solver=FixedGrid(16))
    assert other.pilot_nfe == 1
    wide = replace(flow, score=Gaussian(torch.zeros(24), 3.0).score(sde))
    again = log_likelihood(wide, x, divergence=Hutchinson(2), solver=FixedGrid(16))
    assert again.pilot_nfe == 33 * 16 + 1
    assert not torch.equal(again.clock, first.clock)


@pytest.mark.parametrize("probes", [Exact(), Hutchinson(2)], ids=str)
def test_log_prob_is_differentiable_by_gradcheck(probes):
    sde = VPSDE()
    scale = torch.tensor([0.8, 1.3], dtype=torch.float64, requires_grad=True)
    memory = {}  # of one pilot: nodes that moved with the parameters would move the error

    def remembering(score):
        flow = probability_flow(sde, score)
        flow.memory.update(memory)
        Pilot.of(flow, x, probes)
        memory.update(flow.memory)
        return flow

    def log_prob(x, scale):
        def score(y, t):
            alpha, sigma = sde.alpha(t), sde.sigma(t)
            return -y / (alpha**2 * scale**2 + sigma**2) - 0.1 * torch.sin(y)

        result = log_likelihood(
            remembering(score),
            x,
            solver=FixedGrid(12, halve=False),
            divergence=probes,
            generator=seeded(),
            differentiable=True,
        )
        return result.log_prob, result.latent

    x = torch.randn(3, 2, generator=seeded(), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(log_prob, (x, scale))
    with pytest.raises(ValueError, match="FixedGrid"):
        log_likelihood(
            probability_flow(sde, lambda y, t: -y), x, solver=Adaptive(), differentiable=True
        )


def test_gradient_of_the_exact_log_density_is_the_score():
    sde, data = VPSDE(), vectors(3)
    x = noised(data, sde, 20).double().requires_grad_()
    result = log_likelihood(
        exact_flow(sde, data), x, solver=FixedGrid(192, halve=False), differentiable=True
    )
    (gradient,) = torch.autograd.grad(result.log_prob.sum(), x)
    t = torch.tensor(sde.t_min, dtype=torch.float64)
    score = data.score(sde)(x.detach(), t)
    assert float((gradient - score).norm(dim=1).max()) < 0.02 * float(score.norm(dim=1).mean())
    assert not log_likelihood(exact_flow(sde, data), x).log_prob.requires_grad


def test_samples_that_are_not_finite_leave_the_others_their_result():
    sde, data = VPSDE(), vectors()

    def broken(x, t):
        score = data.score(sde)(x, t)
        far = (x[:, :1] > 50) & (t < 0.5)
        return torch.where(far, float("nan"), score)

    x = noised(data, sde, 4)
    x[2, 0] = 1e3
    flow = probability_flow(sde, broken)
    with pytest.raises(SamplingError, match=r"1 of 4 .* from node [01] on.* number 2") as caught:
        log_likelihood(flow, x, generator=PerSample(range(4)))
    good = [0, 1, 3]
    partial = caught.value.partial.log_prob
    assert_close(
        partial[good],
        log_likelihood(flow, x[good], generator=PerSample(good)).log_prob,
        rtol=1e-4,
        atol=1e-3,
    )
    assert bool(partial[2].isnan())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_for_the_network_and_not_for_the_states(dtype):
    sde, data = VPSDE(), vectors()
    x = noised(data, sde, 8)
    with pytest.raises(ValueError, match="half precision converts inside"):
        log_likelihood(probability_flow(sde, data.score(sde)), x.to(dtype))

    def low(x, t):  # a network whose result is rounded to half precision
        return (data.score(sde)(x, t) * sde.sigma(t).to(x)).to(dtype) / sde.sigma(t).to(dtype)

    result = log_likelihood(probability_flow(sde, low), x, generator=seeded())
    exact = log_likelihood(probability_flow(sde, data.score(sde)), x, generator=seeded())
    assert result.log_prob.dtype == torch.float32
    assert_close(result.log_prob, exact.log_prob, rtol=0.05, atol=1.0)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda s: lambda x, t: s(x, t)[:, :2], r"shape of x; got \(\d+, 2\) for x of shape"),
        (lambda s: lambda x, t: s(x, t)[:, :1], r"shape of x; got \(\d+, 1\) for x of shape"),
        (lambda s: lambda x, t: (s(x, t), 0), "real numbers in the shape of x; got tuple"),
        (lambda s: lambda x, t: None, "real numbers in the shape of x; got NoneType"),
        (lambda s: lambda x, t: s(x, t) + 0j, "real numbers in the shape of x; got torch.complex"),
        (lambda s: lambda x, t: s(x.detach(), t), "cannot be differentiated"),
        (lambda s: lambda x, t: torch.as_tensor(x.numpy()), "cannot be differentiated"),
        (lambda s: torch.no_grad()(s), "cannot be differentiated"),
        (lambda s: lambda x, t, w=torch.ones(24, requires_grad=True): w * s(x.detach(), t),
         "cannot be differentiated"),
        (lambda s: lambda x, t, n=torch.nn.Linear(24, 24).half(): n(x), "x.half"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("probes", [Exact(), Hutchinson(2)], ids=str)
def test_a_score_that_cannot_serve_says_why(spoil, words, probes):
    sde, data = VPSDE(), vectors()
    flow = probability_flow(sde, spoil(data.score(sde)))
    with pytest.raises(ValueError, match=words):
        log_likelihood(flow, torch.zeros(3, 24), divergence=probes)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"x": [[0.0] * 24]}, "as a tensor; got list"),
        ({"x": torch.zeros(0, 24)}, "batch"),
        ({"flow": VPSDE()}, "needs flow to be a ProbabilityFlow"),
        ({"flow": lambda x, t: x}, "needs flow to be a ProbabilityFlow"),
        ({"solver": "dopri5"}, "needs solver to be a Solver, .*got 'dopri5'"),
        ({"solver": FixedGrid}, "got the class FixedGrid"),
        ({"divergence": Exact}, "needs divergence to be a Divergence, .*got the class Exact"),
        ({"generator": 3}, "PerSample or None; got 3"),
        ({"divergence": Hutchinson(2, basis=Cosine(9))}, r"Cosine\(9\) needs samples of 9 axes"),
        ({"divergence": Hutchinson(2, basis=Principal(torch.eye(7)))}, "7 axes; got samples"),
    ],
)
def test_arguments_of_the_wrong_kind_are_told_in_one_sentence(arguments, words):
    sde, data = VPSDE(), vectors()
    given = {"flow": exact_flow(sde, data), "x": torch.zeros(3, 24)} | arguments
    with pytest.raises(ValueError, match=words):
        log_likelihood(given.pop("flow"), given.pop("x"), **given)


def test_bases_that_are_none_are_refused_when_they_are_made():
    for axes in (2 * torch.eye(5), torch.ones(5, 5), torch.eye(5)[:3], torch.eye(5).long()):
        with pytest.raises(ValueError, match="orthogonal matrix"):
            Principal(axes)
    with pytest.raises(ValueError, match="axes"):
        Cosine(0)
    with pytest.raises(ValueError, match="basis='cosine'"):
        Hutchinson(2, basis="cosine")


@pytest.mark.parametrize(
    "solver", [FixedGrid(16), Adaptive(1e-3, 1e-3)], ids=["fixed", "adaptive"]
)
def test_inference_mode_changes_nothing(solver):
    sde, data = VPSDE(), vectors()
    x = noised(data, sde, 3)
    outside = log_likelihood(exact_flow(sde, data), x, solver=solver, generator=seeded())
    with torch.inference_mode():
        flow = exact_flow(sde, data)
        inside = log_likelihood(flow, x.clone(), solver=solver, generator=seeded())
        latent = encode(exact_flow(sde, data), x.clone(), nodes=16)
    assert_close(inside.log_prob, outside.log_prob, rtol=0, atol=1e-5)
    assert latent.shape == x.shape


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU here: the loop's waits cannot be seen"
)
def test_the_loop_over_the_nodes_never_waits_for_the_gpu():
    device, sde, calls = torch.device("cuda"), VPSDE(), 0

    def score(x, t):
        nonlocal calls
        calls += 1
        if calls == 3:
            torch.cuda.set_sync_debug_mode("error")
        if calls == 30:
            torch.cuda.set_sync_debug_mode("default")
        return -x

    flow, x = probability_flow(sde, score), torch.zeros(4, 24, device=device)
    for _ in range(2):  # what the pilot found is kept
        calls = 1000 if not flow.memory else 0
        generator = torch.Generator(device).manual_seed(0)
        try:
            result = log_likelihood(flow, x, solver=FixedGrid(32), generator=generator)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert bool(result.log_prob.isfinite().all())


def test_the_trace_is_integrated_one_order_above_the_path():
    sde, data = VPSDE(), Gaussian(torch.zeros(2, dtype=torch.float64), 0.3)
    flow = exact_flow(sde, data)  # whose trace does not depend on the path
    low, high = (math.exp(u) for u in flow.clock_range())
    truth = math.log((0.09 + high**2) / (0.09 + low**2))
    errors = []
    for nodes in (64, 128):
        solver = FixedGrid(nodes, halve=False)
        x = noised(data, sde, 1)
        path = solver.solve(flow, x, Exact(), None, differentiable=False)
        errors.append(abs(float(path.volume) - truth))
    assert errors[0] / errors[1] > 2**4.6 and errors[1] < 1e-7


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


def test_a_tolerance_of_log_p_of_its_own_takes_evaluations_of_its_own():
    sde, data = VPSDE(), vectors()
    flow, x = exact_flow(sde, data), noised(data, sde, 4)
    loose, tight = (
        log_likelihood(
            flow, x, solver=Adaptive(1e-3, 1e-3, tol, compare=False), divergence=Exact()
        )
        for tol in (None, 1e-7)
    )
    assert tight.nfe > loose.nfe


def test_no_sample_of_an_adaptive_solver_hides_behind_its_batch_mates():
    sde = VPSDE()
    data = GaussianMixture(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), 0.02)
    flow, solver = exact_flow(sde, data), Adaptive(1e-4, 1e-4, compare=False)
    hard = noised(data, sde, 1).double()
    easy = torch.tensor([[40.0, 40.0]], dtype=torch.float64).expand(199, 2)
    alone = log_likelihood(flow, hard, solver=solver)
    among = log_likelihood(flow, torch.cat([hard, easy]), solver=solver)
    assert among.nfe >= alone.nfe
    assert float((among.log_prob[0] - alone.log_prob[0]).abs()) < 1e-2


def test_a_quick_solver_is_cheaper():
    assert FixedGrid(64).quick() == FixedGrid(32, halve=False)
    assert FixedGrid(16).quick() == FixedGrid(16, halve=False)
    assert Adaptive().quick() == Adaptive(1e-3, 1e-3, compare=False)


def test_probes_go_where_the_noise_is_and_their_number_stays():
    clock = torch.linspace(0, 1, 33, dtype=torch.float64)
    variance = 100 * torch.exp(-(((clock - 0.7) / 0.1) ** 2))
    pilot = Pilot(clock, clock, variance, 24, Hutchinson(), 0)
    nodes = torch.linspace(0, 1, 48, dtype=torch.float64)
    even = torch.ones(48, dtype=torch.float64)
    counts = torch.tensor(pilot.probes_at(nodes, even, 5))
    assert int(counts.sum()) == 5 * 48 and int(counts.min()) == 2
    assert abs(float(nodes[counts.argmax()]) - 0.7) < 0.05

    def total(k):
        return float((100 * torch.exp(-(((nodes - 0.7) / 0.1) ** 2)) / k).sum())

    assert total(counts) < 0.5 * total(torch.tensor(5))
    for i, j in ((33, 20), (20, 33), (33, 2), (30, 36)):  # no single move makes it better
        moved = counts.clone()
        moved[i] += 1
        moved[j] -= 1
        assert int(moved[j]) < 2 or total(moved) > total(counts) - 0.5
    quiet = Pilot(clock, clock, 0 * variance, 24, Hutchinson(), 0)
    assert quiet.probes_at(nodes, even, 3) == [3] * 48


def test_probes_that_are_allotted_have_less_noise_and_know_it():
    class Even(Hutchinson):
        @property
        def allots(self):
            return False

    sde, data = VPSDE(), correlated()
    flow, x = exact_flow(sde, data), noised(data, sde, 400)
    truth = data.log_prob(x.double(), sde, sde.t_min)
    squares = {}
    for kind in (Hutchinson, Even):
        result = log_likelihood(flow, x, divergence=kind(6), generator=seeded())
        assert result.passes == 6 * 64
        error = (result.log_prob.double() - truth).square()
        squares[kind] = float(error.mean())
        reported = float(result.standard_error.double().square().mean())
        assert abs(squares[kind] / reported - 1) < 5 * (2 / 400) ** 0.5
    assert squares[Hutchinson] < 0.9 * squares[Even]


@pytest.mark.parametrize("shape", [(24,), (1, 8, 8), (3, 8, 8), (2, 4, 4, 4), (1, 28, 28)])
@pytest.mark.parametrize("count", [2, 4, 8, 13])
def test_colours_share_out_a_sample_and_keep_their_points_apart(shape, count):
    masks = colours(shape, count)
    assert masks.shape == (count, *shape)
    assert_close(masks.sum(0), torch.ones(shape))
    sizes = masks.flatten(1).sum(1)
    assert float(sizes.max()) <= 2 * float(sizes.mean()) + 1
    for mask in masks:
        points = mask.nonzero().double()
        if len(points) > 1:
            near = torch.cdist(points, points).fill_diagonal_(math.inf).min()
            assert float(near) >= (2**0.5 if count > 2 and len(shape) > 1 else 1.4) - 1e-6


@pytest.mark.parametrize("basis", [Pixel(), Cosine(1)], ids=str)
@pytest.mark.parametrize(("num_probes", "tiles"), [(1, 4), (2, 4), (4, 2), (2, 5)])
def test_tiled_probes_are_unbiased_and_know_their_error(num_probes, tiles, basis):
    sde, data = VPSDE(), correlated()
    x = noised(data, sde, 600, seed=4)
    probes = Hutchinson(num_probes, basis=basis, tiles=tiles)
    result = log_likelihood(
        exact_flow(sde, data), x, divergence=probes, generator=seeded(5), solver=FixedGrid(48)
    )
    assert result.passes == 48 * num_probes * tiles and result.nfe == 48 + 25
    truth = data.log_prob(x.double(), sde, sde.t_min)
    error = result.log_prob.double() - truth
    assert abs(float(error.mean())) < 5 * float(error.std()) / 600**0.5 + 2e-3
    low, high = result.interval()
    covered = float(((low <= truth) & (truth <= high)).double().mean())
    assert 0.92 <= covered <= 0.99


def test_tiles_leave_out_what_neighbours_have_in_common():
    sde = VPSDE()
    apart = (torch.arange(64)[:, None] - torch.arange(64)[None]).abs()
    data = Gaussian(torch.zeros(64), covariance=torch.exp(-apart / 1.5) + 0.05 * torch.eye(64))
    flow, x = exact_flow(sde, data), noised(data, sde, 300)
    truth = data.log_prob(x.double(), sde, sde.t_min)
    squares = {}
    for num_probes, tiles in ((8, 1), (1, 8)):
        probes = Hutchinson(num_probes, basis=Pixel(), tiles=tiles)
        result = log_likelihood(flow, x, divergence=probes, generator=seeded())
        assert result.passes == 8 * 64
        squares[tiles] = float((result.log_prob.double() - truth).square().mean())
    assert squares[8] < 0.5 * squares[1]
    with pytest.raises(ValueError, match="at most 64 tiles"):
        Hutchinson(tiles=65)


def test_rows_of_orthogonal_probes_come_from_all_over_the_matrix():
    x = torch.zeros(1, 1024)
    draw = Hutchinson(1, "orthogonal", Pixel()).probes(x, seeded())
    signs = torch.stack([draw()[0, 0] for _ in range(32)])  # [32, 1024]
    relative = signs * signs[0]
    for apart in (1, 2, 4, 16, 256, 512):  # columns that rows of low index would not tell apart
        same = (relative[:, 0] * relative[:, apart]).mean()
        assert abs(float(same)) <= 0.5, apart
    assert_close(signs @ signs.T, 1024 * torch.eye(32))


def test_the_variance_of_single_probes_counts_the_ends():
    nodes = torch.linspace(0, 1, 9, dtype=torch.float64)
    traces = torch.randn(9, 1, 20_000, generator=seeded(), dtype=torch.float64)
    for weights in (torch.eye(9)[0], torch.eye(9)[8], torch.eye(9)[1], torch.eye(9)[4]):
        variance, _ = Hutchinson(1).fresh_variance(traces, nodes, weights.double())
        assert float(variance.mean()) == pytest.approx(1.0, abs=0.05)


def test_the_pilot_takes_the_basis_of_the_least_variance():
    sde, mixed = VPSDE(), torch.zeros(1, 1, 8, 8)
    axes = Cosine(2).to_data(torch.eye(64).reshape(64, 8, 8)).reshape(64, 64)
    scales = torch.exp(torch.linspace(0, -4, 64))
    smooth = Gaussian(torch.zeros(64), covariance=(axes.T * scales) @ axes)
    for score, wanted in (
        (smooth.score(sde), Cosine(2)),
        (Gaussian(torch.zeros(64), scales.sqrt()).score(sde), Pixel()),
    ):
        flow = probability_flow(
            sde, lambda x, t, score=score: score(x.reshape(-1, 64), t).reshape(x.shape)
        )
        found = Pilot.of(flow, mixed.reshape(1, 8, 8), Hutchinson(3)).divergence
        assert found == Hutchinson(3, basis=wanted)


def test_float32_needs_no_more_nodes_than_float64():
    sde, data = VPSDE(), vectors()
    x = noised(data, sde, 64)
    errors = {
        dtype: log_likelihood(
            exact_flow(sde, data), x.to(dtype), divergence=Exact(), solver=FixedGrid(64)
        ).log_prob.double()
        - data.log_prob(x.double(), sde, sde.t_min)
        for dtype in (torch.float32, torch.float64)
    }
    rms = {dtype: float(error.square().mean().sqrt()) for dtype, error in errors.items()}
    assert rms[torch.float32] < 1.2 * rms[torch.float64] + 1e-4


def test_attention_kernels_without_second_derivatives_are_left_aside():
    torch.manual_seed(0)
    project = torch.nn.Linear(4, 12)

    def score(x, t):
        q, k, v = project(x.reshape(len(x), 1, 6, 4)).chunk(3, -1)
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return -x + 0.1 * mixed.reshape(x.shape)

    flow, x = probability_flow(VPSDE(), score), torch.randn(3, 24, generator=seeded())
    exact = log_likelihood(flow, x, divergence=Exact(), solver=FixedGrid(32))
    probed = log_likelihood(
        flow, x, divergence=Hutchinson(64), solver=FixedGrid(32), generator=seeded()
    )
    assert bool(
        ((exact.log_prob - probed.log_prob).abs() < 5 * probed.standard_error + 1e-3).all()
    )
    point = x.clone().requires_grad_()
    smooth = log_likelihood(
        flow, point, divergence=Exact(), solver=FixedGrid(8, halve=False), differentiable=True
    )
    assert bool(torch.isfinite(torch.autograd.grad(smooth.log_prob.sum(), point)[0]).all())


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: FixedGrid(7), ["nodes", ">= 8", "7"]),
        (lambda: FixedGrid(order=9), ["order 6", "9"]),
        (lambda: FixedGrid(fresh=1), ["fresh", "true or false"]),
        (lambda: Hutchinson(2, "sobol"), ["distribution", "orthogonal", "'sobol'"]),
        (lambda: Adaptive(log_prob_tol=0.0), ["log_prob_tol", "> 0"]),
        (lambda: VPSDE(t_min=0.0), ["t_min"]),
        (lambda: VESDE(t_min=0.0), ["t_min"]),
    ],
)
def test_settings_out_of_range_are_refused(make, words):
    with pytest.raises(ValueError) as caught:
        make()
    for word in words:
        assert word in str(caught.value)


def test_one_sample_and_few_nodes_are_enough():
    sde, data = VPSDE(), vectors()
    for probes in (Hutchinson(1), Hutchinson(2), Exact()):
        result = log_likelihood(
            exact_flow(sde, data), noised(data, sde, 1), solver=FixedGrid(8), divergence=probes
        )
        assert result.log_prob.shape == (1,) and bool(result.total_error.isfinite().all())
    assert replace(result, nfe=0).nfe == 0


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
