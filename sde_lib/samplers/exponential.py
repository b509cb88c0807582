"""Exponential integrators: the linear part of the flow exactly, the network by polynomials."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, partial

import numpy as np
import torch
from torch import Tensor

from sde_lib.reverse import Score
from sde_lib.samplers.base import FixedStepSampler, Noise, Plan, Step
from sde_lib.samplers.remembered import remembered
from sde_lib.sde import SDE, Level

POINTS = 20  # of Gauss-Legendre: exact to rounding for steps of up to some units of the clock


class Prediction(ABC):
    r"""What the network is taken to predict, and how the rest of the flow is solved exactly.

    In the clock :math:`u = \log\varrho`, :math:`\varrho = \sigma/\alpha`, the reverse process
    with an amount :math:`\eta` of fresh noise has the solution

    .. math::  x_b = k\, x_a + \int_{u_a}^{u_b} w(u)\, m(u)\, du + c\, z

    for a prediction m along the path. A subclass states m as :math:`p\,x + q\,s` of state and
    score, and k, w and c. All arguments are float64, of any shape that broadcasts.
    """

    @abstractmethod
    def of_score(self, level: Level) -> tuple[Tensor, Tensor]:
        """p and q at ``level``."""

    @abstractmethod
    def kept(self, now: Level, nxt: Level, eta: float) -> Tensor:
        """k, what is left of x from ``now`` to the less noisy ``nxt``."""

    @abstractmethod
    def weight(self, u: Tensor, nxt: Level, eta: float) -> Tensor:
        """w at clock ``u`` on the way to ``nxt``."""

    @abstractmethod
    def fresh(self, now: Level, nxt: Level, eta: float) -> Tensor:
        """c, the standard deviation of the new noise."""


class NoisePrediction(Prediction):
    r"""m = :math:`\hat\varepsilon`: :math:`d(x/\alpha) = (1 + \eta^2)\, \hat\varepsilon\,
    d\varrho`; DPM-Solver and DEIS."""

    def of_score(self, level: Level) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(level.sigma), -level.sigma

    def kept(self, now: Level, nxt: Level, eta: float) -> Tensor:
        return nxt.alpha / now.alpha

    def weight(self, u: Tensor, nxt: Level, eta: float) -> Tensor:
        return (1 + eta**2) * nxt.alpha * u.exp()

    def fresh(self, now: Level, nxt: Level, eta: float) -> Tensor:
        passed = (now.noise_ratio.square() - nxt.noise_ratio.square()).clamp(min=0)
        return eta * nxt.alpha * passed.sqrt()


class DataPrediction(Prediction):
    r"""m = :math:`\hat x_0`: :math:`d(x/\alpha)/du = (1 + \eta^2)(x/\alpha - \hat x_0)`;
    DPM-Solver++ and UniPC. The noise that remains decays exactly."""

    def of_score(self, level: Level) -> tuple[Tensor, Tensor]:
        return 1 / level.alpha, level.sigma.square() / level.alpha

    def kept(self, now: Level, nxt: Level, eta: float) -> Tensor:
        shrink = (nxt.noise_ratio / now.noise_ratio) ** (1 + eta**2)
        return nxt.alpha / now.alpha * shrink

    def weight(self, u: Tensor, nxt: Level, eta: float) -> Tensor:
        rate = 1 + eta**2
        return -rate * nxt.alpha * (rate * (nxt.noise_ratio.log() - u)).exp()

    def fresh(self, now: Level, nxt: Level, eta: float) -> Tensor:
        passed = 2 * eta**2 * (nxt.noise_ratio / now.noise_ratio).log()
        return nxt.sigma * (-torch.expm1(passed)).clamp(min=0).sqrt()


class VPrediction(Prediction):
    r"""m = v = :math:`(\alpha\hat\varepsilon - \sigma\hat x_0) / S`, :math:`S^2 = \alpha^2 +
    \sigma^2`: :math:`d(x/S)/du = (\alpha\sigma/S^2)\, v`.

    The state turns in the plane of data and noise by an angle :math:`\arctan\varrho`; v is of
    order one at both ends, where the other two lose their information. Fresh noise replaces what
    was there,

    .. math::  d\frac xS = \left[(1 + \eta^2)\frac{\alpha\sigma}{S^2}\, v
               + \eta^2 \frac{\sigma^2}{S^2} \frac xS\right] du
               + \eta \sqrt2\, \frac{\sigma}{S}\, d\bar w

    at a rate whose integral is :math:`\log(1 + \varrho^2)`: of data of variance one, for which v
    vanishes, the variance is kept by steps of any length.
    """

    def of_score(self, level: Level) -> tuple[Tensor, Tensor]:
        scale = torch.hypot(level.alpha, level.sigma)
        return -level.sigma / (level.alpha * scale), -level.sigma * scale / level.alpha

    def kept(self, now: Level, nxt: Level, eta: float) -> Tensor:
        scales = torch.hypot(nxt.alpha, nxt.sigma) / torch.hypot(now.alpha, now.sigma)
        return scales * self._left(now.noise_ratio, nxt, eta)

    def weight(self, u: Tensor, nxt: Level, eta: float) -> Tensor:
        rate = (1 + eta**2) * torch.hypot(nxt.alpha, nxt.sigma) * 0.5 / torch.cosh(u)
        return rate * self._left(u.exp(), nxt, eta)

    def fresh(self, now: Level, nxt: Level, eta: float) -> Tensor:
        replaced = -torch.expm1(2 * self._log_left(now.noise_ratio, nxt, eta))
        return torch.hypot(nxt.alpha, nxt.sigma) * replaced.clamp(min=0).sqrt()

    def _left(self, ratio: Tensor, nxt: Level, eta: float) -> Tensor:
        return self._log_left(ratio, nxt, eta).exp()

    def _log_left(self, ratio: Tensor, nxt: Level, eta: float) -> Tensor:
        """Log of what is not replaced from the noise ratio ``ratio`` to ``nxt``."""
        return 0.5 * eta**2 * (torch.log1p(nxt.noise_ratio**2) - torch.log1p(ratio**2))


PREDICTIONS: dict[str, Prediction] = {
    "noise": NoisePrediction(),
    "data": DataPrediction(),
    "v": VPrediction(),
}


@cache
def _gauss_legendre() -> tuple[Tensor, Tensor]:
    points, weights = np.polynomial.legendre.leggauss(POINTS)
    return torch.from_numpy(points), torch.from_numpy(weights)


def polynomial_weights(
    prediction: Prediction,
    nodes: Tensor,
    now: Level,
    nxt: Level,
    *,
    eta: float = 0.0,
    midpoint: bool = False,
) -> Tensor:
    r"""Weights [N, k] with which predictions at k ``nodes`` enter N steps.

    .. math::  w_j = \int_{u_a}^{u_b} w(u)\, \ell_j(u)\, du

    with the Lagrange polynomials :math:`\ell_j` of the nodes: exact for predictions that are
    polynomials of degree k - 1 in the clock.

    Args:
        prediction: Which one.
        nodes: Clock values, [N, k], those of a row all different.
        now: Where the steps start, fields of shape [N].
        nxt: Where they end.
        eta: Amount of fresh noise.
        midpoint: Take the polynomial of two nodes at the middle of the step, as DPM-Solver++ 2M
            and UniPC do; of the same order.
    """
    start, end = now.noise_ratio.log()[:, None], nxt.noise_ratio.log()[:, None]
    points, shares = _panels(eta**2 * float((start - end).max()))
    u = end + (start - end) * points  # [N, points]
    to = Level(*(field[:, None] for field in nxt))
    mass = (end - start) * shares * prediction.weight(u, to, eta)
    if midpoint and nodes.shape[1] == 2:
        middle = _lagrange(nodes, 0.5 * (start + end))[..., 0]
        return middle * mass.sum(1, keepdim=True)
    return (_lagrange(nodes, u) * mass[:, None]).sum(2)


def _panels(replaced: float) -> tuple[Tensor, Tensor]:
    """Points in [0, 1] from the end of a step to its start, and weights: Gauss-Legendre on panels
    that halve towards the end, where noise that replaces the old ``replaced`` times over within
    the step leaves all weight."""
    points, weights = _gauss_legendre()
    halvings = max(0, math.ceil(math.log2(max(replaced, 1.0) / 4)))
    edges = torch.tensor([0.0, *(2.0 ** (k - halvings) for k in range(halvings + 1))])
    width = edges.diff().double()[:, None]
    inside = edges[:-1].double()[:, None] + width * 0.5 * (1 + points)
    return inside.flatten(), (0.5 * width * weights).flatten()


def _lagrange(nodes: Tensor, u: Tensor) -> Tensor:
    """Lagrange polynomials of ``nodes`` [N, k] at ``u`` [N, P], [N, k, P]."""
    columns = []
    for j in range(nodes.shape[1]):
        others = [i for i in range(nodes.shape[1]) if i != j]
        factors = [
            (u - nodes[:, i : i + 1]) / (nodes[:, j : j + 1] - nodes[:, i : i + 1]) for i in others
        ]
        column = torch.ones_like(u)
        for factor in factors:
            column = column * factor
        columns.append(column)
    return torch.stack(columns, dim=1)


@dataclass(frozen=True)
class Row:
    """Numbers of one linear update: ``x <- kept x + sum of weights times predictions + fresh z``.

    The weights go with the predictions in the order in which they were made, the newest first.
    """

    kept: float
    weights: tuple[float, ...]
    fresh: float = 0.0

    def __call__(self, x: Tensor, seen: Sequence[Tensor]) -> Tensor:
        """The update without its noise."""
        newest, *others = self.weights
        kept = x if self.kept == 1 else x * self.kept
        x = torch.add(kept, seen[0], alpha=newest)
        for weight, prediction in zip(others, seen[1:], strict=False):
            if weight:
                x.add_(prediction, alpha=weight)
        return x


@dataclass(frozen=True)
class Stage:
    """One evaluation and what is made of it.

    Args:
        of_score: p and q: the prediction is p x + q s.
        step: From the base to the next point at which to evaluate.
        correct: First moves the base here, from where it was: a corrector, which knows the
            prediction made here.
        holds: Whether the base stays where it was: an inner stage of a step of several. Else the
            base is the present x.
    """

    of_score: tuple[float, float]
    step: Row
    correct: Row | None = None
    holds: bool = False

    @property
    def depth(self) -> int:
        """How many predictions it looks at."""
        return max(len(row.weights) for row in (self.step, self.correct) if row is not None)


@dataclass
class Recurrence:
    """What the stages of one trajectory remember: the base of the step and the predictions."""

    depth: int
    base: Tensor | None = None
    seen: list[Tensor] = field(default_factory=list)

    def __call__(
        self,
        stage: Stage,
        score: Score,
        x: Tensor,
        now: Level,
        nxt: Level,
        noise: Noise,
    ) -> Tensor:
        """The next point, from ``x`` at the level ``now``."""
        p, q = stage.of_score
        prediction = score(x, now.t) * q
        if p:
            prediction.add_(x, alpha=p)
        self.seen = [prediction, *self.seen[: self.depth - 1]]
        if stage.correct is not None:
            self.base = stage.correct(self.base, self.seen)
        elif not stage.holds:
            self.base = x
        x = stage.step(self.base, self.seen)
        return x.add_(noise(), alpha=stage.step.fresh) if stage.step.fresh else x


@dataclass(frozen=True)
class ExponentialSampler(FixedStepSampler):
    """A sampler whose steps are :class:`Stage` objects: tables of numbers, laid out once, in
    float64."""

    @abstractmethod
    def stages(self, sde: SDE) -> tuple[Level, list[tuple[Stage, int, int]]]:
        """The levels that are visited, and each stage with the rows that it joins."""

    def plan(self, sde: SDE) -> Plan:
        """The stages, sharing the memory of one trajectory."""
        levels, stages = remembered(type(self).stages, self, sde)
        memory = Recurrence(max(stage.depth for stage, _, _ in stages))
        moves: list[tuple[Step, int, int]] = [
            (partial(memory, stage), i, j) for stage, i, j in stages
        ]
        return Plan(levels, moves)


Leap = tuple[int, int, tuple[int, ...]]


def rows(
    prediction: Prediction,
    levels: Level,
    leaps: Sequence[Leap],
    *,
    eta: float = 0.0,
    midpoint: bool = False,
) -> list[Row]:
    """The update of each leap: from row i to row j of ``levels``, through the predictions made at
    the rows of its third entry, the newest first."""
    found: dict[int, Row] = {}
    clock = levels.noise_ratio.log()
    for size in {len(leap[2]) for leap in leaps}:
        which = [n for n, leap in enumerate(leaps) if len(leap[2]) == size]
        now, nxt = (
            Level(*(field[[leaps[n][end] for n in which]] for field in levels)) for end in (0, 1)
        )
        nodes = clock[torch.tensor([leaps[n][2] for n in which])]
        weights = polynomial_weights(prediction, nodes, now, nxt, eta=eta, midpoint=midpoint)
        kept, fresh = prediction.kept(now, nxt, eta), prediction.fresh(now, nxt, eta)
        kept = torch.where((kept - 1).abs() < 1e-14, 1.0, kept)  # spares a pass over the state
        columns = zip(which, kept.tolist(), weights.tolist(), fresh.tolist(), strict=True)
        found |= {n: Row(k, tuple(w), c if eta else 0.0) for n, k, w, c in columns}
    return [found[n] for n in range(len(leaps))]


def of_scores(prediction: Prediction, levels: Level) -> list[tuple[float, float]]:
    """p and q of the prediction at each row of ``levels``."""
    return list(zip(*(column.tolist() for column in prediction.of_score(levels)), strict=True))
