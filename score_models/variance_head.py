"""A second head on a frozen network: the variance of a reverse step, by coordinate."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from score_models.model import ScoreModel
from score_models.networks.embedding import NoiseEmbedding
from sde_lib import validation
from sde_lib.sde import expand_like


class VarianceHead(nn.Module):
    """A small residual network from the features of another to one number a coordinate.

    Features [B, C, H, W] of the height and width of the samples go through 3x3 convolutions, any
    others through dense layers; log(sigma / alpha) scales and shifts each block. It starts at 0.

    Args:
        features: Shape of the features of one sample.
        shape: Shape of one sample.
        width: Channels of the blocks.
        blocks: How many.
    """

    def __init__(
        self,
        features: tuple[int, ...],
        shape: tuple[int, ...],
        width: int = 32,
        blocks: int = 2,
    ) -> None:
        super().__init__()
        width = validation.count("VarianceHead", "width", width)
        blocks = validation.count("VarianceHead", "blocks", blocks)
        self.features, self.shape = tuple(features), tuple(shape)
        self.spatial = len(features) == 3 and tuple(features[1:]) == tuple(shape[1:])
        before = features[0] if self.spatial else math.prod(features)
        after = shape[0] if self.spatial else math.prod(shape)
        self.embedding = NoiseEmbedding(2 * width)
        self.enter = self._layer(before, width, 1)
        self.blocks = nn.ModuleList(
            _Block(self._layer(width, width), self._layer(width, width), 2 * width, width)
            for _ in range(blocks)
        )
        self.leave = self._layer(width, after)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def _layer(self, before: int, after: int, kernel: int = 3) -> nn.Module:
        if self.spatial:
            return nn.Conv2d(before, after, kernel, padding=kernel // 2)
        return nn.Linear(before, after)

    def forward(self, features: Tensor, noise_level: Tensor) -> Tensor:
        """Output [B, ...] from ``features`` and ``noise_level`` [B] = log(sigma / alpha)."""
        level = self.embedding(noise_level)
        h = self.enter(features if self.spatial else features.flatten(1))
        for block in self.blocks:
            h = block(h, level)
        return self.leave(F.silu(h)).reshape(len(h), *self.shape)


class _Block(nn.Module):
    """Two layers, scaled and shifted in between, added to their input."""

    def __init__(self, first: nn.Module, second: nn.Module, level_width: int, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, width)
        self.first, self.second = first, second
        self.modulation = nn.Linear(level_width, 2 * width)

    def forward(self, h: Tensor, level: Tensor) -> Tensor:
        scale, shift = (expand_like(m, h) for m in self.modulation(level).chunk(2, dim=1))
        return h + self.second(F.silu(self.first(self.norm(h)) * (1 + scale) + shift))


def head_of(
    model: ScoreModel, x0: Tensor, cond: Tensor | None, width: int, blocks: int
) -> VarianceHead:
    """A new head for the features of ``model``, where it is, from the global random stream.

    Args:
        model: It is evaluated once, for the shape of its features.
        x0: One sample or more, [B, ...].
        cond: Conditioning that goes with them.
        width: Channels of the head.
        blocks: Its residual blocks.

    Raises:
        ValueError: If the network has no features.
    """
    level = torch.tensor(model.sde.t_max, dtype=torch.float64, device=x0.device)
    features = model.features(x0, level, cond)
    head = VarianceHead(tuple(features.shape[1:]), tuple(x0.shape[1:]), width, blocks)
    return head.to(x0.device)


class HeadOutput:
    """The output of a head as a function (x [B, ...], t) -> [B, ...] of the state.

    Args:
        model: Whose features the head is on.
        head: In evaluation mode.
    """

    def __init__(self, model: ScoreModel, head: VarianceHead) -> None:
        self.model, self.head = model, head
        model.keep_features()

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """Costs no pass of the network right after the score of the same tensors, whose condition
        holds here too.

        A wrapper that has the score evaluated at a copy of x costs one pass more, which a counter
        around the score does not see; with a conditional model it is refused.
        """
        # a head stays in its own precision, whatever the network runs in
        features = self.model.features_beside(x, t).to(next(self.head.parameters()).dtype)
        return self.head(features, log_ratio(self.model, t).to(features).expand(len(x)))


def log_ratio(model: ScoreModel, t: Tensor) -> Tensor:
    """log(sigma / alpha) in the shape of ``t``, float64."""
    return -0.5 * model.sde.log_snr(torch.as_tensor(t, dtype=torch.float64))
