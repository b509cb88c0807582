"""What a network is told beside the state: a class, or a vector of numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sde_lib import validation


@dataclass(frozen=True)
class Classes:
    """One of ``count`` classes, int64 [B] in 0..count-1; the index ``count`` is a dropped one.

    Args:
        count: How many there are, 1 or more.
    """

    count: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "count", validation.count("Classes", "count", self.count))

    def check(self, owner: str, cond: Tensor, batch: int) -> None:
        """Refuse what is no batch of classes.

        Raises:
            ValueError: Saying what was given.
        """
        if cond.dtype != torch.int64 or tuple(cond.shape) != (batch,):
            raise ValueError(
                f"{owner} needs classes as int64 of shape ({batch},); got {cond.dtype} of shape "
                f"{tuple(cond.shape)}."
            )
        if batch and not (int(cond.min()) >= 0 and int(cond.max()) <= self.count):
            raise ValueError(
                f"{owner} needs classes in 0..{self.count - 1}; got {int(cond.min())} to "
                f"{int(cond.max())}."
            )

    def null(self, batch: int, device: torch.device | str = "cpu") -> Tensor:
        """A batch of dropped classes, [B]."""
        return torch.full((batch,), self.count, dtype=torch.int64, device=device)

    def drop(self, cond: Tensor, dropped: Tensor) -> Tensor:
        """``cond`` [B] without those that are ``dropped`` [B]."""
        return torch.where(dropped, self.count, cond)

    def embedding(self, width: int) -> nn.Module:
        """A learned vector for each class, and for the dropped one: [B] -> [B, width]."""
        return nn.Embedding(self.count + 1, width)


@dataclass(frozen=True)
class Vector:
    """A vector of ``size`` numbers, float [B, size]; a row of NaN is a dropped one.

    Args:
        size: How many numbers, 1 or more.
    """

    size: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", validation.count("Vector", "size", self.size))

    def check(self, owner: str, cond: Tensor, batch: int) -> None:
        """Refuse what is no batch of such vectors.

        Raises:
            ValueError: Saying what was given.
        """
        if not cond.is_floating_point() or tuple(cond.shape) != (batch, self.size):
            raise ValueError(
                f"{owner} needs vectors as floats of shape ({batch}, {self.size}); got "
                f"{cond.dtype} of shape {tuple(cond.shape)}."
            )

    def null(self, batch: int, device: torch.device | str = "cpu") -> Tensor:
        """A batch of dropped vectors, [B, size]."""
        return torch.full((batch, self.size), math.nan, device=device)

    def drop(self, cond: Tensor, dropped: Tensor) -> Tensor:
        """``cond`` [B, size] without those that are ``dropped`` [B]."""
        return torch.where(dropped[:, None], math.nan, cond)
