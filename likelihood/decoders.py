"""The last factor of a bound for data of K levels: the mass of the bin of a level."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from likelihood.dequantize import UniformDequantization
from sde_lib.decoders import Decoder, DensityDecoder
from sde_lib.sde import Level

__all__ = ["BinDecoder", "Decoder", "DensityDecoder", "log_normal_mass"]


@dataclass(frozen=True)
class BinDecoder(Decoder):
    r"""For K-level data: the mass that :math:`N(\hat x_0, \mathrm{std}^2 I)` has in the bin of x.

    The first and the last bin take the whole tail, so that the K masses add up to one. The bound
    is then one on the log-probability of the levels. Hand in bin centres, which give the tightest
    bound; dequantized points bound it as well, since the KL of a mixture is at most the mean of
    the KLs. Pictures scaled so that level v sits at v / 127.5 - 1 have ``low = -1 - 1 / 255`` and
    ``high = 1 + 1 / 255``.

    Reference: Ho et al., Denoising Diffusion Probabilistic Models, 2020, eq. 13.

    Args:
        bins: Where the levels are.
        std: Standard deviation in model units, > 0; sigma/alpha at t_min if None.
    """

    bins: UniformDequantization
    std: float | None = None

    def check(self, x: Tensor) -> None:
        low, high = self.bins.low, self.bins.high
        slack = 1e-3 * self.bins.bin_width  # float32 rounds an edge to either side of it
        if bool(((x < low - slack) | (x > high + slack)).any()):
            raise ValueError(
                f"BinDecoder needs x within its bins, [{low:g}, {high:g}]; got values from "
                f"{float(x.min()):g} to {float(x.max()):g}. Give bins with the low and high of "
                "the data, or use DensityDecoder() for continuous data."
            )

    def log_prob(self, x: Tensor, x0_hat: Tensor, level: Level) -> Tensor:
        bin_of = self.bins.decode(x).double()
        edge = self.bins.low + self.bins.bin_width * bin_of
        std = self.scale(level)
        below = (edge - x0_hat) / std
        above = (edge + self.bins.bin_width - x0_hat) / std
        below = below.masked_fill(bin_of == 0, -math.inf)
        above = above.masked_fill(bin_of == self.bins.levels - 1, math.inf)
        return log_normal_mass(below, above).flatten(1).sum(1)


def log_normal_mass(low: Tensor, high: Tensor) -> Tensor:
    r"""Log of the standard normal mass :math:`\Phi(high) - \Phi(low)`, low < high, elementwise.

    The interval is mirrored so that most of it lies below zero, where log Phi keeps its digits:
    :math:`\log\Phi(b) + \log(1 - e^{\log\Phi(a) - \log\Phi(b)})`. Either end may be infinite.
    """
    mirror = low + high > 0
    a, b = torch.where(mirror, -high, low), torch.where(mirror, -low, high)
    log_a, log_b = torch.special.log_ndtr(a), torch.special.log_ndtr(b)
    return log_b + torch.log(-torch.expm1(log_a - log_b))
