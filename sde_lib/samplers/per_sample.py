"""Steps of its own size for each sample: an embedded pair of exponential integrators."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from sde_lib import validation
from sde_lib.counting import Counted
from sde_lib.noise import Generator
from sde_lib.reverse import ProbabilityFlow, Score, probability_flow
from sde_lib.rows import for_rows
from sde_lib.samplers.adaptive import check_tolerances
from sde_lib.samplers.base import InShape, Sampler, SamplingError, denoise
from sde_lib.samplers.exponential import Prediction, polynomial_weights
from sde_lib.samplers.step_noise import NoNoise, StepNoise
from sde_lib.sde import SDE, Level, expand_like


class Through(NamedTuple):
    """The polynomial that a step integrates.

    Attributes:
        predictions: By number, those that it goes through.
        midpoint: Whether its value at the middle of the step is taken all along the step.
    """

    predictions: tuple[int, ...]
    midpoint: bool = False


@dataclass(frozen=True)
class Pair:
    """Two solutions of one step that share their evaluations; they differ by its error.

    Predictions are made at the start of the step and at some points of it, each of which is
    reached by a polynomial through the predictions at the last point and at the start.

    Args:
        shares: Where these points are, in shares of the step in the clock.
        low: The less accurate solution.
        high: The one that is kept.
    """

    shares: tuple[float, ...]
    low: Through
    high: Through


@dataclass
class Front:
    """How far each sample of a batch has come. What steps depend on is kept on the CPU.

    Attributes:
        x: The states [B, ...]; replaced, never written to.
        compared: The less accurate end of the last step of each, which sets the tolerance too.
        clock: Where they are, log(sigma/alpha) [B], float64.
        size: The next step that each wants to take, in the clock [B], float64.
        begun: The predictions at x [B, ...]: a step that is tried again needs no new ones.
        fresh: Whether they are still to be made [B].
    """

    x: Tensor
    compared: Tensor
    clock: Tensor
    size: Tensor
    begun: Tensor
    fresh: Tensor

    @classmethod
    def at(cls, x: Tensor, clock: float, size: float) -> Front:
        """All samples at the same ``clock``."""
        filled = torch.full((len(x),), clock, dtype=torch.float64)
        fresh = torch.ones(len(x), dtype=torch.bool)
        return cls(x, x, filled, torch.full_like(filled, size), torch.zeros_like(x), fresh)

    def move(self, rows: Tensor, x: Tensor, compared: Tensor, clock: Tensor) -> None:
        """Samples ``rows`` have taken their step."""
        where = rows.to(self.x.device)
        self.x = self.x.index_copy(0, where, x)
        self.compared = self.compared.index_copy(0, where, compared)
        self.clock[rows], self.fresh[rows] = clock, True


class RowScore:
    """A score function for some rows of a batch, [A, ...] and t [A].

    Args:
        score: Score function (x, t [A]) -> score.
        compact: Whether it is given these rows alone, or always the whole batch.
    """

    def __init__(self, score: Score, *, compact: bool) -> None:
        self.score, self.compact = Counted(InShape(score)), compact

    def __call__(self, front: Front, rows: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The scores of ``rows`` at ``x`` [A, ...] and ``t`` [A]; other rows wait."""
        if len(rows) == len(front.x):
            return self.score(x, t)
        if self.compact:
            return for_rows(self.score, rows)(x, t)
        everything = front.x.index_copy(0, rows.to(x.device), x)
        times = t.new_full((len(front.x),), float(t[0])).index_copy(0, rows.to(t.device), t)
        return self.score(everything, times)[rows.to(x.device)]


