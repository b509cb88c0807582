"""In which basis the probes of a likelihood will be least noisy, as far as a Gaussian tells."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from experiment.diagnose_spread import principal_axes
from experiment.settings import BASES
from likelihood import Basis

MOST_DIMS = 4096  # a covariance of as many rows; the axes of more would take minutes
MUCH = 0.5  # of the variance of the others, below which the principal axes are proposed


@dataclass(frozen=True)
class Bases:
    r"""Predicted noise of Rademacher probes in each basis.

    Under Gaussian data of covariance C the trace that a likelihood integrates over u = log rho is
    that of :math:`A(u) = \rho^2 (C + \rho^2)^{-1}`. One probe in the orthonormal basis Q has the
    variance

    .. math::  2 \sum_{i \ne j} (Q^T A Q)_{ij}^2,

    and fresh probes, one each at nodes that are h apart, leave log p of a sample with
    :math:`h\, V`, where V is the integral of that over u. Real data add what A differs from sample
    to sample: the order of the bases is a prediction, the size a lower estimate.

    Attributes:
        variance: V in nats² by the name of the basis.
        off_diagonal: Share of the energy of C - mean(C) I that lies off its diagonal, by basis.
    """

    variance: dict[str, float]
    off_diagonal: dict[str, float]

    @property
    def best(self) -> str:
        """``principal`` where that is far better; else ``auto``, which tries the others."""
        others = min(v for name, v in self.variance.items() if name != "principal")
        return "principal" if self.variance["principal"] < MUCH * others else "auto"

    def as_row(self, per_nat: float) -> dict[str, Any]:
        """What goes into a JSON file: the error of one sample in the unit of the metric."""
        error = {name: math.sqrt(v) * per_nat for name, v in self.variance.items()}
        return {"error": error, "off_diagonal": self.off_diagonal}


def bases(x: Tensor, shape: tuple[int, ...], clock: Tensor) -> Bases | None:
    """The prediction for samples ``x`` [N, D] in model units over the levels ``clock`` [L].

    The principal axes are those of every other sample, the covariance is that of the samples in
    between: axes fit the samples that they were taken from too well.

    Returns:
        None for one dimension, or more than ``MOST_DIMS``.
    """
    dims = x.shape[1]
    if not 1 < dims <= MOST_DIMS:
        return None
    centred = x - x.mean(0)
    first, second = centred[::2], centred[1::2]
    axes = principal_axes(second)
    variances = (second @ axes).square().mean(0)
    kept = variances[:, None] / (variances[:, None] + (2 * clock)[None].exp())  # I - A, [R, L]
    found = {name: BASES[name](shape, lambda: first) for name in BASES if name != "auto"}
    squares = {name: _columns(basis, shape) @ axes for name, basis in found.items()}
    return Bases(
        {name: _integral(2 * _off(q.square(), kept), clock) for name, q in squares.items()},
        {name: _off_share(q.square(), variances) for name, q in squares.items()},
    )


def _columns(basis: Basis, shape: tuple[int, ...]) -> Tensor:
    """Q transposed, [D, D] float64."""
    dims = torch.Size(shape).numel()
    return basis.to_data(torch.eye(dims, dtype=torch.float64).reshape(dims, *shape)).reshape(
        dims, dims
    )


def _off(squares: Tensor, eigenvalues: Tensor) -> Tensor:
    """Energy off the diagonal, [L], of symmetric matrices with these ``eigenvalues`` [R, L].

    Args:
        squares: Squared coordinates of the eigenvectors in the basis, [D, R].
        eigenvalues: Of L matrices.
    """
    diagonal = squares @ eigenvalues
    return (eigenvalues.square().sum(0) - diagonal.square().sum(0)).clamp(min=0)


def _off_share(squares: Tensor, variances: Tensor) -> float:
    mean = variances.sum() / len(squares)
    energy = float(variances.square().sum() - len(squares) * mean.square())
    off = float(_off(squares, variances[:, None])[0])
    return off / energy if energy > 0 else 0.0


def _integral(values: Tensor, clock: Tensor) -> float:
    return float(torch.trapezoid(values, clock))
