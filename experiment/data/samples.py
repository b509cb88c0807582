"""Samples that may lie on disk: what a data set asks of them, and views of some of their rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from experiment.progress import progress
from likelihood.standardize import slices
from sde_lib import validation

LAZY_BYTES = 2**30  # from here on lazy=auto leaves samples where they are
TOGETHER = 2**30  # bytes that what needs samples in one piece may take


class Samples(Protocol):
    """Samples [N, *shape], in memory or read when they are asked for; a tensor is one.

    Whatever thread asks, the same rows come back; a pickled copy reads the same files.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    def __len__(self) -> int:
        """N."""
        ...

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        """The samples of a slice, or of indices [B], int64, in memory: [B, *shape]."""
        ...


def row_indices(rows: slice | Tensor, count: int) -> Tensor:
    """The rows that a slice or indices [B] of ``count`` stand for, int64 in 0..count-1.

    Raises:
        IndexError: For a row that is not there.
    """
    if isinstance(rows, slice):
        return torch.arange(*rows.indices(count))
    if not isinstance(rows, Tensor) or rows.dtype != torch.int64 or rows.ndim != 1:
        got = f"{rows.dtype} of {rows.ndim} axes" if isinstance(rows, Tensor) else repr(rows)
        raise IndexError(f"samples are taken by a slice or int64 indices [B]; got {got}.")
    if rows.numel() and not (-count <= int(rows.min()) and int(rows.max()) < count):
        raise IndexError(f"rows {int(rows.min())} to {int(rows.max())} of {count} samples.")
    return torch.where(rows < 0, rows + count, rows)


@dataclass(frozen=True)
class Rows:
    """Some rows of samples, by their indices: a part of a split without a copy.

    Args:
        of: All samples.
        indices: Which of them, [N], int64.
    """

    of: Samples
    indices: Tensor

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def shape(self) -> tuple[int, ...]:
        """[N, *shape]."""
        return (len(self.indices), *self.of.shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        """Of the samples."""
        return self.of.dtype

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        wanted = self.indices[row_indices(rows, len(self))]
        order = wanted.argsort()  # a disk is read forwards
        found = self.of[wanted[order]]
        return found[order.argsort()]

    def in_order(self) -> Rows:
        """The same rows as the file has them."""
        return Rows(self.of, self.indices.sort().values)


def some_rows(samples: Samples, indices: Tensor) -> Samples:
    """Those of ``indices``: of a tensor a tensor, of samples on disk a view."""
    return samples[indices] if isinstance(samples, Tensor) else Rows(samples, indices)


def each_block(samples: Samples, description: str) -> Iterator[Tensor]:
    """All samples once, some rows at a time, in the order in which they lie on disk."""
    if isinstance(samples, Tensor):
        yield from (samples[rows] for rows in slices(samples.shape))
        return
    samples = samples.in_order() if hasattr(samples, "in_order") else samples
    for rows in progress(slices(samples.shape), description):
        yield samples[rows]


def first_rows(samples: Samples, most: int | None = None, limit: int = TOGETHER) -> Tensor:
    """The first samples in one piece: ``most`` of them, as far as they fit into ``limit`` bytes.

    At least two, which a spread needs.
    """
    row = math.prod(samples.shape[1:]) * max(4, samples.dtype.itemsize)
    return samples[: max(2, min(len(samples) if most is None else most, limit // max(1, row)))]


def is_lazy(owner: str, lazy: str | bool, size: int) -> bool:
    """Whether samples of ``size`` bytes stay on disk: true, false, or auto, by that size.

    Raises:
        ValueError: For another word.
    """
    wanted = {"auto": size > LAZY_BYTES, "true": True, "false": False}
    return wanted[validation.choice(owner, "lazy", str(lazy).lower(), wanted)]
