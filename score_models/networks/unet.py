"""A U-Net for images of any channel count and size from 8x8 up."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from score_models.networks.embedding import NoiseEmbedding, refuse_cond
from sde_lib import validation


class UNet(nn.Module):
    """Residual U-Net with self-attention at the coarse resolutions.

    Each resolution halves the one before (rounding up); the way up is resized to the size of its
    skip connection, so that any size works. Attention is written out as two matrix products and a
    softmax: one code path that has reverse-mode, forward-mode and second derivatives.

    Args:
        shape: Shape of one sample, (channels, height, width), at least 8x8.
        width: Channels at the finest resolution.
        multipliers: Channels at each resolution, in units of ``width``.
        blocks: Residual blocks at each resolution.
        attention: Resolutions that attend, counted from the finest, 0; negative counts from the
            coarsest.
        heads: Attention heads.
        dropout: Dropout rate in the residual blocks, in [0, 1).
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
    ) -> None:
        super().__init__()
        if len(shape) != 3 or min(shape[1:]) < 8:
            raise ValueError(
                "UNet needs images of shape (channels, height, width), at least 8x8; "
                f"got {tuple(shape)}. For other shapes use network=mlp training=vectors."
            )
        width = validation.count("UNet", "width", width)
        blocks = validation.count("UNet", "blocks", blocks)
        heads = validation.count("UNet", "heads", heads)
        validation.real("UNet", "dropout", dropout, at_least=0, below=1)
        channels = [width * validation.count("UNet", "multipliers", m) for m in multipliers]
        attends = {range(len(channels))[i] for i in attention}
        if width % heads:
            raise ValueError(
                f"UNet needs width divisible by heads; got width={width}, heads={heads}."
            )

        def block(before: int, after: int, resolution: int) -> _Stage:
            return _Stage(before, after, 4 * width, dropout, heads if resolution in attends else 0)

        self.embedding = NoiseEmbedding(4 * width)
        self.enter = nn.Conv2d(shape[0], width, 3, padding=1)
        kept, current = [width], width
        self.down = nn.ModuleList()
        for resolution, size in enumerate(channels):
            if resolution:
                self.down.append(_Down(current))
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
                self.up.append(_Up(current))
        self.leave = nn.Sequential(
            _norm(current), nn.SiLU(), nn.Conv2d(current, shape[0], 3, padding=1)
        )
        nn.init.zeros_(self.leave[-1].weight)
        nn.init.zeros_(self.leave[-1].bias)

    def forward(self, x: Tensor, noise_level: Tensor, cond: Tensor | None = None) -> Tensor:
        """Output [B, C, H, W] at scaled ``x`` and ``noise_level`` [B] = log(sigma / alpha)."""
        refuse_cond("UNet", cond)
        level = self.embedding(noise_level)
        h = self.enter(x)
        kept = [h]
        for layer in self.down:
            h = layer(h, level)
            kept.append(h)
        h = self.middle(h, level)
        for layer in self.up:
            if isinstance(layer, _Up):
                h = layer(h, kept[-1].shape[-2:])
            else:
                h = layer(torch.cat([h, kept.pop()], dim=1), level)
        return self.leave(h)


def _norm(channels: int) -> nn.GroupNorm:
    groups = next(
        g for g in (32, 16, 8, 4, 2, 1) if channels % g == 0 and channels // g >= 4 or g == 1
    )
    return nn.GroupNorm(groups, channels, eps=1e-6)


class _Stage(nn.Module):
    """Residual block, scaled and shifted by the noise level; attention after it if ``heads``."""

    def __init__(
        self, before: int, after: int, level_width: int, dropout: float, heads: int
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = _norm(before), _norm(after)
        self.conv1 = nn.Conv2d(before, after, 3, padding=1)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1)
        self.modulation = nn.Linear(level_width, 2 * after)
        self.dropout = nn.Dropout(dropout)
        self.shortcut = nn.Conv2d(before, after, 1) if before != after else nn.Identity()
        self.attention = _Attention(after, heads) if heads else nn.Identity()
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        scale, shift = self.modulation(level)[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(F.silu(self.norm1(x)))
        h = F.silu(self.norm2(h) * (1 + scale) + shift)
        h = self.shortcut(x) + self.conv2(self.dropout(h))
        return self.attention(h)


class _Attention(nn.Module):
    """Self-attention over all pixels, residual."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = _norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.leave = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        qkv = self.qkv(self.norm(x)).reshape(
            batch, 3, self.heads, channels // self.heads, height * width
        )
        q, k, v = qkv.unbind(1)  # [B, heads, D, pixels]
        weights = (q.mT @ k * q.shape[2] ** -0.5).softmax(-1)
        return x + self.leave((v @ weights.mT).reshape(x.shape))


class _Down(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        return self.conv(x)


class _Up(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        # convolve before enlarging: a quarter of the work, and the next block mixes the copies
        return F.interpolate(self.conv(x), size=tuple(size), mode="nearest")
