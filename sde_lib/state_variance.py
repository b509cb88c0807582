"""Reverse variances that depend on the state, one number for each of its coordinates."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar, Self

import torch
from torch import Tensor

from sde_lib.reverse_variance import (
    AtState,
    ForwardVariance,
    ReverseVariance,
    at_most,
    check_data_variance,
    posterior,
)
from sde_lib.sde import Level

Estimate = Callable[[Tensor, Tensor], Tensor]  # (x [B, ...], t [] or [B]) -> [B, ...]


class StateVariance(ReverseVariance):
    """A variance v(x_t) [B, ...] of the steps from x_t, which costs no evaluation of the score.

    A subclass lays out some :meth:`numbers` of its steps, and makes v of them in :meth:`at`.
    """

    of_state: ClassVar[bool] = True

    @abstractmethod
    def numbers(self, earlier: Level, later: Level, eta: float) -> tuple[Tensor, ...]:
        """What does not depend on the state, in the shape of the fields of the levels."""

    @abstractmethod
    def at(self, *numbers: Tensor, x: Tensor, level: Level, eps_hat: Tensor) -> Tensor:
        """v at ``x`` [B, ...] of one step, or of one a sample.

        Args:
            numbers: Of the step, [] or [B, 1, ...].
            x: The state at ``level``, the noisier one.
            level: Scalars [] or [B].
            eps_hat: The noise estimate there; v has its dtype.
        """

    def at_states(self, earlier: Level, later: Level, eta: float = 1.0) -> list[AtState]:
        """:meth:`at` for each of the steps."""
        rows = zip(*(column.unbind() for column in self.numbers(earlier, later, eta)), strict=True)
        return [partial(_at, self, row) for row in rows]


def _at(
    variance: StateVariance, row: tuple[Tensor, ...], x: Tensor, level: Level, eps_hat: Tensor
) -> Tensor:
    return variance.at(*row, x=x, level=level, eps_hat=eps_hat)


@dataclass(frozen=True)
class ResidualVariance(StateVariance):
    r"""The best diagonal variance around the model's mean, right or wrong (NPR-DPM).

    .. math::  v = \tilde\beta + c^2 \varrho_t^2\, \mathrm{unresolved}(x_t),
               \qquad \mathrm{unresolved} = E[(\varepsilon - \hat\varepsilon)^2 \,|\, x_t]

    by coordinate, with c the factor of x_0 in the mean. No other variance that is a function of
    x_t gives a better bound, whatever the mean: v is the mean squared distance of x_s from it.
    With the exact score the mean of a step, and the variance of each coordinate, are exact at any
    size; what coordinates have to do with each other is left out.

    Reference: Bao et al., Estimating the Optimal Covariance with Imperfect Mean in Diffusion
    Probabilistic Models, 2022.

    Args:
        estimate: (x [B, ...], t) -> unresolved [B, ...], >= 0. A trained head makes one
            (``score_models.variance_kinds``), a mixture has it in closed form
            (``GaussianMixture.noise_variance``).
        data_variance: Largest variance of a coordinate of x_0, model units squared, see
            :meth:`limited`; no limit if not given.
    """

    estimate: Estimate = field(repr=False)
    data_variance: float | None = None

    def __post_init__(self) -> None:
        check_data_variance(type(self).__name__, self.data_variance)

    def numbers(self, earlier: Level, later: Level, eta: float) -> tuple[Tensor, Tensor, Tensor]:
        """Variance of the fresh noise, c², and rho² at the noisier level."""
        variance, pull = posterior(earlier, later, eta)
        return variance, pull.square(), later.noise_ratio.square()

    def at(self, *numbers: Tensor, x: Tensor, level: Level, eps_hat: Tensor) -> Tensor:
        """v at ``x``, see the base class."""
        fresh, square, ratio = numbers
        of_data = ratio * self.unresolved(x, level, eps_hat)
        return fresh + square * at_most(of_data, self.data_variance)

    def unresolved(self, x: Tensor, level: Level, eps_hat: Tensor) -> Tensor:
        """E[(eps - eps_hat)² | x_t] [B, ...], in the dtype of ``eps_hat``."""
        return self.estimate(x, level.t).to(eps_hat.dtype)

    def limited(self, owner: str, data_variance: float) -> Self:
        """The same with this ``data_variance``."""
        return replace(self, data_variance=data_variance)


@dataclass(frozen=True)
class SecondMomentVariance(ResidualVariance):
    r"""The same from the second moment of the noise (SN-DPM): :math:`\mathrm{unresolved} =
    E[\varepsilon^2 | x_t] - \hat\varepsilon^2`, no less than 0.

    That is the variance of the noise given x_t if eps_hat is its mean; of an inexact score it
    misses by twice the error of the mean times eps_hat, and may be negative.

    Args:
        estimate: (x [B, ...], t) -> E[eps² | x_t] [B, ...].
        data_variance: See :class:`ResidualVariance`.
    """

    def unresolved(self, x: Tensor, level: Level, eps_hat: Tensor) -> Tensor:
        """Second moment less eps_hat², [B, ...]."""
        return (super().unresolved(x, level, eps_hat) - eps_hat.square()).clamp(min=0)


@dataclass(frozen=True)
class InterpolatedVariance(StateVariance):
    r"""Between DDPM's two, in the logarithm, by coordinate (improved DDPM); for eta = 1.

    .. math::  \log v = w \log v_{forward} + (1 - w) \log \tilde\beta

    Reference: Nichol and Dhariwal, Improved Denoising Diffusion Probabilistic Models, 2021,
    eq. 15.

    Args:
        estimate: (x [B, ...], t) -> w [B, ...]; beyond [0, 1] it extrapolates.
    """

    estimate: Estimate = field(repr=False)

    def check(self, owner: str, eta: float) -> None:
        """With less fresh noise there are no two ends to lie between."""
        ForwardVariance().check(owner, eta)

    def numbers(self, earlier: Level, later: Level, eta: float = 1.0) -> tuple[Tensor, Tensor]:
        """Logarithms of the posterior's variance, and of what the forward one is above it."""
        low = posterior(earlier, later)[0].log()
        return low, ForwardVariance()(earlier, later).log() - low

    def at(self, *numbers: Tensor, x: Tensor, level: Level, eps_hat: Tensor) -> Tensor:
        """v at ``x``, see the base class."""
        low, range_ = numbers
        return torch.exp(low + range_ * self.estimate(x, level.t).to(eps_hat.dtype))
