"""Variances of the state against closed forms: mixtures know the moments of every reverse step."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from likelihood import calibrate_variance, discrete_bounds
from sde_lib import VPSDE, Counted, probability_flow
from sde_lib.grids import UniformLogSNR
from sde_lib.oracles import GaussianMixture
from sde_lib.reverse_variance import AnalyticVariance, ForwardVariance, PosteriorVariance
from sde_lib.samplers import DDIM, Ancestral
from sde_lib.sde import SDE, Level
from sde_lib.state_variance import (
    InterpolatedVariance,
    ResidualVariance,
    SecondMomentVariance,
)

N = 4000


def second_moment(data: GaussianMixture, sde: SDE):
    """E[eps² | x_t]: variance and square of the mean."""
    variance, score = data.noise_variance(sde), data.score(sde)
    return lambda x, t: variance(x, t) + sde.level(t).noise(score(x, t)).square()


def ends(sde: SDE, late: float, early: float) -> tuple[Level, Level]:
    """Levels at log SNR ``late`` (noisy) and ``early``."""
    u = torch.tensor([late, early], dtype=torch.float64)
    later, earlier = sde.level(sde.time_at(u)).rows()
    return later, earlier


def of_step(variance, x: Tensor, later: Level, earlier: Level, score, eta: float = 1.0) -> Tensor:
    """v [B, ...] of one step at the states ``x``."""
    rows = (Level(*(c.reshape(1) for c in level)) for level in (earlier, later))
    (at,) = variance.at_states(*rows, eta)
    return at(x, later, later.noise(score(x, later.t))).expand_as(x)


def conditional_moments(
    data: GaussianMixture, x: Tensor, later: Level, earlier: Level
) -> tuple[Tensor, Tensor]:
    """Mean and variance by coordinate of x_s given x_t, from each component's joint Gaussian."""
    a, _ = earlier.transition(later)
    x = x.unsqueeze(1)  # [B, 1, D] against [K, D]
    before = earlier.alpha**2 * data.variances + earlier.sigma**2
    after = later.alpha**2 * data.variances + later.sigma**2
    gain = a * before / after
    deviation = x - later.alpha * data.means
    means, variances = earlier.alpha * data.means + gain * deviation, before - gain * a * before
    log_joint = data.log_weights - 0.5 * (deviation.square() / after + after.log()).sum(-1)
    share = log_joint.softmax(1).unsqueeze(-1)
    mean = (share * means).sum(1)
    return mean, (share * (variances + means.square())).sum(1) - mean.square()


def test_noise_variance_of_a_mixture_is_what_many_draws_of_the_posterior_show(sde, mixture):
    """The oracle against E[(eps - eps_hat)² g(x_t)] over joint draws, for several g."""
    generator = torch.Generator().manual_seed(0)
    level, _ = ends(sde, 0.5, 1.0)
    x0 = mixture.sample(N, generator=generator).double()
    noise = torch.randn(N, 2, generator=generator, dtype=torch.float64)
    x = level.alpha * x0 + level.sigma * noise
    error = noise - level.noise(mixture.score(sde)(x, level.t))
    exact = mixture.noise_variance(sde)(x, level.t)
    z = x / torch.hypot(level.alpha, level.sigma)
    for g in (torch.ones_like(z), z, z.flip(1), (z - 1).square()):
        miss = (error.square() - exact) * g
        assert float(miss.mean().abs()) < 5 * float(miss.std()) / math.sqrt(miss.numel())
    assert float((error.square() - exact.mean()).mul(z).mean(0).abs().max()) > 0.05, "it varies"


def test_one_component_leaves_the_same_open_everywhere(any_sde):
    data = GaussianMixture(torch.zeros(1, 2, 3), torch.tensor([0.7]))
    level, _ = ends(any_sde, 0.0, 1.0)
    x = data.sample(5, sde=any_sde, t=level.t, generator=torch.Generator().manual_seed(0)).double()
    share = level.alpha**2 * 0.49 / (level.alpha**2 * 0.49 + level.sigma**2)
    assert_close(data.noise_variance(any_sde)(x, level.t), share.expand(5, 2, 3))