class PerSampleSampler(Sampler):
    r"""A sampler that fits the size of its steps to each sample, by an embedded :class:`Pair`.

    A step is accepted where

    .. math::  E = \sqrt{\frac1D \sum_d \left(\frac{x^{high}_d - x^{low}_d}
               {\max(a S,\, r |x^{low}_d|,\, r |x^{before}_d|)}\right)^2} \le 1,
               \qquad S = \sqrt{\alpha^2 + \sigma^2}

    with the less accurate solution of the step before; the next one is :math:`0.9\, E^{-p}` times
    as long. How long a step may be, and how much longer than the one before, is bounded, as it is
    not in the published rules: over a step from pure noise to data both solutions end at the mean
    of the data, and agree; and the error of one step may vanish by chance.

    No sample looks at another: its steps, and its result, are what they are alone, but for the
    rounding of a network that computes a batch of another size in another order. Samples that
    have arrived leave the batch; ``compact=False`` keeps them in it.

    Score functions are given times t of shape [B], one for each sample that is left.
    """

    safety: ClassVar[float] = 0.9
    growth: ClassVar[float] = 5.0  # how many times as long as the one before a step may be
    eta: float
    rtol: float
    atol: float
    first_step: float
    longest_step: float
    denoise: bool
    compact: bool
    max_evaluations: int

    def __post_init__(self) -> None:
        owner = type(self).__name__
        check_tolerances(owner, self.rtol, self.atol, torch.float64)
        validation.real(owner, "first_step", self.first_step, above=0)
        validation.real(owner, "longest_step", self.longest_step, at_least=self.first_step)
        validation.flag(owner, "denoise", self.denoise)
        validation.flag(owner, "compact", self.compact)
        validation.count(owner, "max_evaluations", self.max_evaluations)

    @property
    def converges(self) -> None:
        """None: the error falls with the tolerance, not with a number of steps."""

    def check(self, sde: SDE, dtype: torch.dtype = torch.float32) -> None:
        """The rounding of the states bounds what can be asked for."""
        check_tolerances(type(self).__name__, self.rtol, self.atol, dtype)

    @property
    @abstractmethod
    def pair(self) -> Pair:
        """The two solutions of a step."""

    @property
    @abstractmethod
    def exponent(self) -> float:
        """p: how the next step answers to the error of this one."""

    @property
    @abstractmethod
    def integrated(self) -> Prediction:
        """What is integrated by polynomials."""

    def noise(self, x: Tensor, generator: Generator) -> StepNoise:
        """The source of fresh noise along the trajectories of ``x`` [B, ...]; none by default."""
        return NoNoise()

    def trajectory(
        self, score: Score, sde: SDE, x: Tensor, *, generator: Generator = None
    ) -> Iterator[tuple[float, Tensor]]:
        """The states after each round of steps, with the time of the sample that is furthest
        behind; the others are ahead of it, nearer to the data."""
        self.check(sde, x.dtype)
        flow = probability_flow(sde, score)
        data_end, noise_end = flow.clock_range()
        front = Front.at(x, noise_end, self.first_step)
        attempt = _Attempt(self, flow, front, self.noise(x, generator))
        yield sde.t_max, x
        while bool((front.clock > data_end).any()):
            self._round(attempt, data_end)
            yield float(flow.level_at(front.clock.max()).t), front.x
        if self.denoise:
            end = flow.level_at(torch.tensor(data_end, dtype=torch.float64)).like(x)
            yield sde.t_min, denoise(attempt.score.score, front.x, end)

    def _round(self, attempt: _Attempt, data_end: float) -> None:
        """One step, accepted or not, of each sample that has not arrived."""
        front, noise = attempt.front, attempt.noise
        self._give_up(attempt)
        rows = (front.clock > data_end).nonzero()[:, 0]
        clock, size = front.clock[rows], front.size[rows]
        target = torch.maximum(clock - size, noise.known(rows).clamp(min=data_end))
        low, high, scale = attempt(rows, clock, target)
        error = self._error(low, high, front.compared[rows.to(low.device)], scale)
        error = error.cpu()  # waits for the device: how far to go depends on it
        self._refuse_nan(attempt, error, clock, target)
        factor = self.safety * error.clamp(min=1e-300) ** -self.exponent
        factor = factor.clamp(max=self.growth)
        front.size[rows] = ((clock - target) * factor).clamp(max=self.longest_step)
        good = error <= 1
        kept = good.nonzero()[:, 0].to(low.device)
        front.move(rows[good], high[kept], low[kept], target[good])
        noise.forget(rows[good])

    def _error(self, low: Tensor, high: Tensor, before: Tensor, scale: Tensor) -> Tensor:
        """E of each sample, [A] float64."""
        size = self.rtol * torch.maximum(low.abs(), before.abs())
        tolerance = torch.maximum(size, self.atol * expand_like(scale.to(low), low))
        ratio = ((high - low) / tolerance).reshape(len(low), -1)
        return ratio.double().square().mean(1).sqrt()

    def _give_up(self, attempt: _Attempt) -> None:
        front, spent = attempt.front, attempt.score.score.nfe
        if spent + 1 + len(attempt.sampler.pair.shares) <= self.max_evaluations:
            return
        level = attempt.flow.level_at(front.clock.max())
        raise SamplingError(
            f"{self}: not finished after {spent} evaluations; the sample furthest behind is at "
            f"t = {float(level.t):.4g}, log(sigma/alpha) = {float(front.clock.max()):.4g}; loosen "
            "rtol and atol, or raise max_evaluations."
        )

    def _refuse_nan(self, attempt: _Attempt, error: Tensor, clock: Tensor, target: Tensor) -> None:
        lost = ~torch.isfinite(error)
        if not bool(lost.any()):
            return
        i = int(lost.nonzero()[0])
        start, end = (float(attempt.flow.level_at(u[i]).t) for u in (clock, target))
        raise SamplingError(
            f"{self}: the steps of {int(lost.sum())} of {len(error)} samples are not finite, the "
            f"first of them between t = {start:.4g} and {end:.4g}; does the score function return "
            "NaN there?"
        )


