"""Variational bounds on log p: of the reverse SDE in continuous time, and of T-step models."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from likelihood.dequantize import UniformDequantization
from sde_lib import validation
from sde_lib.counting import Counted
from sde_lib.grids import UniformLogSNR
from sde_lib.noise import Generator, rand, randn_like
from sde_lib.reverse import ProbabilityFlow, Score
from sde_lib.samplers.base import SamplingError
from sde_lib.sde import SDE, Level, expand_like


class Decoder(ABC):
    r"""The last factor of a bound, :math:`p(x | x_{t_{min}})`, from the denoised x0_hat.

    Left to itself its standard deviation is sigma/alpha at t_min: x_t / alpha misses x by exactly
    that, so the exact denoiser, being better, misses by at most that. The best one for a density
    is :attr:`AnalyticVariance.decoder_std`, how far x0_hat was found to miss.

    Attributes:
        std: Standard deviation in model units, > 0; sigma/alpha at t_min if None.
    """

    std: float | None

    def __post_init__(self) -> None:
        if self.std is not None:
            validation.real(type(self).__name__, "std", self.std, above=0)

    @abstractmethod
    def log_prob(self, x: Tensor, x0_hat: Tensor, level: Level) -> Tensor:
        """Log of p(x | x_t) in nats [B]; ``x``, ``x0_hat`` [B, ...] float64, ``level`` of []."""

    def check(self, x: Tensor) -> None:  # noqa: B027
        """Refuse ``x`` [B, ...] that this decoder cannot score, before anything is computed.

        Raises:
            ValueError: Saying what is wrong with ``x``.
        """

    def _scale(self, level: Level) -> Tensor | float:
        return level.noise_ratio if self.std is None else self.std


@dataclass(frozen=True)
class DensityDecoder(Decoder):
    r"""For continuous or dequantized x: the density :math:`N(x; \hat x_0, \mathrm{std}^2 I)`.

    Args:
        std: Standard deviation in model units, > 0; sigma/alpha at t_min if None.
    """

    std: float | None = None

    def log_prob(self, x: Tensor, x0_hat: Tensor, level: Level) -> Tensor:
        std = torch.as_tensor(self._scale(level)).to(x)
        square = ((x - x0_hat) / std).square().flatten(1).sum(1)
        return -0.5 * square - x[0].numel() * (std.log() + 0.5 * math.log(2 * math.pi))


@dataclass(frozen=True)
class BinDecoder(Decoder):
    r"""For K-level data: the mass that :math:`N(\hat x_0, \mathrm{std}^2 I)` has in the bin of x.

    The first and the last bin take the whole tail, so that the K masses add up to one. The bound
    is then one on the log-probability of the levels. Hand in bin centres, which give the tightest
    bound; dequantized points bound it as well, since the KL of a mixture is at most the mean of
    the KLs. Pictures scaled so that level v sits at v / 127.5 - 1 have ``low = -1 - 1 / 255`` and
    ``high = 1 + 1 / 255``.

    Reference: Ho et al., Denoising Diffusion Probabilistic Models, 2020, eq. 13.

    Args:
        bins: Where the levels are.
        std: Standard deviation in model units, > 0; sigma/alpha at t_min if None.
    """

    bins: UniformDequantization
    std: float | None = None

    def check(self, x: Tensor) -> None:
        low, high = self.bins.low, self.bins.high
        slack = 1e-3 * self.bins.bin_width  # float32 rounds an edge to either side of it
        if bool(((x < low - slack) | (x > high + slack)).any()):
            raise ValueError(
                f"BinDecoder needs x within its bins, [{low:g}, {high:g}]; got values from "
                f"{float(x.min()):g} to {float(x.max()):g}. Give bins with the low and high of "
                "the data, or use DensityDecoder() for continuous data."
            )

    def log_prob(self, x: Tensor, x0_hat: Tensor, level: Level) -> Tensor:
        bin_of = self.bins.decode(x).double()
        edge = self.bins.low + self.bins.bin_width * bin_of
        std = self._scale(level)
        below = (edge - x0_hat) / std
        above = (edge + self.bins.bin_width - x0_hat) / std
        below = below.masked_fill(bin_of == 0, -math.inf)
        above = above.masked_fill(bin_of == self.bins.levels - 1, math.inf)
        return log_normal_mass(below, above).flatten(1).sum(1)


def log_normal_mass(low: Tensor, high: Tensor) -> Tensor:
    r"""Log of the standard normal mass :math:`\Phi(high) - \Phi(low)`, low < high, elementwise.

    The interval is mirrored so that most of it lies below zero, where log Phi keeps its digits:
    :math:`\log\Phi(b) + \log(1 - e^{\log\Phi(a) - \log\Phi(b)})`. Either end may be infinite.
    """
    mirror = low + high > 0
    a, b = torch.where(mirror, -high, low), torch.where(mirror, -low, high)
    log_a, log_b = torch.special.log_ndtr(a), torch.special.log_ndtr(b)
    return log_b + torch.log(-torch.expm1(log_a - log_b))


class ReverseVariance(ABC):
    """The variance v of one reverse step N(mean, v I) of a T-step model."""

    @abstractmethod
    def __call__(self, earlier: Level, later: Level) -> Tensor:
        """v of the steps from ``later`` (noisier) to ``earlier``, in the shape of their fields."""


@dataclass(frozen=True)
class PosteriorVariance(ReverseVariance):
    r"""DDPM's small variance :math:`\tilde\beta`, that of x_s given x_t and x_0.

    The best one if the data is a single point, and the least that any data can ask for.
    """

    def __call__(self, earlier: Level, later: Level) -> Tensor:
        return posterior(earlier, later)[0]


@dataclass(frozen=True)
class ForwardVariance(ReverseVariance):
    r"""DDPM's large variance, that of the forward transition in :math:`z = x / \sqrt{\alpha^2 +
    \sigma^2}`.

    .. math::  v = v_{t|s}\, \frac{\alpha_s^2 + \sigma_s^2}{\alpha_t^2 + \sigma_t^2}

    For a variance-preserving process this is :math:`v_{t|s}`, DDPM's beta. The factor says the
    same of every process: v is the variance of x_s given x_t if the data is N(0, I).
    """

    def __call__(self, earlier: Level, later: Level) -> Tensor:
        _, variance = earlier.transition(later)
        shrink = torch.hypot(earlier.alpha, earlier.sigma) / torch.hypot(later.alpha, later.sigma)
        return variance * shrink.square()


@dataclass(frozen=True)
class AnalyticVariance(ReverseVariance):
    r"""The isotropic variance with the best bound; :func:`calibrate_variance` makes one.

    .. math::  v = \tilde\beta + c^2 \varrho_t^2\, \mathrm{unresolved}_t,
               \qquad \mathrm{unresolved} = E\|\varepsilon - \hat\varepsilon\|^2 / D

    with c the factor of x_0 in the posterior mean: the mean squared distance of x_s from the
    model's mean, per dimension. For the exact score ``unresolved`` is :math:`1 -
    E\|\hat\varepsilon\|^2 / D`, the form of Analytic-DPM; taken from the error itself, v is best
    for an inexact score as well. Between the calibrated clocks it is interpolated: a bound is
    flat around its best variance, so that a small error there costs its square.

    Reference: Bao et al., Analytic-DPM, 2022, theorem 1; Bao et al., Estimating the Optimal
    Covariance with Imperfect Mean in Diffusion Probabilistic Models, 2022.

    Args:
        clock: u = log(sigma/alpha), increasing, [N].
        unresolved: Mean squared noise error per dimension at these, >= 0, [N].
        decoder_std: Best standard deviation of a density decoder at the first, model units.
    """

    clock: Tensor
    unresolved: Tensor
    decoder_std: float

    def __call__(self, earlier: Level, later: Level) -> Tensor:
        variance, pull = posterior(earlier, later)
        share = self._unresolved_at(later.noise_ratio.log())
        return variance + (pull * later.noise_ratio).square() * share

    def _unresolved_at(self, u: Tensor) -> Tensor:
        clock, values = self.clock.to(u), self.unresolved.to(u)
        cell = (torch.searchsorted(clock, u.contiguous()) - 1).clamp(0, len(clock) - 2)
        part = (u - clock[cell]) / (clock[cell + 1] - clock[cell])
        return torch.lerp(values[cell], values[cell + 1], part.clamp(0, 1))


VARIANCES: dict[str, ReverseVariance] = {
    "posterior": PosteriorVariance(),
    "forward": ForwardVariance(),
}


def posterior(earlier: Level, later: Level) -> tuple[Tensor, Tensor]:
    r"""Variance of :math:`q(x_s | x_t, x_0)` and the factor of x_0 in its mean.

    .. math::  \tilde\beta = \frac{\sigma_s^2 v_{t|s}}{\sigma_t^2}, \qquad
               c = \frac{\alpha_s v_{t|s}}{\sigma_t^2}

    Args:
        earlier: Level at s, the one with less noise.
        later: Level at t; fields of the same shape.
    """
    _, variance = earlier.transition(later)
    ratio = variance / later.sigma.square()
    return earlier.sigma.square() * ratio, earlier.alpha * ratio


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
    start, end = _levels(flow.sde, [flow.sde.t_min, flow.sde.t_max], x).rows()
    width = (high - low) / samples
    edges = low + width * torch.arange(samples, dtype=torch.float64, device=x.device)
    rate = torch.stack([_rate(flow, score, x, edge, width, generator) for edge in edges])
    decoded = torch.stack(
        [_last(score, x, start, decoder, generator)[1] for _ in range(draws)]
    )  # [draws, B]
    variance = width**2 * strata_variance(rate) + _variance_of_mean(decoded)
    terms = torch.stack([_prior_term(flow.sde, x, end), width * rate.sum(0), decoded.mean(0)])
    _check_finite("continuous_bound", -terms.sum(0))
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
            :func:`calibrate_variance` returns.
        decoder: The last factor, at the first of the times.
        repeats: Whole passes over the levels, averaged; two or more tell the standard error.
        generator: Source of noise; a ``PerSample`` makes it independent of the batch.

    Raises:
        ValueError: If x is not a batch of finite numbers or not what the decoder can score, if
            the times do not increase, or if there is no variance of this name.
        SamplingError: If the score is not finite.
    """
    repeats = validation.count("discrete_bound", "repeats", repeats)
    _check("discrete_bound", flow, x, decoder)
    reverse_variance = _named_variance(variance)
    levels = _levels(flow.sde, _times("discrete_bound", flow.sde, steps, times), x)
    score = Counted(flow.score)
    passes = [_squares(score, x, levels, decoder, generator) for _ in range(repeats)]
    terms = torch.stack(
        [_terms(flow.sde, x, levels, reverse_variance, *one) for one in passes]
    )  # [repeats, T + 2, B]
    cost = terms.sum(1)
    _check_finite("discrete_bound", -cost.mean(0))
    distortion = torch.stack([squares for squares, _ in passes]).mean(0) / x[0].numel()
    return DiscreteBound(
        -cost.mean(0),
        _variance_of_mean(cost).sqrt(),
        terms.mean(0),
        distortion * levels.noise_ratio.flip(0)[:, None].square(),
        levels.t.flip(0),
        score.nfe,
    )


@torch.no_grad()
def calibrate_variance(
    flow: ProbabilityFlow,
    x: Tensor,
    *,
    steps: int | None = None,
    times: Tensor | None = None,
    generator: Generator = None,
) -> AnalyticVariance:
    r"""Measure the noise error at each level, once for all bounds to come.

    Args:
        flow: ``probability_flow(sde, score)``.
        x: Training samples in model units, [B, ...]; the more, the steadier the estimate.
        steps: T, even in log(sigma/alpha) from t_min to t_max; give this or ``times``.
        times: Increasing times in [t_min, t_max], [T + 1].
        generator: Source of noise.

    Raises:
        ValueError: If x is not a batch of finite numbers, or the times do not increase.
        SamplingError: If the score is not finite.
    """
    _check("calibrate_variance", flow, x, DensityDecoder())
    levels = _levels(flow.sde, _times("calibrate_variance", flow.sde, steps, times), x)
    unresolved = []
    for level in levels.rows():
        noise = randn_like(x, generator).double()
        unresolved.append(noise_error(flow.score, x, level, noise).square().mean())
    found = torch.stack(unresolved)
    _check_finite("calibrate_variance", found)
    best = levels.noise_ratio[0] * found[0].clamp(min=1e-6).sqrt()  # a std of 0 has no density
    return AnalyticVariance(levels.noise_ratio.log(), found, float(best))


@dataclass(frozen=True)
class RateDistortion:
    """What a progressive code would have sent and won at each level, averaged over samples.

    Attributes:
        rate: Bits per dimension sent by then, [T + 1], rising.
        rate_error: Standard error of ``rate`` over the samples, [T + 1].
        distortion: Root mean squared error of x0_hat by then, [T + 1].
        distortion_error: Its standard error over the samples, [T + 1].
        times: The levels, decreasing, [T + 1].
    """

    rate: Tensor
    rate_error: Tensor
    distortion: Tensor
    distortion_error: Tensor
    times: Tensor


def rate_distortion(bound: DiscreteBound, num_dims: int, unit: float = 1.0) -> RateDistortion:
    r"""Progressive coding: the rate of the terms so far against the error of x0_hat.

    Level i is known after the prior term and i steps. What the decoder term adds makes K-level
    data lossless; it is not on the curve.

    Reference: Ho et al., Denoising Diffusion Probabilistic Models, 2020, section 4.3.

    Args:
        bound: From :func:`discrete_bound`, of at least two samples for the errors.
        num_dims: D, numbers in one sample.
        unit: Data units in one model unit: 127.5 for pictures of 0 to 255 scaled to [-1, 1].

    Raises:
        ValueError: If ``num_dims`` is not a whole number >= 1 or ``unit`` not > 0.
    """
    num_dims = validation.count("rate_distortion", "num_dims", num_dims)
    unit = validation.real("rate_distortion", "unit", unit, above=0)
    rate = bound.terms[:-1].cumsum(0) / (num_dims * math.log(2))
    root = bound.distortion.mean(1).sqrt()
    error = _variance_of_mean(bound.distortion.T).sqrt() / (2 * root)  # of a root: half, relative
    return RateDistortion(
        rate.mean(1), _variance_of_mean(rate.T).sqrt(), unit * root, unit * error, bound.times
    )


@dataclass(frozen=True)
class Ordering:
    """Whether log p of the ODE >= ELBO >= VLB, from paired differences over samples, in nats.

    Attributes:
        ode_gap: Mean of the ODE's log p minus the ELBO.
        ode_gap_error: Its standard error.
        vlb_gap: Mean of the ELBO minus the VLB.
        vlb_gap_error: Its standard error.
        sigmas: Standard errors by which a gap may be negative.
    """

    ode_gap: float
    ode_gap_error: float
    vlb_gap: float
    vlb_gap_error: float
    sigmas: float

    @property
    def ode_above_elbo(self) -> bool:
        """Whether log p of the ODE >= ELBO within the allowance."""
        return self.ode_gap >= -self.sigmas * self.ode_gap_error

    @property
    def elbo_above_vlb(self) -> bool:
        """Whether ELBO >= VLB within the allowance."""
        return self.vlb_gap >= -self.sigmas * self.vlb_gap_error

    @property
    def holds(self) -> bool:
        """Whether both do."""
        return self.ode_above_elbo and self.elbo_above_vlb

    def __str__(self) -> str:
        rows = [
            ("ODE - ELBO", self.ode_gap, self.ode_gap_error, self.ode_above_elbo),
            ("ELBO - VLB", self.vlb_gap, self.vlb_gap_error, self.elbo_above_vlb),
        ]
        return "\n".join(
            f"{name} = {gap:.4g} +- {error:.2g} nats: "
            f"{'in order' if good else f'negative by more than {self.sigmas:g} standard errors'}"
            for name, gap, error, good in rows
        )


def ordered(ode: Tensor, elbo: Tensor, vlb: Tensor, *, sigmas: float = 3.0) -> Ordering:
    r"""Compare three log-probabilities [B] of the same samples, in nats and in one unit.

    What is to be expected, and why none of it is a theorem about one run:

    - The ELBO bounds log p of the reverse *SDE* with its decoder. The ODE has another density
      unless the score is exact; a learned score usually leaves the ODE above, but need not.
    - ``log_likelihood`` scores x as a sample at t_min, the bounds score it at t = 0: the
      difference, ``truncation`` of its result, must be small against the gap.
    - A T-step model has a likelihood of its own. Its bound tends to the ELBO as T grows, from
      below, in expectation, if the posterior variance is used and the error of x0_hat falls
      along the levels, as that of the exact score does. A better variance (analytic) can lift a
      T-step bound over the ELBO of an inexact score.

    Bring densities and masses to one unit first: a log-density in model units plus
    D log(bin_width) compares with a log-probability of levels.

    Args:
        ode: log p by the probability flow, [B].
        elbo: From :func:`continuous_bound`, [B].
        vlb: From :func:`discrete_bound`, [B].
        sigmas: Standard errors of the mean difference that count as none, >= 0.

    Raises:
        ValueError: If the three are not of one shape [B], B >= 2.
    """
    sigmas = validation.real("ordered", "sigmas", sigmas, at_least=0)
    shapes = [tuple(value.shape) for value in (ode, elbo, vlb)]
    if len(set(shapes)) > 1 or len(shapes[0]) != 1 or shapes[0][0] < 2:
        raise ValueError(
            "ordered needs three log-probabilities [B] of the same two or more samples; got "
            f"shapes {', '.join(map(str, shapes))}. Pass the log_prob of each result."
        )
    numbers = []
    for gap in (ode.double() - elbo.double(), elbo.double() - vlb.double()):
        numbers += [float(gap.mean()), float(_variance_of_mean(gap).sqrt())]
    return Ordering(*numbers, sigmas)


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
    state = expand_like(level.alpha, x) * x.double() + expand_like(level.sigma, x) * noise
    return noise - level.noise(score(state.to(x.dtype), level.t).double())


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


def _squares(
    score: Score, x: Tensor, levels: Level, decoder: Decoder, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Squared noise errors [T + 1, B] from the noisiest level down, and the decoder term [B]."""
    first, *others = levels.rows()
    squares = []
    for level in reversed(others):
        noise = randn_like(x, generator).double()
        squares.append(noise_error(score, x, level, noise).square().flatten(1).sum(1))
    square, decoder_term = _last(score, x, first, decoder, generator)
    return torch.stack([*squares, square]), decoder_term


def _terms(
    sde: SDE,
    x: Tensor,
    levels: Level,
    variance: ReverseVariance,
    squares: Tensor,
    decoder_term: Tensor,
) -> Tensor:
    """All costs [T + 2, B] of one pass, from its ``squares`` [T + 1, B]; ``levels`` increase."""
    falling = [field.flip(0) for field in levels]
    later, earlier = Level(*(f[:-1] for f in falling)), Level(*(f[1:] for f in falling))
    exact, pull = posterior(earlier, later)
    distance = (pull * later.noise_ratio).square()[:, None] * squares[:-1]
    steps = gaussian_kl(exact[:, None], variance(earlier, later)[:, None], distance, x[0].numel())
    prior = _prior_term(sde, x, levels.rows()[-1])
    return torch.cat([prior[None], steps, decoder_term[None]])


def gaussian_kl(variance: Tensor, other: Tensor, distance: Tensor, num_dims: int) -> Tensor:
    r"""KL of :math:`N(m, v I)` from :math:`N(m', v' I)`, nats, in the broadcast shape.

    .. math::  \tfrac D2 \left(\tfrac{v}{v'} - 1 - \log\tfrac{v}{v'}\right) +
               \frac{\|m - m'\|^2}{2 v'}

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


def _variance_of_mean(draws: Tensor) -> Tensor:
    """Variance [...] of the mean of ``draws`` [n, ...]; NaN for one."""
    if len(draws) < 2:
        return torch.full_like(draws[0], math.nan)
    return draws.var(0) / len(draws)


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


def _named_variance(variance: ReverseVariance | str) -> ReverseVariance:
    if callable(variance):
        return variance
    if variance not in VARIANCES:
        raise ValueError(
            f"discrete_bound needs variance to be one of {', '.join(sorted(VARIANCES))} or an "
            f"object; got variance={variance!r}. The analytic one comes from "
            "calibrate_variance(flow, x, steps=...)."
        )
    return VARIANCES[variance]


def _check(owner: str, flow: ProbabilityFlow, x: Tensor, decoder: Decoder) -> None:
    wanted = x.ndim >= 2 and x.numel() > 0 and x.dtype in (torch.float32, torch.float64)
    if not wanted or not bool(torch.isfinite(x).all()):
        raise ValueError(
            f"{owner} needs a batch [B, ...] of finite floating-point numbers, float32 or "
            f"float64; got shape {tuple(x.shape)}, {x.dtype}"
            f"{'' if torch.isfinite(x).all() else ', with NaN or infinity'}."
        )
    if flow.log_prior is not None:
        raise ValueError(
            f"{owner} has the prior term in closed form for the prior of the process, N(0, "
            "sigma(t_max)²); got a flow with log_prior. Use probability_flow(sde, score)."
        )
    decoder.check(x)


def _check_finite(owner: str, values: Tensor) -> None:
    """The one wait for the device, at the end."""
    bad = ~torch.isfinite(values)
    if bool(bad.any()):
        raise SamplingError(
            f"{owner}: {int(bad.sum())} of {len(bad)} values are not finite, the first at index "
            f"{int(bad.nonzero()[0])}; does the score function return NaN or infinity there?"
        )
