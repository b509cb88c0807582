"""Weighted denoising score matching: regression of the noise that was put in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from score_models.model import ScoreModel
from score_models.objectives.weighted import ScoreMatching, noised, relative
from score_models.objectives.weights import Weight


def score_matching_loss(
    model: ScoreModel,
    x0: Tensor,
    t: Tensor,
    noise: Tensor,
    weight: Weight,
    cond: Tensor | None = None,
) -> Tensor:
    r"""Per-sample :math:`\lambda(t)\, \|s(x_t, t) + \varepsilon/\sigma\|^2 / D`, shape [B].

    Args:
        model: The score model.
        x0: Data in model units, [B, ...].
        t: Times, [B].
        noise: Standard normal, [B, ...].
        weight: lambda, a function of the level that multiplies the squared *score* error.
        cond: Conditioning passed to the network.
    """
    level = model.sde.level(t.double())
    # sigma times the score error, of order one
    error = model(noised(level, x0, noise), t, cond) - noise
    return relative(weight, level, x0) * error.square().flatten(1).mean(1)


@dataclass(frozen=True)
class DenoisingScoreMatching(ScoreMatching):
    r"""Squared distance of the score from that of the noise, :math:`-\varepsilon/\sigma`.

    In expectation this is the weighted squared error of the score, and a floor that no score
    gets below: :math:`\lambda/\sigma^2\,(1 - E\|E[\varepsilon|x_t]\|^2 / D)`.

    Reference: Vincent, A Connection Between Score Matching and Denoising Autoencoders, 2011.
    """

    def loss(
        self,
        model: ScoreModel,
        x0: Tensor,
        draws: Mapping[str, Tensor],
        cond: Tensor | None = None,
    ) -> Tensor:
        """Weighted squared error of the score, see :func:`score_matching_loss`."""
        noise = draws["noise"].to(x0.dtype)
        loss = score_matching_loss(model, x0, draws["t"], noise, self.weight, cond)
        return draws["importance"].to(loss) * loss
