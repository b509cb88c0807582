"""What a pass costs: network evaluations are counted, never assumed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sde_lib.rows import Wrapper


class Counted(Wrapper):
    """A callable that counts its calls.

    >>> score = Counted(model.score)
    >>> x0 = Heun(steps=18)(score, sde, x_T)
    >>> score.nfe  # two a step, one for the denoise
    37

    Args:
        function: What to call, for example a score function.

    Attributes:
        nfe: Number of calls so far.
    """

    def __init__(self, function: Callable) -> None:
        super().__init__(function)
        self._calls = [0]  # shared with its parts

    @property
    def nfe(self) -> int:
        return self._calls[0]

    @nfe.setter
    def nfe(self, calls: int) -> None:
        self._calls[0] = calls

    def around(self, function: Callable) -> Counted:
        """Counts on in the same place."""
        part = Counted(function)
        part._calls = self._calls
        return part

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        self.nfe += 1
        return self.function(*args, **kwargs)
