"""The variational bounds against closed forms: tight where theory says so, term by term."""

import math
from itertools import pairwise

import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

from likelihood import UniformDequantization, log_likelihood
from likelihood.bounds import (
    DiscreteBound,
    calibrate_variance,
    continuous_bound,
    discrete_bound,
    discrete_bounds,
    strata_variance,
)
from likelihood.comparison import ordered, rate_distortion
from likelihood.decoders import BinDecoder, DensityDecoder, log_normal_mass
from sde_lib import VPSDE, PerSample, probability_flow
from sde_lib.oracles import Gaussian, GaussianMixture
from sde_lib.reverse_variance import AnalyticVariance, ForwardVariance, PosteriorVariance
from sde_lib.samplers import SamplingError

LINE = Gaussian(torch.tensor([0.5, -1.0, 0.0]), torch.tensor([0.3, 1.0, 2.0]))
PICTURE = Gaussian(torch.full((1, 4, 4), 0.2), torch.linspace(0.1, 1, 16).reshape(1, 4, 4))
ONE = Gaussian(torch.tensor([1.0, -0.5]), 0.4)


def spread_points(data, n, dtype=torch.float64):
    """Points wider than the data, so that a bound is right at each x and not only on average."""
    noise = torch.randn(n, *data.shape, generator=torch.Generator().manual_seed(0))
    return (data.mean.reshape(data.shape) + 1.5 * noise.double()).to(dtype)


def exact(sde, data):
    return probability_flow(sde, data.score(sde))


def ends(sde):
    t = torch.tensor([sde.t_min, sde.t_max], dtype=torch.float64)
    return sde.level(t).rows()


def gap(sde, data, x):
    """E log(prior / q_T) + E log(decoder / q(x | x_tmin)) given x, for the exact score."""
    (start, end), c = ends(sde), data.variances
    square = (x.double().flatten(1) - data.mean).square()
    prior = Normal(0.0, sde.prior_std())
    noised, second = end.alpha**2 * c + end.sigma**2, end.alpha**2 * x.double().flatten(1) ** 2
    at_end = 0.5 * (
        (end.alpha**2 * square + end.sigma**2) / noised
        + noised.log()
        - (second + end.sigma**2) / prior.variance
        - prior.variance.log()
    )
    d = start.noise_ratio**2
    best = c * d / (c + d)
    miss = (square * d**2 + c**2 * d) / (c + d) ** 2
    at_start = 0.5 * (miss / best + best.log() - miss / d - d.log())
    return (at_end + at_start).sum(1)


def assert_mean(error, bias=1e-9):
    """The mean of independent errors [n] is zero within five standard errors and ``bias``."""
    standard_error = float(error.std()) / math.sqrt(len(error))
    assert abs(float(error.mean())) < 5 * standard_error + bias


@pytest.mark.parametrize(
    "data, dtype",
    [(LINE, torch.float64), (PICTURE, torch.float32)],
    ids=["(3,) float64", "(1,4,4) float32"],
)
def test_continuous_bound_is_log_p_up_to_the_known_gap(any_sde, data, dtype, seeded):
    x = spread_points(data, 200, dtype)
    result = continuous_bound(exact(any_sde, data), x, samples=24, generator=seeded(1))
    error = result.log_prob - data.log_prob(x.double()) - gap(any_sde, data, x)

    # float32 rounds x_t by 2^-24 of it: (2^-24 / sigma)² a dimension, at the smallest sigma 1e-6
    assert_mean(error, bias=1e-6 if dtype == torch.float64 else 0.01 * x[0].numel())


