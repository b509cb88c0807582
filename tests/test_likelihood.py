"""The likelihood against closed forms: exactly with the exact trace, without bias with probes."""

import math

import pytest
import torch
from torch.testing import assert_close

from likelihood import Adaptive, Exact, FixedGrid, Hutchinson, log_likelihood
from sde_lib import PerSample, probability_flow
from sde_lib.oracles import Gaussian, GaussianMixture
from sde_lib.samplers import AdaptiveODE, SamplingError

TIGHT = [FixedGrid(256), Adaptive(1e-7, 1e-7)]
solvers = pytest.mark.parametrize("solver", TIGHT, ids=["fixed grid", "adaptive"])


def full_gaussian(dims=5):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(dims, dims, generator=generator)
    return Gaussian(
        torch.randn(dims, generator=generator), covariance=a @ a.T / dims + 0.1 * torch.eye(dims)
    )


def exact_flow(sde, data):
    """The flow of the exact score and the exact prior: what is left is integration error."""
    return probability_flow(
        sde, data.score(sde), log_prior=lambda x: data.log_prob(x, sde, sde.t_max)
    )


@solvers
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact_trace_equals_the_closed_form_of_gaussian_and_mixture(
    any_sde, mixture, dtype, solver
):
    for data in (full_gaussian(), mixture):
        x = data.sample(50, generator=torch.Generator().manual_seed(1)).to(dtype)
        result = log_likelihood(exact_flow(any_sde, data), x, divergence=Exact(), solver=solver)
        truth = data.log_prob(x.double(), any_sde, any_sde.t_min)

        assert_close(result.log_prob.double(), truth, rtol=0, atol=1e-4)
        assert bool((result.standard_error == 0).all())


