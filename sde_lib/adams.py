"""Linear multistep rules on uneven nodes: one evaluation a node, any order the nodes allow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sde_lib import validation
from sde_lib.sde import expand_like


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

    From z_n and the rates at the last nodes, the Adams-Bashforth rule of order p predicts
    z_{n+1}, the rate is evaluated there, and the Adams-Moulton rule of order p, which uses it,
    corrects. The error falls like the power p of the spacing; the first steps, with fewer rates
    behind them, are of lower order.

    For the state a predictor of order p - 1 would do. But what else is seen of a network at the
    predicted point, its trace above all, is as wrong as that point: on a U-Net for MNIST order p
    took 2 nats of log p off, at 44 nodes. Where a sample passes from one mode to another within a
    step it overshoots, so that each sample falls back to order p - 1 wherever the last order
    would correct the guess by more than the one before it did. On ``fine`` nodes the guess of
    order p - 1 is near enough for all.

    Reference: Hairer, Norsett, Wanner, Solving Ordinary Differential Equations I, chapter III.

    Args:
        nodes: Monotone clock values, [N] float64, N >= 2.
        order: p, from 2 to 6.
        fine: Whether to predict at order p - 1 throughout.
    """

    nodes: Tensor
    order: int
    fine: bool = False

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
        for i, (predictors, correct) in enumerate(self.tables, start=1):
            guesses = [_advanced(state, predict, rates) for predict in predictors]
            rates = [*rates, rate(i, _settled(guesses))]
            state = _advanced(state, correct, rates)
            rates = rates[-self.order :]
        return state

    @property
    def tables(self) -> list[tuple[list[list[float]], list[float]]]:
        """Weights of each step's predictors, of falling order, and of its corrector; the oldest
        rate first."""
        rows = []
        for i in range(1, len(self.nodes)):
            interval = float(self.nodes[i - 1]), float(self.nodes[i])
            most = min(i, self.order)
            orders = range(most, max(most - 3, 0), -1)
            if self.fine:
                orders = [min(i, self.order - 1)]
            predictors = [
                interpolation_weights(self.nodes[i - order : i], *interval).tolist()
                for order in orders
            ]
            through = self.nodes[max(0, i + 1 - self.order) : i + 1]
            rows.append((predictors, interpolation_weights(through, *interval).tolist()))
        return rows


def _settled(guesses: list[Tensor]) -> Tensor:
    """Of up to three guesses of falling order the first, or, sample by sample, the second where
    these two differ by more than the last two do."""
    if len(guesses) < 3:
        return guesses[0]
    best, second, third = guesses
    last, before = (
        step.reshape(len(step), -1).square().sum(1) for step in (best - second, second - third)
    )
    return torch.where(expand_like(last < before, best), best, second)


def _advanced(state: Tensor, weights: list[float], rates: list[Tensor]) -> Tensor:
    """The state moved on by the last of the ``rates``, as many as there are ``weights``."""
    for weight, rate in zip(weights, rates[-len(weights) :], strict=True):
        state = state + weight * rate
    return state