@pytest.mark.parametrize("data", [LINE, PICTURE], ids=["(3,)", "(1,4,4)"])
def test_standard_error_of_a_continuous_bound_is_the_size_of_its_error(sde, data, seeded):
    n = 400
    x = data.sample(n, generator=seeded(0)).double()
    result = continuous_bound(exact(sde, data), x, generator=seeded(1))
    squares = (result.log_prob - data.log_prob(x) - gap(sde, data, x)).square()
    claimed = result.standard_error.square()

    noise = 5 * math.hypot(float(squares.std()), float(claimed.std())) / math.sqrt(n)
    assert float(squares.mean()) < float(claimed.mean()) + noise
    # and it is not inflated: a sample variance over strata would claim several times as much
    assert float(squares.mean()) > 0.85 * float(claimed.mean()) - noise


def test_a_shift_of_the_noise_estimate_costs_its_square_times_the_length_of_the_clock(sde, seeded):
    shift, n = 0.3, 1500
    x = LINE.sample(n, generator=seeded(0)).double()
    score = LINE.score(sde)

    def wrong(x, t):
        return score(x, t) - shift / sde.sigma(t).reshape(-1, 1)

    good = continuous_bound(exact(sde, LINE), x, samples=16, generator=seeded(1))
    bad = continuous_bound(probability_flow(sde, wrong), x, samples=16, generator=seeded(1))
    low, high = exact(sde, LINE).clock_range()

    # given x_t the error of the exact score has mean zero, so only the square of the shift stays
    assert_mean(bad.diffusion_term - good.diffusion_term - 3 * shift**2 * (high - low))
    assert_mean(bad.decoder_term - good.decoder_term - 3 * shift**2 / 2)
    assert float((good.log_prob - bad.log_prob).mean()) > 0


def test_the_parts_of_a_continuous_bound_add_up_and_passes_are_counted(sde, seeded):
    calls = []
    score = LINE.score(sde)

    def watched(x, t):
        calls.append(t.dtype)
        return score(x, t)

    x = spread_points(LINE, 5)
    result = continuous_bound(
        probability_flow(sde, watched), x, samples=7, decoder_samples=3, generator=seeded(0)
    )
    low, high = exact(sde, LINE).clock_range()

    parts = result.prior_term + result.diffusion_term + result.decoder_term
    assert_close(result.log_prob, -parts)
    assert_close(result.diffusion_term, result.rate.mean(0) * (high - low))
    assert result.nfe == len(calls) == 10 and set(calls) == {torch.float64}
    middles = low + (high - low) * (torch.arange(7, dtype=torch.float64) + 0.5) / 7
    assert_close(result.clock, middles)
    end = ends(sde)[1]
    q = Normal(end.alpha * x, end.sigma)
    assert_close(result.prior_term, kl_divergence(q, Normal(0.0, sde.prior_std())).sum(1))


def test_variance_of_strata_ignores_a_slope_and_is_unbiased_for_even_noise(seeded):
    line = torch.linspace(5, -3, 9, dtype=torch.float64)[:, None]
    assert_close(strata_variance(line), torch.zeros(1, dtype=torch.float64))
    noise = torch.randn(9, 4000, dtype=torch.float64, generator=seeded(0))
    assert_mean(strata_variance(line + 2 * noise) - 9 * 4)
    assert bool(strata_variance(line[:2]).isnan().all())


