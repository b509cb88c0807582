"""What all score matching shares: a weighting, a way to draw times, and one noise a sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from score_models.objective import Objective
from score_models.objectives.weights import Weight, noise_regression
from score_models.times import TimeSampler, UniformTimes
from sde_lib.noise import Generator, randn
from sde_lib.sde import SDE, Level, expand_like


@dataclass(frozen=True)
class ScoreMatching(Objective):
    """A weighting and a way to draw times.

    The mean over a batch estimates the integral of the weighted loss over t in [t_min, t_max],
    divided by t_max - t_min, whichever way the times are drawn, if they state their importance.
    ``LogNormalSigma`` without ``reweight``, ``UniformLevels`` and ``OneLevel`` make their
    distribution part of the weighting.

    Args:
        weight: lambda, a function of the level that multiplies the squared *score* error.
        times: How times are drawn.
    """

    weight: Weight = noise_regression
    times: TimeSampler = UniformTimes()

    def __post_init__(self) -> None:
        if isinstance(self.times, nn.Module):
            raise ValueError(
                f"{type(self).__name__} keeps no state, and would forget that of its times; got "
                f"times={type(self.times).__name__}, which are for VariationalBound and Hybrid. "
                "Use UniformLevels, UniformTimes or ImportanceTimes."
            )

    @property
    def caveat(self) -> str:
        return self.times.caveat

    def draw(self, sde: SDE, shape: Sequence[int], generator: Generator) -> dict[str, Tensor]:
        """Times and importances [B], noise [B, ...]."""
        t, importance = self.times(sde, shape[0], generator)
        noise = randn(shape, generator)
        return {"t": t, "importance": importance.to(noise), "noise": noise}


def noised(level: Level, x0: Tensor, noise: Tensor) -> Tensor:
    """The state alpha x_0 + sigma eps of ``x0`` [B, ...] at a ``level`` of [B]."""
    alpha, sigma = (expand_like(c.to(x0.dtype), x0) for c in (level.alpha, level.sigma))
    return alpha * x0 + sigma * noise


def relative(weight: Weight, level: Level, x0: Tensor) -> Tensor:
    r"""The weight of the squared *noise* error, :math:`\lambda / \sigma^2`, [B], like ``x0``."""
    return (weight(level) / level.sigma**2).to(x0.dtype)
