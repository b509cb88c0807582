r"""Weightings :math:`\lambda`: functions of the level that multiply the squared *score* error.

The noise estimate misses by sigma times what the score misses by, x0_hat by rho = sigma / alpha
times that: a weight stated for any target is one of these, whatever the network estimates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from sde_lib import validation
from sde_lib.sde import Level

Weight = Callable[[Level], Tensor]


def noise_regression(level: Level) -> Tensor:
    r""":math:`\lambda = \sigma^2`: plain squared error of the noise (Ho et al. 2020, L_simple)."""
    return level.sigma**2


def maximum_likelihood(level: Level) -> Tensor:
    r""":math:`\lambda = g^2`: the loss bounds the KL divergence (Song et al. 2021b, theorem 1)."""
    return level.diffusion**2


def velocity(level: Level) -> Tensor:
    r""":math:`\lambda = \sigma^2 (1 + \rho^2)`: the squared error of v (Salimans and Ho 2022)."""
    return level.sigma**2 * (1 + level.noise_ratio**2)


def truncated_snr(level: Level) -> Tensor:
    r""":math:`\lambda = \sigma^2 \max(1, \rho^2)`: the worse of the squared errors of noise and
    data.

    Stated for the data it is max(SNR, 1), that of progressive distillation (Salimans and Ho 2022).
    """
    return level.sigma**2 * (level.noise_ratio**2).clamp(min=1)


@dataclass(frozen=True)
class MinSNR:
    r""":math:`\lambda = \sigma^2 \min(1, \gamma\rho^2)`: clean levels, where SNR > gamma, count
    less.

    Stated for the data it is min(SNR, gamma), for the noise min(SNR, gamma) / SNR, for v
    min(SNR, gamma) / (SNR + 1): one and the same.

    Reference: Hang et al., Efficient Diffusion Training via Min-SNR Weighting Strategy, 2023.

    Args:
        gamma: The SNR from which on weights are cut, > 0.
    """

    gamma: float = 5.0

    def __post_init__(self) -> None:
        validation.real("MinSNR", "gamma", self.gamma, above=0)

    def __call__(self, level: Level) -> Tensor:
        return level.sigma**2 * (self.gamma * level.noise_ratio**2).clamp(max=1)


@dataclass(frozen=True)
class EDMWeight:
    r""":math:`\lambda = \sigma^2 (\rho^2 + s^2) / s^2`: unit loss at every level at the start
    (Karras et al. 2022).

    Stated for the denoised estimate it is their :math:`(\rho^2 + s^2) / (\rho s)^2`.

    Args:
        data_std: s, the standard deviation of the data, > 0.
    """

    data_std: float = 0.5

    def __post_init__(self) -> None:
        validation.real("EDMWeight", "data_std", self.data_std, above=0)

    def __call__(self, level: Level) -> Tensor:
        return level.sigma**2 * (level.noise_ratio**2 + self.data_std**2) / self.data_std**2
