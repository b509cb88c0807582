"""The loss against its floor in closed form, and the ways to draw times against each other."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from score_models import (
    EDM,
    DenoisingScoreMatching,
    EDMWeight,
    ImportanceTimes,
    LogNormalSigma,
    MinSNR,
    Noise,
    ScoreModel,
    UniformTimes,
    maximum_likelihood,
    noise_regression,
    score_matching_loss,
    truncated_snr,
    velocity,
)
from sde_lib import EDMSDE, VESDE, VPSDE, CosineSDE, PerSample, SubVPSDE
from sde_lib.sde import expand_like

PROCESSES = [VPSDE(), SubVPSDE(), VESDE(), EDMSDE(), CosineSDE()]
STD = 0.6


class ExactNoise(nn.Module):
    """E[eps | y] for data N(0, STD²): what a perfect network under ``Noise`` returns."""

    def forward(self, x, noise_level, cond=None):
        rho = expand_like(noise_level.exp(), x)
        y = x * (rho**2 + STD**2).sqrt()  # undo c_in
        return rho * y / (rho**2 + STD**2)


def exact_model(sde):
    return ScoreModel(ExactNoise(), sde, Noise(data_std=STD))


@pytest.mark.parametrize("sde", PROCESSES, ids=lambda s: type(s).__name__)
def test_loss_of_the_exact_score_equals_its_floor(sde):
    n, dims = 40_000, 4
    generator = torch.Generator().manual_seed(0)
    for log_snr in (-2.0, 0.5, 4.0):
        t = sde.time_at(torch.full((n,), log_snr, dtype=torch.float64))
        x0 = STD * torch.randn(n, dims, generator=generator, dtype=torch.float64)
        noise = torch.randn(n, dims, generator=generator, dtype=torch.float64)
        loss = score_matching_loss(exact_model(sde), x0, t, noise, noise_regression)
        level = sde.level(t[:1])
        floor = float(level.alpha**2 * STD**2 / (level.alpha**2 * STD**2 + level.sigma**2))
        assert abs(float(loss.mean()) - floor) < 5 * float(loss.std()) / n**0.5


def test_each_weighting_is_the_squared_error_that_it_claims():
    sde, generator = VPSDE(), torch.Generator().manual_seed(1)
    torch.manual_seed(0)
    model = ScoreModel(
        ExactNoise(), sde, EDM(data_std=0.5)
    )  # the wrong network for it: errors of order one
    x0 = torch.randn(64, 3, generator=generator, dtype=torch.float64)
    noise = torch.randn(64, 3, generator=generator, dtype=torch.float64)
    t = torch.linspace(0.01, 1, 64, dtype=torch.float64)
    level = sde.level(t)
    alpha, sigma = level.alpha[:, None], level.sigma[:, None]
    x = alpha * x0 + sigma * noise
    score, noise_hat, x0_hat = model.score(x, t), model.noise(x, t), model.denoised(x, t)
    rho, snr = sigma / alpha, (alpha / sigma) ** 2
    v_error = (alpha * noise_hat - sigma * x0_hat) - (alpha * noise - sigma * x0)
    s = 0.5
    errors = {
        noise_regression: noise_hat - noise,
        maximum_likelihood: level.diffusion[:, None] * (score + noise / sigma),
        EDMWeight(s): (rho**2 + s**2).sqrt() / (rho * s) * (x0_hat - x0),
        velocity: v_error,
        truncated_snr: snr.clamp(min=1).sqrt() * (x0_hat - x0),
        MinSNR(5.0): snr.clamp(max=5).sqrt() * (x0_hat - x0),
        MinSNR(4.0): (snr.clamp(max=4) / snr).sqrt() * (noise_hat - noise),
        MinSNR(0.5): (snr.clamp(max=0.5) / (snr + 1)).sqrt() * v_error,
    }
    for weight, error in errors.items():
        assert_close(
            score_matching_loss(model, x0, t, noise, weight),
            error.square().mean(1),
            rtol=1e-7,
            atol=1e-9,
        )


@pytest.mark.parametrize("sde", PROCESSES, ids=lambda s: type(s).__name__)
def test_importance_times_for_maximum_likelihood_are_uniform_in_log_snr(sde):
    u = torch.linspace(0.001, 0.999, 57, dtype=torch.float64)
    t, importance = ImportanceTimes(weight=maximum_likelihood).quantile(sde, u)
    low, high = sde.log_snr_range()

    assert_close(sde.log_snr(t), high + u * (low - high), rtol=1e-6, atol=1e-6)
    level = sde.level(t)
    flat = (
        importance * (level.diffusion / level.sigma) ** 2
    )  # the weighted loss of a unit noise error
    assert_close(
        flat, torch.full_like(flat, (high - low) / (sde.t_max - sde.t_min)), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("weight", [maximum_likelihood, noise_regression, EDMWeight(0.5)])
@pytest.mark.parametrize("sde", PROCESSES, ids=lambda s: type(s).__name__)
def test_importance_times_are_unbiased_for_any_weighting_and_process(sde, weight):
    def integrand(t):  # the floor of the loss above, a smooth function of t of order one, weighted
        level = sde.level(t)
        floor = level.alpha**2 * STD**2 / (level.alpha**2 * STD**2 + level.sigma**2)
        return weight(level) / level.sigma**2 * floor

    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    t, importance = ImportanceTimes(weight=weight).quantile(sde, u)
    drawn = float((importance * integrand(t)).mean())
    low, high = sde.log_snr_range()  # by quadrature in log SNR, where the integrand is smooth
    clock = torch.linspace(low, high, 200_001, dtype=torch.float64)
    t = sde.time_at(clock)
    level = sde.level(t)
    exact = float(torch.trapezoid(integrand(t) * (level.sigma / level.diffusion) ** 2, clock)) / (
        sde.t_max - sde.t_min
    )
    assert drawn == pytest.approx(exact, rel=1e-2)


def test_importance_times_reduce_the_variance_of_the_likelihood_loss():
    sde, n = VPSDE(), 4096
    x0 = STD * torch.randn(n, 4, generator=torch.Generator().manual_seed(0))
    by_importance = DenoisingScoreMatching(
        maximum_likelihood, ImportanceTimes(weight=maximum_likelihood, stratified=False)
    )
    uniform = DenoisingScoreMatching(maximum_likelihood, UniformTimes(stratified=False))
    a = by_importance(exact_model(sde), x0, torch.Generator().manual_seed(1))
    b = uniform(exact_model(sde), x0, torch.Generator().manual_seed(1))
    # two means of the same number: they agree, and one is far less noisy
    assert abs(a.mean() - b.mean()) < 5 * math.hypot(a.std(), b.std()) / n**0.5
    assert a.std() < 0.3 * b.std()


def test_stratified_times_have_one_draw_in_each_slice():
    t, _ = UniformTimes(stratified=True)(VPSDE(t_min=1e-9), 64, torch.Generator().manual_seed(0))
    assert sorted((t * 64).floor().long().tolist()) == list(range(64))
    assert not bool((t.diff() > 0).all()), (
        "in random order, so that sample i does not always get slice i"
    )


@pytest.mark.parametrize("reweight", [False, True])
def test_log_normal_times_follow_the_normal_law_of_log_sigma(reweight):
    sde, n = EDMSDE(), 100_000
    times = LogNormalSigma(mean=-1.2, std=1.2, stratified=False, reweight=reweight)
    t, importance = times(sde, n, torch.Generator().manual_seed(0))
    log_sigma = t.log()
    assert abs(log_sigma.mean() + 1.2) < 5 * 1.2 / n**0.5
    assert (
        abs(log_sigma.std() - 1.2) < 5 * 1.2 / (2 * n) ** 0.5 + 1e-3
    )  # the tails are cut at sigma 0.002 and 80
    if reweight:
        assert float(importance.mean()) == pytest.approx(
            1.0, rel=0.5
        )  # heavy-tailed; its exact law is tested below
        u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
        t, importance = times.quantile(sde, u)
        inside = t < 10
        assert float((importance * t * inside).mean()) == pytest.approx(
            (10**2 - 0.002**2) / 2 / (80 - 0.002), rel=1e-2
        )
    else:
        assert bool((importance == 1).all())


def test_a_loss_is_a_function_of_its_generator_alone():
    sde = VPSDE()
    x0 = torch.randn(8, 4)
    objective = DenoisingScoreMatching(noise_regression, UniformTimes())
    torch.manual_seed(1)
    a = objective(exact_model(sde), x0, torch.Generator().manual_seed(7))
    torch.manual_seed(2)
    b = objective(exact_model(sde), x0, torch.Generator().manual_seed(7))
    assert bool((a == b).all())


def test_bad_choices_are_refused_with_the_reason():
    with pytest.raises(ValueError, match="needs the weighting it draws for"):
        ImportanceTimes()
    with pytest.raises(ValueError, match="table"):
        ImportanceTimes(weight=maximum_likelihood, table=2)
    with pytest.raises(ValueError, match="puts nearly nothing between the noise ratios"):
        LogNormalSigma(mean=40.0)(EDMSDE(), 4)
    with pytest.raises(ValueError, match="std"):
        LogNormalSigma(std=0.0)
    with pytest.raises(ValueError, match="MinSNR needs gamma"):
        MinSNR(gamma=0.0)
    with pytest.raises(ValueError, match="one seed a sample"):
        DenoisingScoreMatching()(exact_model(VPSDE()), torch.zeros(3, 4), PerSample([1, 2]))
