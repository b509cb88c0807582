"""The variance of one reverse step: that of the posterior, of the forward step, or the best."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar, Self

import torch
from torch import Tensor

from sde_lib import validation
from sde_lib.sde import Level

AtState = Callable[[Tensor, Level, Tensor], Tensor]


class ReverseVariance(ABC):
    """The variance v of one reverse step N(mean, v) from a level to a less noisy one.

    The mean is that of q(x_s | x_t, x_0) at the denoised data, for an amount ``eta`` of fresh
    noise: 1 is DDPM's posterior, 0 DDIM. One number a step is a :class:`ScalarVariance`, one
    for each coordinate of each state a :class:`sde_lib.state_variance.StateVariance`.

    Attributes:
        of_state: Whether v depends on the state; else a step is a table of numbers.
        adds: Whether noise remains where eta is 0.
        wanted: Name of what has to be found out about a model before there is a v; None if
            nothing has.
    """

    of_state: ClassVar[bool] = False
    adds: ClassVar[bool] = True
    wanted: str | None = None

    @property
    def _called(self) -> str:
        """What messages call it."""
        return type(self).__name__

    @abstractmethod
    def at_states(self, earlier: Level, later: Level, eta: float = 1.0) -> list[AtState]:
        """For each of N steps from ``later`` (noisier) to ``earlier``, fields [N], the function
        (x [B, ...], level, eps_hat [B, ...]) -> v, [] or like x; ``level`` is the noisier one."""

    def check(self, owner: str, eta: float) -> None:  # noqa: B027
        """Refuse an amount of fresh noise that this variance is not for."""

    def limited(self, owner: str, data_variance: float) -> ReverseVariance:
        r"""This variance, what it takes to be open of a coordinate of x_0 cut off at
        ``data_variance``.

        Given x_t a bounded coordinate of x_0 has a variance of at most a quarter of its range
        squared, 1 for data in [-1, 1], whatever was estimated.

        Raises:
            ValueError: If it takes nothing to be open.
        """
        raise ValueError(
            f"{owner} has data_variance={data_variance:g} to limit the part of a variance that is "
            f"there because x_0 is open, and {self._called} has no such part; leave it "
            "out, or use variance=analytic, npr or sn."
        )


class ScalarVariance(ReverseVariance):
    """One v for all coordinates and states of a step."""

    @abstractmethod
    def __call__(self, earlier: Level, later: Level, eta: float = 1.0) -> Tensor:
        """v of the steps from ``later`` (noisier) to ``earlier``, in the shape of their fields."""

    def at_states(self, earlier: Level, later: Level, eta: float = 1.0) -> list[AtState]:
        """The same v at every state."""
        return [partial(_same, v) for v in self(earlier, later, eta).unbind()]


def _same(v: Tensor, x: Tensor, level: Level, eps_hat: Tensor) -> Tensor:
    return v


@dataclass(frozen=True)
class Wanted(ReverseVariance):
    """A variance that has to be found out about a model first; until then it has no value.

    Args:
        name: Which one.
        mode: What finds it on the command line.
        only_eta: The one amount of fresh noise that it is for; None: any.
        limitable: Whether it will have a part for :meth:`limited` to limit.
    """

    name: str
    mode: str
    only_eta: float | None = None
    limitable: bool = True
    of_state: ClassVar[bool] = True  # it may turn out to be

    @property
    def wanted(self) -> str:
        """Its name."""
        return self.name

    @property
    def _called(self) -> str:
        return f"variance={self.name}"

    def check(self, owner: str, eta: float) -> None:
        """The one amount of fresh noise that it is for."""
        if self.only_eta not in (None, eta):
            raise ValueError(
                f"{owner} has the {self.name} variance for eta={self.only_eta:g} alone; got "
                f"eta={eta:g}. Use variance=analytic, npr or sn, which suit any eta."
            )

    def limited(self, owner: str, data_variance: float) -> ReverseVariance:
        """Itself, for what is found to be limited; refused at once if that cannot be."""
        return self if self.limitable else super().limited(owner, data_variance)

    def at_states(self, earlier: Level, later: Level, eta: float = 1.0) -> list[AtState]:
        """Refused.

        Raises:
            ValueError: Saying what finds it.
        """
        raise ValueError(
            f"variance={self.name} has to be found out about a model first: on the command line "
            f"by {self.mode}, in a program by calibrate_variance(flow, x, steps=...) (analytic), "
            "or from a trained head by KINDS[kind](analytic).variance(model, head) of "
            "score_models.variance_kinds (npr, sn, learned); pass what that returns."
        )


@dataclass(frozen=True)
class PosteriorVariance(ScalarVariance):
    r"""DDPM's small variance :math:`\tilde\beta`, that of x_s given x_t and x_0; up to eta = 1
    times eta².

    The best one if the data is a single point, and the least that any data can ask for. It is
    also that of the maximum-likelihood SDE solver (Popov et al. 2022) without its trace term.
    """

    adds: ClassVar[bool] = False

    def __call__(self, earlier: Level, later: Level, eta: float = 1.0) -> Tensor:
        return posterior(earlier, later, eta)[0]


@dataclass(frozen=True)
class ForwardVariance(ScalarVariance):
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


@dataclass(frozen=True, eq=False)  # two of them are the same if they are one object
class AnalyticVariance(ScalarVariance):
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
        data_variance: Largest variance of a coordinate of x_0, model units squared, see
            :meth:`limited`; no limit if not given.
    """

    clock: Tensor = field(repr=False)
    unresolved: Tensor = field(repr=False)
    decoder_std: float
    data_variance: float | None = None

    def __post_init__(self) -> None:
        fits = self.clock.ndim == 1 and self.clock.shape == self.unresolved.shape
        if not (fits and len(self.clock) > 1 and bool((self.clock.diff() > 0).all())):
            raise ValueError(
                "AnalyticVariance needs an increasing clock, two values at least, and as many of "
                f"unresolved; got {tuple(self.clock.shape)} and {tuple(self.unresolved.shape)}."
            )
        if not bool((torch.isfinite(self.unresolved) & (self.unresolved >= 0)).all()):
            raise ValueError("AnalyticVariance needs unresolved to be finite and >= 0.")
        check_data_variance("AnalyticVariance", self.data_variance)

    def __call__(self, earlier: Level, later: Level, eta: float = 1.0) -> Tensor:
        variance, pull = posterior(earlier, later, eta)
        ratio = later.noise_ratio
        of_data = ratio.square() * self.unresolved_at(ratio.log())
        return variance + pull.square() * at_most(of_data, self.data_variance)

    def limited(self, owner: str, data_variance: float) -> Self:
        """The same with this ``data_variance``."""
        return replace(self, data_variance=data_variance)

    def unresolved_at(self, u: Tensor) -> Tensor:
        """Mean squared noise error per dimension at clocks ``u`` [...], in their shape."""
        clock, values = self.clock.to(u), self.unresolved.to(u)
        cell = (torch.searchsorted(clock, u.contiguous()) - 1).clamp(0, len(clock) - 2)
        part = (u - clock[cell]) / (clock[cell + 1] - clock[cell])
        return torch.lerp(values[cell], values[cell + 1], part.clamp(0, 1))


VARIANCES: dict[str, ReverseVariance] = {
    "posterior": PosteriorVariance(),
    "forward": ForwardVariance(),
    "analytic": Wanted("analytic", "mode=calibrate"),
    "npr": Wanted("npr", "mode=train_variance mode.kind=npr"),
    "sn": Wanted("sn", "mode=train_variance mode.kind=sn"),
    "learned": Wanted("learned", "mode=train_variance mode.kind=learned", 1.0, limitable=False),
}


def at_most(of_data: Tensor, data_variance: float | None) -> Tensor:
    """The variance of x_0 cut off at ``data_variance``, if there is a limit."""
    return of_data if data_variance is None else of_data.clamp(max=data_variance)


def check_data_variance(owner: str, data_variance: float | None) -> None:
    """Refuse a limit that is no variance."""
    if data_variance is not None:
        validation.real(owner, "data_variance", data_variance, above=0)


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
            f"object; got variance={variance!r}."
        )
    return VARIANCES[variance]