@pytest.mark.parametrize("name", ["posterior", "forward", "analytic"])
def test_every_term_of_a_discrete_bound_is_the_kl_of_two_normals(any_sde, mixture, name, seeded):
    """Against states that the score has seen, and a posterior from precisions, not variances."""
    seen, score = [], mixture.score(any_sde)

    def watched(x, t):
        seen.append((x, t))
        return score(x, t)

    x = mixture.sample(6, generator=seeded(0)).double()
    analytic = AnalyticVariance(torch.tensor([-3.0, 3.0]), torch.tensor([0.9, 0.1]), 1.0)
    variance = analytic if name == "analytic" else name
    result = discrete_bound(
        probability_flow(any_sde, watched), x, steps=6, variance=variance, generator=seeded(1)
    )

    assert result.nfe == len(seen) == 7 and result.terms.shape == (8, 6)
    assert_close(result.log_prob, -result.terms.sum(0))
    for i, ((x_t, t), (_, s)) in enumerate(pairwise(seen)):
        now, nxt = any_sde.level(t), any_sde.level(s)
        a, v = nxt.transition(now)
        beta = 1 / (1 / nxt.sigma**2 + a**2 / v)
        x0_hat = now.denoised(x_t, score(x_t, t))
        mean, model_mean = (
            beta * (nxt.alpha / nxt.sigma**2 * x0 + a / v * x_t) for x0 in (x, x0_hat)
        )
        share = 0.5 + 0.4 * (-now.noise_ratio.log() / 3).clamp(-1, 1)
        model_variance = {
            "posterior": beta,
            "forward": v * (nxt.alpha**2 + nxt.sigma**2) / (now.alpha**2 + now.sigma**2),
            "analytic": beta + (nxt.alpha * beta / nxt.sigma**2 * now.noise_ratio) ** 2 * share,
        }[name]
        kl = kl_divergence(Normal(mean, beta.sqrt()), Normal(model_mean, model_variance.sqrt()))
        assert_close(result.terms[i + 1], kl.sum(1), rtol=1e-6, atol=1e-9)
        assert_close(result.distortion[i], (x - x0_hat).square().mean(1), rtol=1e-6, atol=1e-9)
        assert_close(result.times[i], t)
    start, end = ends(any_sde)
    x_t, t = seen[-1]
    decoder = Normal(start.denoised(x_t, score(x_t, t)), start.noise_ratio)
    assert_close(result.terms[-1], -decoder.log_prob(x).sum(1), rtol=1e-6, atol=1e-6)
    prior = kl_divergence(Normal(end.alpha * x, end.sigma), Normal(0.0, any_sde.prior_std()))
    assert_close(result.terms[0], prior.sum(1))


def test_times_of_the_caller_are_the_levels_and_even_steps_are_one_choice_of_them(sde, seeded):
    flow, x = exact(sde, LINE), spread_points(LINE, 4)
    even = discrete_bound(flow, x, steps=5, generator=seeded(0))
    again = discrete_bound(flow, x, times=even.times.flip(0), generator=seeded(0))
    assert_close(even.log_prob, again.log_prob, rtol=0, atol=0)
    assert_close(sde.log_snr(even.times).diff(), sde.log_snr(even.times).diff().mean().expand(5))

    times = sde.t_min + (sde.t_max - sde.t_min) * torch.tensor([0.1, 0.2, 0.6]).double()
    inner = discrete_bound(flow, x, times=times, generator=seeded(0))
    assert_close(inner.times, times.flip(0))
    end = sde.level(times[-1])
    q = Normal(end.alpha * x, end.sigma)
    assert_close(inner.terms[0], kl_divergence(q, Normal(0.0, sde.prior_std())).sum(1))


@pytest.mark.parametrize("steps", [1, 4])
def test_a_point_mass_costs_nothing_but_prior_and_decoder(any_sde, steps):
    data = Gaussian(torch.tensor([0.5, -1.0]), 0.0)
    x = data.mean.expand(3, 2)
    result = discrete_bound(exact(any_sde, data), x, steps=steps)
    start, end = ends(any_sde)

    assert float(result.terms[1:-1].abs().max()) < 1e-9
    assert float((result.distortion / end.noise_ratio**2).max()) < 1e-20
    prior = 0.5 * (end.alpha * x / end.sigma).square().sum(1)
    assert_close(result.terms[0], prior)
    density = 2 * (start.noise_ratio.log() + 0.5 * math.log(2 * math.pi))
    assert_close(result.terms[-1], density.expand(3), rtol=0, atol=1e-8)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_forward_variance_is_tight_for_standard_normal_data_at_any_number_of_steps(
    any_sde, steps, seeded
):
    data = Gaussian(torch.zeros(2), 1.0)
    x = spread_points(data, 3000)
    result = discrete_bound(
        exact(any_sde, data), x, steps=steps, variance="forward", generator=seeded(1)
    )
    assert_mean(result.log_prob - data.log_prob(x) - gap(any_sde, data, x))


