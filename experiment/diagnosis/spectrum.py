"""The variances of data along directions that other samples have chosen, honest about few."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

HALVED = 5  # numbers of axes tried, each half of the one before
FLAT = 1e-13  # of the largest variance: a smaller one is rounding
LEAST_SHARE = 1e-9  # of a dimension: what the axes leave of a coordinate is rounding below it


@dataclass(frozen=True)
class Spectrum:
    r"""Variances along principal axes, and along coordinates of what the axes leave.

    Few samples have few axes :math:`a_k`. The projection Q onto what is left is a sum over
    coordinates d of :math:`q_d u_d u_d^T`, with :math:`u_d` in the direction of :math:`Q e_d` and
    the share :math:`q_d = \|Q e_d\|^2 = 1 - \sum_k a_{kd}^2`. Axes and the :math:`Q e_d` form a
    tight frame: squared coordinates add up to the squared length, shares to D. So

    .. math::  \sum_k f(\lambda_k) + \sum_d q_d f(\lambda_d), \qquad
               \lambda_d = E\,(e_d^T Q x)^2 / q_d

    is at least tr f(covariance) for a concave f and at most that for a convex one, and the
    coordinates are never further off than one variance for all that is left (Jensen).

    Args:
        mean: Of the data in model units, [D].
        axes: Orthonormal, [D, R], R <= D.
        shares: How much of a dimension each direction stands for, [R] or [R + D], in sum D.
        variances: Along these directions, likewise.
    """

    mean: Tensor
    axes: Tensor
    shares: Tensor
    variances: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Spectrum:
        """That of samples [N, D] in model units, N >= 2.

        The axes are those of every other sample; the variances are those of the samples in
        between. Measured on the samples that chose the axes, small variances would come out too
        small and large ones too large. The last axes of few samples are worse than coordinates:
        of all axes, a half, a quarter and so on of them and none those are taken that bound the
        log determinant of the covariance best.
        """
        mean, n = x.mean(0), len(x)
        first, second = (x - mean)[::2], (x - mean)[1::2]
        axes = principal_axes(first)
        counts = [axes.shape[1] >> halved for halved in range(HALVED)] + [0]
        found = [cls.along(mean, axes[:, :count], second) for count in sorted(set(counts))]
        best = min(found, key=Spectrum.log_determinant)
        return replace(best, variances=best.variances * n / (n - 1))  # about their own mean

    @classmethod
    def along(cls, mean: Tensor, axes: Tensor, centred: Tensor) -> Spectrum:
        """That of samples [N, D] less their ``mean``, along these ``axes`` and what is left."""
        shares = torch.ones(axes.shape[1], dtype=axes.dtype)
        if axes.shape[1] < len(axes):
            shares = torch.cat([shares, 1 - axes.square().sum(1)])
        shares = torch.where(shares > LEAST_SHARE, shares, 0.0)
        square = coordinates(axes, centred).square().mean(0)
        return cls(mean, axes, shares, torch.where(shares > 0, square / shares, 0.0))

    def log_determinant(self) -> float:
        """At least that of the covariance, as a logarithm is concave; little where it is flat."""
        least = self.variances.max() * FLAT
        return float((self.shares * self.variances.clamp(min=least).log()).sum())


def coordinates(axes: Tensor, x: Tensor) -> Tensor:
    """Of vectors ``x`` [B, D] along ``axes`` [D, R] and what these leave, [B, R] or [B, R + D].

    Of the squared length of the vector.
    """
    inside = x @ axes
    if axes.shape[1] == len(axes):
        return inside
    return torch.cat([inside, x - inside @ axes.mT], 1)


def principal_axes(centred: Tensor) -> Tensor:
    """Orthonormal axes [D, R] that hold all of ``centred`` [N, D], the largest first.

    Of the smaller of the two products: few samples of many numbers cost little.
    """
    n, dims = centred.shape
    if n >= dims:
        return torch.linalg.eigh(centred.mT @ centred / n).eigenvectors.flip(1)
    found = torch.linalg.eigh(centred @ centred.mT / n)
    axes = centred.mT @ found.eigenvectors.flip(1)
    # columns of length sqrt(variance); the last may be 0 and then point anywhere else
    return torch.linalg.qr(axes).Q
