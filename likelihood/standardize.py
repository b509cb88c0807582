"""Units of continuous data: an affine map whose volume change every density carries."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sde_lib.noise import Generator
from sde_lib.sde import SDE


@dataclass(frozen=True)
class Standardized:
    """Data in model units, with the log of the volume of the change of units.

    Attributes:
        x: Points in model units, [B, ...].
        log_volume: Nats by which densities in data units are smaller.
    """

    x: Tensor
    log_volume: Tensor

    def bound(self, log_prob: Tensor) -> Tensor:
        """Log-density in data units, nats, [B]: exact, and no mere bound."""
        return log_prob - self.log_volume.to(log_prob)


@dataclass(frozen=True)
class Standardization:
    r"""Continuous data in model units, :math:`x = (v - \mathrm{shift}) / \mathrm{scale}`.

    A density in model units is one in data units once the volume is counted:
    :math:`\log p(v) = \log p(x) - \sum_d \log \mathrm{scale}_d`.

    Args:
        shift: Broadcast against one sample.
        scale: Likewise, > 0.
    """

    shift: Tensor
    scale: Tensor

    metric = "nll"  # nats a sample, in data units

    def __post_init__(self) -> None:
        if not bool((self.scale > 0).all()) or not bool(torch.isfinite(self.scale).all()):
            raise ValueError(
                f"Standardization needs scale > 0; got {self.scale.flatten().tolist()[:8]}."
            )

    @classmethod
    def of(cls, values: Tensor) -> Standardization:
        """Zero mean, unit variance: by coordinate of [N, d], else by channel of [N, C, ...]."""
        values = values.double()
        rows = values.transpose(0, 1).flatten(1)
        shape = (-1,) + (1,) * (values.ndim - 2)
        return cls(
            rows.mean(1).reshape(shape).float(),
            rows.std(1).clamp(min=1e-12).reshape(shape).float(),
        )

    def encode(self, values: Tensor, generator: Generator = None) -> Tensor:
        """Data [B, ...] in model units; nothing random happens."""
        return (values - self.shift.to(values)) / self.scale.to(values)

    def start_time(self, sde: SDE) -> float | None:
        """Where data lie on the flow: None for t_min."""
        return None

    def draw(
        self, values: Tensor, generator: Generator = None, *, sde: SDE | None = None
    ) -> Standardized:
        """Data in model units; nothing random happens, and any process will do."""
        volume = self.scale.double().log().expand(values.shape[1:]).sum()
        return Standardized(self.encode(values, generator), volume)

    def decode(self, x: Tensor) -> Tensor:
        """Model units [B, ...] back in data units."""
        return x * self.scale.to(x) + self.shift.to(x)

    def log_prob(self, log_prob: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Nats in data units from nats in model units; ``shape`` is that of one sample."""
        return log_prob - self.scale.to(log_prob).log().expand(shape).sum()

    def measure(self, log_prob: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Negative log-likelihood in nats, data units, [B]."""
        return -self.log_prob(log_prob, shape)
