"""The best levels for a number of steps, by dynamic programming on the bound."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sde_lib import validation
from sde_lib.grids import Grid, UniformLogSNR
from sde_lib.reverse_variance import AnalyticVariance, posterior
from sde_lib.sde import SDE, Level


def step_costs(variance: AnalyticVariance, levels: Level) -> Tensor:
    r"""Expected KL per dimension, nats, of a step from each of N falling levels to each later
    one, [N, N]; infinite upwards.

    With v the variance of the model's step, :math:`\tilde\beta` that of the posterior, eta = 1,
    and :math:`c^2 \varrho^2 u` the mean squared error of the mean

    .. math::  \tfrac12 \left(\log\frac{v}{\tilde\beta} - 1 + \frac{\tilde\beta + c^2 \varrho^2
               u}{v}\right)

    which is the logarithm alone where v is the best one.
    """
    start, end = (
        Level(*(column.unsqueeze(dim) for column in levels)) for dim in (1, 0)
    )  # rows: from, columns: to
    v, low, free = (
        variance(end, start),
        posterior(end, start)[0],
        replace(variance, data_variance=None)(end, start),  # low + c² rho² u
    )
    cost = 0.5 * (torch.log(v / low) - 1 + free / v)
    falls = torch.ones_like(cost, dtype=torch.bool).triu(1)
    return torch.where(falls, cost, math.inf)


def optimal_trajectory(costs: Tensor, steps: int) -> Tensor:
    """Rows of the cheapest way from the first of N levels to the last, in ``steps`` steps.

    The cheapest way to each level in k steps is one step behind the cheapest way to some other in
    k - 1: all of them are found in order, K N² additions in all.

    Args:
        costs: Of a step from row to column, [N, N]; infinite where there is none.
        steps: K, from 1 to N - 1.

    Returns:
        Increasing indices [K + 1], the first 0 and the last N - 1.
    """
    reached, came_from = costs[0], []
    for _ in range(steps - 1):
        reached, best = (reached[:, None] + costs).min(0)
        came_from.append(best)
    way = [len(costs) - 1]
    for best in reversed(came_from):
        way.append(int(best[way[-1]]))
    return torch.tensor([0, *reversed(way)])


@dataclass(frozen=True)
class OptimalTrajectory(Grid):
    """Those of many levels at which Analytic-DPM with eta = 1 has the best bound in K steps.

    Reference: Bao et al., Analytic-DPM, 2022, section 4; Watson et al., Learning to Efficiently
    Sample from Diffusion Probabilistic Models, 2021.

    Args:
        levels: Steps of the grid that is chosen from, at least as many as are taken.
        candidates: That grid.
        variance: Of the model; if not given, the one that mode=calibrate has stored.
    """

    levels: int = 200
    candidates: Grid = UniformLogSNR()
    variance: AnalyticVariance | None = None

    def __post_init__(self) -> None:
        levels = validation.count("OptimalTrajectory", "levels", self.levels)
        object.__setattr__(self, "levels", levels)

    @property
    def wanted(self) -> str | None:
        """Name of what has to be found out about a model first; None if it is there."""
        return "analytic" if self.variance is None else None

    def given(self, variance: AnalyticVariance) -> OptimalTrajectory:
        """The same for a model of this ``variance``."""
        return replace(self, variance=variance)

    def times(self, sde: SDE, fractions: Tensor) -> Tensor:
        steps = len(fractions) - 1
        if self.variance is None:
            raise ValueError(
                "OptimalTrajectory is of a model and needs its analytic variance: on the command "
                "line from mode=calibrate, in a program from calibrate_variance(flow, x, "
                "steps=...); pass it as variance=."
            )
        if steps > self.levels:
            raise ValueError(
                f"OptimalTrajectory cannot pick {steps} steps out of {self.levels}; use more "
                "levels or fewer steps."
            )
        times = self.candidates(sde, self.levels)
        return times[optimal_trajectory(step_costs(self.variance, sde.level(times)), steps)]
