"""A transformer on patches of images."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from score_models.conditioning import Conditioning
from score_models.networks.attention import attend
from score_models.networks.blocks import Dropout, through, zeroed
from score_models.networks.embedding import NoiseEmbedding, checked_cond
from sde_lib import validation


class DiT(nn.Module):
    """Diffusion transformer: square patches are tokens, at fixed positions.

    Noise level and condition set scale, shift and gate of every branch (adaLN-Zero); gates are
    zero at the start, so that every block is the identity. Differs from the paper in the clock,
    log(sigma / alpha), in frequencies that suit it, and in that the output has no variance.

    Reference: Peebles and Xie, Scalable diffusion models with transformers, 2023.

    Args:
        shape: Shape of one sample, (channels, height, width), in whole patches.
        patch: Side of a patch, in pixels.
        width: Size of a token, a multiple of 4 and of ``heads``.
        blocks: Transformer blocks.
        heads: Attention heads.
        expansion: Width of the hidden layer of a block, in units of ``width``.
        dropout: Dropout rate of what a branch adds, in [0, 1); 0 in the paper.
        cond: What it is conditioned on, see :mod:`score_models.conditioning`.
        checkpointing: While training keep only what enters each block, and compute the rest again
            for the gradient: less memory, a quarter more time.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        patch: int = 2,
        width: int = 384,
        blocks: int = 12,
        heads: int = 6,
        expansion: int = 4,
        dropout: float = 0.0,
        cond: Conditioning | None = None,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        patch, width, blocks, heads, expansion = (
            validation.count("DiT", name, value)
            for name, value in dict(
                patch=patch, width=width, blocks=blocks, heads=heads, expansion=expansion
            ).items()
        )
        validation.real("DiT", "dropout", dropout, at_least=0, below=1)
        if len(shape) != 3 or shape[1] % patch or shape[2] % patch:
            raise ValueError(
                "DiT needs images of shape (channels, height, width) in whole patches; got "
                f"{tuple(shape)} and patch={patch}. Choose a patch that divides both sides, or "
                "network=unet, which takes any."
            )
        if width % 4 or width % heads:
            raise ValueError(
                "DiT needs a width divisible by 4, sines and cosines of two coordinates, and by "
                f"heads; got width={width}, heads={heads}."
            )
        self.cond, self.patch = cond, patch
        self.checkpointing = validation.flag("DiT", "checkpointing", checkpointing)
        size = shape[0] * patch**2
        self.embedding = NoiseEmbedding(width, frequencies=128, cond=cond)
        self.enter = nn.Linear(size, width)
        self.register_buffer(
            "positions", positions(shape[1] // patch, shape[2] // patch, width), persistent=False
        )
        self.blocks = nn.ModuleList(
            _Block(width, heads, expansion, dropout) for _ in range(blocks)
        )
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Linear(width, 2 * width)
        self.leave = nn.Linear(width, size)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        for layer in (self.leave, self.modulation, *(block.modulation for block in self.blocks)):
            zeroed(layer)

    def forward(self, x: Tensor, noise_level: Tensor, cond: Tensor | None = None) -> Tensor:
        """Output [B, C, H, W] at scaled ``x`` and ``noise_level`` [B] = log(sigma / alpha)."""
        sparing = self.checkpointing and self.training
        level = self.embedding(noise_level, checked_cond(self, self.cond, cond, len(x)))
        h = self.enter(to_patches(x, self.patch))
        h = h + self.positions.to(h.dtype)
        for block in self.blocks:
            h = through(block, h, level, sparing=sparing)
        scale, shift = self.modulation(level)[:, None].chunk(2, dim=-1)
        h = self.leave(torch.addcmul(shift, self.norm(h), 1 + scale))
        return from_patches(h, self.patch, x.shape)


class _Block(nn.Module):
    """Attention and two layers, each scaled, shifted and gated by the noise level."""

    def __init__(self, width: int, heads: int, expansion: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)  # has no weights
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv = nn.Linear(width, 3 * width)
        self.mix = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, expansion * width),
            nn.GELU(approximate="tanh"),
            nn.Linear(expansion * width, width),
        )
        self.dropout = Dropout(dropout)

    def forward(self, h: Tensor, level: Tensor) -> Tensor:
        change = self.modulation(level)[:, None].chunk(6, dim=-1)  # six of [B, 1, width]
        scale1, shift1, gate1, scale2, shift2, gate2 = change
        mixed = self.attention(torch.addcmul(shift1, self.norm(h), 1 + scale1))
        h = torch.addcmul(h, gate1, self.dropout(mixed))
        mixed = self.mlp(torch.addcmul(shift2, self.norm(h), 1 + scale2))
        return torch.addcmul(h, gate2, self.dropout(mixed))

    def attention(self, h: Tensor) -> Tensor:
        """Self-attention over the tokens of ``h`` [B, N, width]."""
        q, k, v = self.qkv(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.mix(attend(q, k, v).transpose(1, 2).flatten(2))


def positions(rows: int, columns: int, width: int) -> Tensor:
    """Sines and cosines of the row and of the column of each patch, [rows * columns, width].

    Wavelengths are geometric from 2 pi to 20,000 pi patches.
    """
    exponents = torch.arange(width // 4, dtype=torch.float64, device="cpu") / (width // 4)
    frequencies = torch.exp(-math.log(10_000) * exponents)
    row, column = (torch.arange(n, dtype=torch.float64, device="cpu") for n in (rows, columns))
    angles = (
        torch.stack([row.repeat_interleave(columns), column.repeat(rows)], dim=1)[..., None]
        * frequencies
    )  # [patches, 2, width / 4]
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1).float()


def to_patches(x: Tensor, patch: int) -> Tensor:
    """Patches [B, N, C * patch²], row by row, of ``x`` [B, C, H, W]."""
    batch, channels, height, width = x.shape
    grid = x.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * patch**2)


def from_patches(h: Tensor, patch: int, shape: tuple[int, ...]) -> Tensor:
    """The images of ``shape`` [B, C, H, W] whose patches are ``h``."""
    batch, channels, height, width = shape
    grid = h.reshape(batch, height // patch, width // patch, channels, patch, patch)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(shape)
