"""From K-level data to densities and back; the only place that knows about bins."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from likelihood.bits import bits_per_dim
from sde_lib import validation
from sde_lib.noise import Generator, rand


@dataclass(frozen=True)
class UniformDequantization:
    r"""Spreads each of K levels evenly over its bin: :math:`x = low + (high - low)(v + u) / K`.

    By Jensen's inequality the expected log-density of x, in bins, bounds the log-probability of v
    from below: bits/dim with uniform dequantization is an upper bound on the discrete code length.

    Args:
        levels: K, from 2 to 65536.
        low: Where the bin of level 0 starts, in model units.
        high: Where the bin of level K - 1 ends.
    """

    levels: int
    low: float = -1.0
    high: float = 1.0

    metric = "bits_per_dim"

    def __post_init__(self) -> None:
        object.__setattr__(
            self,
            "levels",
            validation.count("UniformDequantization", "levels", self.levels, at_least=2),
        )
        if self.levels > 2**16:
            raise ValueError(
                "UniformDequantization takes at most 65536 levels, since a float32 hardly tells "
                f"more apart; got levels={self.levels}. Treat the data as continuous, levels=null."
            )
        validation.real("UniformDequantization", "high", self.high, above=self.low)

    @property
    def bin_width(self) -> float:
        """Width of one bin in model units."""
        return (self.high - self.low) / self.levels

    def encode(self, values: Tensor, generator: Generator = None) -> Tensor:
        """Levels [B, ...] as float32 points, each uniform in its bin."""
        u = rand(values.shape, generator, device=values.device, dtype=torch.float64)
        x = (self.low + self.bin_width * (values + u)).float()
        strayed = self._bins(x) != values  # rounded onto the edge of the bin: a step back inside
        inside = (self.low + self.bin_width * (values + u.clamp(2**-8, 1 - 2**-8))).float()
        return torch.where(strayed, inside, x)

    def _bins(self, x: Tensor) -> Tensor:
        levels = torch.floor((x.double() - self.low) / self.bin_width)
        return levels.clamp(0, self.levels - 1)

    def decode(self, x: Tensor) -> Tensor:
        """The level [B, ...] in whose bin each point lies; outside of all, the nearest."""
        return self._bins(x).to(torch.uint8 if self.levels <= 256 else torch.int64)

    def measure(self, log_prob: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Bits per dimension [B] of data of one sample's ``shape``."""
        return bits_per_dim(log_prob, math.prod(shape), self.levels, bin_width=self.bin_width)
