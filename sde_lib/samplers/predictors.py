"""First-order stochastic samplers: three discretisations of the reverse SDE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sde_lib import validation
from sde_lib.reverse import Score
from sde_lib.samplers.base import Noise, OneStepSampler
from sde_lib.sde import Level


@dataclass(frozen=True)
class EulerMaruyama(OneStepSampler):
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

    def step(self, score: Score, x: Tensor, now: Level, nxt: Level, noise: Noise) -> Tensor:
        dt = (nxt.t - now.t).to(x)
        drift = now.drift_rate * x - 0.5 * (1 + self.eta**2) * now.diffusion**2 * score(x, now.t)
        x = x + drift * dt
        return x + self.eta * now.diffusion * torch.sqrt(-dt) * noise() if self.stochastic else x


@dataclass(frozen=True)
class ReverseDiffusion(OneStepSampler):
    r"""The reverse SDE discretised as the forward process is: one forward transition, reversed.

    The transition from the next level s up to t is :math:`N(a x, v)` with
    :math:`a = \alpha_t/\alpha_s` and :math:`v = \sigma_t^2 - a^2\sigma_s^2`, both exact, so that

    .. math::  x \leftarrow (2 - a)\, x + v\, s(x, t) + \sqrt{v}\, z

    never takes the root of a negative number, whatever the step. First order (weakly), one
    evaluation a step.

    Reference: Song et al. 2021, appendix E, with the exact transition in place of its first-order
    form.
    """

    order: ClassVar[int] = 1
    stochastic: ClassVar[bool] = True

    def step(self, score: Score, x: Tensor, now: Level, nxt: Level, noise: Noise) -> Tensor:
        a, v = nxt.transition(now)
        return (2 - a) * x + v * score(x, now.t) + v.sqrt() * noise()


@dataclass(frozen=True)
class Ancestral(OneStepSampler):
    r"""Draws from the posterior :math:`q(x_s | x_t, \hat x_0)`: DDPM at eta = 1, DDIM at eta = 0.

    .. math::  x_s = \alpha_s \hat x_0 + \sqrt{\sigma_s^2 - c^2}\, \hat\varepsilon + c z, \qquad
               c = \eta\, \sigma_s \sqrt{1 - \left(\frac{\alpha_t \sigma_s}{\alpha_s
               \sigma_t}\right)^2}

    First order, one evaluation a step. Exact, at any number of steps, when the data is one point.

    Reference: Ho et al. 2020, eq. 7; Song, Meng and Ermon, Denoising Diffusion Implicit Models,
    2021, eq. 12.

    Args:
        eta: Share of the posterior's standard deviation that is fresh noise, in [0, 1].
    """

    eta: float = 1.0
    order: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        validation.real(type(self).__name__, "eta", self.eta, at_least=0, at_most=1)

    @property
    def stochastic(self) -> bool:
        """Whether fresh noise enters."""
        return self.eta > 0

    def step(self, score: Score, x: Tensor, now: Level, nxt: Level, noise: Noise) -> Tensor:
        eps_hat = now.noise(score(x, now.t))
        x0_hat = (x - now.sigma * eps_hat) / now.alpha
        kept = nxt.noise_ratio / now.noise_ratio
        # standard deviation of the new noise; the rest of sigma is old
        fresh = self.eta * nxt.sigma * torch.sqrt(1 - kept**2)
        x = nxt.alpha * x0_hat + torch.sqrt(nxt.sigma**2 - fresh**2) * eps_hat
        return x + fresh * noise() if self.stochastic else x


@dataclass(frozen=True)
class DDIM(Ancestral):
    """:class:`Ancestral` without fresh noise by default: first order on the probability flow."""

    eta: float = 0.0
