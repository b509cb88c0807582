"""Linear multistep rules on uneven nodes: one evaluation a node, any order the nodes allow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sde_lib import validation


def interpolation_weights(points: Tensor, start: float, end: float) -> Tensor:
    r"""Weights [m] with which values at ``points`` [m] integrate their polynomial.

    .. math::  \int_a^b p(u)\,du = \sum_i w_i\, f(u_i)

    where p of degree m - 1 passes through all values; exact for polynomials of that degree.
    """
    middle, half = 0.5 * (start + end), 0.5 * (end - start)
    scaled = (points.double() - middle) / half
    powers = torch.arange(len(points), dtype=torch.float64)
    moments = half * (1 - (-1.0) ** (powers + 1)) / (powers + 1)
    return torch.linalg.solve(scaled[None] ** powers[:, None], moments)


def quadrature_weights(nodes: Tensor, order: int) -> Tensor:
    """Weights [N] that integrate values at increasing ``nodes`` [N] over all of them.

    Over each interval the polynomial through the ``order`` nodes around it is integrated: the
    error falls like the power ``order`` of the spacing.
    """
    weights = torch.zeros(len(nodes), dtype=torch.float64)
    order = min(order, len(nodes))
    for i in range(len(nodes) - 1):
        first = min(max(0, i + 1 - order // 2), len(nodes) - order)
        window = slice(first, first + order)
        weights[window] += interpolation_weights(
            nodes[window], float(nodes[i]), float(nodes[i + 1])
        )
    return weights


@dataclass(frozen=True)
class Adams:
    r"""Adams predictor-corrector in uneven steps, one evaluation a node (PEC).

    From z_n and the rates at the last nodes, the Adams-Bashforth rule of order p - 1 predicts
    z_{n+1}, the rate is evaluated there, and the Adams-Moulton rule of order p, which uses it,
    corrects. The error falls like the power p of the spacing; the first steps, with fewer rates
    behind them, are of lower order.

    Reference: Hairer, Norsett, Wanner, Solving Ordinary Differential Equations I, chapter III.

    Args:
        nodes: Monotone clock values, [N] float64, N >= 2.
        order: p, from 2 to 6.
    """

    nodes: Tensor
    order: int

    def __post_init__(self) -> None:
        if validation.count("Adams", "order", self.order, at_least=2) > 6:
            raise ValueError(f"Adams is stable enough up to order 6; got order={self.order}.")
        if len(self.nodes) < 2:
            raise ValueError(f"Adams needs two nodes or more; got {len(self.nodes)}.")

    def solve(self, rate: Callable[[int, Tensor], Tensor], start: Tensor) -> Tensor:
        """The state at the last node, from ``start`` [B, ...] at the first.

        Args:
            rate: dz/du at the i-th node, called once for each i in turn.
            start: State at the first node.
        """
        state, rates = start, [rate(0, start)]
        for i, (predict, correct) in enumerate(self.tables, start=1):
            guess = _advanced(state, predict, rates)
            rates = [*rates[1 - self.order :], rate(i, guess)]
            state = _advanced(state, correct, rates)
        return state

    @property
    def tables(self) -> list[tuple[list[float], list[float]]]:
        """Weights of each step's predictor and corrector, oldest rate first."""
        rows = []
        for i in range(1, len(self.nodes)):
            interval = float(self.nodes[i - 1]), float(self.nodes[i])
            through = self.nodes[max(0, i + 1 - self.order) : i + 1]
            rows.append(
                (
                    interpolation_weights(through[:-1], *interval).tolist(),
                    interpolation_weights(through, *interval).tolist(),
                )
            )
        return rows


def _advanced(state: Tensor, weights: list[float], rates: list[Tensor]) -> Tensor:
    """The state moved on by the last of the ``rates``, as many as there are ``weights``."""
    for weight, rate in zip(weights, rates[-len(weights) :], strict=True):
        state = state + weight * rate
    return state
