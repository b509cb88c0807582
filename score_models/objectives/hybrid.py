"""Regression of the noise with a thousandth of the bound, which teaches the variance: L_hybrid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from score_models.level_times import LevelTimes
from score_models.model import ScoreModel
from score_models.objective import Objective
from score_models.objectives.bound import VariationalBound
from score_models.objectives.step_variance import LearnedVariance, StepVariance
from sde_lib import validation
from sde_lib.decoders import Decoder
from sde_lib.noise import Generator
from sde_lib.sde import SDE


class Hybrid(Objective, nn.Module):
    r"""L_simple for the mean, the bound for the variance, from one pass of the network.

    .. math::  \frac{1}{D} \|\varepsilon - \hat\varepsilon\|^2 + \mathrm{share} \cdot
               \frac{T \ell_i + L_T}{D}

    The bound is taken at a noise estimate that is held fixed, so that the network's gradient is
    L_simple's alone, and the head's is ``share`` times that of the whole bound in nats a
    dimension: over levels drawn evenly the mean of :math:`T \ell_i` is the sum of all steps. The
    published code has bits for nats: its 0.001 is 0.00144 here. Under Adam the head learns the
    same with any share.

    Reference: Nichol and Dhariwal, Improved Denoising Diffusion Probabilistic Models, 2021,
    eq. 16.

    Args:
        times: Which level a sample gets.
        variance: Of the steps, a head by default.
        decoder: See :class:`VariationalBound`.
        share: What the bound counts for, > 0.
    """

    def __init__(
        self,
        times: LevelTimes | None = None,
        variance: StepVariance | None = None,
        decoder: Decoder | None = None,
        share: float = 1e-3,
    ) -> None:
        super().__init__()
        variance = LearnedVariance() if variance is None else variance
        self.bound = VariationalBound(times, variance, decoder)
        self.share = validation.real("Hybrid", "share", share, above=0)

    def prepare(self, model: ScoreModel, x0: Tensor, cond: Tensor | None = None) -> None:
        self.bound.prepare(model, x0, cond)

    def draw(self, sde: SDE, shape: Sequence[int], generator: Generator) -> dict[str, Tensor]:
        """Those of the bound."""
        return self.bound.draw(sde, shape, generator)

    def loss(
        self,
        model: ScoreModel,
        x0: Tensor,
        draws: Mapping[str, Tensor],
        cond: Tensor | None = None,
    ) -> Tensor:
        """Both parts, times the importance of the level."""
        term = self.bound.term(model.sde, x0, draws, cond)
        eps_hat = model(term.at.x, term.at.t, cond)
        simple = (eps_hat - term.noise).square().flatten(1).mean(1)
        bound = self.bound.cost(model, x0, term, eps_hat.detach())
        return term.importance * (simple + self.share * bound)

    def observe(self, draws: Mapping[str, Tensor], losses: Tensor) -> None:
        """For times that draw by the size of the losses."""
        self.bound.observe(draws, losses)
