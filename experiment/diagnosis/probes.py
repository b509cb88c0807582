"""In which basis the probes of a likelihood are least noisy: for a Gaussian, and for a model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from experiment.diagnosis.model import noised
from experiment.diagnosis.spectrum import principal_axes
from experiment.settings import BASES
from likelihood import Basis
from score_models import ScoreModel

MOST_DIMS = 4096  # a covariance of as many rows; the axes of more would take minutes
MUCH = 0.8  # of the variance of the others, below which the principal axes are proposed
PROBES = 4  # of a sample at a level


@dataclass(frozen=True)
class Bases:
    r"""Noise of Rademacher probes in each basis, for Gaussian data or as measured on a model.

    Under Gaussian data of covariance C the trace that a likelihood integrates over u = log rho is
    that of :math:`A(u) = \rho^2 (C + \rho^2)^{-1}`. One probe in the orthonormal basis Q has the
    variance

    .. math::  2 \sum_{i \ne j} (Q^T A Q)_{ij}^2,

    and fresh probes, one each at nodes that are h apart, leave log p of a sample with
    :math:`h\, V`, where V is the integral of that over u. A model of other data has another A at
    each sample, which the axes of the whole set need not suit: on digits principal axes are
    predicted to have 0.13 of the variance of pixels, and had twice as much when measured.

    Attributes:
        variance: V in nats² by the name of the basis.
        off_diagonal: Share of the energy of C - mean(C) I that lies off its diagonal, by basis;
            empty for a model.
    """

    variance: dict[str, float]
    off_diagonal: dict[str, float]

    @property
    def best(self) -> str:
        """``principal`` where that is better; else ``auto``, which tries the others."""
        others = min(v for name, v in self.variance.items() if name != "principal")
        axes = self.variance.get("principal", math.inf)
        return "principal" if axes < MUCH * others else "auto"

    @property
    def ratios(self) -> dict[str, float]:
        """Variance against that in pixels, of the other bases."""
        pixel = max(self.variance["pixel"], 1e-300)
        return {name: v / pixel for name, v in self.variance.items() if name != "pixel"}

    def as_row(self, per_nat: float) -> dict[str, Any]:
        """What goes into a JSON file: the error of one sample in the unit of the metric."""
        error = {name: math.sqrt(v) * per_nat for name, v in self.variance.items()}
        return {"error": error, "off_diagonal": self.off_diagonal}


def bases(x: Tensor, shape: tuple[int, ...], clock: Tensor) -> Bases | None:
    """The prediction for samples ``x`` [N, D] in model units over the levels ``clock`` [L].

    The principal axes are those of every other sample, the covariance is that of the samples in
    between: axes fit the samples that they were taken from too well.

    Returns:
        None for one dimension, more than ``MOST_DIMS``, or fewer than four samples.
    """
    dims = x.shape[1]
    if not 1 < dims <= MOST_DIMS or len(x) < 4:
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


def measured_bases(
    model: ScoreModel,
    draws: tuple[Tensor, Tensor, Tensor | None],
    clock: Tensor,
    samples: Tensor,
    generator: torch.Generator,
) -> Bases | None:
    """The noise of probes on a model, whose Jacobian is not symmetric and differs by sample.

    Args:
        model: In evaluation mode, its weights frozen.
        draws: Samples [M, ...], noise, and conditions where the network takes any.
        clock: Levels u of the integral, [L].
        samples: Training samples [N, D] in model units that the principal axes are taken from.
        generator: Of the probes.

    Returns:
        None for one dimension.
    """
    shape, dims = tuple(draws[0].shape[1:]), draws[0][0].numel()
    if dims == 1:
        return None
    names = [n for n in BASES if n != "auto" and (n != "principal" or dims <= MOST_DIMS)]
    found = {name: BASES[name](shape, lambda: samples) for name in names}
    levels = [_spread(model, draws, u, list(found.values()), generator) for u in clock]
    variance = torch.tensor(levels, dtype=torch.float64)
    integral = torch.trapezoid(variance, clock, dim=0)
    return Bases(dict(zip(names, integral.tolist(), strict=True)), {})


def _spread(
    model: ScoreModel,
    draws: tuple[Tensor, Tensor, Tensor | None],
    u: Tensor,
    found: list[Basis],
    generator: torch.Generator,
) -> list[float]:
    """Variance of a probe's trace in each basis at one level, mean over samples."""
    x, t, sigma, cond = noised(model, *draws, u)
    _, pullback = torch.func.vjp(lambda x: model(x, t, cond), x)
    signs = torch.randint(2, (PROBES, *x.shape), generator=generator).to(x) * 2 - 1
    variances = []
    for basis in found:
        probes = [basis.to_data(sign) for sign in signs]
        traces = [(pullback(v)[0] * v).flatten(1).sum(1) * sigma for v in probes]
        variances.append(float(torch.stack(traces).var(0).mean()))
    return variances


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
