"""The processes of the field: each four scalar functions of time, stated in its docstring."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sde_lib import validation
from sde_lib.sde import SDE


def _check_times(owner: str, t_min: float, t_max: float) -> None:
    validation.real(owner, "t_min", t_min, above=0.0)
    validation.real(owner, "t_max", t_max, above=0.0)
    if t_min >= t_max:
        raise ValueError(
            f"{owner} needs t_min < t_max, since time runs from data to noise; "
            f"got t_min={t_min:g}, t_max={t_max:g}."
        )


@dataclass(frozen=True)
class LinearBetaSDE(SDE):
    r"""What VP and sub-VP share: the drift :math:`-\tfrac12\beta(t)x` with beta linear in time.

    With :math:`B(t) = \int_0^t \beta`, the signal scale is :math:`\alpha = e^{-B/2}`.

    Args:
        beta_min: Noise rate at t = 0, per unit time.
        beta_max: Noise rate at t = 1.
        t_min: Where training and integration stop, > 0.
        t_max: Where the prior takes over.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min: float = 1e-5
    t_max: float = 1.0

    def __post_init__(self) -> None:
        owner = type(self).__name__
        validation.real(owner, "beta_min", self.beta_min)
        validation.real(owner, "beta_max", self.beta_max)
        if not 0 < self.beta_min < self.beta_max:
            raise ValueError(
                f"{owner} needs 0 < beta_min < beta_max so that noise is added at an "
                "increasing rate; "
                f"got beta_min={self.beta_min:g}, beta_max={self.beta_max:g}."
            )
        _check_times(owner, self.t_min, self.t_max)

    def beta(self, t: Tensor) -> Tensor:
        """Noise rate beta_min + t (beta_max - beta_min), in the shape of ``t``."""
        return self.beta_min + t * (self.beta_max - self.beta_min)

    def integrated_beta(self, t: Tensor) -> Tensor:
        """B(t), the integral of beta from 0 to ``t``."""
        return t * (self.beta_min + 0.5 * t * (self.beta_max - self.beta_min))

    def _time_of_integrated_beta(self, integral: Tensor) -> Tensor:
        slope = self.beta_max - self.beta_min
        root = torch.sqrt(self.beta_min**2 + 2 * slope * integral)
        return self._clamp(
            2 * integral / (self.beta_min + root)
        )  # this form does not cancel near t = 0

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(-0.5 * self.integrated_beta(t))

    def drift_rate(self, t: Tensor) -> Tensor:
        return -0.5 * self.beta(t)


@dataclass(frozen=True)
class VPSDE(LinearBetaSDE):
    r"""Variance-preserving SDE: the signal decays as fast as noise comes in.

    .. math::  dx = -\tfrac12 \beta(t)\, x\, dt + \sqrt{\beta(t)}\, dw,
               \qquad \beta(t) = \beta_{min} + t\,(\beta_{max} - \beta_{min})

    Writing B(t) for the integral of beta, the marginals are
    :math:`\alpha = e^{-B/2}` and :math:`\sigma^2 = 1 - e^{-B}`, so
    :math:`\alpha^2 + \sigma^2 = 1`: data of unit variance keeps unit variance.

    Reference: Song et al., Score-Based Generative Modeling through SDEs, 2021, eq. 11 and 33.

    Args:
        beta_min: Noise rate at t = 0, per unit time.
        beta_max: Noise rate at t = 1; with 20, alpha(1) is 0.7 %.
        t_min: Where training and integration stop, > 0; sigma(1e-5) is 0.001.
        t_max: Where the prior takes over.
    """

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(
            -torch.expm1(-self.integrated_beta(t))
        )  # expm1: 1 - e^-B is 0 in fp32 near t = 0

    def diffusion(self, t: Tensor) -> Tensor:
        return self.beta(t).sqrt()

    def time_at(self, log_snr: Tensor) -> Tensor:
        return self._time_of_integrated_beta(F.softplus(-log_snr))  # snr = 1 / (e^B - 1)


