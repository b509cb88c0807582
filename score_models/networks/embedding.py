"""How a network learns the noise level: sines and cosines of log(sigma / alpha)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class NoiseEmbedding(nn.Module):
    r"""Sines and cosines of log(sigma / alpha) at geometric frequencies, then a two-layer MLP.

    The clock runs over about ten units from data to noise; frequencies from 0.25 to 8 resolve a
    tenth of a unit and still tell the two ends apart.

    Args:
        width: Size of the output.
        frequencies: Number of sines, and of cosines.
    """

    def __init__(self, width: int, frequencies: int = 16) -> None:
        super().__init__()
        steps = torch.linspace(math.log(0.25), math.log(8.0), frequencies)
        self.register_buffer("frequencies", steps.exp(), persistent=False)
        self.mlp = nn.Sequential(
            nn.Linear(2 * frequencies, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )

    def forward(self, noise_level: Tensor) -> Tensor:
        """Embedding [B, width] of ``noise_level`` [B]."""
        angles = noise_level[:, None] * self.frequencies.to(noise_level)
        return self.mlp(torch.cat([angles.sin(), angles.cos()], dim=1))


def refuse_cond(owner: str, cond: Tensor | None) -> None:
    """Refuse conditioning that a network would otherwise ignore without a word."""
    if cond is not None:
        raise ValueError(
            f"{owner} is unconditional and would ignore cond; got one of shape "
            f"{tuple(cond.shape)}. Leave it out, or use a network that takes it."
        )
