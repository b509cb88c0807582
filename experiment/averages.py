"""Averages of the weights along the path of training: what is evaluated in their place."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor, nn

from experiment.errors import RunError
from experiment.progress import say
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

    @abstractmethod
    def begin_late(self, iteration: int) -> None:
        """Say what it means that the weights before ``iteration`` are not known, those there
        standing for all of them.

        Raises:
            RunError: If it would be another average then.
        """


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

    def begin_late(self, iteration: int) -> None:
        """It forgets them."""
        say(f"the average {self.name} was not kept so far and begins at iteration {iteration}")


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

    def begin_late(self, iteration: int) -> None:
        """Its profile is over all of the training, as is that of averages made of it."""
        raise RunError(
            f"training.power_ema has the width {self.width:g}, whose average is over the training "
            f"from its first iteration on, and this run kept none up to iteration {iteration}. "
            f"Leave it out: from other widths average=power:{self.width:g} can be put together "
            "after training. Or begin anew with run.fresh=true or another run.name."
        )


class Average:
    """An average of weights, kept beside them.

    Args:
        profile: Which weights it is made of.
        weights: What is averaged, as this process holds it; the first average.
    """

    def __init__(self, profile: Profile, weights: Iterable[Tensor]) -> None:
        self.profile = profile
        self.weights = [weight.detach().clone() for weight in weights]

    @torch.no_grad()
    def update(self, weights: Sequence[Tensor], iteration: int) -> None:
        """One more iteration."""
        torch._foreach_lerp_(self.weights, weights, 1 - self.profile.kept(iteration))


class Mould:
    """Makes copies of a module around weights that are given; it holds none itself.

    Where a process has parts of the weights a whole copy would fill what they make room on.

    Args:
        module: What the copies are of, whole.
    """

    def __init__(self, module: nn.Module) -> None:
        hollow = {id(p): _frozen(torch.empty_like(p, device="meta")) for p in module.parameters()}
        self.module = copy.deepcopy(module, hollow).eval()

    def around(self, weights: Iterable[Tensor], buffers: Iterable[Tensor]) -> nn.Module:
        """In evaluation mode and not trained: with these very ``weights``, and with copies of
        ``buffers``."""
        own = [*self.module.parameters(), *self.module.buffers()]
        new = [*map(_frozen, weights), *(buffer.clone() for buffer in buffers)]
        return copy.deepcopy(self.module, dict(zip(map(id, own), new, strict=True)))


def _frozen(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight, requires_grad=False)
