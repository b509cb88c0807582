"""Small networks that say something, and the passes that they take."""

from __future__ import annotations

import torch
from torch import nn

from score_models import EDM, ScoreModel
from score_models.networks import MLP, UNet
from sde_lib import VPSDE
from sde_lib.reverse_variance import AnalyticVariance

SDE = VPSDE()
U = torch.linspace(-7, 5, 40, dtype=torch.float64)
ANALYTIC = AnalyticVariance(U, 0.5 * torch.sigmoid(-2 * U), 1.0)


def random_model(network: nn.Module) -> ScoreModel:
    """A network that says something, frozen."""
    torch.manual_seed(0)
    for weight in network.parameters():
        nn.init.normal_(weight, std=max(weight[0].numel(), 4) ** -0.5)
    return ScoreModel(network, SDE, EDM(0.7)).eval().requires_grad_(False)


def vector_model() -> ScoreModel:
    """A small one of vectors, [2]."""
    return random_model(MLP((2,), width=16, blocks=1))


def picture_model() -> ScoreModel:
    """A small one of pictures, [1, 8, 8]."""
    return random_model(UNet((1, 8, 8), width=8, multipliers=(1,), blocks=1, heads=2))


def time(u: float) -> torch.Tensor:
    """Where log(sigma / alpha) is ``u``."""
    return SDE.time_at(torch.tensor(-2 * u, dtype=torch.float64))


class Watched(nn.Module):
    """Counts the passes of a network."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.passes = network, 0

    @property
    def leave(self) -> nn.Module:
        return self.network.leave

    def forward(self, *arguments):
        self.passes += 1
        return self.network(*arguments)
