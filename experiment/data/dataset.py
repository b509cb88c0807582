"""What every data source returns: checked samples and the units they come in."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from likelihood.dequantize import UniformDequantization
from likelihood.standardize import Standardization
from sde_lib import validation


@dataclass(frozen=True)
class Dataset:
    """Training and test samples and the units they come in.

    Args:
        name: What messages and reports call the data.
        train: Samples [N, *shape], N >= 2: integers in 0..levels-1 for K-level data, float32 for
            continuous data. Images are channel-first.
        test: Samples [M, *shape], M >= 2, of the same shape and dtype.
        levels: K, or None for continuous data.
        entropy: Differential entropy of the source in nats, data units, where known.
        log_density: The true log p in nats, data units: [B, d] -> [B], where known.

    Raises:
        ValueError: For an empty set, a single sample, NaN or Inf, values that are no level, a
            wrong dtype, two shapes, or data that are constant; names the data and the first bad
            value.
    """

    name: str
    train: Tensor
    test: Tensor
    levels: int | None = None
    entropy: float | None = None
    log_density: Callable[[Tensor], Tensor] | None = None
    cond: Any = None
    train_cond: Tensor | None = None
    test_cond: Tensor | None = None

    def __post_init__(self) -> None:
        if self.levels is not None:
            object.__setattr__(
                self, "levels", validation.count(self.name, "levels", self.levels, at_least=2)
            )
        for part, values in (("train", self.train), ("test", self.test)):
            self._check_shape(part, values)
            self._check_values(part, values)
        if self.train.shape[1:] != self.test.shape[1:] or self.train.dtype != self.test.dtype:
            raise ValueError(
                f"{self.name}: train and test samples must be alike; got {_kind(self.train)} and "
                f"{_kind(self.test)}."
            )
        self._check_variation()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return tuple(self.train.shape[1:])

    @property
    def units(self) -> UniformDequantization | Standardization:
        """Data to model units and back: bins for K-level data, else zero mean, unit variance."""
        if self.levels is None:
            return Standardization.of(self.train)
        return UniformDequantization(self.levels)

    def _check_shape(self, part: str, values: Tensor) -> None:
        if values.ndim < 2 or math.prod(values.shape[1:]) == 0:
            raise ValueError(
                f"{self.name}: the {part} set must have shape [N, ...] with samples of one "
                f"number or more; got {tuple(values.shape)}. Scalars are samples of shape [1]."
            )
        if len(values) < 2:
            raise ValueError(
                f"{self.name}: the {part} set needs at least two samples (a spread and a "
                f"standard error need them); got {len(values)}."
            )

    def _check_values(self, part: str, values: Tensor) -> None:
        if self.levels is None:
            self._check_continuous(part, values)
        else:
            self._check_levels(part, values)

    def _check_continuous(self, part: str, values: Tensor) -> None:
        if values.dtype != torch.float32:
            raise ValueError(
                f"{self.name}: continuous data must be float32; the {part} set is "
                f"{_kind(values)}. Convert it, or give levels=K if these are integers in 0..K-1."
            )
        bad = ~torch.isfinite(values)
        if bad.any():
            index = _first(bad)
            raise ValueError(
                f"{self.name}: the {part} set holds NaN or Inf, first {values[index].item()} at "
                f"index {index}, {int(bad.sum())} in all. Remove these samples or repair them."
            )

    def _check_levels(self, part: str, values: Tensor) -> None:
        if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
            raise ValueError(
                f"{self.name}: data of {self.levels} levels must be integers in "
                f"0..{self.levels - 1}; the {part} set is {_kind(values)}, {_range(values)}. "
                "Scale it to that range and round it to integers, or leave levels out for "
                "continuous data."
            )
        if values.min().item() < 0 or values.max().item() >= self.levels:
            wide = values.long()  # K need not fit into the dtype of the values
            index = _first((wide < 0) | (wide >= self.levels))
            raise ValueError(
                f"{self.name}: data of {self.levels} levels must be in 0..{self.levels - 1}; the "
                f"{part} set has {_range(values)}, first {values[index].item()} at index "
                f"{index}. Check levels."
            )

    def _check_variation(self) -> None:
        if bool((self.train == self.train.flatten()[0]).all()):
            raise ValueError(
                f"{self.name}: every value of the train set is "
                f"{self.train.flatten()[0].item():g}; constant data have no density to learn. "
                "Check how the file was written."
            )
        if self.levels is None and self.train.ndim == 2:
            still = self.train.amax(0) == self.train.amin(0)
            if still.any():
                raise ValueError(
                    f"{self.name}: column {_first(still)[0]} is the same in all training samples, "
                    "so that its density is infinite. Drop the column."
                )


def _first(flags: Tensor) -> tuple[int, ...]:
    """Index of the first True of ``flags``."""
    return tuple(flags.nonzero()[0].tolist())


def _kind(values: Tensor) -> str:
    return f"{str(values.dtype).removeprefix('torch.')} of shape {tuple(values.shape)}"


def _range(values: Tensor) -> str:
    if values.is_complex() or values.dtype == torch.bool:
        return "which has no range"
    return f"values from {values.min().item():g} to {values.max().item():g}"
