"""What the network's output means: four scalars of the noise ratio turn it into E[x_0 | x_t]."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from sde_lib import validation


@dataclass(frozen=True)
class Parameterization(ABC):
    r"""Denoised estimate :math:`\hat x_0 = c_{skip}\, y + c_{out}\, F(c_{in}\, y, \log\rho)`.

    Here y = x / alpha and rho = sigma / alpha, so that neither the network nor these scalars
    know which process made the noise: weights survive a change of SDE.

    Args:
        data_std: Standard deviation of the data in model units, > 0; it makes the input of unit
            variance, :math:`c_{in} = 1 / \sqrt{\rho^2 + \mathrm{data\_std}^2}`.
    """

    data_std: float = 0.5

    def __post_init__(self) -> None:
        validation.real(type(self).__name__, "data_std", self.data_std, above=0)

    @abstractmethod
    def skip(self, rho: Tensor) -> Tensor:
        """c_skip, in the shape of ``rho``."""

    @abstractmethod
    def out(self, rho: Tensor) -> Tensor:
        """c_out, in the shape of ``rho``."""

    def input(self, rho: Tensor) -> Tensor:
        """c_in, in the shape of ``rho``."""
        return torch.rsqrt(rho**2 + self.data_std**2)


class Noise(Parameterization):
    """The network estimates the noise, :math:`F = E[\\varepsilon | x]`: DDPM's choice."""

    def skip(self, rho: Tensor) -> Tensor:
        return torch.ones_like(rho)

    def out(self, rho: Tensor) -> Tensor:
        return -rho


class Data(Parameterization):
    """The network estimates the data, :math:`F = E[x_0 | x]`."""

    def skip(self, rho: Tensor) -> Tensor:
        return torch.zeros_like(rho)

    def out(self, rho: Tensor) -> Tensor:
        return torch.ones_like(rho)


class Score(Parameterization):
    r"""The network estimates :math:`\nabla \log p(z)` of z = x / sqrt(alpha² + sigma²)."""

    def skip(self, rho: Tensor) -> Tensor:
        return torch.ones_like(rho)

    def out(self, rho: Tensor) -> Tensor:
        return rho**2 * torch.rsqrt(1 + rho**2)


class Velocity(Parameterization):
    r"""The network estimates v, :math:`F = E[(\varepsilon - \rho x_0) / \sqrt{1 + \rho^2}\,|\,x]`.

    Reference: Salimans and Ho, Progressive Distillation for Fast Sampling of Diffusion Models,
    2022.
    """

    def skip(self, rho: Tensor) -> Tensor:
        return 1 / (1 + rho**2)

    def out(self, rho: Tensor) -> Tensor:
        return -rho * torch.rsqrt(1 + rho**2)


class EDM(Parameterization):
    r"""Preconditioning that keeps both input and target of unit variance at every noise level.

    .. math::  c_{skip} = \frac{s^2}{\rho^2 + s^2}, \qquad c_{out} = \frac{\rho\, s}{\sqrt{\rho^2 +
    s^2}},
               \qquad s = \mathrm{data\_std}

    Reference: Karras et al. 2022, table 1.
    """

    def skip(self, rho: Tensor) -> Tensor:
        return self.data_std**2 / (rho**2 + self.data_std**2)

    def out(self, rho: Tensor) -> Tensor:
        return rho * self.data_std * torch.rsqrt(rho**2 + self.data_std**2)
