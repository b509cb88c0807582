"""What may be done to a training batch without making it less likely: flips."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from experiment.data import Dataset
from experiment.run import Run
from sde_lib import validation
from sde_lib.noise import Generator, rand
from sde_lib.sde import expand_like


class Augmentation(Protocol):
    """A random change of training samples, each on its own."""

    def check(self, shape: tuple[int, ...]) -> None:
        """Refuse samples of a ``shape`` that it is not for.

        Raises:
            ValueError: Saying for which it is.
        """
        ...

    def __call__(self, x: Tensor, generator: Generator = None) -> Tensor:
        """A batch [B, ...] in data or model units, changed; of the same shape and dtype."""
        ...


@dataclass(frozen=True)
class HorizontalFlip:
    """Images mirrored left to right, each with the same probability.

    One number is drawn for a sample, whether it is mirrored or not.

    Args:
        probability: Of each image, in [0, 1]; a half makes the mirrored set as likely as the set.
    """

    probability: float = 0.5

    def __post_init__(self) -> None:
        validation.real("HorizontalFlip", "probability", self.probability, at_least=0, at_most=1)

    def check(self, shape: tuple[int, ...]) -> None:
        """Refuse all but [C, ..., W].

        Raises:
            ValueError: With the shape.
        """
        if len(shape) < 3:
            raise ValueError(
                "HorizontalFlip mirrors images [C, H, W]; the order of the numbers of a vector or "
                f"signal has a meaning, and samples of shape {tuple(shape)} are no images. Leave "
                "augment out."
            )

    def __call__(self, x: Tensor, generator: Generator = None) -> Tensor:
        """Some of the images ``x`` [B, C, ..., W] mirrored; bytes or floats."""
        self.check(x.shape[1:])
        flipped = rand((len(x),), generator, device=x.device) < self.probability
        return torch.where(expand_like(flipped, x), x.flip(-1), x)


def augmentation(run: Run, data: Dataset) -> Augmentation | None:
    """What ``augment=NAME`` does to training batches of ``data``; None without one.

    Raises:
        ValueError: If it is not for such data.
    """
    if run.config.get("augment") is None:
        return None
    made: Augmentation = run.build("augment")
    made.check(data.shape)
    return made
