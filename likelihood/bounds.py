"""Variational bounds on log p: of the reverse SDE in continuous time, and of T-step models."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from likelihood.checked import check_batch, check_finite
from likelihood.comparison import variance_of_mean
from likelihood.decoders import Decoder, DensityDecoder
from sde_lib import validation
from sde_lib.counting import Counted
from sde_lib.grids import UniformLogSNR
from sde_lib.memory import in_halves
from sde_lib.noise import Generator, rand, randn_like
from sde_lib.reverse import ProbabilityFlow, Score
from sde_lib.reverse_variance import (
    AnalyticVariance,
    ReverseVariance,
    named_variance,
    posterior,
)
from sde_lib.rows import for_rows
from sde_lib.sde import SDE, Level, expand_like


@dataclass(frozen=True)
class ContinuousBound:
    r"""A lower bound on log p of the reverse SDE, and the costs that it is made of.

    Everything is float64, in nats; ``log_prob`` is minus the sum of the three terms. It scores x
    itself, at t = 0; :func:`likelihood.log_likelihood` scores x as a sample at t_min.

    Attributes:
        log_prob: The bound, [B].
        standard_error: Of ``log_prob`` for these x, from the noise that was drawn, [B]; NaN with
            fewer than three ``samples`` or two ``decoder_samples``.
        prior_term: KL of q(x_T | x) from the prior, exact, [B].
        diffusion_term: Integral of ``rate`` over the clock, [B].
        decoder_term: :math:`-E \log p(x | x_{t_{min}})`, [B].
        nfe: Forward passes of the score function over the batch.
        clock: Middles of the strata of u = log(sigma/alpha), increasing, [N].
        rate: :math:`\|\varepsilon - \hat\varepsilon\|^2` in each stratum, nats per unit of u,
            [N, B]; each sample has its own u within the stratum.
    """

    log_prob: Tensor
    standard_error: Tensor
    prior_term: Tensor
    diffusion_term: Tensor
    decoder_term: Tensor
    nfe: int
    clock: Tensor
    rate: Tensor


@torch.no_grad()
def continuous_bound(
    flow: ProbabilityFlow,
    x: Tensor,
    *,
    samples: int = 64,
    decoder: Decoder = DensityDecoder(),
    decoder_samples: int = 4,
    generator: Generator = None,
) -> ContinuousBound:
    r"""Evidence lower bound of the reverse SDE (eta = 1) that starts from the prior.

    By Girsanov's theorem the path costs :math:`\tfrac12 \int g^2 E\|s - \nabla\log
    q(x_t|x)\|^2 dt`. With :math:`s = -\hat\varepsilon/\sigma`, :math:`\nabla\log q =
    -\varepsilon/\sigma` and :math:`du = g^2 / (2\sigma^2)\, dt` for u = log(sigma/alpha),

    .. math::  \log p(x) \ge -\mathrm{KL}(q(x_T | x)\,\|\,\pi)
               - \int_{u_{min}}^{u_{max}} E_\varepsilon \|\varepsilon -
               \hat\varepsilon(\alpha x + \sigma\varepsilon, t)\|^2 du
               + E \log p(x | x_{t_{min}})

    Each sample draws one u in each of ``samples`` equal strata, with fresh noise: u is uniform,
    which is t in proportion to :math:`g^2/\sigma^2`, and no part of the clock is missed. The
    bound is unbiased for any number of strata. The network sees alpha x + sigma eps in the dtype
    of x, all else is float64.

    With the exact score the gap is in closed form: :math:`E \log(q_T/\pi)(x_T)` plus
    :math:`E \log q(x|x_{t_{min}}) / p(x|x_{t_{min}})`, both given x.

    Reference: Song et al., Maximum Likelihood Training of Score-Based Diffusion Models, 2021,
    theorem 3; Kingma et al., Variational Diffusion Models, 2021.

    Args:
        flow: ``probability_flow(sde, score)``, with the prior of the process.
        x: Samples at t = 0 in model units, [B, ...], float32 or float64.
        samples: Strata of the clock, one evaluation each.
        decoder: The last factor; :class:`BinDecoder` for the probability of K-level data.
        decoder_samples: Draws of x at t_min, one evaluation each.
        generator: Source of u and noise; a ``PerSample`` makes them independent of the batch.

    Raises:
        ValueError: If x is not a batch of finite numbers, or not what the decoder can score.
        SamplingError: If the score is not finite.
    """
    samples = validation.count("continuous_bound", "samples", samples)
    draws = validation.count("continuous_bound", "decoder_samples", decoder_samples)
    _check("continuous_bound", flow, x, decoder)
    score, (low, high) = Counted(flow.score), flow.clock_range()
    first = flow.sde.t_min if flow.t_start is None else flow.t_start
    start, end = _levels(flow.sde, [first, flow.sde.t_max], x).rows()
    width = (high - low) / samples
    edges = low + width * torch.arange(samples, dtype=torch.float64, device=x.device)
    rate = torch.stack([_rate(flow, score, x, edge, width, generator) for edge in edges])
    decoded = torch.stack(
        [_last(score, x, start, decoder, generator)[1] for _ in range(draws)]
    )  # [draws, B]
    variance = width**2 * strata_variance(rate) + variance_of_mean(decoded)
    terms = torch.stack([_prior_term(flow.sde, x, end), width * rate.sum(0), decoded.mean(0)])
    check_finite("continuous_bound", terms.sum(0))
    return ContinuousBound(
        -terms.sum(0), variance.sqrt(), *terms, score.nfe, edges + 0.5 * width, rate
    )


def strata_variance(rate: Tensor) -> Tensor:
    r"""Variance of the sum of one draw a stratum, from ``rate`` [N, B], summed over strata, [B].

    .. math::  \mathrm{Var}\, r_i \approx (r_{i-1} - 2 r_i + r_{i+1})^2 / 6

    The sample variance over all strata would take the fall of the rate along the clock for noise,
    and first differences part of it; second differences cancel its slope and leave the noise, and
    where the rate bends within a few strata the estimate is on the large side. The first and the
    last stratum take over what their neighbours say. NaN with fewer than three strata.
    """
    if len(rate) < 3:
        return torch.full_like(rate[0], math.nan)
    bend = (rate[:-2] - 2 * rate[1:-1] + rate[2:]).square() / 6
    return bend.sum(0) + bend[0] + bend[-1]


@dataclass(frozen=True)
class DiscreteBound:
    r"""A lower bound on log p of a T-step model, term by term in the order of decoding.

    The model visits T + 1 noise levels in T steps; float64, nats.

    Attributes:
        log_prob: The bound, minus the sum of ``terms``, [B].
        standard_error: Of ``log_prob`` for these x, from the spread of whole repeats, [B]; NaN
            for one repeat.
        terms: Costs in the order of decreasing noise, [T + 2, B]: the prior, the T steps, the
            decoder.
        distortion: Mean squared error of x0_hat per dimension at each level, model units
            squared, in the same order, [T + 1, B]; row i is what the first i + 1 terms buy.
        times: The levels in the same order, so decreasing, [T + 1].
        nfe: Forward passes of the score function over the batch.
    """

    log_prob: Tensor
    standard_error: Tensor
    terms: Tensor
    distortion: Tensor
    times: Tensor
    nfe: int


@torch.no_grad()
def discrete_bound(
    flow: ProbabilityFlow,
    x: Tensor,
    *,
    steps: int | None = None,
    times: Tensor | None = None,
    variance: ReverseVariance | str = "posterior",
    decoder: Decoder = DensityDecoder(),
    repeats: int = 1,
    generator: Generator = None,
) -> DiscreteBound:
    r"""Variational bound of the T-step model with the mean of DDPM, for any affine process.

    With x0_hat in the place of x_0 in the mean of :math:`q(x_s | x_t, x_0) = N(\cdot,
    \tilde\beta)` and v as its variance, the step from t to s costs

    .. math::  \mathrm{KL} = \tfrac D2 \left(\tfrac{\tilde\beta}{v} - 1 -
               \log\tfrac{\tilde\beta}{v}\right) + \frac{c^2 \varrho_t^2}{2 v}
               \|\varepsilon - \hat\varepsilon\|^2

    where c is the factor of x_0 (:func:`posterior`). One noise sample a level makes each term
    unbiased. A model of T' levels as DDPM counts them, such as ``DiscreteSDE``, has T' - 1 steps:
    its decoder is the step from level 1.

    Reference: Ho et al., Denoising Diffusion Probabilistic Models, 2020, eq. 5 to 7.

    Args:
        flow: ``probability_flow(sde, score)``, with the prior of the process.
        x: Samples at t = 0 in model units, [B, ...], float32 or float64.
        steps: T, even in log(sigma/alpha) from t_min to t_max; give this or ``times``.
        times: Increasing times in [t_min, t_max], [T + 1].
        variance: Of the reverse steps: "posterior", "forward", or an object such as the one that
            :func:`calibrate_variance` returns; with one that depends on the state, v is that of
            each coordinate.
        decoder: The last factor, at the first of the times.
        repeats: Whole passes over the levels, averaged; two or more tell the standard error.
        generator: Source of noise; a ``PerSample`` makes it independent of the batch.

    Raises:
        ValueError: If x is not a batch of finite numbers or not what the decoder can score, if
            the times do not increase, or if there is no variance of this name.
        SamplingError: If the score is not finite.
    """
    return discrete_bounds(
        flow,
        x,
        {"": variance},
        steps=steps,
        times=times,
        decoder=decoder,
        repeats=repeats,
        generator=generator,
    )[""]


@torch.no_grad()
def discrete_bounds(
    flow: ProbabilityFlow,
    x: Tensor,
    variances: Mapping[str, ReverseVariance | str],
    *,
    steps: int | None = None,
    times: Tensor | None = None,
    decoder: Decoder = DensityDecoder(),
    repeats: int = 1,
    generator: Generator = None,
) -> dict[str, DiscreteBound]:
    """:func:`discrete_bound` under several ``variances`` by name, from the same forward passes.

    Nothing but the price of an error depends on the variance: the errors are shared.
    """
    repeats = validation.count("discrete_bound", "repeats", repeats)
    _check("discrete_bound", flow, x, decoder)
    if not variances:
        raise ValueError("discrete_bounds needs one variance or more by name; got none.")
    reverse = {
        name: named_variance("discrete_bound", variance) for name, variance in variances.items()
    }
    levels = _levels(flow.sde, _times("discrete_bound", flow.sde, steps, times), x)
    score = Counted(flow.score)
    passes = [_pass(score, x, levels, reverse, decoder, generator) for _ in range(repeats)]
    prior = _prior_term(flow.sde, x, levels.rows()[-1])
    return {name: _discrete(name, passes, prior, levels, x, score.nfe) for name in reverse}


class _Pass(NamedTuple):
    """One noise sample a level: squared errors [T + 1, B] from the noisiest level down, the cost
    of the steps [T, B] by variance, and the decoder term [B]."""

    squares: Tensor
    steps: dict[str, Tensor]
    decoder_term: Tensor


def _discrete(
    name: str, passes: list[_Pass], prior: Tensor, levels: Level, x: Tensor, nfe: int
) -> DiscreteBound:
    """The bound under one variance from all ``passes``."""
    terms = torch.stack(
        [torch.cat([prior[None], one.steps[name], one.decoder_term[None]]) for one in passes]
    )
    cost = terms.sum(1)  # [repeats, B]
    check_finite("discrete_bound", cost.mean(0))
    squares = torch.stack([one.squares for one in passes]).mean(0) / x[0].numel()
    return DiscreteBound(
        -cost.mean(0),
        variance_of_mean(cost).sqrt(),
        terms.mean(0),
        squares * levels.noise_ratio.flip(0)[:, None].square(),
        levels.t.flip(0),
        nfe,
    )


@torch.no_grad()
def calibrate_variance(
    flow: ProbabilityFlow,
    x: Tensor,
    *,
    steps: int | None = None,
    times: Tensor | None = None,
    generator: Generator = None,
    batch_size: int = 512,
) -> AnalyticVariance:
    r"""Measure the noise error at each level, once for all bounds to come.

    Args:
        flow: ``probability_flow(sde, score)``.
        x: Training samples in model units, [B, ...]; the more, the steadier the estimate.
        steps: T, even in log(sigma/alpha) from t_min to t_max; give this or ``times``.
        times: Increasing times in [t_min, t_max], [T + 1].
        generator: Source of noise.
        batch_size: Samples at once; halved where memory runs out. The result does not depend on
            it but for rounding.

    Raises:
        ValueError: If x is not a batch of finite numbers, or the times do not increase.
        SamplingError: If the score is not finite.
    """
    batch_size = validation.count("calibrate_variance", "batch_size", batch_size)
    _check("calibrate_variance", flow, x, DensityDecoder())
    levels = _levels(flow.sde, _times("calibrate_variance", flow.sde, steps, times), x)
    unresolved = []
    for level in levels.rows():
        noise = randn_like(x, generator).double()

        def square(rows: range, level: Level = level, noise: Tensor = noise) -> Tensor:
            some = slice(rows.start, rows.stop)
            error = noise_error(for_rows(flow.score, rows), x[some], level, noise[some])
            return error.square().flatten(1).mean(1)

        starts = range(0, len(x), batch_size)
        batches = (range(start, min(start + batch_size, len(x))) for start in starts)
        parts = [part for rows in batches for part in in_halves(square, rows)]
        unresolved.append(torch.cat(parts).mean())
    found = torch.stack(unresolved)
    check_finite("calibrate_variance", found, what="levels")
    best = levels.noise_ratio[0] * found[0].clamp(min=1e-6).sqrt()  # a std of 0 has no density
    return AnalyticVariance(levels.noise_ratio.log(), found, float(best))


def noise_error(score: Score, x: Tensor, level: Level, noise: Tensor) -> Tensor:
    r"""The error :math:`\varepsilon - \hat\varepsilon(\alpha x + \sigma\varepsilon, t)`, float64.

    Times sigma/alpha it is x0_hat - x, so every term of a bound is made of it. ``noise`` is
    compared as drawn, not as rounded: the bound is that of the score of the rounded state.

    Args:
        score: Score function (x [B, ...], t) -> [B, ...].
        x: Data [B, ...].
        level: Float64 scalars [] or [B].
        noise: Standard normal, like ``x``, float64.
    """
    return noise - noise_estimate(score, x, level, noise)[1]


def noise_estimate(score: Score, x: Tensor, level: Level, noise: Tensor) -> tuple[Tensor, Tensor]:
    """The state alpha x + sigma eps as the score saw it, and its eps_hat there, float64."""
    state = expand_like(level.alpha, x) * x.double() + expand_like(level.sigma, x) * noise
    state = state.to(x.dtype)
    return state, level.noise(score(state, level.t).double())


def _rate(
    flow: ProbabilityFlow,
    score: Score,
    x: Tensor,
    edge: Tensor,
    width: float,
    generator: Generator,
) -> Tensor:
    """Squared noise error [B] at one u a sample, uniform in the stratum above ``edge`` []."""
    u = edge + width * rand((len(x),), generator, dtype=torch.float64, device=x.device)
    noise = randn_like(x, generator).double()
    return noise_error(score, x, flow.level_at(u), noise).square().flatten(1).sum(1)


def _last(
    score: Score, x: Tensor, level: Level, decoder: Decoder, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Squared noise error and decoder term at the ``level`` with least noise, [B] each."""
    noise = randn_like(x, generator).double()
    error = noise_error(score, x, level, noise)
    x0_hat = x.double() + level.noise_ratio * error
    return error.square().flatten(1).sum(1), -decoder.log_prob(x.double(), x0_hat, level)


def _pass(
    score: Score,
    x: Tensor,
    levels: Level,
    reverse: Mapping[str, ReverseVariance],
    decoder: Decoder,
    generator: Generator,
) -> _Pass:
    """From the noisiest level down; ``levels`` increase."""
    falling = [field.flip(0) for field in levels]
    later, earlier = Level(*(f[:-1] for f in falling)), Level(*(f[1:] for f in falling))
    exact, pull = posterior(earlier, later)
    factor = (pull * later.noise_ratio).square()
    at = {name: variance.at_states(earlier, later) for name, variance in reverse.items()}
    squares, steps = [], {name: [] for name in reverse}
    for i, level in enumerate(later.rows()):
        noise = randn_like(x, generator).double()
        state, eps_hat = noise_estimate(score, x, level, noise)
        square = (noise - eps_hat).square()
        squares.append(square.flatten(1).sum(1))
        for name, variances in at.items():
            v = variances[i](state, level, eps_hat)
            cost = gaussian_kl(exact[i], v, factor[i] * square, 1)
            steps[name].append(cost.flatten(1).sum(1))
    square, decoder_term = _last(score, x, levels.rows()[0], decoder, generator)
    costs = {name: torch.stack(rows) for name, rows in steps.items()}
    return _Pass(torch.stack([*squares, square]), costs, decoder_term)


def gaussian_kl(variance: Tensor, other: Tensor, distance: Tensor, num_dims: int) -> Tensor:
    r"""KL of :math:`N(m, v I)` from :math:`N(m', v' I)`, nats, in the broadcast shape.

    .. math::  \tfrac D2 \left(\tfrac{v}{v'} - 1 - \log\tfrac{v}{v'}\right) +
               \frac{\|m - m'\|^2}{2 v'}

    With D = 1 and one distance for each coordinate, that of each coordinate: v' may differ then.

    Args:
        variance: v.
        other: v'.
        distance: Squared distance of the means.
        num_dims: D.
    """
    excess = variance / other - 1
    return 0.5 * num_dims * (excess - torch.log1p(excess)) + 0.5 * distance / other


def _prior_term(sde: SDE, x: Tensor, level: Level) -> Tensor:
    """KL [B] of q(x_t | x) at ``level`` of [] from the prior of the process."""
    prior = torch.as_tensor(sde.prior_std() ** 2).to(level.sigma)
    distance = level.alpha.square() * x.double().square().flatten(1).sum(1)
    return gaussian_kl(level.sigma.square(), prior, distance, x[0].numel())


def _levels(sde: SDE, times: Tensor | list[float], x: Tensor) -> Level:
    """The levels at ``times`` [N], float64, where ``x`` is."""
    return sde.level(torch.as_tensor(times, dtype=torch.float64, device=x.device))


def _times(owner: str, sde: SDE, steps: int | None, times: Tensor | None) -> Tensor:
    """Increasing times [T + 1], float64, checked."""
    if (steps is None) == (times is None):
        raise ValueError(f"{owner} needs either steps or times; got {steps=}, {times=}.")
    if times is None:
        return UniformLogSNR()(sde, validation.count(owner, "steps", steps)).flip(0)
    times = torch.as_tensor(times, dtype=torch.float64)
    row = times.ndim == 1 and len(times) > 1
    inside = row and sde.t_min <= float(times[0]) and float(times[-1]) <= sde.t_max
    if not inside or not bool((times.diff() > 0).all()):
        raise ValueError(
            f"{owner} needs times [T + 1] that increase within [{sde.t_min:g}, {sde.t_max:g}], "
            f"at least two; got shape {tuple(times.shape)}, {times.flatten()[:4].tolist()}... "
            "The times of a sampler decrease: flip them."
        )
    return times


def _check(owner: str, flow: ProbabilityFlow, x: Tensor, decoder: Decoder) -> None:
    check_batch(owner, x)
    if flow.log_prior is not None:
        raise ValueError(
            f"{owner} has the prior term in closed form for the prior of the process, N(0, "
            "sigma(t_max)²); got a flow with log_prior. Use probability_flow(sde, score)."
        )
    decoder.check(x)
