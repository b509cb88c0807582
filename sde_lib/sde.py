"""The forward process: four scalar functions of time, and everything that follows from them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from sde_lib.noise import Generator, randn


def expand_like(scalars: Tensor, x: Tensor) -> Tensor:
    """Append axes of length 1 so that per-sample ``scalars`` [] or [B] multiply ``x`` [B, ...]."""
    return scalars.reshape(scalars.shape + (1,) * (x.ndim - scalars.ndim))


class Level(NamedTuple):
    """The scalars of a process at one time, or at a row of times; all fields share one shape.

    Attributes:
        t: Time, in [t_min, t_max].
        alpha: Signal scale; x_t = alpha x_0 + sigma eps.
        sigma: Noise scale.
        drift_rate: f, where the drift is f(t) x.
        diffusion: g (not its square).
    """

    t: Tensor
    alpha: Tensor
    sigma: Tensor
    drift_rate: Tensor
    diffusion: Tensor

    @property
    def noise_ratio(self) -> Tensor:
        """The ratio rho = sigma / alpha, the noise scale of y = x / alpha."""
        return self.sigma / self.alpha

    @property
    def clock_rate(self) -> Tensor:
        r"""Speed of the clock, :math:`d \log\rho / dt = g^2 / (2 \sigma^2)`."""
        return 0.5 * (self.diffusion / self.sigma) ** 2

    def transition(self, later: Level) -> tuple[Tensor, Tensor]:
        r"""Factor a and variance v of the forward transition :math:`N(a x, v)` from here to
        ``later``.

        .. math::  a = \alpha' / \alpha, \qquad v = \sigma'^2 - a^2 \sigma^2
        """
        a = later.alpha / self.alpha
        variance = later.sigma**2 - (a * self.sigma) ** 2
        return a, variance.clamp(min=0)  # a tiny step may round below 0 in float32

    def like(self, x: Tensor) -> Level:
        """This level where ``x`` is, in its dtype; ``t`` stays float64, since clocks are steep."""
        return Level(self.t.to(x.device), *(c.to(x) for c in self[1:]))

    def rows(self) -> list[Level]:
        """A level of shape [N] as N levels of shape []."""
        return [Level(*scalars) for scalars in zip(*(c.unbind() for c in self), strict=True)]

    def expand_like(self, x: Tensor) -> Level:
        """The fields with trailing axes of length 1, so that they broadcast against ``x``."""
        return Level(*(expand_like(c, x) for c in self))

    def noise(self, score: Tensor) -> Tensor:
        r"""Noise estimate :math:`\hat\varepsilon = -\sigma s`, the expected noise given x_t."""
        return -expand_like(self.sigma, score) * score

    def denoised(self, x: Tensor, score: Tensor) -> Tensor:
        r"""Tweedie's formula: :math:`E[x_0 | x_t] = (x + \sigma^2 s) / \alpha`."""
        return (x + expand_like(self.sigma**2, x) * score) / expand_like(self.alpha, x)


class SDE(ABC):
    r"""An affine diffusion :math:`dx = f(t)\, x\, dt + g(t)\, dw` from data (t_min) to noise
    (t_max).

    A subclass states the signal scale alpha, the noise scale sigma, the drift rate f and the
    diffusion g; they must agree, :math:`f = (\log\alpha)'` and
    :math:`g^2 = (\sigma^2)' - 2 f \sigma^2`, which :func:`sde_lib.checks.check_sde` verifies.
    With only alpha and sigma at hand, use :class:`sde_lib.MarginalSDE`.

    Attributes:
        t_min: Smallest time, > 0, where training and integration stop.
        t_max: Largest time; there x_t is the prior :math:`N(0, \sigma(t_{max})^2)`, nearly.
    """

    t_min: float
    t_max: float

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Signal scale at ``t`` [...], in the shape of ``t``."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Noise scale at ``t`` [...], in the shape of ``t``."""

    @abstractmethod
    def drift_rate(self, t: Tensor) -> Tensor:
        """The factor f(t) of the drift f(t) x, in the shape of ``t``."""

    @abstractmethod
    def diffusion(self, t: Tensor) -> Tensor:
        """The diffusion g(t), not its square, in the shape of ``t``."""

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        """The drift f(t) x of the forward process; ``x`` [B, ...], ``t`` [] or [B]."""
        return expand_like(self.drift_rate(t).to(x.dtype), x) * x

    def marginal(self, x0: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [B, ...] and standard deviation (like ``t``) of x_t given ``x0`` [B, ...]."""
        return expand_like(self.alpha(t).to(x0.dtype), x0) * x0, self.sigma(t)

    def level(self, t: Tensor) -> Level:
        """All scalars at ``t``, in its shape and dtype."""
        return Level(t, self.alpha(t), self.sigma(t), self.drift_rate(t), self.diffusion(t))

    def log_snr(self, t: Tensor) -> Tensor:
        r"""Log signal-to-noise ratio :math:`\log(\alpha^2 / \sigma^2)`, falling in ``t``."""
        return 2 * (self.alpha(t).log() - self.sigma(t).log())

    def log_snr_range(self) -> tuple[float, float]:
        """The log SNR at t_max and at t_min: the smaller first."""
        ends = torch.tensor([self.t_max, self.t_min], dtype=torch.float64)
        low, high = self.log_snr(ends)
        return float(low), float(high)

    def time_at(self, log_snr: Tensor) -> Tensor:
        """The time at which the log SNR is ``log_snr``, its inverse, clamped to [t_min, t_max].

        The general answer: a table over log t, refined along the chord of the cell, each round of
        which divides the error by ten or more. A process with a closed form overrides it.
        """
        log_t, values = (column.to(log_snr.device) for column in self._clock_table)
        target = log_snr.double().clamp(values[-1], values[0])
        cell = (torch.searchsorted(-values, -target.contiguous()) - 1).clamp(0, len(values) - 2)
        low, high = log_t[cell], log_t[cell + 1]
        chord = (high - low) / (values[cell + 1] - values[cell])
        guess = low + chord * (target - values[cell])
        for _ in range(8):
            guess = (guess + chord * (target - self.log_snr(guess.exp()))).clamp(low, high)
        return self._clamp(guess.exp()).to(log_snr.dtype)

    @cached_property
    def _clock_table(self) -> tuple[Tensor, Tensor]:
        """log t and the log SNR there, 1025 rows, float64; made once: a process stays the same."""
        log_t = torch.linspace(
            math.log(self.t_min), math.log(self.t_max), 1025, dtype=torch.float64
        )
        return log_t, self.log_snr(log_t.exp())

    def _clamp(self, t: Tensor) -> Tensor:
        return t.clamp(self.t_min, self.t_max)

    def prior_std(self) -> float:
        """Standard deviation sigma(t_max) of the prior, which is Gaussian with mean zero."""
        return float(self.sigma(torch.tensor(self.t_max, dtype=torch.float64)))

    def prior_sample(
        self,
        shape: tuple[int, ...],
        *,
        generator: Generator = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Draw x at t_max from the prior N(0, sigma(t_max)²), ``shape`` [B, ...]."""
        return self.prior_std() * randn(shape, generator, device=device, dtype=dtype)

    def prior_log_prob(self, x: Tensor) -> Tensor:
        """Log-density of the prior at ``x`` [B, ...], in nats, [B]."""
        std = self.prior_std()
        x = x.reshape(len(x), -1)
        return -0.5 * (x / std).square().sum(1) - x.shape[1] * math.log(
            std * math.sqrt(2 * math.pi)
        )
