"""One posterior step and its variances: DDPM, DDIM, maximum likelihood and analytic are one."""

from __future__ import annotations

import math
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_sampler_orders import gaussian_moments, wanted_moments
from torch.testing import assert_close

from experiment.errors import RunError
from experiment.fitted import fitted, keep_variance
from likelihood import calibrate_variance
from sde_lib import SDE, VPSDE, probability_flow
from sde_lib.grids import Karras, UniformLogSNR
from sde_lib.oracles import Gaussian, GaussianMixture
from sde_lib.reverse_variance import (
    AnalyticVariance,
    ForwardVariance,
    PosteriorVariance,
    posterior,
)
from sde_lib.samplers import DDIM, Ancestral, DPMSolverPP, PredictorCorrector


def exact_variance(sde: SDE, data: Gaussian, steps: int) -> AnalyticVariance:
    """What calibration would find for Gaussian data with an infinite sample."""
    levels = sde.level(UniformLogSNR()(sde, steps).flip(0))
    s2 = data.variances[0]
    open_share = levels.alpha**2 * s2 / (levels.alpha**2 * s2 + levels.sigma**2)
    return AnalyticVariance(levels.noise_ratio.log(), open_share, 1.0)


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_the_analytic_variance_keeps_mean_and_variance_exactly_at_any_step_count(
    sde: SDE, steps: int, eta: float
) -> None:
    data = Gaussian(0.5, 0.8)
    variance = exact_variance(sde, data, steps)
    sampler = Ancestral(steps, grid=UniformLogSNR(), eta=eta, variance=variance)
    got, wanted = gaussian_moments(sampler, sde, data), wanted_moments(sde, data)
    assert got == pytest.approx(wanted, rel=1e-6, abs=1e-8)
    plain = gaussian_moments(Ancestral(steps, grid=UniformLogSNR(), eta=eta), sde, data)
    assert plain[1] < 0.9 * wanted[1], "the posterior's variance is too small for wide data"


def test_the_maximum_likelihood_solver_is_the_posterior_step_at_any_step_size() -> None:
    """Popov et al. 2022, theorem 1: kappa, omega and sigma, written out for VP."""
    sde, generator = VPSDE(), torch.Generator().manual_seed(0)
    x, s = torch.randn(2, 9, generator=generator, dtype=torch.float64)
    for t, h in ((1.0, 0.9), (0.6, 0.3), (0.2, 0.01)):
        now, nxt = (sde.level(torch.tensor(u, dtype=torch.float64)) for u in (t, t - h))
        to_s, to_t = nxt.alpha, now.alpha  # gamma_{0,s} and gamma_{0,t}
        between = to_t / to_s
        mu = between * (1 - to_s**2) / (1 - to_t**2)
        nu = to_s * (1 - between**2) / (1 - to_t**2)
        beta_h = now.diffusion**2 * h
        kappa = nu * (1 - to_t**2) / (to_t * beta_h) - 1
        omega = (mu + nu / to_t - 1) / beta_h - 0.5
        mean = x + beta_h * ((0.5 + omega) * x + (1 + kappa) * s)
        sigma = torch.sqrt((1 - to_s**2) * (1 - between**2) / (1 - to_t**2))

        def step(noise, now=now, nxt=nxt):
            return Ancestral().step(lambda x, t: s, x, now, nxt, lambda: noise)

        assert_close(step(torch.zeros_like(x)), mean, rtol=1e-9, atol=1e-9)
        assert_close(step(torch.ones_like(x)) - mean, sigma.expand(9), rtol=1e-7, atol=1e-9)
        # and with its trace term, nu² tr Var(x_0 | x_t) / d, it is the analytic variance
        unresolved = torch.tensor(0.3, dtype=torch.float64)
        clock = torch.tensor([-20.0, 20.0], dtype=torch.float64)
        analytic = AnalyticVariance(clock, unresolved.expand(2), 1.0)
        of_data = unresolved * now.noise_ratio**2
        assert_close(analytic(nxt, now), sigma**2 + nu**2 * of_data, rtol=1e-9, atol=0.0)


def test_the_factor_of_the_data_has_no_cancellation(sde: SDE) -> None:
    for eta in (0.0, 0.3, 1.0):
        t = torch.tensor([0.4, 0.4 * (1 - 1e-7)], dtype=torch.float64) * sde.t_max
        later, earlier = sde.level(t).rows()
        fresh, pull = posterior(earlier, later, eta)
        direct = earlier.alpha - (earlier.sigma**2 - fresh).sqrt() * later.alpha / later.sigma
        assert_close(pull, direct, rtol=1e-6, atol=1e-12)
        single = posterior(earlier.like(t.float()), later.like(t.float()), eta)[1]
        assert 0 <= float(single) <= 1


def test_analytic_lies_between_the_papers_bounds(mixture: GaussianMixture) -> None:
    """At least the posterior's, at most what an estimate of the noise that says nothing leaves."""
    sde = VPSDE()
    flow = probability_flow(sde, mixture.score(sde))
    x = mixture.sample(2000, generator=torch.Generator().manual_seed(0)).double()
    found = calibrate_variance(flow, x, steps=20, generator=torch.Generator().manual_seed(1))
    levels = sde.level(Karras()(sde, 10)).rows()
    for later, earlier in zip(levels[:-1], levels[1:], strict=True):
        low, pull = posterior(earlier, later)
        v = found(earlier, later)
        assert low <= v <= low + (pull * later.noise_ratio) ** 2 * 1.05