@solvers
def test_the_model_density_with_its_own_prior_is_the_closed_form_of_the_affine_flow(
    any_sde, solver
):
    data = full_gaussian()
    z = torch.randn(30, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    x, latent = data.push(any_sde, z, any_sde.t_min), data.push(any_sde, z, any_sde.t_max)
    result = log_likelihood(probability_flow(any_sde, data.score(any_sde)), x, solver=solver)
    # the flow takes x to latent linearly along each axis: its volume change is a ratio of standard
    # deviations
    t = torch.tensor([any_sde.t_min, any_sde.t_max], dtype=torch.float64)
    variance = any_sde.alpha(t)[:, None] ** 2 * data.variances + any_sde.sigma(t)[:, None] ** 2
    log_volume = 0.5 * (variance[1].log() - variance[0].log()).sum()

    assert_close(result.latent, latent, rtol=0, atol=1e-4 * float(latent.abs().max()))
    assert_close(result.log_prob, any_sde.prior_log_prob(latent) + log_volume, rtol=0, atol=3e-5)


def test_eight_gaussians_score_their_entropy_within_a_thousandth():
    angles = torch.arange(8) * math.pi / 4
    centres = 4 / 1.414 * torch.stack([angles.cos(), angles.sin()], 1)
    data = GaussianMixture(centres, 0.5 / 1.414)
    from sde_lib import VPSDE

    sde = VPSDE()
    x = data.sample(4000, generator=torch.Generator().manual_seed(0))
    result = log_likelihood(probability_flow(sde, data.score(sde)), x)
    # paired with the true density at the same points, so that the sampling error of the entropy
    # cancels
    assert abs(float((result.log_prob - data.log_prob(x)).mean())) < 1e-3
    assert (
        abs(float(-result.log_prob.mean()) - 2.83188)
        < 1e-3 + 5 * float(result.log_prob.std()) / 4000**0.5
    )


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_hutchinson_is_unbiased_and_its_standard_error_covers(sde, distribution):
    solver = Adaptive(1e-5, 1e-5)
    data = full_gaussian()
    n = 600
    x = data.sample(1, generator=torch.Generator().manual_seed(3)).expand(
        n, 5
    )  # one point, 600 independent probe sets
    estimator = Hutchinson(num_probes=8, distribution=distribution)
    result = log_likelihood(
        exact_flow(sde, data),
        x,
        divergence=estimator,
        generator=torch.Generator().manual_seed(4),
        solver=solver,
    )
    error = result.log_prob.double() - data.log_prob(x[:1].double(), sde, sde.t_min)

    assert abs(float(error.mean())) < 5 * float(error.std()) / n**0.5 + 1e-3
    covered = float(
        (error.abs() < 2.365 * result.standard_error).double().mean()
    )  # t, 7 degrees of freedom, 95 %
    # Monte Carlo bound on the share, and 3 points for probes whose sums are not quite normal
    assert abs(covered - 0.95) < 5 * (0.95 * 0.05 / n) ** 0.5 + 0.03


def test_more_probes_on_one_graph_cost_one_forward_pass_and_average():
    from sde_lib import VPSDE

    sde, data = VPSDE(), full_gaussian()
    x = data.sample(4, generator=torch.Generator().manual_seed(0))
    one = log_likelihood(
        exact_flow(sde, data),
        x,
        divergence=Hutchinson(1),
        generator=torch.Generator().manual_seed(1),
    )
    four = log_likelihood(
        exact_flow(sde, data),
        x,
        divergence=Hutchinson(4),
        generator=torch.Generator().manual_seed(1),
    )
    assert bool(one.standard_error.isfinite().all() and four.standard_error.isfinite().all())
    # half as many passes again, forward only, measure the solver's error
    assert four.nfe == one.nfe == 64 + 33
    assert (one.passes, four.passes) == (64, 4 * 64)


@pytest.mark.parametrize("probes", [1, 3])
def test_passes_are_the_times_that_the_score_was_differentiated(probes):
    from sde_lib import VPSDE

    sde, data, backward = VPSDE(), full_gaussian(), []
    exact = data.score(sde)

    def watched(x, t):
        score = exact(x, t)
        if score.requires_grad:
            score.register_hook(lambda gradient: backward.append(len(gradient)))
        return score

    result = log_likelihood(
        probability_flow(sde, watched),
        data.sample(3),
        divergence=Hutchinson(probes),
        solver=FixedGrid(12, halve=False),
    )
    assert backward.count(3) == result.passes == probes * result.nfe  # 16 rows: the pilot


def test_nfe_is_what_the_score_function_was_called():
    from sde_lib import VPSDE, Counted

    sde, data = VPSDE(), full_gaussian()
    score = Counted(data.score(sde))
    result = log_likelihood(probability_flow(sde, score), data.sample(3))
    # the pilot evaluates a batch of 16 33 times, and the prior's mismatch one point, the origin
    assert result.nfe + 33 + 1 == score.nfe and result.pilot_nfe == 33 * 16 + 1


@solvers
def test_encode_then_decode_returns_x(sde, mixture, solver):
    x = mixture.sample(40, generator=torch.Generator().manual_seed(5)).double()
    score = mixture.score(sde)
    latent = log_likelihood(probability_flow(sde, score), x, solver=solver).latent
    back = AdaptiveODE(rtol=1e-7, atol=1e-7, denoise=False)(score, sde, latent)
    assert_close(back, x, rtol=0, atol=2e-4)


def test_model_density_of_a_mixture_integrates_to_one(mixture):
    from sde_lib import VPSDE

    sde = VPSDE()
    axis = torch.linspace(-6, 6, 121)
    x = torch.cartesian_prod(axis, axis)
    result = log_likelihood(probability_flow(sde, mixture.score(sde)), x)
    assert float(result.log_prob.exp().sum()) * 0.1**2 == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize("shape", [(3,), (2, 4), (1, 3, 3), (1, 2, 2, 2)])
def test_any_data_shape_gives_the_same_density(shape):
    from sde_lib import VPSDE

    sde = VPSDE()
    data = Gaussian(torch.linspace(-1, 1, math.prod(shape)).reshape(shape), 0.5)
    x = data.sample(6, generator=torch.Generator().manual_seed(0))
    result = log_likelihood(exact_flow(sde, data), x, divergence=Exact(chunk=2))
    assert_close(result.log_prob, data.log_prob(x, sde, sde.t_min), rtol=0, atol=1e-3)
    assert result.latent.shape == x.shape


@pytest.mark.parametrize(
    "solver, tolerance", [(FixedGrid(32), 1e-4), (Adaptive(1e-6, 1e-6), 1e-3)], ids=str
)
def test_a_sample_does_not_depend_on_its_batch_beyond_the_tolerance(solver, tolerance):
    from sde_lib import VPSDE

    sde, data = VPSDE(), full_gaussian()
    x = data.sample(64, generator=torch.Generator().manual_seed(0))
    flow = probability_flow(sde, data.score(sde))

    def run(n):
        return log_likelihood(
            flow,
            x[:n],
            divergence=Hutchinson(2),
            generator=PerSample(range(n)),
            solver=solver,
        )

    together = run(64)
    for n in (1, 7):
        assert_close(
            run(n).log_prob, together.log_prob[:n], rtol=0, atol=tolerance
        )  # probes differ by nats


def test_bad_input_is_refused_with_the_reason():
    from sde_lib import VPSDE

    sde, data = VPSDE(), full_gaussian()
    flow = probability_flow(sde, data.score(sde))
    with pytest.raises(ValueError, match="NaN or infinity"):
        log_likelihood(flow, torch.full((2, 5), float("nan")))
    with pytest.raises(ValueError, match="batch"):
        log_likelihood(flow, torch.zeros(5))
    with pytest.raises(ValueError, match="floating-point"):
        log_likelihood(flow, torch.zeros(2, 5, dtype=torch.int64))
    for name in ("rtol", "atol"):
        for value in (0.0, -1.0, 1e-20, float("nan")):
            with pytest.raises(ValueError, match=name):
                log_likelihood(flow, data.sample(2), solver=Adaptive(**{name: value}))
    with pytest.raises(ValueError, match="dopri5"):
        Adaptive(method="rk45")
    with pytest.raises(ValueError, match="cannot be differentiated"):
        log_likelihood(
            probability_flow(sde, lambda x, t: data.score(sde)(x.detach(), t)), data.sample(2)
        )
    with pytest.raises(ValueError, match="num_probes"):
        Hutchinson(num_probes=0)
    with pytest.raises(ValueError, match="rademacher"):
        Hutchinson(distribution="sphere")


def test_a_field_of_nan_ends_with_a_diagnosis_and_not_with_underflow_in_dt():
    from sde_lib import VPSDE

    sde, data = VPSDE(), full_gaussian()

    def broken(x, t):
        return data.score(sde)(x, t) * torch.where(t > 0.5, float("nan"), 1.0)

    flow = probability_flow(sde, broken)
    with pytest.raises(SamplingError, match=r"log\(sigma/alpha\) = .* after \d+ evaluations"):
        log_likelihood(flow, data.sample(2), solver=Adaptive())
    with pytest.raises(SamplingError, match="not finished after 20 evaluations"):
        log_likelihood(
            probability_flow(sde, data.score(sde)),
            data.sample(2),
            solver=Adaptive(max_evaluations=20),
        )
