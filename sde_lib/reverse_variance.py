"""The variance of one reverse step: that of the posterior, of the forward step, or the best."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sde_lib.sde import Level


class ReverseVariance(ABC):
    """The variance v of one reverse step N(mean, v I) from a level to a less noisy one.

    The mean is that of q(x_s | x_t, x_0) at the denoised data, for an amount ``eta`` of fresh
    noise: 1 is DDPM's posterior, 0 DDIM.
    """

    @abstractmethod
    def __call__(self, earlier: Level, later: Level, eta: float = 1.0) -> Tensor:
        """v of the steps from ``later`` (noisier) to ``earlier``, in the shape of their fields."""

    def check(self, owner: str, eta: float) -> None:  # noqa: B027
        """Refuse an amount of fresh noise that this variance is not for."""


@dataclass(frozen=True)
class PosteriorVariance(ReverseVariance):
    r"""DDPM's small variance :math:`\tilde\beta`, that of x_s given x_t and x_0; times eta².

    The best one if the data is a single point, and the least that any data can ask for. It is
    also that of the maximum-likelihood SDE solver (Popov et al. 2022) without its trace term.
    """

    def __call__(self, earlier: Level, later: Level, eta: float = 1.0) -> Tensor:
        return posterior(earlier, later, eta)[0]


@dataclass(frozen=True)
class ForwardVariance(ReverseVariance):
    r"""DDPM's large variance, that of the forward transition in :math:`z = x / \sqrt{\alpha^2 +
    \sigma^2}`.

    .. math::  v = v_{t|s}\, \frac{\alpha_s^2 + \sigma_s^2}{\alpha_t^2 + \sigma_t^2}

    For a variance-preserving process this is :math:`v_{t|s}`, DDPM's beta. The factor says the
    same of every process: v is the variance of x_s given x_t if the data is N(0, I).
    """

    def check(self, owner: str, eta: float) -> None:
        """With less fresh noise the forward step says nothing of what is missing."""
        if eta != 1:
            raise ValueError(
                f"{owner} has the forward variance for eta=1 alone; got eta={eta:g}. Use "
                "variance=posterior, or an analytic one, which suits any eta."
            )

    def __call__(self, earlier: Level, later: Level, eta: float = 1.0) -> Tensor:
        _, variance = earlier.transition(later)
        shrink = torch.hypot(earlier.alpha, earlier.sigma) / torch.hypot(later.alpha, later.sigma)
        return variance * shrink.square()


@dataclass(frozen=True)
class AnalyticVariance(ReverseVariance):
    r"""The isotropic variance with the best bound; :func:`calibrate_variance` makes one.

    .. math::  v = \tilde\beta + c^2 \varrho_t^2\, \mathrm{unresolved}_t,
               \qquad \mathrm{unresolved} = E\|\varepsilon - \hat\varepsilon\|^2 / D

    with c the factor of x_0 in the mean: the mean squared distance of x_s from the model's mean,
    per dimension, for any eta. For the exact score ``unresolved`` is :math:`1 -
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

    clock: Tensor = field(repr=False)
    unresolved: Tensor = field(repr=False)
    decoder_std: float

    def __post_init__(self) -> None:
        fits = self.clock.ndim == 1 and self.clock.shape == self.unresolved.shape
        if not (fits and len(self.clock) > 1 and bool((self.clock.diff() > 0).all())):
            raise ValueError(
                "AnalyticVariance needs an increasing clock, two values at least, and as many of "
                f"unresolved; got {tuple(self.clock.shape)} and {tuple(self.unresolved.shape)}."
            )
        if not bool((torch.isfinite(self.unresolved) & (self.unresolved >= 0)).all()):
            raise ValueError("AnalyticVariance needs unresolved to be finite and >= 0.")

    def __call__(self, earlier: Level, later: Level, eta: float = 1.0) -> Tensor:
        variance, pull = posterior(earlier, later, eta)
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


def posterior(earlier: Level, later: Level, eta: float = 1.0) -> tuple[Tensor, Tensor]:
    r"""Variance of the fresh noise on the way from t to s, and the factor of x_0 in the mean.

    With :math:`r = v_{t|s} / \sigma_t^2` and a share q of the noise at s that is fresh, at eta = 1
    those of :math:`q(x_s | x_t, x_0)`:

    .. math::  \sigma_s^2 q, \qquad \alpha_s - \sqrt{1 - q}\,
               \frac{\sigma_s \alpha_t}{\sigma_t}
               = \alpha_s \left(1 - \sqrt{(1 - q)(1 - r)}\right)

    Up to eta = 1, :math:`q = \eta^2 r` as in DDIM. Beyond, that would exceed 1 in long steps:
    there :math:`q = 1 - (1 - r)^{\eta^2}`, which is as much of the noise as an
    Ornstein-Uhlenbeck process of eta² times the speed replaces; short steps tell no difference.

    Args:
        earlier: Level at s, the one with less noise.
        later: Level at t; fields of the same shape.
        eta: Amount of fresh noise, >= 0.
    """
    _, variance = earlier.transition(later)
    r = variance / later.sigma.square()
    q = eta**2 * r if eta <= 1 else -torch.expm1(eta**2 * torch.log1p(-r.clamp(max=1)))
    kept = ((1 - q) * (1 - r)).clamp(min=0).sqrt()
    pull = earlier.alpha * (q + r * (1 - q)) / (1 + kept)  # 1 - kept without cancellation
    return earlier.sigma.square() * q, pull


def named_variance(owner: str, variance: ReverseVariance | str) -> ReverseVariance:
    """The object of this name, or the one that was given.

    Raises:
        ValueError: Listing what there is, for ``owner``.
    """
    if isinstance(variance, ReverseVariance):
        return variance
    if not isinstance(variance, str) or variance not in VARIANCES:
        raise ValueError(
            f"{owner} needs variance to be one of {', '.join(sorted(VARIANCES))} or an "
            f"object; got variance={variance!r}. The analytic one comes from "
            "calibrate_variance(flow, x, steps=...), on the command line from mode=calibrate."
        )
    return VARIANCES[variance]
