"""The published U-Nets of diffusion models: one class, whose switches tell them apart."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from score_models.conditioning import Conditioning
from score_models.networks.blocks import CONV, attending, spatial_axes, through
from score_models.networks.embedding import NoiseEmbedding, checked_cond
from score_models.networks.pyramids import INPUTS
from score_models.networks.resample import Resample
from score_models.networks.residual import BlockStyle
from sde_lib import validation


class ScoreUNet(nn.Module):
    r"""The U-Net of DDPM, of DDPM++ and NCSN++, and of ADM.

    Residual blocks with group normalisation and self-attention. How resolutions change
    (``kernel``, ``project``), what joins on the way (``progressive_input``, ``output_skip``) and
    how the noise level enters (``scale_shift``, ``bandwidth``) tells the papers apart, see
    docs/networks.md. In all of them, other than in the papers, the noise level is
    log(sigma / alpha), so that weights survive a change of process, the output is zero at the
    start and scaled by the ScoreModel, and any size from 8 up will do, along one to three axes.

    References: Ho et al., Denoising diffusion probabilistic models, 2020; Song et al.,
    Score-based generative modeling through SDEs, 2021, appendix H; Dhariwal and Nichol, Diffusion
    models beat GANs on image synthesis, 2021.

    Args:
        shape: Shape of one sample, (channels, *sizes), one to three sizes of at least 8.
        width: Channels at the finest resolution.
        multipliers: Channels at each resolution, in units of ``width``.
        blocks: Residual blocks at each resolution on the way down; one more on the way up.
        attention: Resolutions that attend, counted from the finest, 0; negative counts from the
            coarsest. The middle always does.
        attend_once: Whether on the way up the last block of a resolution attends alone (true), or
            each block (false).
        head_channels: Channels of one attention head; null for a single head.
        kernel: Filter along one axis of residual blocks that change the resolution, such as [1, 1]
            or [1, 3, 3, 1], see :class:`~score_models.networks.resample.Resample`; null for DDPM's
            strided convolutions on the way down and repeated points on the way up.
        project: Whether the shortcut of blocks that change the resolution has a 1x1 convolution.
        scale_shift: Whether the noise level scales and shifts what is normalised (true), or is
            added before (false).
        rescale: Whether sums of two branches are divided by sqrt(2), to keep their variance.
        progressive_input: How the input, made smaller, joins each resolution: none; skip, itself;
            residual, by way of what joined before.
        output_skip: Whether each resolution adds an output of its own, enlarged, to the result.
        bandwidth: Of random Fourier features of the noise level; 0 for geometric frequencies.
        dropout: Dropout rate in the residual blocks, in [0, 1).
        cond: What it is conditioned on, see :mod:`score_models.conditioning`.
        checkpointing: While training keep only what enters each block, and compute the rest again
            for the gradient: less memory, a quarter more time.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        width: int = 128,
        multipliers: Sequence[int] = (1, 2, 2, 2),
        blocks: int = 4,
        attention: Sequence[int] = (1,),
        attend_once: bool = True,
        head_channels: int | None = None,
        kernel: Sequence[float] | None = (1, 1),
        project: bool = True,
        scale_shift: bool = False,
        rescale: bool = True,
        progressive_input: str = "none",
        output_skip: bool = False,
        bandwidth: float = 0.0,
        dropout: float = 0.1,
        cond: Conditioning | None = None,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        axes = spatial_axes("ScoreUNet", shape)
        width, *multipliers = _counts(("width", width), *(("multipliers", m) for m in multipliers))
        (blocks,) = _counts(("blocks", blocks))
        channels = [width * multiplier for multiplier in multipliers]
        _check_flags(
            attend_once=attend_once, project=project, scale_shift=scale_shift, rescale=rescale,
            output_skip=output_skip, checkpointing=checkpointing,
        )  # fmt: skip
        _check_ranges(dropout, bandwidth, progressive_input)
        _check_kernel(kernel, project, output_skip, progressive_input)
        _check_channels(channels, head_channels)
        self.cond, self.checkpointing = cond, checkpointing
        self.resample = None if kernel is None else Resample(kernel, axes)
        frequencies = width if bandwidth else max(width // 2, 1)
        self.embedding = NoiseEmbedding(4 * width, frequencies, cond, bandwidth)
        gain = math.sqrt(0.5) if rescale else 1.0
        style = BlockStyle(
            axes, 4 * width, scale_shift, gain, dropout, head_channels, self.resample, project
        )
        attends = attending("ScoreUNet", attention, len(channels))
        self.enter = CONV[axes](shape[0], width, 3, padding=1)
        kept = self._build_down(style, channels, blocks, attends, shape[0], progressive_input)
        deepest = channels[-1]
        self.middle = nn.ModuleList(
            [style.block(deepest, deepest, attends=True), style.block(deepest, deepest)]
        )
        self._build_up(style, channels, blocks, attends, kept, attend_once)
        exits = channels[:0:-1] if output_skip else []  # coarsest first; the finest is leave
        self.outputs = nn.ModuleList(style.leave(size, shape[0]) for size in exits)
        self.leave = style.leave(channels[0], shape[0])
        _start(self)

    def _build_down(
        self,
        style: BlockStyle,
        channels: list[int],
        blocks: int,
        attends: set[int],
        joined: int,
        progressive_input: str,
    ) -> list[int]:
        """The way down, finest resolution first; the channels that the way up is given."""
        self.down, self.halving, self.inputs = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        current = self.enter.out_channels
        kept = [current]
        for resolution, size in enumerate(channels):
            if resolution:
                self.halving.append(style.half(current))
                self.inputs.append(INPUTS[progressive_input](style, joined, current))
                joined = self.inputs[-1].after
                kept.append(current)
            self.down.append(nn.ModuleList())
            for _ in range(blocks):
                self.down[-1].append(style.block(current, size, resolution in attends))
                current = size
                kept.append(current)
        return kept

    def _build_up(
        self,
        style: BlockStyle,
        channels: list[int],
        blocks: int,
        attends: set[int],
        kept: list[int],
        attend_once: bool,
    ) -> None:
        """The way up, coarsest resolution first."""
        self.up, self.doubling = nn.ModuleList(), nn.ModuleList()
        current = channels[-1]
        for resolution, size in reversed(list(enumerate(channels))):
            self.up.append(nn.ModuleList())
            for i in range(blocks + 1):
                attending = resolution in attends and (i == blocks or not attend_once)
                self.up[-1].append(style.block(current + kept.pop(), size, attending))
                current = size
            if resolution:
                self.doubling.append(style.double(current))

    def forward(self, x: Tensor, noise_level: Tensor, cond: Tensor | None = None) -> Tensor:
        """Output [B, C, ...] at scaled ``x`` and ``noise_level`` [B] = log(sigma / alpha)."""
        level = self.embedding(noise_level, checked_cond(self, self.cond, cond, len(x)))
        kept = self._way_down(x, level)
        h = kept[-1]
        for block in self.middle:
            h = self._through(block, h, level)
        h, outputs = self._way_up(h, kept, level)
        return self.leave(h) + outputs if self.outputs else self.leave(h)

    def _through(self, block: nn.Module, *arguments: object) -> Tensor:
        return through(block, *arguments, sparing=self.checkpointing and self.training)

    def _way_down(self, x: Tensor, level: Tensor) -> list[Tensor]:
        """What the way up is given, the finest first."""
        h, joined = self.enter(x), x
        kept = [h]
        for resolution, blocks in enumerate(self.down):
            if resolution:
                h = self._through(self.halving[resolution - 1], h, level)
                joined, h = self.inputs[resolution - 1](joined, h)
                kept.append(h)
            for block in blocks:
                h = self._through(block, h, level)
                kept.append(h)
        return kept

    def _way_up(
        self, h: Tensor, kept: list[Tensor], level: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The features at the finest resolution, and the sum of the coarser ones' outputs."""
        outputs = None
        for i, blocks in enumerate(self.up):
            for block in blocks:
                h = self._through(block, torch.cat([h, kept.pop()], dim=1), level)
            if not kept:
                break
            size = kept[-1].shape[2:]
            if self.outputs:
                own = self.outputs[i](h)
                outputs = self.resample.up(own if outputs is None else outputs + own, size)
            h = self._through(self.doubling[i], h, level, size)
        return h, outputs


def _counts(*named: tuple[str, float]) -> list[int]:
    return [validation.count("ScoreUNet", name, value) for name, value in named]


def _check_flags(**flags: bool) -> None:
    for name, value in flags.items():
        validation.flag("ScoreUNet", name, value)


def _check_ranges(dropout: float, bandwidth: float, progressive_input: str) -> None:
    validation.real("ScoreUNet", "dropout", dropout, at_least=0, below=1)
    validation.real("ScoreUNet", "bandwidth", bandwidth, at_least=0)
    validation.choice("ScoreUNet", "progressive_input", progressive_input, INPUTS)


def _check_kernel(
    kernel: Sequence[float] | None, project: bool, output_skip: bool, progressive_input: str
) -> None:
    if kernel is None and (project or output_skip or progressive_input != "none"):
        raise ValueError(
            "ScoreUNet without a kernel has no filter for project, output_skip and "
            f"progressive_input; got kernel=null, project={project}, output_skip={output_skip}, "
            f"progressive_input={progressive_input}. Set kernel to [1, 1] or [1, 3, 3, 1], or "
            "project and output_skip to false and progressive_input to none."
        )


def _check_channels(channels: list[int], head_channels: int | None) -> None:
    size = 1 if head_channels is None else head_channels
    validation.count("ScoreUNet", "head_channels", size)
    if not channels or any(c % size for c in channels):
        raise ValueError(
            "ScoreUNet needs one multiplier or more, and whole attention heads at each "
            f"resolution; got channels {channels}, head_channels={head_channels}. Choose "
            "head_channels that divides width, or null for one head."
        )


@torch.no_grad()
def _start(network: nn.Module) -> None:
    """Uniform weights of variance 1 / (mean of fan in and out), no biases; zeros stay zeros.

    As in the papers; torch's own have a third of that variance and less.
    """
    for layer in network.modules():
        if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            if layer.weight.is_meta or bool(layer.weight.any()):
                nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