@pytest.mark.parametrize("steps", [(-9.0, 9.0), (-2.0, 3.0), (0.0, 0.1)], ids=str)
@pytest.mark.parametrize("kind", ["npr", "sn"])
def test_a_step_of_any_size_has_exactly_the_conditional_mean_and_variance(
    any_sde, mixture, kind, steps
):
    later, earlier = ends(any_sde, *steps)
    score = mixture.score(any_sde)
    variance = {
        "npr": ResidualVariance(mixture.noise_variance(any_sde)),
        "sn": SecondMomentVariance(second_moment(mixture, any_sde)),
    }[kind]
    generator = torch.Generator().manual_seed(0)
    x = mixture.sample(64, sde=any_sde, t=later.t, generator=generator).double()
    mean, wanted = conditional_moments(mixture, x, later, earlier)
    sampler = Ancestral(variance=variance)
    silent, loud = (
        sampler.step(score, x, later, earlier, lambda z=z: torch.full_like(x, z)) for z in (0, 1)
    )
    scale = float(torch.hypot(earlier.alpha, earlier.sigma))
    assert_close(silent, mean, rtol=1e-6, atol=1e-6 * scale)
    assert_close((loud - silent).square(), wanted, rtol=1e-5, atol=1e-9 * scale**2)
    assert_close(of_step(variance, x, later, earlier, score), wanted, rtol=1e-5, atol=1e-9)


def test_one_step_from_noise_to_data_draws_the_conditional_moments(mixture):
    """20000 draws from one state, against moments that the joint Gaussians of x_s and x_t give."""
    sde, n = VPSDE(), 20000
    later, earlier = (
        sde.level(torch.tensor(t, dtype=torch.float64)) for t in (sde.t_max, sde.t_min)
    )
    x = torch.tensor([[0.7, -0.4]], dtype=torch.float64).expand(n, 2)
    sampler = Ancestral(1, variance=ResidualVariance(mixture.noise_variance(sde)), denoise=False)
    drawn = sampler(mixture.score(sde), sde, x, generator=torch.Generator().manual_seed(0))
    mean, variance = conditional_moments(mixture, x[:1], later, earlier)
    z = (drawn - mean) / variance.sqrt()
    assert bool((z.mean(0).abs() < 5 / math.sqrt(n)).all())
    assert bool(((z.square().mean(0) - 1).abs() < 5 * math.sqrt(2 / n)).all())


def residuals(
    data: GaussianMixture, sde: SDE, score, later: Level, earlier: Level, eta: float
) -> tuple[Tensor, Tensor]:
    """Joint draws: x_t, and how far x_s of the non-Markovian q misses the model's mean."""
    generator = torch.Generator().manual_seed(1)
    x0 = data.sample(N, generator=generator).double()
    noise, fresh = torch.randn(2, N, 2, generator=generator, dtype=torch.float64)
    x = later.alpha * x0 + later.sigma * noise
    mean = Ancestral(eta=eta, data_variance=None).step(
        score, x, later, earlier, lambda: torch.zeros_like(x)
    )
    variance = PosteriorVariance()(earlier, later, eta)
    kept = (earlier.sigma**2 - variance).sqrt()
    return x, earlier.alpha * x0 + kept * noise + variance.sqrt() * fresh - mean


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0, 1.5])
def test_with_a_wrong_mean_the_residual_variance_is_still_right_and_the_second_moment_is_not(
    mixture, eta
):
    sde, exact = VPSDE(), mixture.score(VPSDE())
    later, earlier = ends(sde, -1.0, 1.5)

    def wrong(x, t):
        return 1.3 * exact(x, t)

    def unresolved(x, t):
        off = sde.level(t).noise(wrong(x, t) - exact(x, t))
        return mixture.noise_variance(sde)(x, t) + off.square()

    x, miss = residuals(mixture, sde, wrong, later, earlier, eta)
    right, second = (
        of_step(variance, x, later, earlier, wrong, eta)
        for variance in (
            ResidualVariance(unresolved),
            SecondMomentVariance(second_moment(mixture, sde)),
        )
    )
    for g in (torch.ones_like(x), x, x.flip(1)):
        assert off_by((miss.square() / right - 1) * g) < 5, "of mean 0 given x_t"
    assert off_by(miss.square() - second) > 10