@pytest.mark.parametrize("steps", [2, 7])
def test_analytic_variance_is_tight_for_any_isotropic_gaussian(any_sde, steps, seeded):
    x = ONE.sample(3000, generator=seeded(0)).double()
    flow = exact(any_sde, ONE)
    calibrated = calibrate_variance(
        flow, ONE.sample(3000, generator=seeded(1)).double(), steps=steps, generator=seeded(2)
    )
    result = discrete_bound(flow, x, steps=steps, variance=calibrated, generator=seeded(3))
    # the calibration misses by 5 / sqrt(n) of itself at most, a step by the square of that
    bias = steps * 2 * (5 / math.sqrt(3000)) ** 2
    assert_mean(result.log_prob - ONE.log_prob(x) - gap(any_sde, ONE, x), bias=bias)
    share = 0.16 / (0.16 + (2 * calibrated.clock).exp())
    assert_close(calibrated.unresolved, share, rtol=5 * math.sqrt(2 / 6000), atol=0)


def test_analytic_variance_gives_the_best_bound_of_the_three(sde, mixture, seeded):
    score = mixture.score(sde)

    def inexact(x, t):
        return 0.8 * score(x, t)

    x = mixture.sample(1500, generator=seeded(0)).double()
    for flow in (exact(sde, mixture), probability_flow(sde, inexact)):
        for steps in (5, 10, 20):
            analytic = calibrate_variance(flow, x, steps=steps, generator=seeded(1))
            best, *others = (
                discrete_bound(flow, x, steps=steps, variance=variance, generator=seeded(2))
                for variance in (analytic, PosteriorVariance(), ForwardVariance())
            )
            for other in others:
                gain = best.log_prob - other.log_prob
                assert float(gain.mean()) > 3 * float(gain.std()) / math.sqrt(1500)


def test_discrete_bound_rises_with_the_steps_to_the_continuous_bound(sde, seeded):
    """Two steps for one halve the gap: it is of first order in the width of a step."""
    data = Gaussian(torch.tensor([0.0, 0.5]), torch.tensor([0.5, 1.5]))
    x = data.sample(1500, generator=seeded(0)).double()
    elbo = data.log_prob(x) + gap(sde, data, x)
    gaps, errors = [], []
    for steps in (4, 8, 16, 64, 128):
        result = discrete_bound(exact(sde, data), x, steps=steps, generator=seeded(1))
        gaps.append(float((elbo - result.log_prob).mean()))
        errors.append(float((elbo - result.log_prob).std()) / math.sqrt(1500))

    assert all(fine < coarse for coarse, fine in pairwise(gaps))
    noise = 5 * math.hypot(errors[-1], 0.5 * errors[-2])
    assert gaps[-1] == pytest.approx(0.5 * gaps[-2], abs=noise + 0.1 * gaps[-2])


def test_continuous_and_discrete_bound_agree_for_a_score_that_is_no_gradient(sde, seeded):
    def swirl(x, t):
        return -x / (1 + sde.sigma(t).reshape(-1, 1) ** 2) + 0.3 * x.flip(1).tanh()

    flow, x = probability_flow(sde, swirl), spread_points(ONE, 1)
    x = x.expand(400, 2)
    elbo = continuous_bound(flow, x, samples=64, generator=seeded(0))
    vlb = discrete_bound(flow, x, steps=400, generator=seeded(1))
    cost = float(elbo.diffusion_term.mean())
    low, high = flow.clock_range()
    # a step costs expm1(2h) / 2 where the integral has h; the rate at its end and not within it
    width = (high - low) / 400
    assert_mean(elbo.log_prob - vlb.log_prob, bias=2 * width * cost)


