"""How the input, made smaller, joins the resolutions of a U-Net."""

from __future__ import annotations

from torch import Tensor, nn

from score_models.networks.blocks import CONV
from score_models.networks.residual import BlockStyle


class NoInput(nn.Module):
    """It does not.

    Args:
        style: Of the network.
        joined: Channels of what came from the resolution before.
        channels: Channels of the network here.
    """

    def __init__(self, style: BlockStyle, joined: int, channels: int) -> None:
        super().__init__()
        self.after = joined  # channels of what goes on to the next resolution

    def forward(self, joined: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """What goes on to the next resolution, and the features here, from what came and ``h``."""
        return joined, h


class InputSkip(NoInput):
    """The input itself, through a 1x1 convolution."""

    def __init__(self, style: BlockStyle, joined: int, channels: int) -> None:
        super().__init__(style, joined, channels)
        self.resample = style.resample
        self.conv = CONV[style.axes](joined, channels, 1)

    def forward(self, joined: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        joined = self.resample.down(joined)
        return joined, h + self.conv(joined)


class InputResidual(NoInput):
    """What joined before, through a 3x3 convolution, is the shortcut of the whole resolution."""

    def __init__(self, style: BlockStyle, joined: int, channels: int) -> None:
        super().__init__(style, joined, channels)
        self.after, self.gain, self.resample = channels, style.gain, style.resample
        self.conv = CONV[style.axes](joined, channels, 3, padding=1)

    def forward(self, joined: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = self.gain * (self.conv(self.resample.down(joined)) + h)
        return h, h


INPUTS = {"none": NoInput, "skip": InputSkip, "residual": InputResidual}
