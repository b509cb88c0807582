"""Score functions that hold something for each row of a batch, such as its condition."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Self

from torch import Tensor

Rows = range | slice | Tensor  # of a batch; numbers of rows may come more than once


def for_rows(function: Callable, rows: Rows) -> Callable:
    """``function`` for the samples ``rows`` of the batch that it is for.

    What splits a batch calls this. A function says that its rows differ by having a method of this
    name; any other treats all alike, and is returned as it is.
    """
    part = getattr(function, "for_rows", None)
    return function if part is None else part(rows)


def for_others(function: Callable, count: int) -> Callable:
    """``function`` for ``count`` samples that are none of its batch: those of a pilot."""
    others = getattr(function, "for_others", None)
    return function if others is None else others(count)


def by_row(function: Callable) -> bool:
    """Whether ``function`` differs by row, so that it takes its own batch and no other."""
    return getattr(function, "by_row", False)


class Wrapper(ABC):
    """A callable around another one, which holds of its rows what that one does.

    Args:
        function: What is wrapped.
    """

    def __init__(self, function: Callable) -> None:
        self.function = function

    @abstractmethod
    def around(self, function: Callable) -> Self:
        """The same around another ``function``."""

    @property
    def by_row(self) -> bool:
        """As of what is wrapped."""
        return by_row(self.function)

    def for_rows(self, rows: Rows) -> Self:
        """Around what is wrapped, for ``rows``."""
        return self.around(for_rows(self.function, rows))

    def for_others(self, count: int) -> Self:
        """Around what is wrapped, for ``count`` others."""
        return self.around(for_others(self.function, count))


def innermost(function: Callable) -> Any:  # noqa: ANN401
    """What is inside all wrappers: whatever is no ``function`` of something."""
    while hasattr(function, "function"):
        function = function.function
    return function