@pytest.mark.parametrize("levels", [2, 256])
@pytest.mark.parametrize("std", [1e-3, 0.05, 2.0])
def test_masses_of_all_bins_add_up_to_one(levels, std):
    bins = UniformDequantization(levels, low=-1.0, high=1.0)
    centres = -1 + bins.bin_width * (torch.arange(levels, dtype=torch.float64)[:, None] + 0.5)
    decoder, (level, _) = BinDecoder(bins, std), ends(VPSDE())
    for x0_hat in (-3.0, -1.0, -0.123, 0.0, 0.4567, 1.1):
        masses = decoder.log_prob(centres, torch.full_like(centres, x0_hat), level)
        assert float(masses.logsumexp(0)) == pytest.approx(0, abs=1e-9)
        normal = Normal(torch.tensor(x0_hat, dtype=torch.float64), std)
        inner = centres[1:-1, 0]
        differences = normal.cdf(inner + bins.bin_width / 2) - normal.cdf(
            inner - bins.bin_width / 2
        )
        assert_close(masses[1:-1].exp(), differences, rtol=0, atol=1e-12)


def test_end_bins_take_the_whole_tail():
    bins, (level, _) = UniformDequantization(8, low=0.0, high=8.0), ends(VPSDE())
    x = torch.tensor([[0.5], [7.5]], dtype=torch.float64)
    x0_hat = torch.tensor([[-30.0], [11.0]], dtype=torch.float64)
    masses = BinDecoder(bins, 1.0).log_prob(x, x0_hat, level)
    beyond_four = 0.5 * math.erfc(4 / math.sqrt(2))
    truth = torch.tensor([0.0, math.log1p(-beyond_four)], dtype=torch.float64)
    assert_close(masses, truth, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "low, high", [(40.0, 40.001), (-39.0, -38.0), (-0.5, 3.0), (200.0, 201.0)]
)
def test_log_normal_mass_keeps_its_digits_in_the_tails(low, high):
    nodes = torch.linspace(low, high, 200_001, dtype=torch.float64)
    weights = torch.ones_like(nodes)
    weights[0] = weights[-1] = 0.5
    step = (high - low) / 200_000
    density = -0.5 * nodes.square() - 0.5 * math.log(2 * math.pi)
    truth = torch.logsumexp(density + weights.log() + math.log(step), 0)
    found = log_normal_mass(*torch.tensor([low, high], dtype=torch.float64))
    # the trapezoid rule misses by (slope of the log density times step)² / 12, 1e-7 at most
    assert float(found) == pytest.approx(float(truth), abs=1e-6)


