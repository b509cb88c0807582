"""Noise levels in mode=diagnose: floors, simple denoisers, the density, a model's own error."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from experiment.data import Dataset, checkerboard, eight_gaussians
from experiment.diagnosis.floor import known_floor, without_gaps
from experiment.diagnosis.levels import (
    Curve,
    Wanted,
    gaussian_curve,
    levels_for,
    simple_curve,
    with_more_samples,
)
from experiment.diagnosis.model import (
    GROUPS,
    Errors,
    even_levels,
    gradients,
    noise_errors,
    own_levels,
)
from experiment.diagnosis.seen import Seen
from experiment.diagnosis.spectrum import Spectrum
from score_models import (
    EDM,
    DenoisingScoreMatching,
    ImportanceTimes,
    LogNormalSigma,
    ScoreModel,
    UniformTimes,
    maximum_likelihood,
    noise_regression,
)
from score_models.networks import MLP
from sde_lib import EDMSDE, VPSDE
from sde_lib.oracles import Gaussian, GaussianMixture

CLOCK = torch.linspace(-6, 6, 25, dtype=torch.float64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def known(oracle, n: int = 4000) -> Dataset:
    train = oracle.sample(n, generator=generator()).float()
    return Dataset("known", train, train[:500] + 0.0, log_density=oracle.log_prob)


@pytest.mark.parametrize("std", [0.03, 1.0, 20.0])
def test_one_gaussian_direction_asks_for_a_hyperbolic_secant(std) -> None:
    variances = torch.tensor([std**2, std**2], dtype=torch.float64)
    clock = levels_for(variances, 0.0)
    wanted = gaussian_curve(variances, clock).wanted()
    exact = 1 / torch.cosh(clock - math.log(std)) / math.pi
    assert_close(wanted.density, exact, rtol=0.01, atol=0)  # the ends are cut off at e^-6
    assert wanted.mean == pytest.approx(math.log(std), abs=0.01)
    assert wanted.std == pytest.approx(math.pi / 2, rel=0.03)


def test_an_error_that_does_not_fall_asks_for_nothing() -> None:
    with pytest.raises(ValueError, match="falls from 1 to 0"):
        Curve(CLOCK, torch.ones_like(CLOCK), "nobody").wanted()


def test_efficiency_is_the_ratio_of_the_excess_at_equal_draws() -> None:
    clock, c = torch.arange(4, dtype=torch.float64), torch.tensor([0.0, 1.0, 4.0, 0.25]).double()
    wanted = Wanted(clock, c.sqrt() / c.sqrt().sum())
    p = torch.tensor([0.4, 0.3, 0.2, 0.1]).double()

    def excess(density: Tensor) -> float:
        return float((c / density)[density > 0].sum())

    ratio = excess(wanted.density) / excess(p)
    assert wanted.efficiency(p) == pytest.approx(ratio)
    assert wanted.efficiency(7 * p) == pytest.approx(ratio), "the scale of p means nothing"
    assert wanted.efficiency(wanted.density) == pytest.approx(1)
    assert wanted.efficiency(torch.zeros(4)) == 0


def test_the_floor_of_a_gaussian_is_its_closed_form() -> None:
    covariance = torch.tensor([[1.0, 0.6], [0.6, 0.5]], dtype=torch.float64)
    data = known(Gaussian(torch.tensor([1.0, -2.0]).double(), covariance=covariance))
    scale = data.units.scale.double()
    scaled = covariance / scale[:, None] / scale[None]
    exact = gaussian_curve(torch.linalg.eigvalsh(scaled), CLOCK).error
    assert_close(known_floor(data, CLOCK), exact, rtol=0, atol=2e-4)  # mass beyond the grid


def test_the_floor_of_a_mixture_on_a_line_is_that_of_its_exact_score() -> None:
    mixture = GaussianMixture(torch.tensor([[-1.0], [2.0]]), torch.tensor([0.1, 0.5]))
    data = known(mixture)
    scale, sde = float(data.units.scale), EDMSDE(1e-4, 1e4)
    score = mixture.score(sde)
    x = torch.linspace(-30, 30, 60_001, dtype=torch.float64)[:, None]
    for u in (-4.0, -1.0, 0.0, 1.0):
        t = torch.tensor(math.exp(u) * scale, dtype=torch.float64)
        p = mixture.log_prob(x, sde, t).exp()
        exact = 1 - float(torch.trapezoid(p * (t * score(x, t))[:, 0] ** 2, x[:, 0]))
        found = float(known_floor(data, torch.tensor([u], dtype=torch.float64))[0])
        assert found == pytest.approx(exact, abs=1e-4)


def test_a_floor_is_given_where_it_is_known_alone() -> None:
    plain = torch.randn(100, 2, generator=generator())
    assert known_floor(Dataset("plain", plain, plain + 0.0), CLOCK) is None
    three = Gaussian(torch.zeros(3), 1.0)
    assert known_floor(known(three), CLOCK) is None
    wide = Gaussian(torch.zeros(2), 50.0)
    beyond = Dataset("beyond", plain, plain + 0.0, log_density=wide.log_prob)
    assert known_floor(beyond, CLOCK) is None, "most of the density is outside of the samples"


def test_where_edges_are_finer_than_the_grid_the_floor_is_not_known_but_goes_to_one() -> None:
    data = checkerboard(train_size=3000, test_size=300)
    floor = known_floor(data, CLOCK)
    assert bool(floor[0].isnan()) and bool(floor[CLOCK > -2].isfinite().all())
    filled = without_gaps(floor, CLOCK)
    assert bool((filled.diff()[CLOCK[1:] < -2] <= 0).all()) and float(filled[0]) > 0.98
    smooth = known_floor(eight_gaussians(train_size=3000, test_size=300), CLOCK)
    assert bool(smooth.isfinite().all())


def simple(train: Tensor, queries: Tensor, clock: Tensor) -> Curve:
    known = Spectrum.of(train)
    gaussian = gaussian_curve(known.variances, clock, known.shares)
    return simple_curve(gaussian, train[:1000], queries, generator(1))


def linear(train: Tensor, clock: Tensor) -> Tensor:
    known = Spectrum.of(train)
    return gaussian_curve(known.variances, clock, known.shares).error


def test_no_kernel_is_taken_for_better_than_the_best_denoiser_of_a_gaussian() -> None:
    x = torch.randn(1256, 6, generator=generator(), dtype=torch.float64)
    found, known = simple(x[:1000], x[1000:], CLOCK).error, linear(x[:1000], CLOCK)
    # by chance a level may pass two standard errors; its gain is then a small one
    assert float((known - found).max()) < 0.02
    assert float((known == found).double().mean()) > 0.8


@pytest.mark.parametrize("n, dims", [(40, 300), (200, 300), (200, 60)])
def test_the_error_of_a_gaussian_is_never_below_its_exact_one_whatever_the_samples(n, dims):
    stds = torch.logspace(-2, 0, dims, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(dims, dims, generator=generator(2)).double()).Q
    x = stds * torch.randn(n + 128, dims, generator=generator(), dtype=torch.float64) @ turn
    found = simple(x[:n], x[n:], CLOCK).error
    exact = gaussian_curve(stds**2, CLOCK).error
    # a variance of n/2 samples is good to sqrt(4/n), v/(v + r) moves by a quarter of that at
    # most and bends by 4/n at most; an error of the kernel is one of 64 samples
    each = math.sqrt(4 / n) / 4
    spread = each * float(stds.square().square().sum().sqrt() / stds.square().sum())
    off = 5 * spread + 4 / n + 5 * math.sqrt(2 / 64 / dims)
    assert bool((found > exact - off).all())
    assert 0.98 < float(found[0]) <= 1 and float(found[-1]) < 1e-3
    even = gaussian_curve(stds.square().mean()[None], CLOCK).error
    assert bool((linear(x[:n], CLOCK) < even + 5 * spread).all()), "worse than one variance"


def test_independent_pixels_hide_small_noise_whatever_the_samples() -> None:
    x = torch.rand(120 + 128, 192, generator=generator(), dtype=torch.float64) * 12**0.5
    found = simple(x[:120], x[120:], CLOCK).error
    # noise is told within some rho of the ends of a pixel's 12^0.5 alone: p rises there from 0
    # to its height over rho, E slope²/p = 2 c / (rho 12^0.5) with c < 0.91 (integral phi²/Phi)
    small = CLOCK <= -2
    least = 1 - 2 * 0.91 * CLOCK.exp()[small] / 12**0.5
    exact = gaussian_curve(torch.ones(1).double(), CLOCK).error  # no linear denoiser is better
    # 192 variances of 60 samples: together good to sqrt(2/60/192), bent by 2/60 at most
    off = 5 * math.sqrt(2 / 60 / 192) / 4 + 2 / 60 * exact * (1 - exact)
    assert bool((found - exact).abs().le(off)[small].all()) and float(found.max()) <= 1
    assert bool((found[small] >= least - off[small]).all())


def test_a_rare_value_on_a_coordinate_that_hardly_changes_is_no_gain_of_the_kernel() -> None:
    """Like the border of MNIST: training samples that never have ink there, a test sample does."""
    x = torch.randn(300 + 128, 20, generator=generator(), dtype=torch.float64)
    x[:, 10:] *= 1e-3
    x[301::8, 10] = 1.0
    found, known = simple(x[:300], x[300:], CLOCK).error, linear(x[:300], CLOCK)
    assert float((known - found).max()) < 0.02


def test_a_kernel_finds_what_is_not_gaussian_and_stays_above_the_floor() -> None:
    mixture = GaussianMixture(torch.tensor([[-1.0, 1.0], [1.0, 1.0], [0.0, -1.4]]), 0.1)
    data = known(mixture, 6000)
    x = data.units.encode(data.train).double()
    clock = torch.linspace(-4, 2, 13, dtype=torch.float64)
    gaussian = gaussian_curve(torch.ones(2).double(), clock)
    found = simple(x[:2000], x[2000:2512], clock)
    floor = known_floor(data, clock)
    assert float((gaussian.error - found.error).max()) > 0.2
    # 256 samples judge; the spread of one error of two numbers is below 1.5
    assert bool((found.error > floor - 5 * 1.5 / 16 * 0.5).all())
    assert float((found.error - floor).abs().max()) < 0.25


def test_a_kernel_finds_clusters_in_more_dimensions_than_samples() -> None:
    dims, n, s = 200, 150, 0.05
    centres = torch.randn(40, dims, generator=generator(3)).double()
    which = torch.randint(0, 40, (n + 128,), generator=generator())
    inner = torch.randn(n + 128, dims, generator=generator(1), dtype=torch.float64)
    x, clock = centres[which] + s * inner, torch.linspace(-6, 1, 15, dtype=torch.float64)
    found = simple(x[:n], x[n:], clock).error
    least = s**2 / (s**2 + (2 * clock).exp())  # for those who are told the cluster
    off = 5 * math.sqrt(2 / 64 / dims)  # relative, of 64 errors of 200 numbers
    assert bool((found > (1 - off) * least).all()) and float(found[0]) > 0.98
    assert float((found / linear(x[:n], clock)).min()) < 0.5


def seen(train: Tensor, test: Tensor) -> Seen:
    return Seen.of(Dataset("own", train, test), {}, 10**6, 4096, 0)


def test_what_fewer_samples_ask_for_tells_whether_all_are_enough() -> None:
    x = torch.randn(500, 20, generator=generator())
    curves = seen(x[:300], x[300:]).curves
    assert 0.95 < curves.lasting <= 1
    scales = torch.tensor([1e-3, 1.0]).repeat(150)[:, None]  # every other sample is a small one
    apart = seen(scales * x[:300], x[300:]).curves
    assert apart.lasting < 0.9
    half = apart.fewer[0].wanted().mean
    assert half < apart.best.wanted().mean - 1
    assert seen(x[:15], x[300:]).curves.lasting == 0 and len(curves.fewer) == 2
    assert seen(x[:39], x[300:]).curves.lasting == 0, "less than two a dimension see no axes"
    assert seen(x[:40], x[300:]).curves.lasting > 0


@pytest.mark.parametrize("shift", [0.05, 0.1, 0.2])
@pytest.mark.parametrize("ratio", [0.5, 1.0])
def test_the_shift_of_a_density_is_foreseen_by_its_last_two_steps(shift, ratio) -> None:
    clock = torch.arange(-20, 20, 0.05, dtype=torch.float64)

    def at(mean: float) -> Wanted:
        density = 1 / torch.cosh(clock - mean)
        return Wanted(clock, density / density.sum() / 0.05)

    last = sum(shift * ratio**k for k in range(1, 5))
    half, quarter = (
        at(0.0).efficiency(at(-away).density) for away in (shift, shift / ratio + shift)
    )
    exact = at(last).efficiency(at(0.0).density)
    # the loss is the square of the shift but for its fourth power; mean u² / 2 is pi²/8
    assert with_more_samples(half, quarter) == pytest.approx(
        exact, abs=(last + 2 * shift / ratio) ** 4
    )
    assert with_more_samples(1.0, 1.0) == 1 and with_more_samples(0.9, 0.9) == pytest.approx(0)


def test_the_kernel_sees_data_in_the_order_of_their_classes_from_end_to_end(monkeypatch) -> None:
    monkeypatch.setattr("experiment.diagnosis.seen.REFERENCE", 200)
    side = torch.tensor([-3.0, 3.0]).repeat_interleave(200)[:, None]
    x = side * torch.ones(2) + 0.1 * torch.randn(400, 2, generator=generator())
    ordered, mixed = x, x[torch.randperm(400, generator=generator())]
    gains = []
    for train in (ordered, mixed):
        curves = seen(train, x + 0.0).curves
        gains.append(float((curves.gaussian.error - curves.best.error).max()))
    # had it seen one side alone, it would be no better: the samples of the other are in its tail
    assert gains[0] > 0.1 and abs(gains[0] - gains[1]) < 0.1


class Line(nn.Module):
    """What a perfect network says of N(0, s²) under EDM(s): nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, noise_level: Tensor, cond: Tensor | None = None) -> Tensor:
        return self.weight * x


