"""Langevin dynamics: a corrector after each step, or annealed over the noise levels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from sde_lib import validation
from sde_lib.grids import Grid, UniformLogSNR
from sde_lib.reverse import Score
from sde_lib.samplers.base import FixedStepSampler, Noise, OneStepSampler, Plan, Step
from sde_lib.samplers.predictors import ReverseDiffusion
from sde_lib.sde import SDE, Level


@dataclass(frozen=True)
class LangevinCorrector:
    r"""One Langevin step at a fixed noise level, its size set by a signal-to-noise ratio r.

    .. math::  x \leftarrow x + \epsilon\, s + \sqrt{2 \epsilon}\, z, \qquad \epsilon = 2 (r
    \sigma)^2

    It leaves the noised density invariant up to O(epsilon). The published rule has
    :math:`\|z\| / \|s\|` in place of sigma, which is nearly the same in many dimensions. In few it
    makes the step depend on the state: on a 2-D mixture the variance came out up to twice too
    large, and norms over a batch tie each sample to its neighbours. So sigma it is.

    Reference: Song et al. 2021, algorithms 4 and 5.

    Args:
        snr: r, in (0, 0.7); 0.05 to 0.2 is the useful range, 0.16 their choice for CIFAR-10.
    """

    snr: float = 0.16

    def __post_init__(self) -> None:
        validation.real("LangevinCorrector", "snr", self.snr, above=0, below=0.7)

    def step(self, score: Score, x: Tensor, now: Level, nxt: Level, noise: Noise) -> Tensor:
        """One step at level ``nxt``; ``now`` is the same level."""
        size = 2 * (self.snr * nxt.sigma) ** 2
        return x + size * score(x, nxt.t) + torch.sqrt(2 * size) * noise()


@dataclass(frozen=True)
class PredictorCorrector(FixedStepSampler):
    """A predictor step to each level, then ``corrections`` Langevin steps at it.

    Costs ``steps * (1 + corrections)`` evaluations with a first-order predictor, and one for the
    denoise.

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
    stochastic: ClassVar[bool] = True

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
                "PredictorCorrector needs a predictor that goes on from the present state; "
                f"{type(self.predictor).__name__} goes on from one that it remembers. Use DDIM, "
                "Heun, DEIS or DPMSolverPP, or for noise ReverseDiffusion or Ancestral."
            )

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
class AnnealedLangevin(OneStepSampler):
    r"""Langevin dynamics at each noise level in turn, from the largest to the smallest, no
    predictor.

    In y = x / alpha, whose noise scale is rho, each level runs
    :math:`y \leftarrow y + a\, \nabla \log p(y) + \sqrt{2a}\, z` with
    :math:`a = \mathrm{step\_size}\, \rho^2`; between levels y stays. NCSN states the same step as
    :math:`a_0 (\rho_i / \rho_L)^2`. As rho falls below the scale of the data the dynamics freeze,
    which leaves the variance too large by about one part in inner_steps * step_size * (levels for
    each
    factor e of rho).

    Reference: Song and Ermon, Generative Modeling by Estimating Gradients of the Data
    Distribution, 2019.

    Args:
        steps: Number of levels below t_max.
        inner_steps: Langevin steps at each level.
        step_size: a in units of rho², in (0, 2): above that the dynamics diverge.
    """

    steps: int = 100
    grid: Grid = field(default_factory=UniformLogSNR)
    inner_steps: int = 10
    step_size: float = 0.2
    stochastic: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        inner_steps = validation.count("AnnealedLangevin", "inner_steps", self.inner_steps)
        object.__setattr__(self, "inner_steps", inner_steps)
        validation.real("AnnealedLangevin", "step_size", self.step_size, above=0, below=2)

    def plan(self, sde: SDE) -> Plan:
        """For each level, one step that enters it and the others at it."""
        moves: list[tuple[Step, int, int]] = []
        for i in range(self.steps):
            moves += [(self.step, i, i + 1)]
            moves += [(self.step, i + 1, i + 1)] * (self.inner_steps - 1)
        return Plan(self.levels(sde), moves)

    def step(self, score: Score, x: Tensor, now: Level, nxt: Level, noise: Noise) -> Tensor:
        x = nxt.alpha / now.alpha * x
        size = self.step_size * nxt.sigma**2
        return x + size * score(x, nxt.t) + torch.sqrt(2 * size) * noise()
