"""What a pass costs: network evaluations are counted, never assumed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Counted:
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
        self.function = function
        self.nfe = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        self.nfe += 1
        return self.function(*args, **kwargs)