@pytest.mark.parametrize("sde", [VPSDE(), EDMSDE()], ids=repr)
def test_errors_of_the_exact_model_are_the_closed_form(sde) -> None:
    model, n = ScoreModel(Line(), sde, EDM(0.6)), 3000
    x0 = 0.6 * torch.randn(n, 4, generator=generator())
    clock = even_levels(sde, 9)
    errors = noise_errors(model, x0, torch.randn(n, 4, generator=generator(1)), clock)
    exact = gaussian_curve(torch.full((4,), 0.36).double(), clock).error
    assert bool(((errors.mean - exact).abs() < 5 * errors.standard_error + 1e-6).all())
    integral, error = errors.integral()
    assert abs(integral - float(torch.trapezoid(exact, clock))) < 5 * error
    assert_close(even_levels(sde, 2), -0.5 * torch.tensor(sde.log_snr_range()).flip(0).double())


def test_the_integral_of_an_error_has_the_spread_of_the_samples() -> None:
    each = torch.tensor([[1.0, 3.0], [2.0, 6.0]]).double()
    value, error = Errors(torch.tensor([0.0, 2.0]).double(), each).integral()
    assert (value, error) == pytest.approx((6.0, math.sqrt(8) / math.sqrt(2)))


@pytest.mark.parametrize("size", [1, 3])
def test_gradient_moments_are_those_of_each_sample(size) -> None:
    torch.manual_seed(0)
    network = MLP((2,), width=8, blocks=1)
    for weight in network.parameters():
        nn.init.normal_(weight, std=0.5)
    model = ScoreModel(network, VPSDE(), EDM(0.7)).requires_grad_(False)
    n, u = GROUPS * size, torch.tensor([-1.0], dtype=torch.float64)
    x0, noise = (torch.randn(n, 2, generator=generator(seed)) for seed in (1, 2))
    found = gradients(model, x0, noise, u)
    assert not any(weight.requires_grad for weight in model.parameters())

    model.requires_grad_()
    rows = []
    for i in range(n):
        t = model.sde.time_at(-2 * u)
        alpha, sigma = model.sde.alpha(t).float(), model.sde.sigma(t).float()
        part = slice(i, i + 1)
        error = model(alpha * x0[part] + sigma * noise[part], t) - noise[part]
        grads = torch.autograd.grad(error.square().mean(), list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in grads]).double())
    groups = torch.stack(rows).reshape(GROUPS, size, -1).mean(1)
    variance = float(groups.var(0).sum())
    agreed = float(groups.mean(0).square().sum()) - variance / GROUPS
    assert float(found.agreed[0]) == pytest.approx(agreed, rel=1e-3)
    assert float(found.square[0]) == pytest.approx(agreed + size * variance, rel=1e-3)
    if size == 1:
        each = torch.stack(rows).square().sum(1).mean()
        assert float(found.square[0]) == pytest.approx(float(each), rel=1e-3)
    assert float(found.norm[0]) == pytest.approx(float(found.square[0]) ** 0.5)


