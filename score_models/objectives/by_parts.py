"""Explicit and sliced score matching: the score of the noise is integrated away by parts."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from score_models.model import ScoreModel
from score_models.objectives.weighted import ScoreMatching, noised, relative
from sde_lib import validation
from sde_lib.noise import Generator, rand
from sde_lib.sde import SDE


@dataclass(frozen=True)
class ScoreMatchingByParts(ScoreMatching):
    r"""Score matching that needs the trace of the Jacobian, and no score of the noise.

    .. math::  \frac{\lambda}{D} \left(\|s\|^2 + 2\,\mathrm{tr}\,\nabla s +
               \frac{D}{\sigma^2}\right)
               = \frac{\lambda}{\sigma^2} \left(\frac{\|\hat\varepsilon\|^2 -
               2 \sigma\, \mathrm{tr}\,\nabla\hat\varepsilon}{D} + 1\right)

    That is twice the published loss, in the unit of the other objectives, and the constant by
    which its mean then misses that of denoising score matching: value, gradient and floor are the
    same in expectation. At one level it holds of the noised data, as naive score matching does.

    Needs second derivatives of the network: attention runs in its plain form.

    Reference: Hyvärinen, Estimation of Non-Normalized Statistical Models by Score Matching, 2005.
    """

    second_derivatives: ClassVar[bool] = True

    def loss(
        self,
        model: ScoreModel,
        x0: Tensor,
        draws: Mapping[str, Tensor],
        cond: Tensor | None = None,
    ) -> Tensor:
        """See the class; a graph is built even where gradients are off."""
        level = model.sde.level(draws["t"].double())
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            x = noised(level, x0, draws["noise"].to(x0.dtype)).detach().requires_grad_()
            eps_hat = model(x, draws["t"], cond)
            trace = self.trace(eps_hat, x, draws) / x0[0].numel()
            square = eps_hat.square().flatten(1).mean(1)
            loss = square - 2 * level.sigma.to(x0.dtype) * trace + 1
        return draws["importance"].to(loss) * relative(self.weight, level, x0) * loss

    @abstractmethod
    def trace(self, field: Tensor, x: Tensor, draws: Mapping[str, Tensor]) -> Tensor:
        """Trace of the Jacobian of ``field`` [B, ...] at ``x`` [B, ...], or an unbiased estimate
        of it, [B]."""


@dataclass(frozen=True)
class ExplicitScoreMatching(ScoreMatchingByParts):
    """With the exact trace: one backward pass for each coordinate of a sample.

    Args:
        weight: lambda.
        times: How times are drawn.
        max_dims: Samples of more coordinates are refused: a mistake would cost days.
    """

    max_dims: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        whole = validation.count("ExplicitScoreMatching", "max_dims", self.max_dims)
        object.__setattr__(self, "max_dims", whole)

    def draw(self, sde: SDE, shape: Sequence[int], generator: Generator) -> dict[str, Tensor]:
        """Times and importances [B], noise [B, ...].

        Raises:
            ValueError: If a sample has too many coordinates.
        """
        dims = math.prod(shape[1:])
        if dims > self.max_dims:
            raise ValueError(
                "ExplicitScoreMatching makes a backward pass for each of the D coordinates of a "
                f"sample, at most max_dims={self.max_dims}; got D={dims}. Use "
                "SlicedScoreMatching, or raise max_dims."
            )
        return super().draw(sde, shape, generator)

    def trace(self, field: Tensor, x: Tensor, draws: Mapping[str, Tensor]) -> Tensor:
        """The sum of the diagonal, exact."""
        diagonal = []
        for i in range(x[0].numel()):
            one = torch.zeros_like(field).flatten(1)
            one[:, i] = 1
            diagonal.append(_pulled_back(field, x, one.view_as(field)).flatten(1)[:, i])
        return torch.stack(diagonal).sum(0)


@dataclass(frozen=True)
class SlicedScoreMatching(ScoreMatchingByParts):
    r"""With the trace along random directions, :math:`v^\top \nabla s\, v`, v = ±1 by coordinate.

    The variance-reduced form: the squared norm is taken whole, not along v.

    Reference: Song et al., Sliced Score Matching: A Scalable Approach to Density and Score
    Estimation, 2019, eq. 8.

    Args:
        weight: lambda.
        times: How times are drawn.
        probes: Directions for each sample, a backward pass each.
    """

    probes: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        whole = validation.count("SlicedScoreMatching", "probes", self.probes)
        object.__setattr__(self, "probes", whole)

    def draw(self, sde: SDE, shape: Sequence[int], generator: Generator) -> dict[str, Tensor]:
        """Times and importances [B], noise [B, ...], signs [B, probes, ...]."""
        draws = super().draw(sde, shape, generator)
        coins = rand((shape[0], self.probes, *shape[1:]), generator)
        return draws | {"probes": (coins < 0.5).to(coins) * 2 - 1}

    def trace(self, field: Tensor, x: Tensor, draws: Mapping[str, Tensor]) -> Tensor:
        """The mean over probes of probe·J·probe: unbiased."""
        found = [
            (_pulled_back(field, x, probe) * probe).flatten(1).sum(1)
            for probe in draws["probes"].to(x).unbind(1)
        ]
        return torch.stack(found).mean(0)


def _pulled_back(field: Tensor, x: Tensor, direction: Tensor) -> Tensor:
    """Transposed Jacobian of ``field`` times ``direction``, with a graph; zero where the field
    does not depend on ``x``."""
    (row,) = torch.autograd.grad(
        field, x, direction, create_graph=True, allow_unused=True, materialize_grads=True
    )
    return row
