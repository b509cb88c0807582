"""Langevin dynamics: a corrector after each step, or annealed over the noise levels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from sde_lib import validation
from sde_lib.grids import Grid, UniformLogSNR
from sde_lib.reverse import Score
from sde_lib.samplers.base import (
    FixedStepSampler,
    Noise,
    OneStepSampler,
    Plan,
    PlannedSampler,
    Step,
)
from sde_lib.samplers.predictors import ReverseDiffusion
from sde_lib.sde import SDE, Level, expand_like

LARGEST = 0.7  # of sigma, for a step of sigma²: half of what diverges


@dataclass(frozen=True)
class LangevinCorrector:
    r"""One Langevin step at a fixed noise level, its size set by a signal-to-noise ratio r.

    .. math::  x \leftarrow x + \epsilon\, s + \sqrt{2 \epsilon}\, z, \qquad \epsilon = 2 (r
    \sigma)^2

    It leaves the noised density invariant up to O(epsilon). The published rule has
    :math:`\|z\| / \|s\|` in place of sigma, which is nearly the same in many dimensions: of each
    sample (``scale=sample``), or of the means over the batch (``batch``), which ties a sample to
    its neighbours. In few dimensions it makes the step depend on the state: on a 2-D mixture the
    variance came out up to twice too large. So sigma is the default; and the ratio counts up to
    0.7 sigma / r alone, beyond which a step is longer than the level is wide.

    Reference: Song et al. 2021, algorithms 4 and 5, without the factor of nearly one that the
    second has for VP.

    Args:
        snr: r, in (0, 0.7); 0.05 to 0.2 is the useful range, 0.16 their choice for CIFAR-10.
        scale: What r is multiplied by: sigma, or the norms of each sample or of the batch.
    """

    snr: float = 0.16
    scale: str = "sigma"

    def __post_init__(self) -> None:
        validation.real("LangevinCorrector", "snr", self.snr, above=0, below=LARGEST)
        validation.choice("LangevinCorrector", "scale", self.scale, SCALES)

    def step(self, score: Score, x: Tensor, now: Level, nxt: Level, noise: Noise) -> Tensor:
        """One step at level ``nxt``; ``now`` is the same level."""
        pull, fresh = score(x, nxt.t), noise()
        scale = SCALES[self.scale](pull, fresh, nxt.sigma)
        scale = torch.minimum(scale, nxt.sigma * (LARGEST / self.snr))
        return langevin(x, pull, fresh, 2 * (self.snr * scale).square())


def langevin(x: Tensor, score: Tensor, noise: Tensor, size: Tensor) -> Tensor:
    """x + size * score + sqrt(2 size) * noise, ``size`` of shape [] or [B, 1, ...]."""
    return x + size * score + torch.sqrt(2 * size) * noise


def _of_level(score: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    return sigma


def _of_sample(score: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    return expand_like(_norms(noise) / _norms(score), score)  # infinite where the score is zero


def _of_batch(score: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    return _norms(noise).mean() / _norms(score).mean()


def _norms(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1)


SCALES = {"sigma": _of_level, "sample": _of_sample, "batch": _of_batch}


@dataclass(frozen=True)
class PredictorCorrector(FixedStepSampler):
    """A predictor step to each level, then ``corrections`` Langevin steps at it.

    Costs ``steps * (1 + corrections)`` evaluations with a first-order predictor, and one for the
    denoise; with :class:`NoPredictor` the corrector does it alone.

    Reference: Song et al. 2021, algorithm 1.

    Args:
        predictor: Any fixed-step sampler that looks at the present state, which the corrector
            has moved; its own steps and grid do not count.
        corrector: What follows each step.
        corrections: Corrector steps a level, >= 0.
    """

    predictor: FixedStepSampler = ReverseDiffusion()
    corrector: LangevinCorrector = LangevinCorrector()
    corrections: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        corrections = validation.count(
            "PredictorCorrector", "corrections", self.corrections, at_least=0
        )
        object.__setattr__(self, "corrections", corrections)
        if not hasattr(self.corrector, "step"):
            raise ValueError(
                "PredictorCorrector needs a corrector with a step, such as LangevinCorrector(); "
                f"got corrector={self.corrector!r}."
            )
        if not getattr(self.predictor, "correctable", False):
            raise ValueError(
                "PredictorCorrector needs a predictor that goes from level to level on from the "
                f"present state, and {type(self.predictor).__name__} does not. Use DDIM, Heun, "
                "DEIS or DPMSolverPP, or for noise ReverseDiffusion or Ancestral."
            )

    @property
    def stochastic(self) -> bool:
        """Whether fresh noise enters."""
        return self.corrections > 0 or self.predictor.stochastic

    @property
    def wanted(self) -> frozenset[str]:
        """What the grid and the predictor want."""
        return super().wanted | self.predictor.wanted

    def given(self, found: Mapping[str, Any]) -> PredictorCorrector:
        """This sampler with a predictor and a grid that have what they wanted."""
        return replace(super().given(found), predictor=self.predictor.given(found))

    def check(self, sde: SDE, dtype: torch.dtype = torch.float32) -> None:
        """What the predictor refuses, once there is all that it wants."""
        self._on_its_grid().check(sde, dtype)

    def _on_its_grid(self) -> FixedStepSampler:
        return replace(self.predictor, steps=self.steps, grid=self.grid)

    def plan(self, sde: SDE) -> Plan:
        """Moves of the predictor, each step of which is followed by corrections at its end."""
        plan = self._on_its_grid().plan(sde)
        times = plan.levels.t.tolist()
        moves: list[tuple[Step, int, int]] = []
        for move, i, j in plan.moves:
            corrections = self.corrections if times[j] < times[i] else 0  # churn goes up
            moves += [(move, i, j)] + [(self.corrector.step, j, j)] * corrections
        return Plan(plan.levels, moves)


@dataclass(frozen=True)
class NoPredictor(OneStepSampler):
    """Goes to the next level without an evaluation: y = x / alpha stays as it is."""

    stochastic: ClassVar[bool] = False

    def step(self, score: Score, x: Tensor, now: Level, nxt: Level, noise: Noise) -> Tensor:
        return nxt.alpha / now.alpha * x


@dataclass(frozen=True)
class AnnealedLangevin(FixedStepSampler):
    r"""Langevin dynamics at each noise level in turn, from the largest to the smallest, no
    predictor.

    In y = x / alpha, whose noise scale is rho, each level runs
    :math:`y \leftarrow y + a\, \nabla \log p(y) + \sqrt{2a}\, z` with
    :math:`a = \mathrm{step\_size}\, \rho^2`; between levels y stays. NCSN states the same step as
    :math:`a_i / 2 = \epsilon \sigma_i^2 / 2 \sigma_L^2` at its L levels: with ``sde=ncsn`` and
    L - 1 steps these are the levels, and :math:`\mathrm{step\_size} = \epsilon / 2 \sigma_L^2`. As
    rho falls below the scale of the data the dynamics freeze, which leaves the variance too large
    by about one part in inner_steps * step_size * (levels for each factor e of rho).

    Reference: Song and Ermon, Generative Modeling by Estimating Gradients of the Data
    Distribution, 2019, algorithm 1.

    Args:
        steps: Number of levels below t_max, which is one too.
        inner_steps: Langevin steps at each level.
        step_size: a in units of rho², in (0, 2): above that the dynamics diverge.
    """

    steps: int = 100
    grid: Grid = UniformLogSNR()
    inner_steps: int = 10
    step_size: float = 0.2
    stochastic: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        inner_steps = validation.count("AnnealedLangevin", "inner_steps", self.inner_steps)
        object.__setattr__(self, "inner_steps", inner_steps)
        validation.real("AnnealedLangevin", "step_size", self.step_size, above=0, below=2)

    def plan(self, sde: SDE) -> Plan:
        """Langevin steps at t_max, and after each move to a less noisy level."""
        at_level = partial(langevin_step, self.step_size)
        moves: list[tuple[Step, int, int]] = [(at_level, 0, 0)] * self.inner_steps
        for i in range(self.steps):
            moves += [(NoPredictor().step, i, i + 1)]
            moves += [(at_level, i + 1, i + 1)] * self.inner_steps
        return Plan(self.levels(sde), moves)


@dataclass(frozen=True)
class Langevin(PlannedSampler):
    r"""Langevin dynamics at one noise level, :math:`x \leftarrow x + a\, s + \sqrt{2a}\, z`.

    Between modes that lie further apart than the noise reaches it hardly moves, which is why the
    other samplers come down from large noise; where it mixes it needs no schedule. The start is
    brought to the level with its size in units of :math:`\sqrt{\alpha^2 + \sigma^2}`.

    Reference: Song and Ermon 2019, section 2.2.

    Args:
        steps: Langevin steps.
        t: Time of the level, in [t_min, t_max]; t_min if not given.
        step_size: a in units of sigma², in (0, 2): above that the dynamics diverge. The larger the
            further from the density that they leave invariant, by O(step_size).
        denoise: Whether the end is E[x_0 | x] at the level, one more evaluation, or x there.
    """

    steps: int = 1000
    t: float | None = None
    step_size: float = 0.2
    denoise: bool = True
    stochastic: ClassVar[bool] = True
    correctable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", validation.count("Langevin", "steps", self.steps))
        validation.real("Langevin", "step_size", self.step_size, above=0, below=2)
        validation.flag("Langevin", "denoise", self.denoise)
        if self.t is not None:
            validation.real("Langevin", "t", self.t, above=0)

    def plan(self, sde: SDE) -> Plan:
        """One move to the level, and the steps at it."""
        t = sde.t_min if self.t is None else self.t
        if not sde.t_min <= t <= sde.t_max:
            raise ValueError(
                f"Langevin needs t between t_min={sde.t_min:g} and t_max={sde.t_max:g} of "
                f"{type(sde).__name__}; got t={t:g}."
            )
        levels = sde.level(torch.tensor([sde.t_max, t], dtype=torch.float64))
        steps = [(partial(langevin_step, self.step_size), 1, 1)] * self.steps
        return Plan(levels, [(_resize, 0, 1), *steps])


def langevin_step(
    step_size: float, score: Score, x: Tensor, now: Level, nxt: Level, noise: Noise
) -> Tensor:
    """One step at level ``nxt``, of size ``step_size`` in units of sigma²."""
    return langevin(x, score(x, nxt.t), noise(), step_size * nxt.sigma.square())


def _resize(score: Score, x: Tensor, now: Level, nxt: Level, noise: Noise) -> Tensor:
    return torch.hypot(nxt.alpha, nxt.sigma) / torch.hypot(now.alpha, now.sigma) * x
