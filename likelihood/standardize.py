"""Units of continuous data: an affine map whose volume change every density carries."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sde_lib.noise import Generator
from sde_lib.sde import SDE

BLOCK = 2**20  # numbers looked at together


class Sliceable(Protocol):
    """Samples [N, ...] that are read a slice at a time: a tensor, or what lies on disk."""

    shape: tuple[int, ...]

    def __getitem__(self, rows: slice) -> Tensor: ...


class Moments:
    r"""Mean and variance by coordinate of [N, d], else by channel of [N, C, ...], in one pass.

    Two parts of n = n_a + n_b numbers whose means are delta apart have the sum of squares

    .. math::  M = M_a + M_b + \delta^2\, n_a n_b / n,

    each about its own mean: nothing cancels, however far the data are from zero.

    Reference: Chan, Golub, LeVeque, Algorithms for computing the sample variance, 1983, eq. 2.1.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.squares = torch.zeros((), dtype=torch.float64)
        self._shape: tuple[int, ...] = ()

    def add(self, block: Tensor) -> None:
        """Take in one block of samples, [n, C, ...]."""
        if block.numel() == 0:
            return
        rows = block.double().transpose(0, 1).flatten(1)  # [C, n * ...]
        mean = rows.mean(1)
        squares = (rows - mean[:, None]).square_().sum(1)
        delta, more = mean - self.mean, rows.shape[1]
        count = self.count + more
        self.squares = self.squares + squares + delta.square() * (self.count * more / count)
        self.mean = self.mean + delta * (more / count)
        self.count, self._shape = count, (-1,) + (1,) * (block.ndim - 2)

    @property
    def std(self) -> Tensor:
        """Unbiased standard deviation, [C], float64."""
        return (self.squares / (self.count - 1)).sqrt()

    def standardization(self) -> Standardization:
        """Zero mean, unit variance."""
        scale = self.std.clamp(min=1e-12)
        return Standardization(
            self.mean.reshape(self._shape).float(), scale.reshape(self._shape).float()
        )


def slices(shape: tuple[int, ...]) -> list[slice]:
    """Samples of ``shape`` [N, ...] in parts: of about a million numbers, one sample at least."""
    rows = max(1, BLOCK // max(1, math.prod(shape[1:])))
    return [slice(start, start + rows) for start in range(0, shape[0], rows)]


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
    def of(cls, values: Sliceable) -> Standardization:
        """Zero mean, unit variance: by coordinate of [N, d], else by channel of [N, C, ...]."""
        moments = Moments()
        for rows in slices(values.shape):
            moments.add(values[rows])
        return moments.standardization()

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
