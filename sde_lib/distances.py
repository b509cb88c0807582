"""How far samples are from other samples, each distance with an interval: sliced W2, energy, MMD.

Energy distance and MMD are one unbiased U-statistic with different kernels. It may be negative,
and its interval holds also where the two distributions are the same. The sliced Wasserstein
distance of samples is never zero: compare it with what two samples of the data are apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from sde_lib import validation

NORMAL_95 = 1.959964  # half a 95 % interval of a normal distribution, in standard deviations
TILE = 1024  # rows and columns of a block of pairs: 8 MB in float64
SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)  # of the median distance
LEAST = 4  # samples; a variance of pairs needs them

Kernel = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Estimate:
    """A number found from samples and its 95 % interval, that of more samples alike."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, value: float, variance: float) -> Estimate:
        """The normal interval around ``value``."""
        half = NORMAL_95 * math.sqrt(variance)
        return cls(value, value - half, value + half)

    def root(self) -> Estimate:
        """The square root of a square: of value and ends, those below zero taken as zero."""
        return Estimate(*(math.sqrt(max(0.0, end)) for end in (self.value, self.low, self.high)))


def root_mean_square(errors: Tensor) -> Estimate:
    """Root of the mean over samples and coordinates of ``errors`` [N, ...], N >= 2."""
    squares = errors.double().reshape(len(errors), -1).square().mean(1)
    return Estimate.of(float(squares.mean()), float(squares.var()) / len(squares)).root()


def energy_distance(x: Tensor, y: Tensor) -> Estimate:
    r"""Energy distance :math:`2 E|X - Y| - E|X - X'| - E|Y - Y'|`, >= 0, 0 for equal laws alone.

    The unbiased U-statistic, see :func:`mmd_squared`, of the kernel -|x - y|. In units of x, and
    not rooted: half of it is, for one dimension, the integral of the squared difference of the
    distribution functions.

    Reference: Székely and Rizzo, Energy statistics, 2013.

    Args:
        x: Samples [N, ...], N >= 4.
        y: Others [M, ...], M >= 4.
    """
    return _two_sample("energy_distance", x, y, torch.neg)


def mmd_squared(x: Tensor, y: Tensor, bandwidths: Sequence[float] | None = None) -> Estimate:
    r"""Squared maximum mean discrepancy :math:`E k(X, X') + E k(Y, Y') - 2 E k(X, Y)`.

    .. math::  k(x, y) = \frac1K \sum_{j=1}^{K} e^{-|x - y|^2 / (2 b_j^2)}

    Without the pairs of a sample with itself this is unbiased, and so it may be negative. Its
    variance has a part that falls with 1/N, that of one sample against all, and one that falls
    with 1/N², that of pairs; the second is all there is where the laws are equal. Both are
    estimated without bias from the row sums of the kernel, and the first is taken as zero where
    its estimate is negative, so that the normal interval is right far from zero and at zero.

    Reference: Gretton et al., A Kernel Two-Sample Test, 2012, lemma 6.

    Args:
        x: Samples [N, ...], N >= 4.
        y: Others [M, ...], M >= 4.
        bandwidths: b_j, > 0; :func:`median_bandwidths` of ``y`` if not given.
    """
    if bandwidths is None:
        _, bandwidths = _pair("mmd_squared", x, y), median_bandwidths(y)
    if not isinstance(bandwidths, Sequence) or not bandwidths:
        raise ValueError(
            f"mmd_squared needs a sequence of at least one bandwidth; got {bandwidths!r}."
        )
    for width in bandwidths:
        validation.real("mmd_squared", "bandwidths", width, above=0)

    def kernel(distances: Tensor) -> Tensor:
        exponent = distances.square().mul_(-0.5)
        return sum((exponent / b**2).exp_() for b in bandwidths).div_(len(bandwidths))

    return _two_sample("mmd_squared", x, y, kernel)


def median_bandwidths(reference: Tensor, most: int = 1000) -> tuple[float, ...]:
    """A quarter to four times the median distance between two of ``reference`` [M, ...].

    Args:
        reference: The samples that others are compared with; M >= 4.
        most: Samples to look at, the first.

    Raises:
        ValueError: If more than half of the pairs are equal.
    """
    points = _flat("median_bandwidths", reference[:most])
    rows, columns = torch.triu_indices(len(points), len(points), 1, device=points.device)
    median = float(_distances(points, points)[rows, columns].median())
    if not median > 0:
        raise ValueError(
            "median_bandwidths needs samples that differ; the median distance between those "
            "given is 0."
        )
    return tuple(scale * median for scale in SCALES)


