"""Halving and doubling of resolutions by a fixed filter."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
SPREAD = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


class Resample(nn.Module):
    r"""Filters with a small symmetric kernel along every axis, then drops or inserts points.

    (1, 1) averages pairs on the way down and repeats points on the way up; (1, 3, 3, 1), a cubic
    B-spline in eighths, also removes what the coarser grid cannot show. Both keep constants as
    they are away from the edges, where zeros are outside; up is 2^axes times the transpose of
    down. An odd size is halved upwards, its last point repeated first.

    Reference: Karras et al., Analyzing and improving the image quality of StyleGAN, 2020; Zhang,
    Making convolutional networks shift-invariant again, 2019.

    Args:
        kernel: Weights along one axis up to a factor, an even number of them.
        axes: Number of axes behind [B, C].

    Raises:
        ValueError: If the kernel would shift what it filters, or not keep a constant.
    """

    def __init__(self, kernel: Sequence[float], axes: int = 2) -> None:
        super().__init__()
        taps = torch.tensor([float(tap) for tap in kernel], device="cpu")
        even, odd = taps[::2].sum(), taps[1::2].sum()
        symmetric = len(taps) and torch.equal(taps, taps.flip(0)) and len(taps) % 2 == 0
        if not symmetric or even <= 0 or not torch.isclose(even, odd):
            raise ValueError(
                "a resampling kernel is symmetric, so that it does not shift, and has an even "
                f"number of weights with a positive sum; got {list(kernel)}. Take [1, 1], or "
                "[1, 3, 3, 1]."
            )
        self.axes, self.pad = axes, (len(taps) - 2) // 2
        taps = taps / taps.sum()
        kernel = math.prod(
            taps.reshape([-1 if i == axis else 1 for i in range(axes)]) for axis in range(axes)
        )
        self.register_buffer("kernel", kernel[None, None], persistent=False)

    def _weights(self, x: Tensor, gain: int = 1) -> Tensor:
        kernel = gain * self.kernel.to(x)
        return kernel.expand(x.shape[1], *kernel.shape[1:])

    def down(self, x: Tensor) -> Tensor:
        """[B, C, *halves], rounded up."""
        odd = [size % 2 for size in reversed(x.shape[2:])]
        if any(odd):
            x = F.pad(x, [side for one in odd for side in (0, one)], mode="replicate")
        return CONVOLVE[self.axes](
            x, self._weights(x), stride=2, padding=self.pad, groups=x.shape[1]
        )

    def up(self, x: Tensor, size: Sequence[int]) -> Tensor:
        """[B, C, *``size``], twice that of ``x`` or one less along each axis."""
        weights = self._weights(x, 2**self.axes)
        x = SPREAD[self.axes](x, weights, stride=2, padding=self.pad, groups=x.shape[1])
        return x[(..., *(slice(n) for n in size))]
