"""Averages of the weights along the path of training: what is evaluated in their place."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor, nn

from sde_lib import validation


@dataclass(frozen=True)
class Profile(ABC):
    """Which of the weights so far an average is made of."""

    @abstractmethod
    def kept(self, iteration: int) -> float:
        """Share of the average that an iteration, counted from 0, keeps; the rest is the new
        weights'."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What the average is called, in files too."""

    combines: ClassVar[bool] = False  # whether such averages make others, after training


@dataclass(frozen=True)
class Exponential(Profile):
    """Decay by a constant factor an iteration; it warms up as (1 + n) / (10 + n).

    Args:
        decay: In [0, 1).
    """

    decay: float = 0.999

    def __post_init__(self) -> None:
        validation.real("training", "ema", self.decay, at_least=0, below=1)

    def kept(self, iteration: int) -> float:
        """The factor, smaller at first."""
        return min(self.decay, (1 + iteration) / (10 + iteration))

    @property
    def name(self) -> str:
        return f"ema-{self.decay:g}"


@dataclass(frozen=True)
class Power(Profile):
    r"""A share of the training so far: the weight of iteration n in the average at N goes as
    :math:`(n/N)^\gamma`.

    The relative standard deviation of that density is the width: :math:`\mathrm{width}^2 =
    (\gamma + 1) / ((\gamma + 2)^2 (\gamma + 3))`. From averages of two widths kept along the way,
    that of any other follows after training, see :mod:`experiment.posthoc`.

    Reference: Karras et al., Analyzing and Improving the Training Dynamics of Diffusion Models,
    2024, section 3.

    Args:
        width: In (0, 0.28]; 0.1 is a tenth of the training.
    """

    combines: ClassVar[bool] = True

    width: float = 0.1

    def __post_init__(self) -> None:
        validation.real("training", "power_ema", self.width, above=0, at_most=0.28)

    @cached_property
    def exponent(self) -> float:
        """gamma >= 0, by bisection: the width falls as it grows."""
        low, high = 0.0, 2.0 / self.width
        for _ in range(100):
            middle = 0.5 * (low + high)
            width = math.sqrt((middle + 1) / (middle + 3)) / (middle + 2)
            low, high = (middle, high) if width > self.width else (low, middle)
        return 0.5 * (low + high)

    def kept(self, iteration: int) -> float:
        """(1 - 1/n)^(gamma + 1) at the n-th iteration: the first keeps nothing."""
        return (1 - 1 / (iteration + 1)) ** (self.exponent + 1)

    @property
    def name(self) -> str:
        return f"power-{self.width:g}"


class Average:
    """An average of all that is trained, kept beside it.

    Args:
        profile: Which weights it is made of.
        trained: What is averaged; its weights now are the first average.
    """

    def __init__(self, profile: Profile, trained: nn.Module) -> None:
        self.profile = profile
        self.module = frozen_copy(trained)
        self.weights: list[Tensor] = list(self.module.parameters())
        self.buffers: list[Tensor] = list(self.module.buffers())
        self.whole = True

    def hold(self, parts: list[Tensor]) -> None:
        """From now on average these parts of the weights, where a process holds no more. What else
        the module has is then that of what is trained, and is taken from there when asked for."""
        self.whole = all(own is part for own, part in zip(self.weights, parts, strict=True))
        if not self.whole:
            self.weights = [part.detach().clone() for part in parts]

    @torch.no_grad()
    def update(self, weights: list[Tensor], buffers: list[Tensor], iteration: int) -> None:
        """One more iteration: weights are averaged, buffers copied."""
        torch._foreach_lerp_(self.weights, weights, 1 - self.profile.kept(iteration))
        if not self.whole:
            return
        for own, new in zip(self.buffers, buffers, strict=True):
            own.copy_(new)


def frozen_copy(module: nn.Module) -> nn.Module:
    """A copy in evaluation mode that is not trained."""
    return copy.deepcopy(module).requires_grad_(False).eval()
