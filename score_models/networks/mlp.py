"""A residual MLP for vectors, and for samples of any other shape as vectors."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from score_models.conditioning import Conditioning
from score_models.networks.blocks import through, zeroed
from score_models.networks.embedding import NoiseEmbedding, checked_cond
from sde_lib import validation


class MLP(nn.Module):
    """Residual MLP on flattened samples; the noise level scales and shifts each block.

    Args:
        shape: Shape of one sample, of any rank.
        width: Width of the hidden layers.
        blocks: Number of residual blocks.
        features: Random Fourier features of the input, for densities with fine detail; 0 for none.
        bandwidth: Their standard frequency, in radians per unit of the scaled input.
        cond: What it is conditioned on, see :mod:`score_models.conditioning`.
        checkpointing: While training keep only what enters each block, and compute the rest again
            for the gradient: less memory, a quarter more time.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        width: int = 128,
        blocks: int = 4,
        features: int = 0,
        bandwidth: float = 3.0,
        cond: Conditioning | None = None,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        width = validation.count("MLP", "width", width)
        blocks = validation.count("MLP", "blocks", blocks)
        features = validation.count("MLP", "features", features, at_least=0)
        self.cond = cond
        self.checkpointing = validation.flag("MLP", "checkpointing", checkpointing)
        size = math.prod(shape)
        generator = torch.Generator().manual_seed(0)
        self.register_buffer(
            "directions", bandwidth * torch.randn(size, features, generator=generator)
        )
        self.embedding = NoiseEmbedding(width, cond=cond)
        self.enter = nn.Linear(size + 2 * features, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(blocks))
        self.leave = nn.Sequential(nn.LayerNorm(width), nn.SiLU(), zeroed(nn.Linear(width, size)))

    def forward(self, x: Tensor, noise_level: Tensor, cond: Tensor | None = None) -> Tensor:
        """Output [B, ...] at scaled input ``x`` and ``noise_level`` [B] = log(sigma / alpha)."""
        level = self.embedding(noise_level, checked_cond(self, self.cond, cond, len(x)))
        flat = x.flatten(1)
        angles = flat @ self.directions.to(x)
        h = self.enter(torch.cat([flat, angles.sin(), angles.cos()], dim=1))
        for block in self.blocks:
            h = through(block, h, level, sparing=self.checkpointing and self.training)
        return self.leave(h).reshape(x.shape)


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width)
        )
        with torch.no_grad():
            self.mlp[-1].weight.mul_(1 / math.sqrt(2))

    def forward(self, h: Tensor, level: Tensor) -> Tensor:
        scale, shift = self.modulation(level).chunk(2, dim=1)
        return h + self.mlp(torch.addcmul(shift, self.norm(h), 1 + scale))