@dataclass(frozen=True)
class SubVPSDE(LinearBetaSDE):
    r"""Sub-variance-preserving SDE: the drift of VP with less noise, so better likelihoods.

    .. math::  dx = -\tfrac12 \beta(t)\, x\, dt + \sqrt{\beta(t)\,(1 - e^{-2B(t)})}\, dw

    The marginals are :math:`\alpha = e^{-B/2}` and :math:`\sigma = 1 - e^{-B}`: the
    *standard deviation* is what VP has as its variance. Near t = 0 the noise ratio grows like t
    and not like its root, so t_min reaches 1e-6 in sigma where VP reaches 1e-3.

    Reference: Song et al., Score-Based Generative Modeling through SDEs, 2021, eq. 28 and 29.

    Args:
        beta_min: Drift rate at t = 0, per unit time.
        beta_max: Drift rate at t = 1.
        t_min: Where training and integration stop, > 0; sigma(1e-5) is 1e-6.
        t_max: Where the prior takes over.
    """

    def sigma(self, t: Tensor) -> Tensor:
        return -torch.expm1(-self.integrated_beta(t))

    def diffusion(self, t: Tensor) -> Tensor:
        return torch.sqrt(-self.beta(t) * torch.expm1(-2 * self.integrated_beta(t)))

    def time_at(self, log_snr: Tensor) -> Tensor:
        return self._time_of_integrated_beta(
            2 * torch.asinh(0.5 * torch.exp(-0.5 * log_snr))
        )  # rho = 2 sinh(B/2)


