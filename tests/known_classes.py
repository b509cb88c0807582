"""A conditional model with an exact score: class c is component c of a mixture, no class all."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from experiment.data import Dataset
from likelihood import Standardization
from score_models import Classes
from sde_lib import VPSDE
from sde_lib.oracles import GaussianMixture

SDE, STD = VPSDE(), 0.6
MEANS = torch.tensor([[-1.0, 0.0], [1.0, 0.5], [0.0, -1.5]])
SHARES = torch.tensor([0.5, 0.3, 0.2])
NUMBERS = torch.arange(3)


def components(means: Tensor = MEANS, std: float | Tensor = STD) -> list[GaussianMixture]:
    """Each class alone."""
    return [GaussianMixture(mean[None], std) for mean in means]


class KnownClasses(nn.Module):
    """In the units of the classes times ``scale``; without class it is their mixture."""

    cond = Classes(3)

    def __init__(self, units: Standardization | None = None) -> None:
        super().__init__()
        self.sde, self.weight = SDE, nn.Parameter(torch.zeros(()))
        means = MEANS if units is None else units.encode(MEANS)
        std = torch.full((2,), STD) / (1 if units is None else units.scale)
        self.each = components(means, std[None])
        self.all = GaussianMixture(means, std.expand(3, 2), SHARES)
        self.rows: list[int] = []

    def score(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        self.rows.append(len(x))
        assert cond.shape == x.shape[:1], "a class for each sample"
        found = torch.stack([data.score(SDE)(x, t) for data in (*self.each, self.all)], 1)
        return found[torch.arange(len(x)), cond]


def classes(train: int = 300, test: int = 24) -> Dataset:
    """Samples of the mixture with their classes."""
    parts = {}
    for name, count in (("train", train), ("test", test)):
        generator = torch.Generator().manual_seed(count)
        labels = torch.multinomial(SHARES, count, replacement=True, generator=generator)
        noise = torch.randn(count, 2, generator=generator)
        parts |= {name: MEANS[labels] + STD * noise, f"{name}_cond": labels}
    return Dataset("classes", **parts, cond=Classes(3))


def log_joint(data: Dataset, x: Tensor) -> Tensor:
    """log p(x, c) with the shares of the training set, [B, 3] float64."""
    shares = torch.bincount(data.train_cond, minlength=3).double() / len(data.train)
    square = (x[:, None] - MEANS).double().square().sum(-1) / STD**2
    return shares.log() - 0.5 * square - math.log(2 * math.pi * STD**2)
