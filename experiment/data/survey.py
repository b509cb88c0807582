"""One pass over samples, whether they fit into memory or not: range, bad values, mean and std."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from experiment.data.samples import Samples, each_block
from likelihood.standardize import Moments


@dataclass
class Survey:
    """What one pass over samples has found.

    Attributes:
        low: Least value, by column of vectors [d], else of all [].
        high: Largest value, likewise.
        bad: How many values are not allowed.
        first: Index of the first of these; None if there is none.
        value: That value.
        moments: Mean and std by coordinate or channel, where they were asked for.
    """

    low: Tensor | None = None
    high: Tensor | None = None
    bad: int = 0
    first: tuple[int, ...] | None = None
    value: float = 0.0
    moments: Moments = field(default_factory=Moments)
    _seen: int = 0

    def add(self, block: Tensor, is_bad: Callable[[Tensor], Tensor], moments: bool) -> None:
        """Take in the next samples [n, ...]."""
        bad = is_bad(block)
        if bool(bad.any()):
            self._note(block, bad)
        by = (0,) if block.ndim == 2 else tuple(range(block.ndim))
        low, high = block.amin(by), block.amax(by)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)
        if moments and not self.bad:
            self.moments.add(block)
        self._seen += len(block)

    def _note(self, block: Tensor, bad: Tensor) -> None:
        if self.first is None:
            row, *rest = bad.nonzero()[0].tolist()
            self.first = (row + self._seen, *rest)
            self.value = block[(row, *rest)].item()
        self.bad += int(bad.sum())

    @property
    def range(self) -> tuple[float, float]:
        """Least and largest value of all."""
        return self.low.min().item(), self.high.max().item()


def survey(
    name: str, samples: Samples, is_bad: Callable[[Tensor], Tensor], *, moments: bool
) -> Survey:
    """Go through ``samples`` once, some rows at a time.

    Args:
        name: Of the data, in front of the progress bar of samples on disk.
        samples: One or more, each of one number or more.
        is_bad: Block [n, ...] -> flags of the same shape: values that are not allowed.
        moments: Whether mean and std are wanted.
    """
    found = Survey()
    for block in each_block(samples, f"checking {name}"):
        found.add(block, is_bad, moments)
    return found


def first_of_a_constant(name: str, samples: Samples) -> float | None:
    """The value that every number of ``samples`` has; None, mostly at once, if two differ."""
    head = samples[:1]
    first = head.flatten()[0]
    if bool((head != first).any()):
        return None
    for block in each_block(samples, f"checking {name}"):
        if bool((block != first).any()):
            return None
    return first.item()
