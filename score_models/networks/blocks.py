"""What U-Nets are made of, along any number of axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from score_models.networks.attention import attend
from sde_lib.sde import expand_like

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
SMALLEST = 8  # points along an axis


def spatial_axes(owner: str, shape: Sequence[int]) -> int:
    """Number of axes of samples of ``shape`` (channels, *sizes) if a U-Net can take them.

    Raises:
        ValueError: Saying what it takes, and what takes the others.
    """
    axes = len(shape) - 1
    if axes not in CONV or min(shape[1:]) < SMALLEST:
        raise ValueError(
            f"{owner} needs samples of shape (channels, *sizes) with one to three sizes of at "
            f"least 8, in images at least 8x8; got {tuple(shape)}. For other shapes use "
            "network=mlp training=vectors."
        )
    return axes


def attending(owner: str, attention: Sequence[int], resolutions: int) -> set[int]:
    """Those of so many resolutions, counted from the finest, that ``attention`` names.

    Raises:
        ValueError: If it names one that is not there.
    """
    if not all(-resolutions <= i < resolutions for i in attention):
        raise ValueError(
            f"{owner} with {resolutions} multipliers has resolutions 0, the finest, to "
            f"{resolutions - 1}, or -1, the coarsest, to {-resolutions}; got "
            f"attention={list(attention)}. Leave out the others, or set more multipliers."
        )
    return {range(resolutions)[i] for i in attention}


def group_norm(channels: int) -> nn.GroupNorm:
    """Over the largest power of two of groups, up to 32, that leaves four channels in each."""
    groups = next(
        g for g in (32, 16, 8, 4, 2, 1) if channels % g == 0 and channels // g >= 4 or g == 1
    )
    return nn.GroupNorm(groups, channels, eps=1e-6)


def zeroed(layer: nn.Module) -> nn.Module:
    """``layer`` with its weights and biases set to zero, in place."""
    for weight in layer.parameters():
        nn.init.zeros_(weight)
    return layer


def through(block: Callable[..., Tensor], *arguments: Tensor, sparing: bool) -> Tensor:
    """``block(*arguments)``; with ``sparing`` its inner values are computed again for a gradient.

    Numbers and random bits are those of the plain call. Within transforms of ``torch.func``, which
    know nothing of recomputation, it is the plain call.
    """
    if sparing and torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active():
        return checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=True)
    return block(*arguments)


class SelfAttention(nn.Module):
    """Self-attention over all points of h [B, C, *sizes], residual; the identity at the start.

    Args:
        channels: C.
        heads: Attention heads, which divide C.
        gain: Factor on the sum of input and attention.
    """

    def __init__(self, channels: int, heads: int, gain: float = 1.0, axes: int = 2) -> None:
        super().__init__()
        self.heads, self.gain = heads, gain
        self.norm = group_norm(channels)
        self.qkv = CONV[axes](channels, 3 * channels, 1)
        self.leave = zeroed(CONV[axes](channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Output in the shape of ``x``."""
        batch, channels = x.shape[:2]
        qkv = self.qkv(self.norm(x)).reshape(batch, 3, self.heads, channels // self.heads, -1)
        h = attend(*qkv.mT.unbind(1))  # [B, heads, points, D]
        h = x + self.leave(h.mT.reshape(x.shape))
        return h if self.gain == 1 else self.gain * h


class Dropout(nn.Module):
    """Zeroes each number with probability ``rate`` and scales the others, while training.

    On a CPU the decision takes 16 random bits a number instead of torch's 64, so that it costs a
    third; the rate is then the nearest multiple of 2^-16, and its expectation still exact.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.dropped = round(rate * 2**16)  # of 2^16 equally likely values

    def forward(self, x: Tensor) -> Tensor:
        """``x`` with some numbers zero and the others larger."""
        if not self.training or not self.dropped:
            return x
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return F.dropout(x, self.rate)
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        bits = words.view(torch.int16)[: x.numel()].view(x.shape)
        kept = (bits >= self.dropped - 2**15).to(x.dtype)
        return x * kept.mul_(2**16 / (2**16 - self.dropped))


class Down(nn.Module):
    """Half as many points along each axis, rounding up, by a strided convolution."""

    def __init__(self, channels: int, axes: int) -> None:
        super().__init__()
        self.conv = CONV[axes](channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        """[B, C, *halves]."""
        return self.conv(x)


def modulate(h: Tensor, scale_and_shift: Tensor) -> Tensor:
    """``h`` [B, C, ...] times 1 + scale, plus shift, which are the halves of [B, 2 C]."""
    scale, shift = (expand_like(m, h) for m in scale_and_shift.chunk(2, dim=1))
    return torch.addcmul(shift, h, 1 + scale)  # one pass over h and not two
