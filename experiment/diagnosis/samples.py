"""Samples of a data set as mode=diagnose reads them: in blocks, in any units, some or all."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from experiment.seeds import stream

BLOCK = 2**22  # numbers read at once
MOST_NUMBERS = 2**25  # of the samples that are kept in memory, 256 MiB in float64


class Samples(Protocol):
    """What a part of a data set is: a tensor, or something read as it is asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any) -> Tensor: ...  # noqa: ANN401


class Units(Protocol):
    """Data to model units."""

    def encode(self, values: Tensor, generator: torch.Generator) -> Tensor:
        """Values [B, ...] in model units."""


@dataclass(frozen=True)
class Part:
    """One part of a data set.

    Args:
        name: ``train`` or ``test``.
        samples: [N, ...], indexed by slices and index tensors alone.
        shape: Of one sample.
        most: So many are looked at one by one: all, or a random choice that ``seed`` decides.
        seed: Of the choice, and of the spread over bins.
    """

    name: str
    samples: Samples
    shape: tuple[int, ...]
    most: int
    seed: int = 0

    def __len__(self) -> int:
        """How many are looked at."""
        return min(self.most, len(self.samples))

    @property
    def dims(self) -> int:
        """Numbers of a sample."""
        return torch.Size(self.shape).numel()

    def index(self) -> Tensor:
        """Which samples are looked at, increasing."""
        return self._choice(len(self), "looked at")

    def blocks(self) -> Iterator[Tensor]:
        """Those that are looked at, in data units, some at a time."""
        rows = max(1, BLOCK // self.dims)
        for chosen in self.index().split(rows):
            whole = len(self) == len(self.samples)
            yield (
                self.samples[int(chosen[0]) : int(chosen[-1]) + 1]
                if whole
                else (self.samples[chosen])
            )

    def some(self, count: int, units: Units, purpose: str = "some") -> Tensor:
        """At most ``count`` samples chosen at random, flattened [n, D] float64 in model units."""
        chosen = self._choice(min(count, len(self), max(2, MOST_NUMBERS // self.dims)), purpose)
        generator = stream(self.seed, f"diagnose {self.name} {purpose} bins", 0)
        return units.encode(self.samples[chosen], generator).flatten(1).double()

    def chosen(self, count: int, purpose: str = "some") -> Tensor:
        """Which samples :meth:`some` takes, as long as they fit into memory."""
        return self._choice(min(count, len(self), max(2, MOST_NUMBERS // self.dims)), purpose)

    def _choice(self, count: int, purpose: str) -> Tensor:
        size = len(self.samples)
        if count >= size:
            return torch.arange(size)
        generator = stream(self.seed, f"diagnose {self.name} {purpose}", 0)
        return torch.randperm(size, generator=generator)[:count].sort().values