def off_by(values: Tensor) -> float:
    """How many standard errors the mean is from zero."""
    return abs(float(values.mean() / values.std())) * math.sqrt(values.numel())


def test_the_bound_with_npr_is_better_than_isotropic_and_the_same_for_an_isotropic_gaussian(
    mixture, seeded
):
    sde = VPSDE()
    isotropic = GaussianMixture(torch.tensor([[0.3, -0.2]]), torch.tensor([0.6]))
    for data, wins in ((mixture, True), (isotropic, False)):
        flow = probability_flow(sde, data.score(sde))
        x = data.sample(1000, generator=seeded(0)).double()
        train = data.sample(2000, generator=seeded(1)).double()
        for steps in (3, 10, 30):
            if wins:
                analytic = calibrate_variance(flow, train, steps=steps, generator=seeded(2))
            else:
                u = sde.level(UniformLogSNR()(sde, steps).flip(0)).noise_ratio.log()
                analytic = AnalyticVariance(u, 0.36 / (0.36 + (2 * u).exp()), 1.0)
            npr = ResidualVariance(data.noise_variance(sde))
            bounds = discrete_bounds(
                flow, x, {"iso": analytic, "npr": npr}, steps=steps, generator=seeded(3)
            )
            gain = bounds["npr"].log_prob - bounds["iso"].log_prob
            if wins:
                assert float(gain.mean()) > 5 * float(gain.std()) / math.sqrt(len(x))
            else:
                assert float(gain.abs().max()) < 1e-6 * steps


def test_a_cost_by_coordinate_is_the_kl_of_two_normals(mixture, seeded):
    sde, seen, score = VPSDE(), [], mixture.score(VPSDE())

    def watched(x, t):
        seen.append((x, t))
        return score(x, t)

    x = mixture.sample(5, generator=seeded(0)).double()
    npr = ResidualVariance(mixture.noise_variance(sde))
    found = discrete_bounds(
        probability_flow(sde, watched), x, {"npr": npr}, steps=4, generator=seeded(1)
    )["npr"]
    for i in range(4):
        (x_t, t), (_, s) = seen[i], seen[i + 1]
        later, earlier = sde.level(t), sde.level(s)
        a, v = earlier.transition(later)
        beta = 1 / (1 / earlier.sigma**2 + a**2 / v)
        pull = earlier.alpha * beta / earlier.sigma**2
        x0_hat = later.denoised(x_t, score(x_t, t))
        _, model = conditional_moments(mixture, x_t, later, earlier)
        q = torch.distributions.Normal(pull * x, beta.sqrt())
        p = torch.distributions.Normal(pull * x0_hat, model.sqrt())
        kl = torch.distributions.kl_divergence(q, p).sum(1)
        assert_close(found.terms[i + 1], kl, rtol=1e-6, atol=1e-8)


def test_interpolation_ends_at_the_two_variances_of_ddpm(any_sde):
    later, earlier = ends(any_sde, -1.0, 2.0)
    x, score = torch.zeros(3, 2, dtype=torch.float64), lambda x, t: x
    low, high = PosteriorVariance()(earlier, later), ForwardVariance()(earlier, later)
    for w, wanted in ((0.0, low), (1.0, high), (0.5, (low * high).sqrt()), (2.0, high**2 / low)):
        variance = InterpolatedVariance(lambda x, t, w=w: torch.full_like(x, w))
        assert_close(of_step(variance, x, later, earlier, score), wanted.expand(3, 2))


