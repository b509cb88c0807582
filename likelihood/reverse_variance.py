"""The variance of one reverse step of a T-step model: posterior, forward, or the best one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from sde_lib.sde import Level


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


def named_variance(variance: ReverseVariance | str) -> ReverseVariance:
    """The object of this name, or the one that was given."""
    if callable(variance):
        return variance
    if variance not in VARIANCES:
        raise ValueError(
            f"discrete_bound needs variance to be one of {', '.join(sorted(VARIANCES))} or an "
            f"object; got variance={variance!r}. The analytic one comes from "
            "calibrate_variance(flow, x, steps=...)."
        )
    return VARIANCES[variance]
