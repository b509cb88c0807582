"""A U-Net for series, images and volumes of any channel count and size from 8 up."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from score_models.conditioning import Conditioning
from score_models.networks.blocks import (
    CONV,
    Down,
    Dropout,
    SelfAttention,
    attending,
    group_norm,
    modulate,
    spatial_axes,
    through,
    zeroed,
)
from score_models.networks.embedding import NoiseEmbedding, checked_cond
from sde_lib import validation


class UNet(nn.Module):
    """Residual U-Net with self-attention at the coarse resolutions.

    Each resolution halves the one before (rounding up); the way up is resized to the size of its
    skip connection, so that any size works. Convolutions are along as many axes as samples have.

    Args:
        shape: Shape of one sample: (channels, length), (channels, height, width) or (channels,
            depth, height, width), at least 8 along each axis.
        width: Channels at the finest resolution.
        multipliers: Channels at each resolution, in units of ``width``.
        blocks: Residual blocks at each resolution.
        attention: Resolutions that attend, counted from the finest, 0; negative counts from the
            coarsest.
        heads: Attention heads.
        dropout: Dropout rate in the residual blocks, in [0, 1).
        cond: What it is conditioned on, see :mod:`score_models.conditioning`.
        checkpointing: While training keep only what enters each block, and compute the rest again
            for the gradient: less memory, a quarter more time.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        width: int = 64,
        multipliers: Sequence[int] = (1, 2),
        blocks: int = 2,
        attention: Sequence[int] = (-1,),
        heads: int = 4,
        dropout: float = 0.1,
        cond: Conditioning | None = None,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        axes = spatial_axes("UNet", shape)
        width = validation.count("UNet", "width", width)
        blocks = validation.count("UNet", "blocks", blocks)
        heads = validation.count("UNet", "heads", heads)
        validation.real("UNet", "dropout", dropout, at_least=0, below=1)
        self.cond = cond
        self.checkpointing = validation.flag("UNet", "checkpointing", checkpointing)
        channels = [width * validation.count("UNet", "multipliers", m) for m in multipliers]
        attends = attending("UNet", attention, len(channels))
        if width % heads:
            raise ValueError(
                f"UNet needs width divisible by heads; got width={width}, heads={heads}."
            )

        def block(before: int, after: int, resolution: int) -> _Stage:
            at = heads if resolution in attends else 0
            return _Stage(before, after, 4 * width, dropout, at, axes)

        self.embedding = NoiseEmbedding(4 * width, cond=cond)
        self.enter = CONV[axes](shape[0], width, 3, padding=1)
        kept, current = [width], width
        self.down = nn.ModuleList()
        for resolution, size in enumerate(channels):
            if resolution:
                self.down.append(Down(current, axes))
                kept.append(current)
            for _ in range(blocks):
                self.down.append(block(current, size, resolution))
                current = size
                kept.append(current)
        self.middle = block(current, current, len(channels) - 1)
        self.up = nn.ModuleList()
        for resolution, size in reversed(list(enumerate(channels))):
            for _ in range(blocks + 1):
                self.up.append(block(current + kept.pop(), size, resolution))
                current = size
            if resolution:
                self.up.append(_Up(current, axes))
        self.leave = nn.Sequential(
            group_norm(current), nn.SiLU(), zeroed(CONV[axes](current, shape[0], 3, padding=1))
        )

    def forward(self, x: Tensor, noise_level: Tensor, cond: Tensor | None = None) -> Tensor:
        """Output [B, C, ...] at scaled ``x`` and ``noise_level`` [B] = log(sigma / alpha)."""
        sparing = self.checkpointing and self.training
        level = self.embedding(noise_level, checked_cond(self, self.cond, cond, len(x)))
        h = self.enter(x)
        kept = [h]
        for layer in self.down:
            h = through(layer, h, level, sparing=sparing)
            kept.append(h)
        h = through(self.middle, h, level, sparing=sparing)
        for layer in self.up:
            if isinstance(layer, _Up):
                h = layer(h, kept[-1].shape[2:])
            else:
                h = through(layer, torch.cat([h, kept.pop()], dim=1), level, sparing=sparing)
        return self.leave(h)


class _Stage(nn.Module):
    """Residual block, scaled and shifted by the noise level; attention after it if ``heads``."""

    def __init__(
        self, before: int, after: int, level_width: int, dropout: float, heads: int, axes: int
    ) -> None:
        super().__init__()
        conv = CONV[axes]
        self.norm1, self.norm2 = group_norm(before), group_norm(after)
        self.conv1 = conv(before, after, 3, padding=1)
        self.conv2 = zeroed(conv(after, after, 3, padding=1))
        self.modulation = nn.Linear(level_width, 2 * after)
        self.dropout = Dropout(dropout)
        self.shortcut = conv(before, after, 1) if before != after else nn.Identity()
        self.attention = SelfAttention(after, heads, axes=axes) if heads else nn.Identity()

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = F.silu(modulate(self.norm2(h), self.modulation(level)))
        h = self.shortcut(x) + self.conv2(self.dropout(h))
        return self.attention(h)


class _Up(nn.Module):
    def __init__(self, channels: int, axes: int) -> None:
        super().__init__()
        self.conv = CONV[axes](channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        # convolve before enlarging: a quarter of the work, and the next block mixes the copies
        return F.interpolate(self.conv(x), size=tuple(size), mode="nearest")