@pytest.mark.parametrize("levels", [2, 256])
def test_levels_score_the_logarithm_of_their_weight(levels, seeded):
    """A model that knows the K points: uniform over 256 levels is 8 bits a dimension."""
    bins, sde = UniformDequantization(levels), VPSDE()
    centres = -1 + bins.bin_width * (torch.arange(levels, dtype=torch.float64)[:, None] + 0.5)
    weights = torch.ones(levels) if levels > 2 else torch.tensor([0.3, 0.7])
    data = GaussianMixture(centres, 0.0, weights)
    n, flow, decoder = 512, exact(sde, data), BinDecoder(bins)
    x, truth = centres.repeat(n // levels, 1), data.log_weights.repeat(n // levels)
    elbo = continuous_bound(flow, x, samples=48, decoder=decoder, generator=seeded(0))
    vlb = discrete_bound(flow, x, steps=48, decoder=decoder, generator=seeded(1))

    # the prior, N(0, 1) for alpha x + sigma eps at t_max, costs at most alpha² / 2 here
    assert_mean(elbo.log_prob - truth, bias=3e-5)
    assert float((elbo.log_prob - truth).std()) / math.sqrt(n) < 0.1
    # a step costs expm1(2h) / 2 times the rate where the integral has h; the rate is 0 at both
    # ends, so that a sum over steps is its integral
    low, high = flow.clock_range()
    width = (high - low) / 48
    assert_mean(vlb.log_prob - math.expm1(2 * width) / (2 * width) * truth, bias=1e-2)


def test_repeats_tell_the_standard_error_of_a_discrete_bound(seeded):
    flow, n = exact(VPSDE(), LINE), 2000
    x = spread_points(LINE, 1).expand(n, 3)
    result = discrete_bound(flow, x, steps=5, repeats=2, generator=seeded(0))
    squares = result.standard_error.square()

    assert result.nfe == 12
    noise = 5 * math.sqrt(2 / n) + 5 * float(squares.std() / squares.mean()) / math.sqrt(n)
    assert float(result.log_prob.var()) == pytest.approx(float(squares.mean()), rel=noise)
    assert bool(discrete_bound(flow, x[:3], steps=5).standard_error.isnan().all())


def test_a_sample_does_not_depend_on_its_batch(mixture):
    flow = exact(VPSDE(), mixture)
    x, seeds = mixture.sample(4, generator=torch.Generator().manual_seed(0)), [5, 6, 7, 8]
    for bound in (
        lambda x, seeds: continuous_bound(flow, x, samples=5, generator=PerSample(seeds)),
        lambda x, seeds: discrete_bound(flow, x, steps=5, generator=PerSample(seeds)),
    ):
        batch = bound(x, seeds).log_prob
        alone = torch.cat([bound(x[i : i + 1], seeds[i : i + 1]).log_prob for i in range(4)])
        assert_close(batch, alone, rtol=0, atol=1e-5)


def test_gaussian_data_reach_shannons_rate_distortion_function(sde, seeded):
    """R(D) = log2(variance / D) / 2: ideal decoding of an isotropic Gaussian loses nothing."""
    data, n = Gaussian(torch.zeros(4), 0.7), 2000
    flow, x = exact(sde, data), data.sample(n, generator=seeded(0)).double()
    calibrated = calibrate_variance(flow, x, steps=12, generator=seeded(1))
    bound = discrete_bound(flow, x, steps=12, variance=calibrated, generator=seeded(2))
    curve = rate_distortion(bound, 4, unit=10.0)
    noise = (sde.sigma(curve.times) / sde.alpha(curve.times)) ** 2
    distortion = 0.49 * noise / (0.49 + noise)

    assert bool((curve.times.diff() < 0).all()) and bool((curve.rate.diff() > 0).all())
    shannon = 0.5 * torch.log2(0.49 / distortion)
    mismatch = 0.5 * math.log2(math.e) * 0.49 * float(1 / noise[0])  # q_T is not quite the prior
    calibration = 12 * (5 * math.sqrt(2 / (4 * n))) ** 2
    allowed = 5 * curve.rate_error + mismatch + calibration
    assert bool(((curve.rate - shannon).abs() < allowed).all())
    miss = (curve.distortion - 10 * distortion.sqrt()).abs()
    assert bool((miss < 5 * curve.distortion_error).all())


def test_rate_distortion_by_hand():
    terms = torch.tensor([[1.0, 3.0], [2.0, 2.0], [0.5, 1.5], [9.0, 9.0]]).double()
    distortion = torch.tensor([[4.0, 4.0], [1.0, 1.0], [0.0, 0.5]]).double()
    bound = DiscreteBound(
        -terms.sum(0), terms[0], terms, distortion, torch.tensor([1.0, 0.5, 0.1]), 3
    )
    curve = rate_distortion(bound, 2, unit=3.0)
    bits = 2 * math.log(2)
    assert_close(curve.rate, torch.tensor([2 / bits, 4 / bits, 5 / bits]).double())
    assert_close(curve.rate_error, torch.tensor([1 / bits, 1 / bits, 1.5 / bits]).double())
    assert_close(curve.distortion, torch.tensor([6.0, 3.0, 1.5]).double())
    # half the relative error of the mean square 0.25 +- 0.25, times 1.5
    assert_close(curve.distortion_error, torch.tensor([0.0, 0.0, 0.75]).double())


def test_ode_elbo_and_vlb_stand_in_order_for_an_exact_score_and_the_text_says_so(mixture, seeded):
    flow = exact(VPSDE(), mixture)
    x = mixture.sample(400, generator=seeded(0)).double()
    ode = log_likelihood(flow, x).log_prob
    elbo = continuous_bound(flow, x, generator=seeded(1)).log_prob
    vlb = discrete_bound(flow, x, steps=20, generator=seeded(2)).log_prob

    found = ordered(ode, elbo, vlb)
    assert found.holds and str(found).count("in order") == 2
    assert found.vlb_gap == pytest.approx(float((elbo - vlb).mean()))
    swapped = ordered(vlb, elbo, ode, sigmas=2)
    assert not swapped.ode_above_elbo and not swapped.holds
    assert "ODE - ELBO" in str(swapped) and "out of order by more than 2" in str(swapped)


def test_what_cannot_be_bounded_is_refused_with_a_remedy(seeded):
    flow, x = exact(VPSDE(), ONE), ONE.sample(3, generator=seeded(0))
    bins = BinDecoder(UniformDequantization(4))
    with_prior = probability_flow(VPSDE(), ONE.score(VPSDE()), log_prior=lambda x: x.sum(1))
    falling = torch.tensor([0.9, 0.5, 0.1])
    for call, words in [
        (lambda: discrete_bound(flow, x, steps=0), "steps to be a whole number >= 1"),
        (lambda: discrete_bound(flow, x), "either steps or times"),
        (lambda: discrete_bound(flow, x, steps=3, times=falling), "either steps or times"),
        (lambda: discrete_bound(flow, x, times=falling), "flip them"),
        (lambda: discrete_bound(flow, x, times=torch.tensor([0.5])), "at least two"),
        (lambda: discrete_bound(flow, x, times=torch.tensor([0.5, 2.0])), "within"),
        (lambda: discrete_bound(flow, x, steps=3, variance="small"), "forward, .*posterior"),
        (lambda: discrete_bound(flow, x, steps=3, variance="analytic"), "calibrate_variance"),
        (lambda: discrete_bound(flow, x, steps=3, repeats=0), "repeats"),
        (lambda: discrete_bound(flow, x + 9, steps=3, decoder=bins), "within its bins"),
        (lambda: continuous_bound(flow, x + 9, decoder=bins), "DensityDecoder"),
        (lambda: continuous_bound(flow, x, samples=0), "samples"),
        (lambda: continuous_bound(flow, x / 0), "NaN or infinity"),
        (lambda: continuous_bound(flow, x.half()), "float32 or float64"),
        (lambda: continuous_bound(with_prior, x), "log_prior"),
        (lambda: calibrate_variance(flow, x[0], steps=3), "batch"),
        (lambda: DensityDecoder(std=0.0), "std"),
        (lambda: rate_distortion(discrete_bound(flow, x, steps=2), 0), "num_dims"),
        (lambda: ordered(x[:, 0], x[:, 0], x[:2, 0]), "same two or more samples"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()
    broken = probability_flow(VPSDE(), lambda x, t: x * float("nan"))
    for call in (
        lambda: continuous_bound(broken, x),
        lambda: discrete_bound(broken, x, steps=2),
        lambda: calibrate_variance(broken, x, steps=2),
    ):
        with pytest.raises(SamplingError, match="not finite"):
            call()


def test_several_variances_share_their_forward_passes():
    sde, data = VPSDE(), Gaussian(torch.zeros(3), torch.tensor([0.3, 0.6, 1.0]))
    flow, x = probability_flow(sde, data.score(sde)), data.sample(5)
    generator = torch.Generator().manual_seed(0)
    both = discrete_bounds(
        flow, x, {"a": "posterior", "b": "forward"}, steps=7, generator=generator
    )
    for name, kind in (("a", "posterior"), ("b", "forward")):
        alone = discrete_bound(
            flow, x, steps=7, variance=kind, generator=torch.Generator().manual_seed(0)
        )
        assert torch.equal(both[name].terms, alone.terms) and both[name].nfe == alone.nfe == 8
