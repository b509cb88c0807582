"""What a network is conditioned on: one of so many classes, or a vector; always one tensor."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sde_lib import validation


class Conditioning(ABC):
    """Says what ``cond`` is, what stands for its absence, and how it is embedded.

    ``cond`` itself is a plain tensor with a row for each sample, from the data set to the network.
    """

    @abstractmethod
    def check(self, owner: str, cond: Tensor | None, batch: int) -> Tensor:
        """``cond`` if it is what a batch of so many samples needs.

        Values are looked at on a CPU alone: elsewhere the look would wait for the device.

        Raises:
            ValueError: Saying what ``owner`` needs, what it got, and what to pass instead.
        """

    @abstractmethod
    def null(self, batch: int, device: torch.device | str = "cpu") -> Tensor:
        """The ``cond`` of so many samples that says nothing."""

    @abstractmethod
    def embedding(self, width: int) -> nn.Module:
        """A module cond [B, ...] -> [B, ``width``], with a learned value for the null."""

    @abstractmethod
    def each(self, owner: str) -> Tensor:
        """All conditions that there are, [C, ...].

        Raises:
            ValueError: If there is no end of them.
        """

    def few(self, most: int) -> list[int] | None:
        """All conditions there are, where that is at most so many; else None."""
        return None

    @abstractmethod
    def read(self, owner: str, value: Any) -> Tensor:  # noqa: ANN401
        """One condition or a list of them, written as numbers, as ``cond`` [K, ...].

        Raises:
            ValueError: Saying what ``owner`` takes.
        """

    def drop(self, cond: Tensor, dropped: Tensor) -> Tensor:
        """``cond`` with the null in the rows where ``dropped``, booleans [B], is true."""
        null = self.null(len(cond), cond.device)
        return torch.where(dropped.reshape([-1] + [1] * (cond.ndim - 1)), null, cond)


@dataclass(frozen=True)
class Classes(Conditioning):
    """One class a sample: int64 [B] in 0 .. count - 1; ``count`` itself is the null.

    Args:
        count: How many there are.
    """

    count: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "count", validation.count("Classes", "count", self.count))

    def check(self, owner: str, cond: Tensor | None, batch: int) -> Tensor:
        _given(owner, f"the class of each sample, int64 [{batch}]", cond)
        if cond.dtype != torch.int64 or cond.shape != (batch,):
            raise ValueError(
                f"{owner} is conditioned on one of {self.count} classes and needs cond to be "
                f"int64 [{batch}], a class a sample; got {_found(cond)}. Convert it with .long(), "
                "and repeat a single class with .expand(batch)."
            )
        if _can_look(cond) and batch and not 0 <= int(cond.min()) <= int(cond.max()) <= self.count:
            raise ValueError(
                f"{owner} needs classes in 0 .. {self.count - 1}, or {self.count} for none; got "
                f"{int(cond.min())} to {int(cond.max())}. Build the network with cond.count above "
                "the largest, or number the classes from 0."
            )
        return cond

    def each(self, owner: str) -> Tensor:
        return torch.arange(self.count)

    def few(self, most: int) -> list[int] | None:
        return list(range(self.count)) if self.count <= most else None

    def read(self, owner: str, value: Any) -> Tensor:  # noqa: ANN401
        listed = value if isinstance(value, list | tuple) else [value]
        whole = [n for n in listed if isinstance(n, int) and not isinstance(n, bool)]
        if (
            not listed
            or len(whole) < len(listed)
            or not 0 <= min(whole) <= max(whole) < self.count
        ):
            raise ValueError(
                f"{owner} takes a class, a whole number in 0 .. {self.count - 1}, or a list of "
                f"them, as the model knows {self.count} classes; got {value!r}."
            )
        return torch.tensor(whole)

    def null(self, batch: int, device: torch.device | str = "cpu") -> Tensor:
        return torch.full((batch,), self.count, dtype=torch.int64, device=device)

    def embedding(self, width: int) -> nn.Module:
        table = nn.Embedding(self.count + 1, width)
        # 0.02 taught digits in 600 iterations to 66 % of the classes, 0.3 and 1 to 98 %
        nn.init.normal_(table.weight, std=0.3)
        return table


@dataclass(frozen=True)
class Vector(Conditioning):
    """So many numbers a sample, of order one: float [B, size]; a row of NaN is the null.

    Args:
        size: How many.
    """

    size: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", validation.count("Vector", "size", self.size))

    def check(self, owner: str, cond: Tensor | None, batch: int) -> Tensor:
        _given(owner, f"a vector for each sample, float [{batch}, {self.size}]", cond)
        if not cond.is_floating_point() or cond.shape != (batch, self.size):
            raise ValueError(
                f"{owner} is conditioned on {self.size} numbers and needs cond to be floating "
                f"point [{batch}, {self.size}], a row a sample; got {_found(cond)}. Convert it "
                "with .float(), and repeat a single row with .expand(batch, -1)."
            )
        return cond

    def each(self, owner: str) -> Tensor:
        raise ValueError(
            f"{owner} goes through all conditions, and there is no end of vectors; it is for a "
            "model of classes."
        )

    def read(self, owner: str, value: Any) -> Tensor:  # noqa: ANN401
        try:
            found = torch.as_tensor(value, dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError):
            found = torch.empty(0)
        rows = found[None] if found.ndim == 1 else found
        if rows.ndim != 2 or rows.shape[1] != self.size or not bool(rows.isfinite().all()):
            raise ValueError(
                f"{owner} takes a list of {self.size} finite numbers, or a list of such lists, as "
                f"the model is conditioned on {self.size} numbers; got {value!r}."
            )
        return rows

    def null(self, batch: int, device: torch.device | str = "cpu") -> Tensor:
        return torch.full((batch, self.size), torch.nan, device=device)

    def embedding(self, width: int) -> nn.Module:
        return _VectorEmbedding(self.size, width)


class _VectorEmbedding(nn.Module):
    """Two layers, and a learned vector for rows of NaN."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(size, width), nn.SiLU(), nn.Linear(width, width))
        self.null = nn.Parameter(torch.zeros(width))

    def forward(self, cond: Tensor) -> Tensor:
        cond = cond.to(self.null.dtype)
        absent = cond.isnan().all(1, keepdim=True)
        # zeros go through the layers: a NaN there would reach their gradients
        known = self.mlp(torch.where(absent, 0.0, cond))
        return torch.where(absent, self.null.to(known.dtype), known)


def _given(owner: str, what: str, cond: Tensor | None) -> None:
    if cond is None:
        raise ValueError(
            f"{owner} is conditional and needs cond, {what}; got none. Pass it, or the null of "
            "the conditioning, network.cond.null(batch), for the score without it."
        )


def _found(cond: Tensor) -> str:
    return f"{str(cond.dtype).removeprefix('torch.')} {list(cond.shape)}"


def _can_look(cond: Tensor) -> bool:
    batched = torch._C._functorch.is_batchedtensor(cond)
    return cond.device.type == "cpu" and not batched and not torch.compiler.is_compiling()
