"""How training draws its times, and what each draw counts for."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from sde_lib import validation
from sde_lib.noise import Generator, rand, whole_batch
from sde_lib.sde import SDE, Level


@dataclass(frozen=True)
class TimeSampler(ABC):
    """Draws times in [t_min, t_max] and the importance of each.

    The importance is q(t) / p(t), with p the density of the draw and q the uniform one, so that
    the mean of importance times f(t) estimates the mean of f over uniform t. A sampler may state
    1 instead, and then says so: its distribution is part of the weighting.

    Args:
        stratified: Whether the n draws of a batch fall into n equal slices of probability, one
            each: still unbiased, less variance (Kingma et al., Variational Diffusion Models,
                2021).
    """

    caveat: ClassVar[str] = ""  # what a model so trained cannot do
    stratified: bool = True

    def __call__(self, sde: SDE, n: int, generator: Generator = None) -> tuple[Tensor, Tensor]:
        """Times and importances, both [n], float64."""
        return self.quantile(sde, probabilities(n, generator, self.stratified))

    @abstractmethod
    def quantile(self, sde: SDE, u: Tensor) -> tuple[Tensor, Tensor]:
        """Time at each probability ``u`` [n] in [0, 1), and its importance."""


def probabilities(n: int, generator: Generator, stratified: bool) -> Tensor:
    """Uniform numbers in [0, 1) for ``n`` rows of a batch, [n], float64.

    ``stratified`` puts one of the whole batch into each of its equal slices, in random order.
    """
    generator, size, rows = whole_batch(generator, n)
    u = rand((size,), generator, dtype=torch.float64)
    if stratified:
        order = rand((size,), generator, dtype=torch.float64).argsort()
        u = (order.double() + u) / size
    return u[rows]


@dataclass(frozen=True)
class UniformTimes(TimeSampler):
    """Uniform in t: every importance is 1."""

    def quantile(self, sde: SDE, u: Tensor) -> tuple[Tensor, Tensor]:
        return sde.t_min + u * (sde.t_max - sde.t_min), torch.ones_like(u)


@dataclass(frozen=True)
class OneLevel(TimeSampler):
    """One noise level for all: naive score matching, whose model knows the density there alone.

    Args:
        noise_ratio: sigma / alpha of the level, > 0, within the range of the process. Of data
            with alpha = 1 it is the standard deviation of the noise, in model units.
    """

    caveat: ClassVar[str] = (
        "trained at one noise level, this model has no score at any other: a likelihood, or "
        "samples that go through all levels, mean nothing; draw with sampler=langevin at sampler.t"
    )
    stratified: bool = field(default=False, init=False)
    noise_ratio: float = 0.3

    def __post_init__(self) -> None:
        validation.real("OneLevel", "noise_ratio", self.noise_ratio, above=0)

    def quantile(self, sde: SDE, u: Tensor) -> tuple[Tensor, Tensor]:
        log_snr = -2 * math.log(self.noise_ratio)
        low, high = sde.log_snr_range()
        if not low <= log_snr <= high:
            raise ValueError(
                f"OneLevel needs noise_ratio among those of {type(sde).__name__}, from "
                f"{math.exp(-0.5 * high):.3g} to {math.exp(-0.5 * low):.3g}; got noise_ratio="
                f"{self.noise_ratio:g}."
            )
        return sde.time_at(torch.full_like(u, log_snr)), torch.ones_like(u)


@dataclass(frozen=True)
class LogNormalSigma(TimeSampler):
    r"""log(sigma / alpha) normal, cut off at the ends of the process: EDM's training distribution.

    With ``reweight=False`` the importance is 1: the distribution *is* the weighting, as in EDM.

    Reference: Karras et al. 2022, table 1.

    Args:
        mean: Mean of log(sigma / alpha); -1.2 for images of standard deviation 0.5.
        std: Its standard deviation, > 0.
        reweight: Whether to undo the distribution by its importance.
    """

    mean: float = -1.2
    std: float = 1.2
    reweight: bool = False

    def __post_init__(self) -> None:
        validation.real("LogNormalSigma", "mean", self.mean)
        validation.real("LogNormalSigma", "std", self.std, above=0)

    def quantile(self, sde: SDE, u: Tensor) -> tuple[Tensor, Tensor]:
        low, high = sde.log_snr_range()
        normal = torch.distributions.Normal(
            torch.tensor(self.mean, dtype=torch.float64),
            torch.tensor(self.std, dtype=torch.float64),
        )
        first, last = normal.cdf(torch.tensor([-0.5 * high, -0.5 * low], dtype=torch.float64))
        if last - first < 1e-6:
            raise ValueError(
                f"LogNormalSigma(mean={self.mean:g}, std={self.std:g}) puts nearly "
                "nothing between the noise "
                f"ratios of {type(sde).__name__}, log(sigma/alpha) from "
                f"{-0.5 * high:.3g} to {-0.5 * low:.3g}."
            )
        log_rho = normal.icdf(first + u * (last - first)).clamp(-0.5 * high, -0.5 * low)
        t = sde.time_at(-2 * log_rho)
        if not self.reweight:
            return t, torch.ones_like(u)
        level = sde.level(t)
        density = normal.log_prob(log_rho).exp() / (last - first) * level.clock_rate
        return t, 1 / (density * (sde.t_max - sde.t_min))


@dataclass(frozen=True)
class ImportanceTimes(TimeSampler):
    r"""Draws t in proportion to :math:`\lambda(t) / \sigma(t)^2`, the size of the weighted loss.

    That loss is lambda / sigma² times the noise error, which is of order one: the maximum
    likelihood weighting explodes like 1 / t under uniform times and is flat under these. The
    distribution is inverted numerically, by a table over log(sigma / alpha), for any process and
    any weighting; the importance is that of the tabulated density, so the estimate is unbiased.
    For lambda = g² it comes out uniform in log SNR.

    Reference: Song et al., Maximum Likelihood Training of Score-Based Diffusion Models, 2021,
    section 4.4.

    Args:
        weight: lambda, the weighting that the loss uses.
        table: Number of cells, >= 16.
    """

    weight: Callable[[Level], Tensor] | None = None
    table: int = 1024

    def __post_init__(self) -> None:
        validation.count("ImportanceTimes", "table", self.table, at_least=16)
        if not callable(self.weight):
            raise ValueError(
                f"ImportanceTimes needs the weighting it draws for; got weight={self.weight!r}."
            )

    def quantile(self, sde: SDE, u: Tensor) -> tuple[Tensor, Tensor]:
        low, high = sde.log_snr_range()
        edges = torch.linspace(
            -0.5 * high, -0.5 * low, self.table + 1, dtype=torch.float64, device=u.device
        )
        centres = sde.level(sde.time_at(-edges[1:] - edges[:-1]))
        # lambda / sigma² dt = (lambda / sigma²) (2 sigma² / g²) d log rho
        mass = 2 * self.weight(centres) / centres.diffusion**2
        if not bool((torch.isfinite(mass) & (mass > 0)).all()):
            raise ValueError(
                f"ImportanceTimes needs a weighting > 0 on all of {type(sde).__name__}."
            )
        mass = mass / mass.sum()
        upper = mass.cumsum(0)
        cell = torch.searchsorted(upper, u.contiguous(), right=True).clamp(max=self.table - 1)
        within = (u - (upper[cell] - mass[cell])) / mass[cell]
        width = edges[1] - edges[0]
        t = sde.time_at(-2 * (edges[cell] + within.clamp(0, 1) * width))
        level = sde.level(t)
        density = mass[cell] / width * level.clock_rate
        return t, 1 / (density * (sde.t_max - sde.t_min))