@pytest.mark.parametrize("limit", [0.05, 0.5, 3.0])
def test_a_limit_cuts_off_what_is_open_of_the_data_and_nothing_else(mixture, limit):
    """At least the posterior's; with it at most what data of that variance leave open."""
    sde, score = VPSDE(), mixture.score(VPSDE())
    clock = torch.tensor([-9.0, 6.0], dtype=torch.float64)
    all_open = AnalyticVariance(clock, torch.ones(2, dtype=torch.float64), 1.0)
    npr = ResidualVariance(mixture.noise_variance(sde))
    x = mixture.sample(50, generator=torch.Generator().manual_seed(0)).double()
    cut = 0
    for late, early in ((-6.0, 0.0), (-1.0, 1.0), (2.0, 6.0)):
        later, earlier = ends(sde, late, early)
        low = PosteriorVariance()(earlier, later)
        pull = (all_open(earlier, later) - low).sqrt() / later.noise_ratio
        for variance in (all_open, npr, SecondMomentVariance(second_moment(mixture, sde))):
            v = of_step(variance.limited("test", limit), x, later, earlier, score)
            free = of_step(variance, x, later, earlier, score)
            assert bool((v >= low * (1 - 1e-12)).all())
            assert bool((v <= (low + pull**2 * limit) * (1 + 1e-12)).all())
            assert_close(v, torch.minimum(free, low + pull**2 * limit))
            cut += int((v < free).any())
    assert cut > 0
    sampler = Ancestral(variance=npr, data_variance=limit)
    silent, loud = (
        sampler.step(score, x, later, earlier, lambda z=z: torch.full_like(x, z)) for z in (0, 1)
    )
    v = of_step(npr.limited("test", limit), x, later, earlier, score)
    assert_close((loud - silent).square(), v, rtol=1e-6, atol=1e-12)


def points_of_beta(n: int = 201) -> GaussianMixture:
    """Points in (-1, 1), weighted as a Beta(2, 3) density over it would be."""
    x = torch.linspace(-1, 1, n + 2, dtype=torch.float64)[1:-1]
    return GaussianMixture(x[:, None], 0.0, (1 + x) * (1 - x).square())


BOUNDED = {
    "two ends": (GaussianMixture(torch.tensor([[-1.0], [1.0]]), 0.0), 0.99),
    "uneven": (GaussianMixture(torch.tensor([[-1.0], [0.3], [1.0]]), 0.0), 0.5),
    "beta": (points_of_beta(), 0.1),
}


@pytest.mark.parametrize(("data", "reached"), BOUNDED.values(), ids=BOUNDED)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_the_exact_variance_of_bounded_data_obeys_the_bounds_of_the_paper(data, reached, eta):
    """Analytic-DPM, theorem 2, written down as it stands for a DDPM of signals alpha_bar.

    Nothing is cut off here. In [-1, 1] x_0 has a variance of 1 at most whatever is known of it,
    so that v, by state and by step, lies between the posterior's and what that makes of it. The
    exact v comes from Bayes' rule over the points, in another way than the oracle's.
    """
    sde, nearly = VPSDE(), 0.0
    npr = ResidualVariance(data.noise_variance(sde))
    weights, values = data.log_weights.exp(), data.means[:, 0]
    for late, early in ((-7.0, 0.0), (-3.0, -1.0), (-1.0, 2.0), (2.0, 6.0)):
        later, earlier = ends(sde, late, early)
        (bar, beta_bar), (bar_before, beta_before) = (
            (level.alpha**2, level.sigma**2) for level in (later, earlier)
        )
        lam = eta**2 * beta_before / beta_bar * (1 - bar / bar_before)
        of_x0 = (bar_before.sqrt() - (beta_before - lam).sqrt() * (bar / beta_bar).sqrt()).square()
        x = (later.alpha * torch.linspace(-1.5, 1.5, 61).double())[:, None]
        log_joint = weights.log() - (x - later.alpha * values).square() / (2 * beta_bar)
        known = log_joint.softmax(1)
        mean = (known * values).sum(1, keepdim=True)
        open_ = (known * (values - mean).square()).sum(1, keepdim=True)
        exact = lam + of_x0 * open_
        v = of_step(npr, x, later, earlier, data.score(sde), eta)
        assert_close(v, exact, rtol=1e-6, atol=1e-12)
        assert bool((v >= lam * (1 - 1e-9)).all())
        assert bool((v <= (lam + of_x0) * (1 + 1e-9)).all())
        limited = of_step(npr.limited("test", 1.0), x, later, earlier, data.score(sde), eta)
        assert_close(limited, v, rtol=1e-9, atol=0, msg="a limit of 1 never cuts the truth")
        nearly = max(nearly, float(((v - lam) / of_x0).max()))
    assert nearly > reached, "the upper bound is not out of reach"


