"""Time reversal: the reverse SDEs, and the probability-flow ODE in coordinates for solvers."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sde_lib import validation
from sde_lib.rows import Rows, for_others, for_rows
from sde_lib.sde import SDE, Level, expand_like

Score = Callable[[Tensor, Tensor], Tensor]


def reverse(
    sde: SDE, score: Score, eta: float = 1.0
) -> tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor], Tensor]]:
    r"""The reverse-time process: run it from t_max down to t_min and noise becomes data.

    .. math::  dx = \left[ f(t)\,x - \tfrac{1 + \eta^2}{2}\, g(t)^2\, s(x, t) \right] dt + \eta\,
    g(t)\, d\bar w

    All eta share the marginals of the forward process: 1 is Anderson's reverse SDE, 0 the
    probability-flow ODE.

    Args:
        sde: The forward process.
        score: Score function (x [B, ...], t) -> [B, ...].
        eta: Amount of fresh noise, >= 0.

    Returns:
        ``drift(x, t)`` and ``diffusion(t)``; dt is negative along the way.
    """
    eta = validation.real("reverse", "eta", eta, at_least=0)

    def drift(x: Tensor, t: Tensor) -> Tensor:
        rate = 0.5 * (1 + eta**2) * sde.diffusion(t).square()
        return sde.drift(x, t) - expand_like(rate.to(x.dtype), x) * score(x, t)

    def diffusion(t: Tensor) -> Tensor:
        return eta * sde.diffusion(t)

    return drift, diffusion


@dataclass(frozen=True)
class ProbabilityFlow:
    r"""The ODE :math:`dx/dt = f x - \tfrac12 g^2 s` whose solutions have the marginals of the SDE.

    Calling it gives that velocity. Solvers use the same flow in other coordinates, in which
    every process looks alike and nothing is stiff: the clock :math:`u = \log(\sigma/\alpha)` and
    the state :math:`z = x / \sqrt{\alpha^2 + \sigma^2}`, which stays of order one, with

    .. math::  \frac{dz}{du} = \varsigma\, \hat\varepsilon - \varsigma^2 z,
               \qquad \varsigma = \frac{\sigma}{\sqrt{\alpha^2 + \sigma^2}}

    (from y = x/alpha, rho = sigma/alpha and dy/d rho = eps_hat).

    Args:
        sde: The forward process.
        score: Score function (x, t) -> score.
        log_prior: Log-density [B] at t_max, if it is known better than the process's own prior.
        t_start: Time at the data's end of the flow; t_min of the process if not given.

    Attributes:
        memory: What a likelihood has found out about this flow and need not find out again. A
            flow made by ``dataclasses.replace`` starts without it. It is not looked at whether
            weights behind the score have changed since: make a new flow then.
    """

    sde: SDE
    score: Score
    log_prior: Callable[[Tensor], Tensor] | None = None
    t_start: float | None = None
    memory: dict[Hashable, Any] = field(
        default_factory=dict, init=False, compare=False, repr=False
    )

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """Velocity dx/dt at ``x`` [B, ...] and ``t`` [] or [B]."""
        half_g2 = 0.5 * self.sde.diffusion(t).square()
        return self.sde.drift(x, t) - expand_like(half_g2.to(x.dtype), x) * self.score(x, t)

    def for_rows(self, rows: Rows) -> ProbabilityFlow:
        """The flow of the samples ``rows`` of the batch that the score function is for.

        A score function that treats all alike is for any batch, and so is its flow. The parts of
        one flow share its ``memory``, so that they share its pilot and no sample depends on where
        a batch was cut.
        """
        return self._with(for_rows(self.score, rows))

    def for_others(self, count: int) -> ProbabilityFlow:
        """The flow of ``count`` samples that are none of the batch: those of a pilot."""
        return self._with(for_others(self.score, count))

    def _with(self, score: Score) -> ProbabilityFlow:
        if score is self.score:
            return self
        part = replace(self, score=score)
        object.__setattr__(part, "memory", self.memory)
        return part

    def prior_log_prob(self, x: Tensor) -> Tensor:
        """Log-density [B] of the prior at the end of the flow."""
        return (self.log_prior or self.sde.prior_log_prob)(x)

    def clock_range(self) -> tuple[float, float]:
        """u at the data's end and at t_max (noise); the first is the smaller."""
        low, high = self.sde.log_snr_range()
        if self.t_start is not None:
            high = float(self.sde.log_snr(torch.tensor(self.t_start, dtype=torch.float64)))
        return -0.5 * high, -0.5 * low

    def level_at(self, clock: Tensor) -> Level:
        """The level at clock ``u`` [], in float64."""
        return self.sde.level(self.sde.time_at(-2 * clock.double()))

    def scale(self, level: Level) -> Tensor:
        """The norm sqrt(alpha² + sigma²) that turns x into z."""
        return torch.hypot(level.alpha, level.sigma)

    def noise_share(self, level: Level) -> Tensor:
        """The part of sigma in the norm, sigma / sqrt(alpha² + sigma²)."""
        return level.sigma / self.scale(level)

    def noise_part(self, z: Tensor, level: Level) -> Tensor:
        """The part of dz/du that asks the network, at ``z`` [B, ...] and one ``level`` of []."""
        scale, share = self.scale(level).to(z), self.noise_share(level).to(z)
        level = level.like(z)
        score = self.score(scale * z, level.t)
        if not isinstance(score, Tensor) or score.is_complex():
            kind = score.dtype if isinstance(score, Tensor) else type(score).__name__
            raise ValueError(
                f"the score function must return real numbers in the shape of x; got {kind}."
            )
        return share * level.noise(score.to(z.dtype))

    def scaled_velocity(self, z: Tensor, level: Level) -> Tensor:
        """dz/du at ``z`` [B, ...] and one ``level`` of scalars []."""
        return self.noise_part(z, level) - self.noise_share(level).to(z).square() * z


def probability_flow(
    sde: SDE, score: Score, *, log_prior: Callable[[Tensor], Tensor] | None = None
) -> ProbabilityFlow:
    """The flow that shares its marginals with ``sde``; see :class:`ProbabilityFlow`."""
    return ProbabilityFlow(sde, score, log_prior)