def test_the_levels_of_an_objective_are_its_draws_and_weights() -> None:
    sde = VPSDE()
    clock = torch.arange(-8, 7, 0.25, dtype=torch.float64)
    inner = clock.abs() < 4
    normal = own_levels(
        DenoisingScoreMatching(noise_regression, LogNormalSigma(mean=-1.0, std=1.5)), sde, clock
    )
    exact = torch.distributions.Normal(-1.0, 1.5).log_prob(clock).exp()
    assert_close(normal.density[inner], exact[inner], rtol=0.03, atol=3e-4)
    assert_close(normal.weight[inner], torch.ones_like(exact[inner]))

    level = sde.level(sde.time_at(-2 * clock))
    uniform = own_levels(DenoisingScoreMatching(maximum_likelihood, UniformTimes()), sde, clock)
    assert_close(uniform.density[inner], (1 / level.clock_rate)[inner], rtol=0.05, atol=3e-4)
    weight = level.diffusion**2 / level.sigma**2
    drawn = inner & (uniform.density > 0.01)
    assert_close(uniform.weight[drawn], weight[drawn], rtol=0.1, atol=0)

    weighed = ImportanceTimes(weight=maximum_likelihood)
    even = own_levels(DenoisingScoreMatching(maximum_likelihood, weighed), sde, clock)
    assert float(even.density[inner].std() / even.density[inner].mean()) < 0.02
    assert own_levels(object(), sde, clock) is None
