"""The variational bound of a T-step model, one of its terms a sample: DDPM's L_vlb."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from score_models.level_times import LevelTimes, UniformLevels
from score_models.model import ScoreModel
from score_models.objective import Objective
from score_models.objectives.step_variance import FixedVariance, StepState, StepVariance
from score_models.objectives.weighted import noised
from score_models.variance_kinds import step_cost
from sde_lib.decoders import Decoder, DensityDecoder
from sde_lib.noise import Generator, randn
from sde_lib.sde import SDE, Level


class Term(NamedTuple):
    """Which term of the bound each sample stands for.

    Attributes:
        at: States at the level of the term, and the steps.
        noise: That is in the states, [B, ...].
        first: Whether the level is the first one, whose term is the decoder's, [B].
        importance: What each counts for, [B].
        ends: First and last level of the model, fields [].
    """

    at: StepState
    noise: Tensor
    first: Tensor
    importance: Tensor
    ends: tuple[Level, Level]


class VariationalBound(Objective, nn.Module):
    r"""Minus a lower bound on log p of the T-step model, nats a dimension, one term a sample.

    .. math::  L = L_T + \sum_{i=2}^{T} \mathrm{KL}_i + L_0, \qquad
               \frac{1}{D} \left(T \ell_i + L_T\right), \quad i \in 1..T

    with :math:`\ell_i` the cost of the step from level i to i - 1, and of the decoder for i = 1.
    With T levels from t_min to t_max these are the terms of ``likelihood.discrete_bound`` at the
    same times. L_T is the KL divergence from the prior, which no weight changes: it is there so
    that the mean of the loss is the bound.

    Reference: Ho et al., Denoising Diffusion Probabilistic Models, 2020, eq. 5; Nichol and
    Dhariwal 2021, section 3.

    Args:
        times: Which level a sample gets.
        variance: Of the steps: fixed, or a head that is trained along.
        decoder: The last factor; a density, or ``likelihood.BinDecoder`` for K-level data.
    """

    def __init__(
        self,
        times: LevelTimes | None = None,
        variance: StepVariance | None = None,
        decoder: Decoder | None = None,
    ) -> None:
        super().__init__()
        self.times = UniformLevels() if times is None else times
        self.variance = FixedVariance() if variance is None else variance
        self.decoder = DensityDecoder() if decoder is None else decoder
        if not hasattr(self.times, "row"):
            raise ValueError(
                "a bound in T steps needs times that are one of T levels, UniformLevels or "
                f"LossAwareLevels; got times={self.times!r}."
            )

    def prepare(self, model: ScoreModel, x0: Tensor, cond: Tensor | None = None) -> None:
        self.variance.prepare(model, x0, cond)

    def draw(self, sde: SDE, shape: Sequence[int], generator: Generator) -> dict[str, Tensor]:
        """Numbers [B] that a level is looked up by, noise [B, ...]."""
        return {"u": self.times.draw(shape[0], generator), "noise": randn(shape, generator)}

    def loss(
        self,
        model: ScoreModel,
        x0: Tensor,
        draws: Mapping[str, Tensor],
        cond: Tensor | None = None,
    ) -> Tensor:
        """The term of each sample, times T and its importance."""
        term = self.term(model.sde, x0, draws, cond)
        eps_hat = model(term.at.x, term.at.t, cond)
        return term.importance * self.cost(model, x0, term, eps_hat)

    def observe(self, draws: Mapping[str, Tensor], losses: Tensor) -> None:
        """For times that draw by the size of the losses."""
        self.times.observe(draws["u"], losses.detach())

    def term(self, sde: SDE, x0: Tensor, draws: Mapping[str, Tensor], cond: Tensor | None) -> Term:
        """The term that each sample of ``x0`` [B, ...] was drawn for."""
        row, importance = self.times.row(draws["u"])
        noise, first = draws["noise"].to(x0.dtype), row == 0
        every = torch.arange(self.times.levels, device=row.device)
        levels = sde.level(self.times.time(sde, every))
        # the first level has no step: it gets the numbers of the second, which do not count
        later = row.clamp(min=1)
        now, earlier, later = (_taken(levels, i) for i in (row, later - 1, later))
        at = StepState(noised(now, x0, noise), now.t, cond, earlier, later)
        ends = _taken(levels, 0), _taken(levels, -1)
        return Term(at, noise, first, importance.to(x0.dtype), ends)

    def cost(self, model: ScoreModel, x0: Tensor, term: Term, eps_hat: Tensor) -> Tensor:
        """T times each term, and L_T, nats a dimension, [B]; without importance."""
        error, at = term.noise - eps_hat, term.at
        excess = self.variance.excess(model, at)
        step = step_cost(excess, error.square(), at.earlier, at.later).flatten(1).sum(1)
        last = self._decoder_cost(x0, error, term).to(step)
        # the prior has the noise of the last level, so that only the means differ
        prior = 0.5 * x0.square().flatten(1).sum(1) / term.ends[1].noise_ratio.to(step).square()
        terms = torch.where(term.first, last, step)
        return (self.times.levels * terms + prior) / x0[0].numel()

    def _decoder_cost(self, x0: Tensor, error: Tensor, term: Term) -> Tensor:
        """L_0 of the samples at the first level, float64, [B]; of others, something finite."""
        level, x = term.ends[0], x0.double()
        wrong = error.flatten(1).masked_fill(~term.first[:, None], 0).view_as(error).double()
        return -self.decoder.log_prob(x, x + level.noise_ratio * wrong, level)


def _taken(levels: Level, rows: Tensor | int) -> Level:
    """The ``levels`` [T] of these rows, in the shape of ``rows``."""
    return Level(*(column[rows] for column in levels))
