"""Samplers whose steps follow the error, and the fixed-step methods of torchdiffeq beside them."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from sde_lib import SDE, VESDE, VPSDE, Counted, DiscreteSDE, PerSample
from sde_lib.checks import check_sampler, measured_order
from sde_lib.oracles import Gaussian, GaussianMixture
from sde_lib.samplers import (
    AdaptiveODE,
    AdaptiveSDE,
    DPMSolverAdaptive,
    FixedODE,
    Sampler,
    SamplingError,
)
from sde_lib.samplers.adaptive import FIXED_METHODS
from sde_lib.samplers.exponential import PREDICTIONS, polynomial_weights
from sde_lib.samplers.step_noise import KeptNoise
from sde_lib.sde import Level

SeededGenerator = Callable[[int], torch.Generator]
PAIRS = [(order, name) for order in (12, 23) for name in PREDICTIONS]
PER_SAMPLE = {
    "dpm_12": partial(DPMSolverAdaptive, 12),
    "dpm_23": partial(DPMSolverAdaptive, 23),
    "sde": AdaptiveSDE,
}
per_sample = pytest.mark.parametrize("make", PER_SAMPLE.values(), ids=PER_SAMPLE.keys())


def three_widths() -> Gaussian:
    """Narrow, medium and wide: every process finds one that is hard for it."""
    return Gaussian(0.5, torch.tensor([0.3, 0.8, 2.0], dtype=torch.float64))


def ends(sde: SDE) -> tuple[Tensor, Tensor]:
    """Nine points at t_max and where the exact flow takes them at t_min."""
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None].expand(9, 3)
    return tuple(three_widths().push(sde, z, t) for t in (sde.t_max, sde.t_min))


# torchdiffeq


@pytest.mark.parametrize("sde", [VPSDE(), VESDE()], ids=["vp", "ve"])
@pytest.mark.parametrize("method", FIXED_METHODS)
def test_fixed_step_methods_of_torchdiffeq_converge_at_their_order(method: str, sde: SDE) -> None:
    make = partial(FixedODE, method=method)
    order = make(1).converges
    # the rounds of an implicit rule make its error jump a little
    assert measured_order(make, sde, (60, 120)) == pytest.approx(order, abs=0.3)


@pytest.mark.parametrize(
    ("method", "spent"), [("euler", 20), ("midpoint", 40), ("heun3", 60), ("rk4", 80)]
)
def test_fixed_step_methods_cost_their_stages_and_one_denoise(method: str, spent: int) -> None:
    sde = VPSDE()
    score = Counted(three_widths().score(sde))
    states = list(FixedODE(20, method).trajectory(score, sde, ends(sde)[0]))

    assert score.nfe == spent + 1
    assert len(states) == 12


@pytest.mark.parametrize("tolerance", [1e-4, 1e-7])
def test_lsoda_of_scipy_reaches_the_exact_flow_to_its_tolerance(
    tolerance: float, sde: SDE
) -> None:
    start, end = ends(sde)
    solver = AdaptiveODE(tolerance, tolerance, "scipy_solver", denoise=False)

    found = solver(three_widths().score(sde), sde, start)

    assert float((found - end).abs().max()) < 100 * tolerance  # a hundred steps, each to it


def test_lsoda_says_where_it_gives_up() -> None:
    sde = VPSDE()
    with pytest.raises(SamplingError, match="scipy_solver: not finished after 20 evaluations"):
        AdaptiveODE(method="scipy_solver", max_evaluations=20)(
            three_widths().score(sde), sde, ends(sde)[0]
        )


def test_an_implicit_step_that_is_too_long_is_refused_and_not_returned() -> None:
    sde = VPSDE()
    with pytest.raises(SamplingError, match="implicit step is not solved .* take more steps"):
        FixedODE(6, "implicit_adams")(lambda x, t: -50 * x, sde, ends(sde)[0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: FixedODE(method="dopri5"),
            "FixedODE takes steps of one size, and dopri5 chooses",
        ),
        (lambda: FixedODE(method="scipy_solver"), "use AdaptiveODE.*method='scipy_solver'"),
        (lambda: FixedODE(method="rk99"), "method to be one of euler, .*got method='rk99'"),
        (lambda: FixedODE(steps=0), "FixedODE needs steps to be a whole number >= 1"),
        (lambda: FixedODE(denoise=1), "FixedODE needs denoise to be true or false"),
        (lambda: AdaptiveODE(method="rk4"), "rk4 has no estimate of it; use FixedODE"),
        (lambda: DPMSolverAdaptive(13), "order=12 and order=23, .*got order=13"),
        (lambda: DPMSolverAdaptive(prediction="x0"), "prediction to be one of data, noise, v"),
        (lambda: DPMSolverAdaptive(rtol=0.0), "DPMSolverAdaptive needs rtol .*>= 1e-12 and < 1"),
        (lambda: AdaptiveSDE(atol=2.0), "AdaptiveSDE needs atol .* < 1; got atol=2"),
        (lambda: AdaptiveSDE(eta=0.0), "AdaptiveSDE needs eta .* > 0"),
        (lambda: AdaptiveSDE(first_step=0.0), "first_step to be a finite number > 0"),
        (lambda: AdaptiveSDE(longest_step=0.05), "longest_step to be a finite number >= 0.1"),
        (lambda: AdaptiveSDE(compact=0), "compact to be true or false"),
        (lambda: AdaptiveSDE(max_evaluations=0), "max_evaluations to be a whole number >= 1"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_sentence(
    make: Callable[[], Sampler], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# steps of its own for each sample


@pytest.mark.parametrize(("order", "prediction"), PAIRS)
def test_error_of_dpm_adaptive_falls_with_the_tolerance(
    order: int, prediction: str, sde: SDE
) -> None:
    """Some dozens of steps, each to the tolerance, in the norm that the coordinates share."""
    start, end = ends(sde)
    how, loose, tight = {"prediction": prediction, "denoise": False}, 1e-2, {12: 1e-3, 23: 1e-4}
    made = [DPMSolverAdaptive(order, r, r, **how) for r in (loose, tight[order])]
    errors = [float((m(three_widths().score(sde), sde, start) - end).abs().max()) for m in made]

    assert errors[0] < 20 * loose and errors[1] < 20 * tight[order]
    assert errors[1] < errors[0] / 3


class Unbounded(DPMSolverAdaptive):
    """Steps may grow at will, as published."""

    growth = math.inf


@pytest.mark.parametrize("order", [12, 23])
def test_dpm_adaptive_is_the_published_algorithm_for_one_sample(order: int) -> None:
    """Lu et al. 2022, appendix C, by its own formulas, step sizes and all."""
    sde, rtol, atol = VPSDE(), 0.05, 0.0078
    score, x = three_widths().score(sde), ends(sde)[0][2:3]
    counted = Counted(score)
    free = Unbounded(order, rtol, atol, longest_step=100.0, denoise=False)

    found = free(counted, sde, x)

    def level(lam: float) -> Level:
        return sde.level(sde.time_at(torch.tensor(2 * lam, dtype=torch.float64)))

    def eps(x: Tensor, at: Level) -> Tensor:
        return -at.sigma * score(x, at.t)

    low_lam, high_lam = (0.5 * v for v in sde.log_snr_range())
    lam, h, before, spent = low_lam, 0.05, x, 0
    while lam < high_lam:
        h = min(h, high_lam - lam)
        a, b = level(lam), level(lam + h)
        e, phi = eps(x, a), math.expm1(h)
        spent += order // 10 + 1
        if order == 12:
            mid = level(lam + h / 2)
            u = mid.alpha / a.alpha * x - mid.sigma * math.expm1(h / 2) * e
            lower = b.alpha / a.alpha * x - b.sigma * phi * e
            higher = b.alpha / a.alpha * x - b.sigma * phi * eps(u, mid)
        else:
            one, two = level(lam + h / 3), level(lam + 2 * h / 3)
            u = one.alpha / a.alpha * x - one.sigma * math.expm1(h / 3) * e
            d = eps(u, one) - e
            lower = b.alpha / a.alpha * x - b.sigma * phi * (e + 1.5 * d)
            part = math.expm1(2 * h / 3)
            u = two.alpha / a.alpha * x - two.sigma * (part * e + 2 * (part / (2 * h / 3) - 1) * d)
            d = eps(u, two) - e
            higher = b.alpha / a.alpha * x - b.sigma * (phi * e + 1.5 * (phi / h - 1) * d)
        tolerance = torch.maximum(rtol * torch.maximum(lower.abs(), before.abs()), x * 0 + atol)
        error = float(((higher - lower) / tolerance).square().mean().sqrt())
        if error <= 1:
            x, before, lam = higher, lower, lam + h
        h *= 0.9 * error ** (-1 / (order // 10 + 1))
    assert_close(found, x, rtol=1e-9, atol=1e-9)
    assert counted.nfe <= spent  # a step that is tried again keeps its first evaluation


@pytest.mark.parametrize("name", PER_SAMPLE)
def test_per_sample_steps_conform(name: str) -> None:
    check_sampler(
        lambda steps: PER_SAMPLE[name](), VESDE(), bias=0.05, batch_tolerance=1e-4
    )  # float32: an error estimate moves by its rounding, and the step by as much


@per_sample
def test_a_sample_is_alone_what_it_is_in_a_batch(
    make: Callable[..., Sampler], mixture: GaussianMixture
) -> None:
    """Rounding alone may tell them apart: the norm of a row is summed as its batch is laid out."""
    sde, score = VPSDE(), mixture.score(VPSDE())

    def drawn(seeds: list[int]) -> Tensor:
        streams = PerSample(seeds)
        x = sde.prior_sample((len(seeds), 2), generator=streams, dtype=torch.float64)
        return make()(score, sde, x, generator=streams)

    together = drawn([5, 6, 7, 8, 9])

    assert_close(torch.cat([drawn([s]) for s in (5, 6, 7, 8, 9)]), together, rtol=0, atol=1e-10)


@per_sample
def test_arrived_samples_leave_the_batch_and_change_nothing_by_it(
    make: Callable[..., Sampler], mixture: GaussianMixture, seeded: SeededGenerator
) -> None:
    sde, rows = VPSDE(), []

    def score(x: Tensor, t: Tensor) -> Tensor:
        assert t.ndim == 0 or t.shape == x.shape[:1]
        rows.append(len(x))
        return mixture.score(sde)(x, t)

    x = sde.prior_sample((16, 2), generator=seeded(0), dtype=torch.float64)
    left = make()(score, sde, x, generator=PerSample(range(16)))
    fewer, rows[:] = sum(rows), []
    stayed = make(compact=False)(score, sde, x, generator=PerSample(range(16)))

    assert_close(left, stayed, rtol=0, atol=1e-10)
    assert set(rows) == {16} and fewer < sum(rows)


def test_samples_take_the_steps_that_they_need() -> None:
    """In a narrow mode the noise estimate soon stays what it is: such samples arrive first."""
    sde = VPSDE()
    data = GaussianMixture(torch.tensor([[-2.0], [2.0]]), torch.tensor([0.8, 0.01]))
    steps = torch.zeros(2, dtype=torch.long)
    x = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)

    def score(x: Tensor, t: Tensor) -> Tensor:
        if t.ndim:
            right = x[:, 0] > 0
            steps[0] += int((~right).sum())
            steps[1] += int(right.sum())
        return data.score(sde)(x, t)

    end = DPMSolverAdaptive(12, rtol=1e-3, atol=1e-3)(score, sde, x)

    assert bool(end[0] < 0) and bool(end[1] > 0)
    assert steps[0] > 1.1 * steps[1]


@per_sample
def test_time_of_the_trajectory_falls_from_noise_to_data(
    make: Callable[..., Sampler], mixture: GaussianMixture, seeded: SeededGenerator
) -> None:
    sde = VESDE()
    x = sde.prior_sample((4, 2), generator=seeded(0))
    states = list(make().trajectory(mixture.score(sde), sde, x, generator=seeded(1)))
    times = [t for t, _ in states]

    assert times[0] == sde.t_max and times[-1] == pytest.approx(sde.t_min, rel=1e-6)
    assert times == sorted(times, reverse=True)
    assert torch.equal(states[0][1], x)


@pytest.mark.parametrize("make", [DPMSolverAdaptive, AdaptiveSDE])
def test_per_sample_steps_work_on_discrete_models_too(make: Callable[..., Sampler]) -> None:
    sde, n = DiscreteSDE.geometric_sigmas(), 200
    generator = torch.Generator().manual_seed(0)
    x = sde.prior_sample((n, 3), generator=generator)

    z = (make()(three_widths().score(sde), sde, x, generator=generator) - 0.5).double()
    z = z / three_widths().variances.sqrt()

    assert float(z.mean(0).abs().max()) < 5 / math.sqrt(n) + 0.02
    assert float((z.var(0) - 1).abs().max()) < 5 * math.sqrt(2 / n) + 0.05


@per_sample
def test_nan_and_too_many_evaluations_say_where(
    make: Callable[..., Sampler], mixture: GaussianMixture, seeded: SeededGenerator
) -> None:
    sde, x = VPSDE(), torch.ones(3, 2)
    x[1] = -1

    def score(x: Tensor, t: Tensor) -> Tensor:
        gone = (t < 0.3) & (x[:, 0] < 0)
        return torch.where(gone[..., None], math.nan, mixture.score(sde)(x, t))

    with pytest.raises(SamplingError, match=r"the first of them between t = 0\.\d+ and 0\.[012]"):
        make()(score, sde, x, generator=seeded(0))
    with pytest.raises(SamplingError, match=r"not finished after \d+ evaluations.* at t = 0"):
        make(max_evaluations=12)(mixture.score(sde), sde, x, generator=seeded(0))
    with pytest.raises(ValueError, match="rtol to be a finite number >= 5.96.*got rtol=1e-10"):
        make(rtol=1e-10)(mixture.score(sde), sde, x)


# noise


def gaussian_moments(sampler: Sampler, sde: SDE, std: float, n: int) -> tuple[float, float]:
    """Errors of mean and variance of ``n`` samples of N(0, std²), in standard errors."""
    data, generator = Gaussian(torch.zeros(1), std), torch.Generator().manual_seed(3)
    x = data.sample(n, sde=sde, t=sde.t_max, generator=generator).double()
    z = sampler(data.score(sde), sde, x, generator=generator)
    level = sde.level(torch.tensor(sde.t_min, dtype=torch.float64))
    z = z / math.hypot(float(level.alpha) * std, float(level.sigma))
    return float(z.mean()) * math.sqrt(n), (float(z.var()) - 1) / math.sqrt(2 / n)


class Redrawn(KeptNoise):
    """What the published algorithm does: a step that is refused gets new noise."""

    def known(self, rows: Tensor) -> Tensor:
        return torch.full((len(rows),), -math.inf, dtype=torch.float64)

    def between(self, rows: Tensor, start: Tensor, end: Tensor) -> Tensor:
        self.depth[rows] = 0
        return super().between(rows, start, end)


class Redrawing(AdaptiveSDE):
    """AdaptiveSDE without memory."""

    def noise(self, x: Tensor, generator: torch.Generator) -> KeptNoise:
        return Redrawn(x, self.eta, generator)


def test_refused_steps_leave_the_law_of_the_noise_alone() -> None:
    """A fifth of the steps is refused here; with new noise for them the variance is 20 % off."""
    how, n = {"rtol": 0.02, "atol": 0.02, "denoise": False}, 6000
    mean, variance = gaussian_moments(AdaptiveSDE(**how), VPSDE(), 0.1, n)
    bias = 0.02 / math.sqrt(2 / n)  # that of the steps themselves, to the tolerance

    assert abs(mean) < 5 and abs(variance) < 5 + bias
    assert gaussian_moments(Redrawing(**how), VPSDE(), 0.1, n)[1] > 5 + bias


@pytest.mark.parametrize(("eta", "std"), [(0.3, 2.0), (1.0, 0.1), (1.0, 2.0), (2.0, 0.5)])
def test_adaptive_sde_reaches_mean_and_variance_at_any_amount_of_noise(
    eta: float, std: float, sde: SDE
) -> None:
    n, rtol = 1000, 0.05
    sampler = AdaptiveSDE(rtol, rtol, eta=eta, denoise=False)

    mean, variance = gaussian_moments(sampler, sde, std, n)

    assert abs(mean) < 5 + rtol * math.sqrt(n)
    assert abs(variance) < 5 + 2 * rtol / math.sqrt(2 / n)  # twice the error of the deviation


def test_adaptive_sde_finds_both_modes(
    mixture: GaussianMixture, seeded: SeededGenerator, assert_moments: Callable[..., None]
) -> None:
    sde, generator = VPSDE(), seeded(0)
    x = sde.prior_sample((2000, 2), generator=generator)

    x0 = AdaptiveSDE()(mixture.score(sde), sde, x, generator=generator)

    assert_moments(x0, mixture.mean(), mixture.variance(), bias=0.02)


@pytest.mark.parametrize("eta", [0.5, 2.0])
def test_noise_split_in_pieces_is_the_noise_of_the_whole_step(eta: float) -> None:
    """Asked for to -1, then to 0.5 and to -0.3 first: all pieces make up what was seen."""
    n, rows = 20_000, torch.arange(20_000)
    kept = KeptNoise(torch.zeros(n, dtype=torch.float64), eta, torch.Generator().manual_seed(0))

    def to(start: float, end: float) -> Tensor:
        return kept.between(
            rows, *(torch.full((n,), u, dtype=torch.float64) for u in (start, end))
        )

    def left(start: float, end: float) -> float:
        return ((1 + math.exp(2 * end)) / (1 + math.exp(2 * start))) ** (eta**2 / 2)

    whole = to(1.0, -1.0).clone()
    longer, first = to(1.0, -0.3).clone(), to(1.0, 0.5).clone()
    kept.forget(rows)
    assert bool((kept.known(rows) == -0.3).all())
    second = to(0.5, -0.3).clone()
    kept.forget(rows)
    third = to(-0.3, -1.0).clone()
    kept.forget(rows)

    assert bool((kept.known(rows) == -math.inf).all())
    assert_close(second + left(0.5, -0.3) * first, longer)
    assert_close(third + left(-0.3, -1.0) * longer, whole)
    pieces = torch.stack([first, second, third])
    stds = [math.sqrt(1 - left(*ends) ** 2) for ends in ((1, 0.5), (0.5, -0.3), (-0.3, -1))]
    normal = pieces / torch.tensor(stds, dtype=torch.float64)[:, None]
    # entries of a sample covariance have a variance of (1 + [on the diagonal]) / n
    assert_close(torch.cov(normal), torch.eye(3).double(), rtol=0, atol=5 * math.sqrt(2 / n))


def test_a_sample_draws_from_its_own_stream_and_only_when_it_steps() -> None:
    kept, alone = KeptNoise(torch.zeros(2, 3), 1.0, PerSample([4, 5])), PerSample([5])
    row, clock = torch.tensor([1]), torch.tensor([0.0], dtype=torch.float64)

    seen = kept.between(row, clock, clock - 1)
    kept.forget(row)
    again = kept.between(row, clock - 1, clock - 2)

    v = [1 - (1 + math.exp(2 * b)) / (1 + math.exp(2 * a)) for a, b in ((0, -1), (-1, -2))]
    for noise, variance in zip((seen, again), v, strict=True):
        assert_close(noise, math.sqrt(variance) * alone.randn((1, 3), torch.float32, noise.device))
    untouched = PerSample([4]).randn((1, 3), torch.float32, seen.device)
    assert_close(kept.between(row - 1, clock, clock - 1), math.sqrt(v[0]) * untouched)


@pytest.mark.parametrize("eta", [0.5, 1.0])
@pytest.mark.parametrize("name", PREDICTIONS)
def test_stochastic_heun_steps_have_weak_order_two_for_each_prediction(
    name: str, eta: float, sde: SDE
) -> None:
    """Variance of N(0, 1.5²) by the numbers of the steps alone, no Monte Carlo."""
    prediction, std = PREDICTIONS[name], 1.5

    def off(steps: int) -> float:
        u = torch.linspace(-0.5 * sde.log_snr_range()[0], -2.0, steps + 1, dtype=torch.float64)
        levels = sde.level(sde.time_at(-2 * u))
        now, nxt = (Level(*(c[part] for c in levels)) for part in (slice(0, -1), slice(1, None)))
        spread = (levels.alpha * std).square() + levels.sigma.square()
        p, q = prediction.of_score(levels)
        slope = p - q / spread  # the prediction is this times x
        kept, fresh = prediction.kept(now, nxt, eta), prediction.fresh(now, nxt, eta)
        weights = partial(polynomial_weights, prediction, now=now, nxt=nxt, eta=eta)
        frozen = kept + weights(u[:-1, None])[:, 0] * slope[:-1]
        end, start = weights(torch.stack([u[1:], u[:-1]], 1)).unbind(1)
        factor = kept + start * slope[:-1] + end * slope[1:] * frozen
        added = (fresh * (1 + end * slope[1:])).square()
        variance = spread[0]
        for a, b in zip(factor, added, strict=True):
            variance = a.square() * variance + b
        return abs(float(variance / spread[-1]) - 1)

    assert math.log2(off(400) / off(800)) > 1.8