@dataclass(frozen=True)
class VESDE(SDE):
    r"""Variance-exploding SDE: the signal stays, geometrically growing noise drowns it.

    .. math::  dx = \sigma(t) \sqrt{2 \log(\sigma_{max}/\sigma_{min})}\, dw,
               \qquad \sigma(t) = \sigma_{min} (\sigma_{max}/\sigma_{min})^t, \quad \alpha = 1

    The prior N(0, sigma_max²) neglects the data's own variance: its error is of order
    (data scale / sigma_max)². The rule of thumb for sigma_max is the largest distance between two
    data points (Song and Ermon, Improved Techniques for Training Score-Based Models, 2020).

    Reference: Song et al., Score-Based Generative Modeling through SDEs, 2021, eq. 9 and 30.

    Args:
        sigma_min: Noise scale at t = 0, in units of the data.
        sigma_max: Noise scale at t = 1.
        t_min: Where training and integration stop, > 0.
        t_max: Where the prior takes over.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    t_min: float = 1e-5
    t_max: float = 1.0

    def __post_init__(self) -> None:
        _check_sigmas("VESDE", self.sigma_min, self.sigma_max)
        _check_times("VESDE", self.t_min, self.t_max)

    @property
    def log_ratio(self) -> float:
        """log(sigma_max / sigma_min)."""
        return math.log(self.sigma_max / self.sigma_min)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_min * torch.exp(t * self.log_ratio)

    def drift_rate(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def diffusion(self, t: Tensor) -> Tensor:
        return self.sigma(t) * math.sqrt(2 * self.log_ratio)

    def time_at(self, log_snr: Tensor) -> Tensor:
        return self._clamp((-0.5 * log_snr - math.log(self.sigma_min)) / self.log_ratio)


@dataclass(frozen=True)
class EDMSDE(SDE):
    r"""The process whose time *is* its noise scale: sigma(t) = t, alpha = 1.

    .. math::  dx = \sqrt{2t}\, dw, \qquad t_{min} = \sigma_{min}, \quad t_{max} = \sigma_{max}

    Its probability flow has straight lines as solutions far from the data, which makes few-step
    solvers good.

    Reference: Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models,
    2022.

    Args:
        sigma_min: Smallest noise scale and smallest time.
        sigma_max: Largest noise scale and largest time.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        _check_sigmas("EDMSDE", self.sigma_min, self.sigma_max)

    @property
    def t_min(self) -> float:
        """Smallest time, sigma_min."""
        return self.sigma_min

    @property
    def t_max(self) -> float:
        """Largest time, sigma_max."""
        return self.sigma_max

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return t.clone()

    def drift_rate(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def diffusion(self, t: Tensor) -> Tensor:
        return torch.sqrt(2 * t)

    def time_at(self, log_snr: Tensor) -> Tensor:
        return self._clamp(torch.exp(-0.5 * log_snr))


@dataclass(frozen=True)
class CosineSDE(SDE):
    r"""Variance-preserving process with the cosine schedule: noise comes in evenly.

    .. math::  \alpha(t) = \frac{\cos a(t)}{\cos a(0)}, \qquad
               a(t) = \frac{\pi}{2} \frac{t + s}{1 + s}, \qquad \sigma^2 = 1 - \alpha^2

    The drift rate is :math:`-a' \tan a` and :math:`g^2 = 2 a' \tan a`, which diverges at t = 1;
    t_max stops short of it, where alpha is 0.8 %.

    Reference: Nichol and Dhariwal, Improved Denoising Diffusion Probabilistic Models, 2021, eq.
    17.

    Args:
        offset: s above; keeps the first steps from being too small.
        t_min: Where training and integration stop, > 0.
        t_max: Where the prior takes over, < 1.
    """

    offset: float = 0.008
    t_min: float = 1e-5
    t_max: float = 0.9946

    def __post_init__(self) -> None:
        validation.real("CosineSDE", "offset", self.offset, above=0.0)
        _check_times("CosineSDE", self.t_min, self.t_max)
        validation.real("CosineSDE", "t_max", self.t_max, below=1.0)

    @property
    def _rate(self) -> float:
        return math.pi / 2 / (1 + self.offset)

    def angle(self, t: Tensor) -> Tensor:
        """a(t), from a(0) > 0 to a(1) = pi / 2."""
        return self._rate * (t + self.offset)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.cos(self.angle(t)) / math.cos(self._rate * self.offset)

    def sigma(self, t: Tensor) -> Tensor:
        # cos² a(0) - cos² a as a product: the difference would cancel near t = 0
        product = torch.sin(self._rate * t) * torch.sin(self.angle(t + self.offset))
        return torch.sqrt(product) / math.cos(self._rate * self.offset)

    def drift_rate(self, t: Tensor) -> Tensor:
        return -self._rate * torch.tan(self.angle(t))

    def diffusion(self, t: Tensor) -> Tensor:
        return torch.sqrt(2 * self._rate * torch.tan(self.angle(t)))

    def time_at(self, log_snr: Tensor) -> Tensor:
        x = log_snr.double()  # a - a(0) is a small difference
        start = self._rate * self.offset
        cos2, sin2 = math.cos(start) ** 2, math.sin(start) ** 2
        angle = torch.atan2(
            torch.sqrt(sin2 + cos2 * torch.sigmoid(-x)), torch.sqrt(cos2 * torch.sigmoid(x))
        )
        return self._clamp((angle - start) / self._rate).to(log_snr.dtype)


@dataclass(frozen=True)
class MarginalSDE(SDE):
    r"""A process given by its marginals alone; drift and diffusion are derived.

    .. math::  f = \frac{d}{dt}\log\alpha, \qquad g^2 = \sigma^2\,
    \frac{d}{dt}\log\frac{\sigma^2}{\alpha^2}

    The derivatives are exact (forward-mode differentiation of the two functions).

    Args:
        alpha_of: Signal scale, a differentiable function of a tensor of times, element by element.
        sigma_of: Noise scale, likewise; sigma / alpha must increase.
        t_min: Where training and integration stop, > 0.
        t_max: Where the prior takes over.
    """

    alpha_of: Callable[[Tensor], Tensor]
    sigma_of: Callable[[Tensor], Tensor]
    t_min: float = 1e-5
    t_max: float = 1.0

    def __post_init__(self) -> None:
        _check_times(type(self).__name__, self.t_min, self.t_max)
        low, high = self.log_snr_range()
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(
                f"{type(self).__name__} needs a log SNR that falls from t_min to "
                "t_max, both finite; "
                f"got {high:g} at t_min={self.t_min:g} and {low:g} at t_max={self.t_max:g}."
            )

    def alpha(self, t: Tensor) -> Tensor:
        return self.alpha_of(t)

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_of(t)

    def drift_rate(self, t: Tensor) -> Tensor:
        rate = torch.func.jvp(lambda s: self.alpha(s).log(), (t,), (torch.ones_like(t),))[1]
        return rate.to(t.dtype)  # the derivative of a float32 scalar [] comes back as float64

    def diffusion(self, t: Tensor) -> Tensor:
        rate = torch.func.jvp(self.log_snr, (t,), (torch.ones_like(t),))[1]
        return self.sigma(t) * torch.sqrt(-rate.to(t.dtype))


def _check_sigmas(owner: str, sigma_min: float, sigma_max: float) -> None:
    validation.real(owner, "sigma_min", sigma_min, above=0.0)
    validation.real(owner, "sigma_max", sigma_max, above=0.0)
    if sigma_min >= sigma_max:
        raise ValueError(
            f"{owner} needs sigma_min < sigma_max, since noise grows with time; "
            f"got sigma_min={sigma_min:g}, sigma_max={sigma_max:g}."
        )
