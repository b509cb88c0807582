"""Where a sampler steps: decreasing times from t_max to t_min, laid out evenly in some clock."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sde_lib import validation
from sde_lib.sde import SDE


class Grid(ABC):
    """A rule that lays out the times of a sampler."""

    def __call__(self, sde: SDE, steps: int) -> Tensor:
        """``steps + 1`` strictly decreasing times from t_max to t_min, float64.

        Raises:
            ValueError: If the rule yields times that do not decrease, or that leave [t_min,
                t_max].
        """
        fractions = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        times = self.times(sde, fractions)
        times[0], times[-1] = sde.t_max, sde.t_min  # free of rounding
        return checked(self, times, sde, steps)

    @abstractmethod
    def times(self, sde: SDE, fractions: Tensor) -> Tensor:
        """Times at ``fractions`` [N] of the way, 0 = noise (t_max), 1 = data (t_min)."""


def checked(grid: object, times: Tensor, sde: SDE, steps: int) -> Tensor:
    """``times`` of ``grid``, float64 on the CPU, if a sampler of so many ``steps`` can take them.

    Raises:
        ValueError: If there are not ``steps + 1``, or they do not decrease strictly within
            [t_min, t_max].
    """
    asked = (
        f"strictly decrease from t_max={sde.t_max:g} to t_min={sde.t_min:g} in {steps} steps; use "
        "fewer steps or another grid."
    )
    if not isinstance(times, Tensor) or times.shape != (steps + 1,):
        got = tuple(times.shape) if isinstance(times, Tensor) else type(times).__name__
        raise ValueError(f"{grid} must give {steps + 1} times that {asked} Got {got}.")
    times = times.detach().double().cpu()
    falls = bool((times.diff() < 0).all()) and sde.t_min <= times[-1] and times[0] <= sde.t_max
    if not falls:
        shown = ", ".join(f"{t:.4g}" for t in times[:6].tolist()) + ", ..." * (steps > 5)
        raise ValueError(f"{grid} gives times that do not {asked} Got {shown}")
    return times


@dataclass(frozen=True)
class UniformTime(Grid):
    """Even steps in t (Song et al. 2021); for EDM, whose t is sigma, prefer :class:`Karras`."""

    def times(self, sde: SDE, fractions: Tensor) -> Tensor:
        return sde.t_max + fractions * (sde.t_min - sde.t_max)


@dataclass(frozen=True)
class UniformLogSNR(Grid):
    """Even steps in log SNR, clock of exponential integrators (Lu et al., DPM-Solver, 2022)."""

    def times(self, sde: SDE, fractions: Tensor) -> Tensor:
        low, high = sde.log_snr_range()
        return sde.time_at(low + fractions * (high - low))


@dataclass(frozen=True)
class Karras(Grid):
    r"""Even steps in :math:`\varrho^{1/p}`, :math:`\varrho = \sigma/\alpha` (Karras et al. 2022,
    eq. 5).

    Args:
        power: p; large p spends more steps near the data, infinity would be
            :class:`UniformLogSNR`.
    """

    power: float = 7.0

    def __post_init__(self) -> None:
        validation.real("Karras", "power", self.power, above=0)

    def times(self, sde: SDE, fractions: Tensor) -> Tensor:
        low, high = (
            torch.tensor(-0.5 * end / self.power, dtype=torch.float64).exp()
            for end in sde.log_snr_range()
        )
        return sde.time_at(-2 * self.power * torch.log(low + fractions * (high - low)))


@dataclass(frozen=True)
class Quadratic(Grid):
    """Even steps in the root of t: DDIM's choice for CIFAR-10, finer near the data."""

    def times(self, sde: SDE, fractions: Tensor) -> Tensor:
        return (sde.t_max**0.5 + fractions * (sde.t_min**0.5 - sde.t_max**0.5)).square()


@dataclass(frozen=True)
class Subsequence(Grid):
    """Times that a T-step model was trained at: those of its levels nearest to another grid's
    times.

    Both ends are kept, so that the sequence always starts at T.

    Args:
        grid: Which times to round to levels; even in t if not given.
    """

    grid: Grid = UniformTime()

    def times(self, sde: SDE, fractions: Tensor) -> Tensor:
        num_levels = getattr(sde, "num_levels", None)
        if num_levels is None:
            raise ValueError(
                "Subsequence picks levels of a T-step model (DiscreteSDE), and "
                f"{type(sde).__name__} has none; "
                "use another grid, or sde=ddpm or sde=ncsn."
            )
        if len(fractions) > num_levels:
            raise ValueError(
                f"Subsequence cannot pick {len(fractions)} different levels out of {num_levels}; "
                f"use at most {num_levels - 1} steps."
            )
        wanted = (self.grid.times(sde, fractions) * num_levels).round().long().clamp(1, num_levels)
        return sde.times_of(_strictly_decreasing(wanted))


@dataclass(frozen=True)
class FittedGrid(Grid):
    """Steps as dense as was found right for a model; :func:`sde_lib.samplers.fitted_grid` makes
    one.

    Args:
        clock: u = log(sigma/alpha) from noise to data, decreasing, [M].
        density: Steps per unit of u there, > 0, up to a factor; linear in between.
    """

    clock: tuple[float, ...] = field(repr=False)
    density: tuple[float, ...] = field(repr=False)

    def __post_init__(self) -> None:
        clock, density = (torch.tensor(part) for part in (self.clock, self.density))
        fits = len(clock) == len(density) >= 2 and bool((clock.diff() < 0).all())
        if not (fits and bool((density > 0).all()) and bool(torch.isfinite(density).all())):
            raise ValueError(
                "FittedGrid needs a decreasing clock and as many densities, two at least, all "
                f"finite and > 0; got {len(clock)} and {len(density)} of them."
            )

    def times(self, sde: SDE, fractions: Tensor) -> Tensor:
        clock = torch.tensor(self.clock, dtype=torch.float64)
        fine = torch.linspace(0, len(clock) - 1, 32 * len(clock) + 1, dtype=torch.float64)
        u = interpolated(fine, torch.arange(len(clock)).double(), clock)
        density = interpolated(
            fine,
            torch.arange(len(clock)).double(),
            torch.tensor(self.density, dtype=torch.float64),
        )
        mass = torch.cat([torch.zeros(1), torch.cumulative_trapezoid(density, -u)])
        return sde.time_at(-2 * interpolated(fractions * mass[-1], mass, u))


def interpolated(at: Tensor, points: Tensor, values: Tensor) -> Tensor:
    """Linear interpolation of ``values`` at increasing ``points``, evaluated ``at`` [N]."""
    cell = (torch.searchsorted(points, at.contiguous()) - 1).clamp(0, len(points) - 2)
    width = (points[cell + 1] - points[cell]).clamp(min=1e-300)
    share = ((at - points[cell]) / width).clamp(0, 1)
    return values[cell] + share * (values[cell + 1] - values[cell])


def _strictly_decreasing(levels: Tensor) -> Tensor:
    """Nearest strictly decreasing integers with the same ends: neighbours that collide move up."""
    spread = levels.tolist()  # on the CPU, before any step
    for i in range(len(spread) - 2, -1, -1):
        spread[i] = max(spread[i], spread[i + 1] + 1)
    excess = range(1, len(spread))
    top = levels[0]
    for i in excess:
        spread[i] = min(spread[i], int(top) - i)
    spread[0] = int(top)
    return torch.tensor(spread)
