"""First-order stochastic samplers: three discretisations of the reverse SDE."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from sde_lib import validation
from sde_lib.reverse import Score
from sde_lib.reverse_variance import (
    AtState,
    ReverseVariance,
    check_data_variance,
    named_variance,
    posterior,
)
from sde_lib.samplers.base import LinearSampler, Noise, Plan, Step, affine
from sde_lib.sde import SDE, Level


@dataclass(frozen=True)
class ReverseStep(LinearSampler):
    """A step of the reverse SDE, first order, with any amount of fresh noise.

    Args:
        eta: 1 is the reverse SDE, 0 the probability flow.
    """

    eta: float = 1.0
    order: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        validation.real(type(self).__name__, "eta", self.eta, at_least=0)

    @property
    def stochastic(self) -> bool:
        """Whether fresh noise enters."""
        return self.eta > 0


@dataclass(frozen=True)
class EulerMaruyama(ReverseStep):
    r"""Euler-Maruyama on the reverse SDE; with eta = 0, Euler on the probability flow.

    .. math::  x \leftarrow x + \left[f x - \tfrac{1+\eta^2}{2} g^2 s\right] \Delta t + \eta g
    \sqrt{|\Delta t|}\, z

    First order in mean (weakly), one evaluation a step. The least assuming and the least accurate.

    Reference: Song et al. 2021, section 4.1.

    Args:
        eta: Amount of fresh noise: 1 is the reverse SDE, 0 the probability flow.
    """

    def coefficients(self, now: Level, nxt: Level) -> tuple[Tensor, Tensor, Tensor]:
        dt = nxt.t - now.t
        pull = -0.5 * (1 + self.eta**2) * now.diffusion**2 * dt
        return 1 + now.drift_rate * dt, pull, self.eta * now.diffusion * torch.sqrt(-dt)


@dataclass(frozen=True)
class ReverseDiffusion(ReverseStep):
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
    Analytic-DDIM), which adds to c² what is left open of x_0, on average or in each coordinate of
    the state at hand (NPR-DPM, SN-DPM). Fewer steps, more to gain; what is added keeps a path
    from its limit by the root of a step, so that the order is of the law alone.

    Reference: Ho et al. 2020, eq. 7; Song, Meng and Ermon, Denoising Diffusion Implicit Models,
    2021, eq. 12; Bao et al., Analytic-DPM, 2022, theorem 1; Popov et al. 2022, theorem 1.

    Args:
        eta: Fresh noise: 0 is DDIM, 1 DDPM, in between the share of the posterior's standard
            deviation; more is possible, but for the forward and the learned variance.
        variance: posterior, forward, or an object: what ``likelihood.calibrate_variance``
            returns, or a :class:`sde_lib.state_variance.StateVariance`. ``analytic`` stands for
            the one that mode=calibrate has stored, ``npr``, ``sn`` and ``learned`` for those of
            mode=train_variance.
        last_std: Largest standard deviation of the noise of the last step of a trajectory, in
            units of the model, which nothing takes off again; no limit if not given. A
            :meth:`step` by itself is any step, and not limited.
        data_variance: Largest variance of a coordinate of x_0, in units of the model squared,
            that a step may take to be open; Analytic-DPM has 1 for data in [-1, 1]. No limit if
            not given.
    """

    eta: float = 1.0
    variance: ReverseVariance | str = "posterior"
    last_std: float | None = None
    data_variance: float | None = None
    order: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        owner = type(self).__name__
        validation.real(owner, "eta", self.eta, at_least=0)
        if self.last_std is not None:
            validation.real(owner, "last_std", self.last_std, at_least=0)
        check_data_variance(owner, self.data_variance)
        self._reverse().check(owner, self.eta)

    @property
    def stochastic(self) -> bool:
        """Whether fresh noise enters."""
        return self.eta > 0 or self._reverse().adds

    @property
    def wanted(self) -> frozenset[str]:
        """What the grid and the variance want."""
        return super().wanted | ({self._reverse().wanted} - {None})

    def given(self, found: Mapping[str, Any]) -> Ancestral:
        """This sampler with the grid and the variance that it wanted."""
        name, sampler = self._reverse().wanted, super().given(found)
        return sampler if name is None else replace(sampler, variance=found[name])

    def coefficients(self, now: Level, nxt: Level) -> tuple[Tensor, Tensor, Tensor]:
        a, b = self._mean(now, nxt)
        return a, b, self._reverse()(nxt, now, self.eta).sqrt()

    def moves(self, now: Level, nxt: Level, most: float = math.inf) -> list[Step]:
        """The steps from ``now`` to ``nxt``, their noise of a standard deviation of ``most`` at
        most."""
        reverse = self._reverse()
        if reverse.of_state:
            columns = (column.tolist() for column in self._mean(now, nxt))
            rows = zip(*columns, reverse.at_states(nxt, now, self.eta), strict=True)
            return [partial(_spread, most, *row) for row in rows]
        rows = zip(*(column.tolist() for column in self.coefficients(now, nxt)), strict=True)
        return [partial(affine, a, b, min(c, most)) for a, b, c in rows]

    def plan(self, sde: SDE) -> Plan:
        """The steps, the noise of the last one limited."""
        plan = super().plan(sde)
        if self.last_std is not None:
            if type(self).step is not LinearSampler.step:
                raise ValueError(
                    f"{type(self).__name__} has a step of its own, which last_std cannot limit; "
                    "leave it out."
                )
            rows = (Level(*(c[part] for c in plan.levels)) for part in (slice(-2, -1), [-1]))
            (move,) = self.moves(*rows, most=self.last_std)
            plan.moves[-1] = (move, *plan.moves[-1][1:])
        return plan

    def _mean(self, now: Level, nxt: Level) -> tuple[Tensor, Tensor]:
        """Factors of the state and of the score in the mean."""
        fresh, pull = posterior(nxt, now, self.eta)
        old = torch.sqrt(nxt.sigma**2 - fresh) / now.sigma
        return pull / now.alpha + old, pull * now.sigma**2 / now.alpha

    def _reverse(self) -> ReverseVariance:
        owner = type(self).__name__
        reverse = named_variance(owner, self.variance)
        return (
            reverse if self.data_variance is None else reverse.limited(owner, self.data_variance)
        )


def _spread(
    most: float,
    a: float,
    b: float,
    variance: AtState,
    score: Score,
    x: Tensor,
    now: Level,
    nxt: Level,
    noise: Noise,
) -> Tensor:
    """A step whose noise has a variance of its own in each coordinate; one evaluation."""
    s = score(x, now.t)
    std = variance(x, now, now.noise(s)).sqrt().clamp(max=most)
    return torch.add(x * a, s, alpha=b).addcmul_(std, noise())


@dataclass(frozen=True)
class DDIM(Ancestral):
    """:class:`Ancestral` without fresh noise by default: first order on the probability flow."""

    eta: float = 0.0
