"""Residual blocks of the published U-Nets, and how they change the resolution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from score_models.networks.blocks import (
    CONV,
    Down,
    Dropout,
    SelfAttention,
    group_norm,
    modulate,
    zeroed,
)
from score_models.networks.resample import Resample
from sde_lib.sde import expand_like


@dataclass(frozen=True)
class BlockStyle:
    """What all blocks of a network have in common, and the blocks.

    Attributes:
        axes: Number of axes of a sample behind its channels.
        level_width: Size of the embedding of noise level and condition.
        scale_shift: Whether it scales and shifts (true) or is added (false).
        gain: Factor on the sum of two branches.
        dropout: Dropout rate.
        head_channels: Channels of an attention head; None for a single head.
        resample: Filter of blocks that change the resolution; None for convolutions instead.
        project: Whether the shortcut of such a block has a convolution.
    """

    axes: int
    level_width: int
    scale_shift: bool
    gain: float
    dropout: float
    head_channels: int | None
    resample: Resample | None
    project: bool

    def block(self, before: int, after: int, attends: bool = False) -> ResidualBlock:
        """At one resolution, with attention behind it if it ``attends``."""
        return ResidualBlock(self, before, after, project=before != after, attends=attends)

    def half(self, channels: int) -> nn.Module:
        """Module (x, level) -> x of half the resolution."""
        if self.resample is None:
            return Down(channels, self.axes)
        return _HalvingBlock(self, channels, channels, project=self.project)

    def double(self, channels: int) -> nn.Module:
        """Module (x, level, size) -> x of that size."""
        if self.resample is None:
            return _RepeatedPoints(channels, self.axes)
        return _DoublingBlock(self, channels, channels, project=self.project)

    def attention(self, channels: int) -> SelfAttention:
        """Of as many heads as ``channels`` hold."""
        heads = channels // self.head_channels if self.head_channels else 1
        return SelfAttention(channels, heads, self.gain, self.axes)

    def leave(self, channels: int, after: int) -> nn.Sequential:
        """From features to an output, zero at the start."""
        conv = CONV[self.axes](channels, after, 3, padding=1)
        return nn.Sequential(group_norm(channels), nn.SiLU(), zeroed(conv))


class ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut; the noise level enters between them.

    Args:
        style: What it shares with the others.
        before: Channels of the input.
        after: Channels of the output.
        project: Whether the shortcut has a 1x1 convolution.
        attends: Whether there is attention behind it.
    """

    def __init__(
        self, style: BlockStyle, before: int, after: int, project: bool, attends: bool = False
    ) -> None:
        super().__init__()
        conv = CONV[style.axes]
        self.gain, self.scale_shift = style.gain, style.scale_shift
        self.resample = style.resample
        self.norm1, self.norm2 = group_norm(before), group_norm(after)
        self.conv1 = conv(before, after, 3, padding=1)
        self.conv2 = zeroed(conv(after, after, 3, padding=1))
        self.modulation = nn.Linear(style.level_width, (2 if style.scale_shift else 1) * after)
        self.dropout = Dropout(style.dropout)
        self.shortcut = conv(before, after, 1) if project else nn.Identity()
        self.attention = style.attention(after) if attends else nn.Identity()

    def forward(self, x: Tensor, level: Tensor, size: Sequence[int] = ()) -> Tensor:
        """[B, ``after``, *sizes] from ``x`` [B, ``before``, ...] and ``level`` [B, width]."""
        h = self.conv1(self.resized(F.silu(self.norm1(x)), size))
        change = self.modulation(level)
        if self.scale_shift:
            h = modulate(self.norm2(h), change)
        else:
            h = self.norm2(h + expand_like(change, h))
        h = self.conv2(self.dropout(F.silu(h)))
        h = self.shortcut(self.resized(x, size)) + h
        return self.attention(h if self.gain == 1 else self.gain * h)

    def resized(self, x: Tensor, size: Sequence[int]) -> Tensor:
        """``x`` at the resolution of the output, here that of the input."""
        return x


class _HalvingBlock(ResidualBlock):
    def resized(self, x: Tensor, size: Sequence[int]) -> Tensor:
        return self.resample.down(x)


class _DoublingBlock(ResidualBlock):
    def resized(self, x: Tensor, size: Sequence[int]) -> Tensor:
        return self.resample.up(x, size)


class _RepeatedPoints(nn.Module):
    """Points repeated to another size, then a convolution."""

    def __init__(self, channels: int, axes: int) -> None:
        super().__init__()
        self.conv = CONV[axes](channels, channels, 3, padding=1)

    def forward(self, x: Tensor, level: Tensor, size: Sequence[int]) -> Tensor:
        return self.conv(F.interpolate(x, size=tuple(size), mode="nearest"))
