"""The last factor of a bound in training and in evaluation: a density around x0_hat."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from sde_lib import validation
from sde_lib.sde import Level


class Decoder(ABC):
    r"""The last factor of a bound, :math:`p(x | x_{t_{min}})`, from the denoised x0_hat.

    Left to itself its standard deviation is sigma/alpha at t_min: x_t / alpha misses x by exactly
    that, so the exact denoiser, being better, misses by at most that. The best one for a density
    is :attr:`AnalyticVariance.decoder_std`, how far x0_hat was found to miss.

    Attributes:
        std: Standard deviation in model units, > 0; sigma/alpha at t_min if None.
    """

    std: float | None

    def __post_init__(self) -> None:
        if self.std is not None:
            validation.real(type(self).__name__, "std", self.std, above=0)

    @abstractmethod
    def log_prob(self, x: Tensor, x0_hat: Tensor, level: Level) -> Tensor:
        """Log of p(x | x_t) in nats [B]; ``x``, ``x0_hat`` [B, ...] float64, ``level`` of []."""

    def check(self, x: Tensor) -> None:  # noqa: B027
        """Refuse ``x`` [B, ...] that this decoder cannot score, before anything is computed.

        Raises:
            ValueError: Saying what is wrong with ``x``.
        """

    def scale(self, level: Level) -> Tensor:
        """The standard deviation [] at ``level`` of []."""
        ratio = level.noise_ratio
        return ratio if self.std is None else torch.full_like(ratio, self.std)


@dataclass(frozen=True)
class DensityDecoder(Decoder):
    r"""For continuous or dequantized x: the density :math:`N(x; \hat x_0, \mathrm{std}^2 I)`.

    Args:
        std: Standard deviation in model units, > 0; sigma/alpha at t_min if None.
    """

    std: float | None = None

    def log_prob(self, x: Tensor, x0_hat: Tensor, level: Level) -> Tensor:
        std = self.scale(level).to(x)
        square = ((x - x0_hat) / std).square().flatten(1).sum(1)
        return -0.5 * square - x[0].numel() * (std.log() + 0.5 * math.log(2 * math.pi))