def test_the_last_step_of_a_variance_of_the_state_has_no_more_noise_than_allowed(mixture):
    sde, x = VPSDE(), torch.randn(4, 2, generator=torch.Generator().manual_seed(0)).double()
    sampler = Ancestral(5, variance=ResidualVariance(mixture.noise_variance(sde)), last_std=1e-5)
    moves = list(sampler.plan(sde))
    for k, (move, now, nxt) in enumerate(moves):
        silent, loud = (
            move(mixture.score(sde), x, now, nxt, lambda z=z: torch.full_like(x, z))
            for z in (0, 1)
        )
        assert (float((loud - silent).max()) <= 1.001e-5) == (k == len(moves) - 1)
    free = sampler.step(mixture.score(sde), x, now, nxt, lambda: torch.ones_like(x))
    assert float((free - silent).min()) > 1e-5, "a step by itself is any step"


def test_mean_and_variance_together_cost_one_evaluation_a_step(mixture):
    sde, score = VPSDE(), Counted(mixture.score(VPSDE()))
    sampler = DDIM(10, variance=ResidualVariance(mixture.noise_variance(sde)))
    sampler(score, sde, torch.randn(3, 2), generator=torch.Generator().manual_seed(0))
    assert score.nfe == 11


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Ancestral(data_variance=1.0), "PosteriorVariance has no such part"),
        (lambda: Ancestral(variance="npr", data_variance=0.0), "data_variance to be .* > 0"),
        (lambda: ResidualVariance(lambda x, t: x, data_variance=-1.0), "data_variance to be"),
        (
            lambda: Ancestral(variance="learned", data_variance=1.0),
            "data_variance=1 .* variance=learned has no such part",
        ),
        (lambda: DDIM(variance="learned"), "learned variance for eta=1 alone"),
        (lambda: DDIM(variance=InterpolatedVariance(lambda x, t: x)), "for eta=1 alone"),
        (lambda: Ancestral(variance="npr").plan(VPSDE()), "mode=train_variance mode.kind=npr"),
        (
            lambda: Ancestral(variance="sn").plan(VPSDE()),
            r"from a trained head by KINDS\[kind\]\(analytic\).variance\(model, head\)",
        ),
        (
            lambda: Ancestral(variance=InterpolatedVariance(lambda x, t: x), data_variance=1.0),
            "no such part",
        ),
    ],
)
def test_impossible_variances_of_the_state_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_what_a_sampler_wants_is_named_and_given():
    given = ResidualVariance(lambda x, t: x, data_variance=2.0)
    asked = Ancestral(variance="npr")
    asked.check(VPSDE())
    assert asked.wanted == {"npr"} and asked.given({"npr": given}).variance is given
    assert Ancestral().wanted == frozenset()