def test_with_the_analytic_variance_few_steps_reach_the_variance_of_a_mixture(
    mixture: GaussianMixture,
) -> None:
    """Of 10 steps on even log SNR: posterior too narrow, forward too wide, analytic right."""
    sde, score = VPSDE(), mixture.score(VPSDE())
    data = mixture.sample(4000, generator=torch.Generator().manual_seed(0)).double()
    analytic = calibrate_variance(
        probability_flow(sde, score), data, steps=60, generator=torch.Generator().manual_seed(1)
    )
    wanted, off = float(mixture.variance().sum()), {}
    for name, variance in (
        ("posterior", PosteriorVariance()),
        ("forward", ForwardVariance()),
        ("analytic", analytic),
    ):
        generator = torch.Generator().manual_seed(2)
        x = sde.prior_sample((20000, 2), generator=generator, dtype=torch.float64)
        sampler = Ancestral(10, grid=UniformLogSNR(), variance=variance, denoise=False)
        got = float(sampler(score, sde, x, generator=generator).var(0).sum())
        off[name] = abs(got - wanted)
    noise = 5 * wanted * math.sqrt(2 / 20000)
    assert off["analytic"] < min(off["posterior"], off["forward"])
    assert off["analytic"] < noise + 0.1 * wanted


def test_the_last_step_has_no_more_noise_than_allowed(mixture: GaussianMixture) -> None:
    sde, drawn = VPSDE(), []
    x = torch.zeros(3, 2, dtype=torch.float64)

    def noise():
        drawn.append(1)
        return torch.ones(3, 2, dtype=torch.float64)

    sampler = Ancestral(4, variance="forward", last_std=1e-6)
    moves = list(sampler.plan(sde))
    for k, (move, now, nxt) in enumerate(moves):
        loud = move(mixture.score(sde), x, now, nxt, noise)
        silent = move(mixture.score(sde), x, now, nxt, lambda: torch.zeros_like(x))
        limited = float((loud - silent).max()) <= 1.001e-6
        assert limited == (k == len(moves) - 1)
    assert len(drawn) == 4


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Ancestral(variance="beta"), "forward, .*posterior, .*got variance='beta'"),
        (lambda: Ancestral(eta=0.5, variance="forward"), "forward variance for eta=1 alone"),
        (lambda: DDIM(variance="forward"), "forward variance for eta=1 alone"),
        (lambda: Ancestral(last_std=-1.0), "last_std to be a finite number >= 0"),
        (lambda: Ancestral(variance="analytic").plan(VPSDE()), "mode=calibrate"),
        (
            lambda: AnalyticVariance(torch.tensor([1.0, 0.0]), torch.ones(2), 1.0),
            "increasing clock",
        ),
        (
            lambda: AnalyticVariance(torch.tensor([0.0, 1.0]), torch.tensor([0.1, -1.0]), 1.0),
            "finite and >= 0",
        ),
    ],
)
def test_impossible_variances_are_refused(build, message) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_a_predictor_may_have_the_analytic_variance(tmp_path, mixture) -> None:
    sde, checkpoint = VPSDE(), tmp_path / "step.pt"
    checkpoint.write_bytes(b"weights")
    asked = PredictorCorrector(predictor=Ancestral(variance="analytic"))
    asked.check(sde)
    model = SimpleNamespace(score=mixture.score(sde), sde=sde)
    where = {"like": torch.zeros(1, 2), "checkpoint": checkpoint, "folder": tmp_path}
    with pytest.raises(RunError, match="mode=calibrate"):
        fitted(asked, model, **where)
    keep_variance(exact_variance(sde, Gaussian(0.0, 1.0), 9), checkpoint, tmp_path)
    filled = fitted(asked, model, **where)
    assert isinstance(filled.predictor.variance, AnalyticVariance)
    filled.plan(sde)


def test_the_limit_of_the_last_step_for_images_is_two_levels_a_pixel_on_average() -> None:
    """Analytic-DPM's: E|z| of the noise is 2 · 2/255; E|z| here by a sum over the density."""
    root = Path(__file__).resolve().parents[1]
    for place in ("conf/sampler/analytic_ddpm.yaml", "docs/samplers.md"):
        text = (root / place).read_text(encoding="utf-8")
        std = float(re.search(r"(?:of the last step, |last_std=)(0\.\d+)", text).group(1))
        z = torch.linspace(-10 * std, 10 * std, 20001, dtype=torch.float64)
        density = torch.distributions.Normal(0.0, std).log_prob(z).exp()
        mean = torch.trapezoid(z.abs() * density, z)
        assert float(mean) == pytest.approx(2 * 2 / 255, rel=0.005), "three digits"


@pytest.mark.parametrize("eta", [1.0, 1.7, 6.0])
def test_beyond_one_the_step_is_that_of_sde_dpm_solver(sde, mixture, eta) -> None:
    x = sde.prior_sample((5, 2), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ends = [
        make(6, grid=UniformLogSNR(), eta=eta, denoise=False)(
            mixture.score(sde), sde, x, generator=torch.Generator().manual_seed(1)
        )
        for make in (Ancestral, partial(DPMSolverPP, order=1))
    ]

    assert_close(ends[0], ends[1], rtol=1e-6, atol=1e-8)
