"""How far a data set reaches: distances, and the fit of the prior."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from experiment.diagnosis.facts import Coordinates, in_units
from experiment.diagnosis.samples import Part, Units

MOST_PAIRED = 4096  # samples whose distances are all worked out
MATCHED = 1e-4  # nats a dimension that the prior may be off


@dataclass(frozen=True)
class Distance:
    """A distance that lies between two bounds.

    Attributes:
        low: Lower bound; found between two samples.
        high: Upper bound; equal to ``low`` where the distance is exact.
        samples: How many samples it is about.
    """

    low: float
    high: float
    samples: int

    def __str__(self) -> str:
        about = f"among {self.samples} samples"
        if self.low == self.high:
            return f"{self.low:.3g} (exact, {about})"
        return f"between {self.low:.3g} and {self.high:.3g} ({about})"


def largest_distance(
    part: Part, centres: Units, spread: Coordinates, radii: Tensor, most: int = MOST_PAIRED
) -> Distance:
    """Largest distance between two training samples looked at, in model units.

    Two searches for the farthest point give a first value. A sample can be an end of a longer
    pair only if its distance from the mean and the largest such distance add up to more. If at
    most ``most`` samples are left, the distances of all these give the exact value; else those of
    the ``most`` farthest raise the lower bound, and the two largest distances from the mean add
    up to the upper one (triangle inequality).

    Args:
        part: The training part.
        centres: Model units, the middle of bins.
        spread: Its coordinates.
        radii: Distances from the mean, [N].
        most: Samples whose distances are all worked out.
    """
    index = part.index()
    low, start = 0.0, int(radii.argmax())
    for _ in range(2):
        away = _distances(part, centres, _points(part, centres, index[[start]]))
        start, low = int(away.argmax()), max(low, float(away.max()))
    left = (radii + radii.max() >= low * (1 - 1e-9)).nonzero().flatten()
    exact = len(left) <= most
    ends = left if exact else radii.topk(most).indices
    low = max(low, _largest_of(_points(part, centres, index[ends])))
    high = low if exact else float(radii.topk(2).values.sum())
    return Distance(low, high, len(part))


def nearest_distance(part: Part, centres: Units, queries: int) -> float:
    """Median distance of a training sample from its nearest neighbour among all looked at."""
    chosen = part.index()[torch.linspace(0, len(part) - 1, min(queries, len(part))).long()]
    points = _points(part, centres, chosen)
    nearest, start = torch.full((len(points),), math.inf, dtype=torch.float64), 0
    index = part.index()
    for x in in_units(part, centres):
        away = torch.cdist(points, x)
        away[chosen[:, None] == index[start : start + len(x)]] = math.inf
        nearest, start = torch.minimum(nearest, away.amin(1)), start + len(x)
    return float(nearest.median())


def _points(part: Part, centres: Units, index: Tensor) -> Tensor:
    return centres.encode(part.samples[index], torch.Generator()).flatten(1).double()


def _distances(part: Part, centres: Units, point: Tensor) -> Tensor:
    return torch.cat([(x - point).norm(dim=1) for x in in_units(part, centres)])


def _largest_of(points: Tensor) -> float:
    return max(float(torch.cdist(rows, points).max()) for rows in points.split(512))


@dataclass(frozen=True)
class PriorFit:
    r"""How far the data at noise ratio :math:`\rho = \sigma/\alpha` are from the prior.

    The noised data are the mixture of :math:`N(\alpha x_i, \sigma^2)`. Its divergence from
    :math:`N(0, \sigma^2)`, nats a dimension, is at least that of the Gaussian of the same mean and
    covariance, and by convexity at most the mean of that of its components:

    .. math::  \frac{1}{2D} \sum_d \left[ q_d \left( \frac{\lambda_d}{\rho^2} -
               \log\left(1 + \frac{\lambda_d}{\rho^2}\right) \right) + \frac{m_d^2}{\rho^2} \right]
               \;\le\; \frac{1}{D} KL \;\le\; \frac{E\|x\|^2}{2 D \rho^2}

    Args:
        mean: Of the data in model units, [D].
        variances: Along their principal axes, [D], or other directions, [R].
        shares: q, how much of a dimension each stands for, [R], or 1.
    """

    mean: Tensor
    variances: Tensor
    shares: Tensor | float = 1.0

    @property
    def dims(self) -> int:
        """D."""
        return len(self.mean)

    def low(self, rho: float) -> float:
        """Lower bound, nats a dimension; exact for Gaussian data."""
        relative = self.variances / rho**2
        spread = (self.shares * (relative - relative.log1p())).sum()
        return 0.5 * float(spread + (self.mean / rho).square().sum()) / self.dims

    def high(self, rho: float) -> float:
        """Upper bound, nats a dimension."""
        power = float(self.mean.square().sum() + (self.shares * self.variances).sum()) / self.dims
        return 0.5 * power / rho**2

    def matched(self, tolerance: float = MATCHED) -> float:
        """Smallest rho with a lower bound of ``tolerance`` nats a dimension, by bisection."""
        low, high = -30.0, 1.0
        while self.low(math.exp(high)) > tolerance:
            low, high = high, 2 * high
        for _ in range(60):
            middle = 0.5 * (low + high)
            high, low = (middle, low) if self.low(math.exp(middle)) < tolerance else (high, middle)
        return math.exp(high)