class _Attempt:
    """One step of some samples, from where they are: both solutions, by the pair's evaluations."""

    def __init__(
        self, sampler: PerSampleSampler, flow: ProbabilityFlow, front: Front, noise: StepNoise
    ) -> None:
        self.sampler, self.flow, self.front, self.noise = sampler, flow, front, noise
        self.score = RowScore(flow.score, compact=sampler.compact)

    def __call__(
        self, rows: Tensor, clock: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The less and the more accurate end of steps from ``clock`` to ``target`` [A], and the
        scale of the states there."""
        pair, shares = self.sampler.pair, (0.0, *self.sampler.pair.shares)
        points = torch.stack([clock + share * (target - clock) for share in shares], 1)
        levels = [self.flow.level_at(u) for u in points.unbind(1)]
        end = self.flow.level_at(target)
        step = _Leaps(self.sampler, self.front.x[rows.to(self.front.x.device)], points, levels[0])
        seen = [self._begun(rows, levels[0])]
        noise = self.noise.between(rows, clock, target)
        for k, level in enumerate(levels[1:], start=1):
            whole = shares[k] == 1  # only a step to its end takes the noise along
            point = step(level, seen, Through((k - 1, 0)[:k]), noise if whole else None)
            seen.append(self._prediction(rows, point, level))
        low, high = (step(end, seen, through, noise) for through in (pair.low, pair.high))
        return low, high, self.flow.scale(end)

    def _begun(self, rows: Tensor, level: Level) -> Tensor:
        """The predictions at the start; those of a step that is tried again are there already."""
        front, new = self.front, self.front.fresh[rows]
        if bool(new.any()):
            which, at = rows[new], Level(*(field[new] for field in level))
            where = which.to(front.x.device)
            made = self._prediction(which, front.x[where], at)
            front.begun = front.begun.index_copy(0, where, made)
            front.fresh[which] = False
        return front.begun[rows.to(front.x.device)]

    def _prediction(self, rows: Tensor, x: Tensor, level: Level) -> Tensor:
        p, q = (expand_like(c.to(x), x) for c in self.sampler.integrated.of_score(level))
        return p * x + q * self.score(self.front, rows, x, level.t.to(x.device))


@dataclass
class _Leaps:
    """Exponential steps from one base, ``x`` [A, ...] at ``start``, through predictions made at
    ``points`` [A, k] of the clock."""

    sampler: PerSampleSampler
    x: Tensor
    points: Tensor
    start: Level

    def __call__(
        self, to: Level, seen: list[Tensor], through: Through, noise: Tensor | None
    ) -> Tensor:
        """The state at the level ``to`` [A]; ``noise`` is in units of the scale there."""
        prediction, eta = self.sampler.integrated, self.sampler.eta
        nodes = self.points[:, list(through.predictions)]
        weights = polynomial_weights(
            prediction, nodes, self.start, to, eta=eta, midpoint=through.midpoint
        )
        columns = (prediction.kept(self.start, to, eta), *weights.unbind(1))
        kept, *shares = (expand_like(c.to(self.x), self.x) for c in columns)
        moved = kept * self.x
        for share, i in zip(shares, through.predictions, strict=True):
            moved = moved + share * seen[i]
        if noise is None:
            return moved
        return moved + expand_like(torch.hypot(to.alpha, to.sigma).to(noise), noise) * noise