def sliced_wasserstein(
    x: Tensor, y: Tensor, *, projections: int = 500, generator: torch.Generator | None = None
) -> Estimate:
    r"""Sliced Wasserstein-2 distance of the two sets of samples: a root mean square.

    .. math::  SW_2^2 = E_\theta \int_0^1 \left( F_{\theta \cdot x}^{-1}(q) -
               F_{\theta \cdot y}^{-1}(q) \right)^2 dq

    over directions on the unit sphere, where one dimension needs only one; N and M may differ.
    In D dimensions a shift by m gives :math:`|m| / \sqrt D`: a distance by coordinate.

    Samples of one law are apart, too, so that the value exceeds that of the two laws where that
    is small. The interval says between which limits the value lies on average *for these
    numbers of samples*, over samples and directions; near what two samples of the data are apart
    it is too wide, by a factor of up to :math:`\sqrt2`. Its variance is that of the optimal
    potentials, the first order of what one sample adds: resampling would add a distance of its
    own to a small one.

    Reference: Bonneel et al., Sliced and Radon Wasserstein Barycenters, 2015; del Barrio and
    Loubes, Central limit theorems for empirical transportation cost, 2019.

    Args:
        x: Samples [N, ...], N >= 4.
        y: Others [M, ...], M >= 4.
        projections: Number of directions, >= 2.
        generator: Of the directions, on the CPU; the same seed gives the same ones.
    """
    projections = validation.count("sliced_wasserstein", "projections", projections, at_least=2)
    x, y = _pair("sliced_wasserstein", x, y)
    plan, squares = _Staircase.of(len(x), len(y), x.device), []
    effects = [torch.zeros(len(side), dtype=torch.float64, device=x.device) for side in (x, y)]
    directions = _directions(x.shape[1], projections, generator).to(x)
    for theta in directions.split(64):  # [64, D]
        sides = [(side @ theta.mT).mT.sort(dim=1) for side in (x, y)]
        values, potentials = plan.solve(*(side.values for side in sides))
        squares.append(values)
        for effect, side, potential in zip(effects, sides, potentials, strict=True):
            effect.index_add_(0, side.indices.flatten(), potential.flatten() / len(directions))
    found = torch.cat(squares)
    variance = sum(float(effect.var()) / len(effect) for effect in effects)
    if len(found) > 1:
        variance += float(found.var()) / len(found)
    return Estimate.of(float(found.mean()), variance).root()


def _directions(dimensions: int, count: int, generator: torch.Generator | None) -> Tensor:
    """Unit vectors [count, D]; the one there is in one dimension."""
    if dimensions == 1:
        return torch.ones(1, 1)
    drawn = torch.randn(count, dimensions, generator=generator, dtype=torch.float64)
    return drawn / drawn.norm(dim=1, keepdim=True)


