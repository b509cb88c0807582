"""How a network learns the noise level and the condition: one vector for both."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from score_models.conditioning import Conditioning


class NoiseEmbedding(nn.Module):
    r"""Sines and cosines of log(sigma / alpha) at geometric frequencies, then a two-layer MLP.

    The clock runs over about ten units from data to noise; frequencies from 0.25 to 8 resolve a
    tenth of a unit and still tell the two ends apart. What the sample is conditioned on is added
    before the last nonlinearity.

    Args:
        width: Size of the output.
        frequencies: Number of sines, and of cosines.
        cond: What there is to embed beside the noise level.
        bandwidth: If above 0, frequencies are drawn from N(0, (2 pi bandwidth)²) instead, once and
            for all, in radians per unit of log(sigma / alpha); they are stored with the weights.
    """

    def __init__(
        self,
        width: int,
        frequencies: int = 16,
        cond: Conditioning | None = None,
        bandwidth: float = 0.0,
    ) -> None:
        super().__init__()
        if bandwidth:
            generator = torch.Generator().manual_seed(0)
            drawn = torch.randn(frequencies, generator=generator, device="cpu")
            self.register_buffer("frequencies", 2 * math.pi * bandwidth * drawn)
        else:
            steps = torch.linspace(math.log(0.25), math.log(8.0), frequencies)
            self.register_buffer("frequencies", steps.exp(), persistent=False)
        self.mlp = nn.Sequential(
            nn.Linear(2 * frequencies, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.cond = None if cond is None else cond.embedding(width)

    def forward(self, noise_level: Tensor, cond: Tensor | None = None) -> Tensor:
        """Embedding [B, width] of ``noise_level`` [B] and ``cond`` [B, ...]."""
        angles = noise_level[:, None] * self.frequencies.to(noise_level)
        waves = torch.cat([angles.sin(), angles.cos()], dim=1)
        level = self.mlp(waves)  # in one call, as what shares weights between processes asks
        return F.silu(level if self.cond is None else level + self.cond(cond))


def checked_cond(
    network: nn.Module, spec: Conditioning | None, cond: Tensor | None, batch: int
) -> Tensor | None:
    """``cond`` if it is what ``network``, conditioned on ``spec``, needs for so many samples.

    Raises:
        ValueError: If it does not fit, or would be ignored without a word.
    """
    owner = type(network).__name__
    if spec is None:
        return refuse_cond(owner, cond)
    return spec.check(owner, cond, batch)


def refuse_cond(owner: str, cond: Tensor | None) -> None:
    """Refuse conditioning that a network would otherwise ignore without a word."""
    if cond is not None:
        raise ValueError(
            f"{owner} is unconditional and would ignore cond; got one of shape "
            f"{tuple(cond.shape)}. Leave it out, or build the network with cond=Classes(count) or "
            "cond=Vector(size)."
        )
