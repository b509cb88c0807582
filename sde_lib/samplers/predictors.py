"""First-order stochastic samplers: three discretisations of the reverse SDE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sde_lib import validation
from sde_lib.reverse_variance import ReverseVariance, named_variance, posterior
from sde_lib.samplers.base import LinearSampler
from sde_lib.sde import SDE, Level


@dataclass(frozen=True)
class EulerMaruyama(LinearSampler):
    r"""Euler-Maruyama on the reverse SDE; with eta = 0, Euler on the probability flow.

    .. math::  x \leftarrow x + \left[f x - \tfrac{1+\eta^2}{2} g^2 s\right] \Delta t + \eta g
    \sqrt{|\Delta t|}\, z

    First order in mean (weakly), one evaluation a step. The least assuming and the least accurate.

    Reference: Song et al. 2021, section 4.1.

    Args:
        eta: Amount of fresh noise: 1 is the reverse SDE, 0 the probability flow.
    """

    eta: float = 1.0
    order: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        validation.real("EulerMaruyama", "eta", self.eta, at_least=0)

    @property
    def stochastic(self) -> bool:
        """Whether fresh noise enters."""
        return self.eta > 0

    def coefficients(self, now: Level, nxt: Level) -> tuple[Tensor, Tensor, Tensor]:
        dt = nxt.t - now.t
        pull = -0.5 * (1 + self.eta**2) * now.diffusion**2 * dt
        return 1 + now.drift_rate * dt, pull, self.eta * now.diffusion * torch.sqrt(-dt)


@dataclass(frozen=True)
class ReverseDiffusion(LinearSampler):
    r"""The reverse SDE discretised as the forward process is: one forward transition, reversed.

    The transition from the next level s up to t is :math:`N(a x, v)` with
    :math:`a = \alpha_t/\alpha_s` and :math:`v = \sigma_t^2 - a^2\sigma_s^2`, both exact, so that

    .. math::  x \leftarrow (2 - a)\, x + \tfrac{1+\eta^2}{2} v\, s(x, t) + \eta \sqrt{v}\, z

    never takes the root of a negative number, whatever the step. First order (weakly), one
    evaluation a step.

    Reference: Song et al. 2021, appendix E, with the exact transition in place of its first-order
    form.

    Args:
        eta: Amount of fresh noise: 1 is the reverse SDE, 0 the probability flow.
    """

    eta: float = 1.0
    order: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        validation.real("ReverseDiffusion", "eta", self.eta, at_least=0)

    @property
    def stochastic(self) -> bool:
        """Whether fresh noise enters."""
        return self.eta > 0

    def coefficients(self, now: Level, nxt: Level) -> tuple[Tensor, Tensor, Tensor]:
        a, v = nxt.transition(now)
        return 2 - a, 0.5 * (1 + self.eta**2) * v, self.eta * v.sqrt()


@dataclass(frozen=True)
class Ancestral(LinearSampler):
    r"""Draws from the posterior :math:`q(x_s | x_t, \hat x_0)`: DDPM at eta = 1, DDIM at eta = 0.

    .. math::  x_s = \alpha_s \hat x_0 + \sqrt{\sigma_s^2 - c^2}\, \hat\varepsilon + \sqrt v\, z,
               \qquad c = \eta\, \sigma_s \sqrt{1 - \left(\frac{\alpha_t \sigma_s}{\alpha_s
               \sigma_t}\right)^2}

    (c for eta up to 1; :func:`sde_lib.reverse_variance.posterior` goes on beyond it.)

    First order, one evaluation a step. The variance v is a choice: c², which is exact at any
    number of steps when the data is one point (DDPM's small one, and at eta = 1 the
    maximum-likelihood SDE solver); DDPM's large one; or the best for this model (Analytic-DPM and
    Analytic-DDIM), which adds to c² what is left open of x_0. Fewer steps, more to gain.

    Reference: Ho et al. 2020, eq. 7; Song, Meng and Ermon, Denoising Diffusion Implicit Models,
    2021, eq. 12; Bao et al., Analytic-DPM, 2022, theorem 1; Popov et al. 2022, theorem 1.

    Args:
        eta: Fresh noise, in units of the posterior's standard deviation: 0 is DDIM, 1 DDPM, more
            is possible.
        variance: posterior, forward, or what ``likelihood.calibrate_variance`` returns;
            ``analytic`` stands for the one that mode=calibrate has stored.
        last_std: Largest standard deviation of the noise of the last step of a trajectory, in
            units of the model, which nothing takes off again; no limit if not given.
    """

    eta: float = 1.0
    variance: ReverseVariance | str = "posterior"
    last_std: float | None = None
    order: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        owner = type(self).__name__
        validation.real(owner, "eta", self.eta, at_least=0)
        if self.last_std is not None:
            validation.real(owner, "last_std", self.last_std, at_least=0)
        if self.variance != "analytic":
            named_variance(owner, self.variance).check(owner, self.eta)

    @property
    def stochastic(self) -> bool:
        """Whether fresh noise enters."""
        return self.eta > 0 or self.variance != "posterior"

    def check(self, sde: SDE, dtype: torch.dtype = torch.float32) -> None:
        """The grid; the analytic variance is asked for when a model is there."""
        if self.variance != "analytic":
            self.plan(sde)

    def coefficients(self, now: Level, nxt: Level) -> tuple[Tensor, Tensor, Tensor]:
        variance = named_variance(type(self).__name__, self.variance)
        fresh, pull = posterior(nxt, now, self.eta)
        old = torch.sqrt(nxt.sigma**2 - fresh) / now.sigma
        std = variance(nxt, now, self.eta).sqrt()
        if self.last_std is not None and std.ndim:
            std = torch.cat([std[:-1], std[-1:].clamp(max=self.last_std)])
        return pull / now.alpha + old, pull * now.sigma**2 / now.alpha, std


@dataclass(frozen=True)
class DDIM(Ancestral):
    """:class:`Ancestral` without fresh noise by default: first order on the probability flow."""

    eta: float = 0.0
