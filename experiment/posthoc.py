"""Averages of any width after training: combinations of those that were kept along the way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from experiment.averages import Power

SMALLEST = 1e-10  # eigenvalue of unit profiles, relative to the largest, that is still used


@dataclass(frozen=True)
class Kept:
    r"""A power average at one iteration, by its profile over the path of the weights.

    .. math::  p(\tau) = (\gamma + 1)\, \tau^\gamma / t^{\gamma + 1},  \qquad 0 \le \tau \le t

    The weights stay the same from one iteration to the next, and what :class:`Power` gives those
    of iteration i is the integral of p from i - 1 to i: an average is the integral of p against a
    path of steps, without any rounding to whole iterations.

    Args:
        width: See :class:`experiment.averages.Power`.
        iteration: t, >= 1.
    """

    width: float
    iteration: int


@dataclass(frozen=True)
class Combination:
    """Kept averages that together are nearest to one that is wanted.

    Attributes:
        coefficients: A factor for each of them, float64; their sum is 1, so that weights that
            stood still come out as they are.
        error: L2 distance of the profile from the wanted one, relative to the norm of that.
    """

    coefficients: Tensor
    error: float


def combined(kept: Sequence[Kept], wanted: Kept) -> Combination:
    r"""The combination of ``kept`` whose profile is nearest to that of ``wanted`` in L2.

    Among coefficients with the sum 1 it minimises :math:`\|\sum_i c_i p_i - p\|`. What the
    weights come out wrong by is the integral of the rest against the path, so by Cauchy-Schwarz at
    most ``error`` times :math:`\|p\| \sqrt{T}` times the standard deviation of the path over
    [0, T], T the last of all iterations.

    Args:
        kept: One or more; of one that is wanted itself nothing else is taken.
        wanted: The profile to come near to.
    """
    if wanted in kept:
        index = torch.tensor(kept.index(wanted))
        return Combination(torch.nn.functional.one_hot(index, len(kept)).double(), 0.0)
    norms = overlaps(kept, kept).diagonal().sqrt()
    norm = norm_of(wanted)
    between = overlaps(kept, kept) / norms[:, None] / norms
    towards = overlaps(kept, [wanted])[:, 0] / norms / norm
    values, vectors = torch.linalg.eigh(between)
    used = values > SMALLEST * values[-1]
    inverse = (vectors[:, used] / values[used]) @ vectors[:, used].T
    sums = norm / norms  # what a unit profile of the solution adds to the sum of coefficients
    free, along = inverse @ towards, inverse @ sums
    unit = free + along * (1 - sums @ free) / (sums @ along)
    rest = float(1 - 2 * towards @ unit + unit @ between @ unit)
    return Combination(unit * sums, math.sqrt(max(rest, 0.0)))


def norm_of(kept: Kept) -> float:
    """L2 norm of a profile."""
    return math.sqrt(float(overlaps([kept], [kept])))


def overlaps(first: Sequence[Kept], second: Sequence[Kept]) -> Tensor:
    r"""Inner products of profiles, [A, B], float64.

    For s <= t the integral of the product, from 0 to s, is

    .. math::  \frac{(\alpha + 1)(\beta + 1)}{\alpha + \beta + 1}\,
               \frac{s^{\alpha + \beta + 1}}{s^{\alpha + 1}\, t^{\beta + 1}}
               = \frac{(\alpha + 1)(\beta + 1)}{\alpha + \beta + 1}\,
                 \frac{(s/t)^\beta}{t}

    with beta the exponent of the later one: a power of a number below 1, which cannot overflow.
    """
    (alpha, s), (beta, t) = _columns(first), _columns(second)
    alpha, s = alpha[:, None], s[:, None]
    earlier, later = torch.minimum(s, t), torch.maximum(s, t)
    exponent = torch.where(s <= t, beta, alpha)
    factor = (alpha + 1) * (beta + 1) / (alpha + beta + 1)
    return factor * (earlier / later) ** exponent / later


def _columns(kept: Sequence[Kept]) -> tuple[Tensor, Tensor]:
    """Exponents and iterations."""
    gamma = {width: Power(width).exponent for width in {one.width for one in kept}}
    exponents, iterations = [gamma[one.width] for one in kept], [one.iteration for one in kept]
    return tuple(torch.tensor(c, dtype=torch.float64) for c in (exponents, iterations))