@dataclass(frozen=True)
class _Staircase:
    """The optimal plan between N and M sorted points on a line: masses [K] and whom they join."""

    mass: Tensor
    of_x: Tensor
    of_y: Tensor

    @classmethod
    def of(cls, n: int, m: int, device: torch.device) -> _Staircase:
        """In whole numbers, of which a unit of mass has n m, so that no piece is lost."""
        ends = torch.cat([torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n]).unique()
        mass = ends.diff(prepend=ends.new_zeros(1)).double() / (n * m)
        last = ends - 1
        return cls(*(part.to(device) for part in (mass, last // m, last // n)))

    def solve(self, x: Tensor, y: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Squared distance [P] and both potentials, of sorted ``x`` [P, N] and ``y`` [P, M]."""
        x, y = x.double(), y.double()
        from_x, from_y = x[:, self.of_x], y[:, self.of_y]
        squares = ((from_x - from_y).square() * self.mass).sum(1)
        to_y = torch.zeros_like(x).index_add_(1, self.of_x, from_y * self.mass) * x.shape[1]
        to_x = torch.zeros_like(y).index_add_(1, self.of_y, from_x * self.mass) * y.shape[1]
        return squares, (_potential(x, to_y), _potential(y, to_x))


def _potential(points: Tensor, images: Tensor) -> Tensor:
    """Integral of 2 (s - T(s)) along each row of sorted ``points``, by trapezoids, of mean 0."""
    slope = points - images
    steps = points.diff(dim=1) * (slope[:, 1:] + slope[:, :-1])
    potential = torch.nn.functional.pad(steps.cumsum(1), (1, 0))
    return potential - potential.mean(1, keepdim=True)


@dataclass(frozen=True)
class _Sums:
    """Means of a kernel matrix over its rows and columns, and the sum of its squares."""

    rows: Tensor
    columns: Tensor
    squares: float

    @classmethod
    def of(cls, x: Tensor, y: Tensor, kernel: Kernel, *, within: bool = False) -> _Sums:
        """Block by block; ``within`` one sample the diagonal is left out."""
        rows, columns = (
            torch.zeros(len(side), dtype=torch.float64, device=x.device) for side in (x, y)
        )
        squares = torch.zeros((), dtype=torch.float64, device=x.device)
        starts = (range(0, len(side), TILE) for side in (x, y))
        for i, j in product(*starts):
            block = kernel(_distances(x[i : i + TILE], y[j : j + TILE]))
            if within and i == j:
                block.fill_diagonal_(0)
            rows[i : i + TILE] += block.sum(1)
            columns[j : j + TILE] += block.sum(0)
            squares += block.square().sum()
        return cls(rows / (len(y) - within), columns / (len(x) - within), float(squares))


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean distances [N, M] in float64, where the squares of norms cancel harmlessly."""
    return torch.cdist(x.double(), y.double())


def _two_sample(owner: str, x: Tensor, y: Tensor, kernel: Kernel) -> Estimate:
    x, y = _pair(owner, x, y)
    xx, yy = (_Sums.of(side, side, kernel, within=True) for side in (x, y))
    xy = _Sums.of(x, y, kernel)
    value = float(xx.rows.mean() + yy.rows.mean() - 2 * xy.rows.mean())
    single, pairs = _variances(xx, yy, xy)
    return Estimate.of(value, max(0.0, single) + pairs)


def _variances(xx: _Sums, yy: _Sums, xy: _Sums) -> tuple[float, float]:
    r"""The two parts of the variance of the U-statistic, each without bias.

    A kernel is the sum of a mean, an effect of each argument and a rest that no effect explains,
    all of them uncorrelated, as in an analysis of variance. With the effects' difference
    :math:`d(x) = E k(x, X') - E k(x, Y)` and the variances r of the rests

    .. math::  \mathrm{Var} = \frac{4 \mathrm{Var}\, d(X)}{N} + \frac{4 \mathrm{Var}\, d(Y)}{M}
               + \frac{2 r_{xx}}{N (N - 1)} + \frac{2 r_{yy}}{M (M - 1)} + \frac{4 r_{xy}}{N M}
    """
    n, m = len(xx.rows), len(yy.rows)
    r_xx, r_yy, r_xy = _rest_within(xx), _rest_within(yy), _rest_between(xy)
    single = 0.0
    for own, across, size, other in ((xx, xy.rows, n, m), (yy, xy.columns, m, n)):
        effects = (own.rows - own.rows.mean()) * (size - 1) / (size - 2) - across
        rest = r_xx if own is xx else r_yy
        noise = rest / (size - 2) + r_xy / other  # what the rests add to the effects' variance
        single += 4 * (float(effects.var()) - noise) / size
    pairs = 2 * r_xx / (n * (n - 1)) + 2 * r_yy / (m * (m - 1)) + 4 * r_xy / (n * m)
    return single, max(0.0, pairs)


def _rest_within(sums: _Sums) -> float:
    """Variance of what is left of a symmetric kernel without its diagonal, by least squares."""
    n, mean = len(sums.rows), sums.rows.mean()
    explained = 2 * (n - 1) ** 2 / (n - 2) * float((sums.rows - mean).square().sum())
    return (sums.squares - n * (n - 1) * float(mean) ** 2 - explained) / (n * (n - 3))


def _rest_between(sums: _Sums) -> float:
    """The same between two samples: two-way analysis of variance, without replication."""
    n, m, mean = len(sums.rows), len(sums.columns), sums.rows.mean()
    explained = m * (sums.rows - mean).square().sum() + n * (sums.columns - mean).square().sum()
    return (sums.squares - n * m * float(mean) ** 2 - float(explained)) / ((n - 1) * (m - 1))


def _pair(owner: str, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both as [N, D], checked at the door; the one wait for the device."""
    for side in (x, y):
        if not isinstance(side, Tensor):
            raise ValueError(f"{owner} compares tensors of samples; got {type(side).__name__}.")
    if x.shape[1:] != y.shape[1:]:
        raise ValueError(
            f"{owner} compares samples of one shape; got {tuple(x.shape[1:])} and "
            f"{tuple(y.shape[1:])}."
        )
    x, y = _flat(owner, x), _flat(owner, y)
    dtype = torch.promote_types(x.dtype, y.dtype)
    return x.to(dtype), y.to(dtype)


def _flat(owner: str, x: Tensor) -> Tensor:
    if x.ndim < 2 or len(x) < LEAST or not x.is_floating_point():
        raise ValueError(
            f"{owner} needs floating-point samples [N, ...], {LEAST} at least, since an error is "
            f"estimated; got {x.dtype} {tuple(x.shape)}."
        )
    bad = ~torch.isfinite(x.reshape(len(x), -1)).all(1)
    if bool(bad.any()):
        raise ValueError(f"{owner} needs finite samples; {int(bad.sum())} of {len(x)} are not.")
    return x.reshape(len(x), -1)
