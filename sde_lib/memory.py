"""Work on a batch in halves of halves, as far as memory asks for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

Part = TypeVar("Part")


def in_halves(
    solve: Callable[[range], Part], rows: range, told: Callable[[str], None] | None = None
) -> list[Part]:
    """``solve`` over ``rows``, at once if that fits into memory.

    Give each row its own stream of random numbers (``PerSample``), so that no result depends on
    where the batch was cut.

    Args:
        solve: Takes the rows from start to stop.
        rows: At least one.
        told: Gets a line whenever a part did not fit.

    Raises:
        MemoryError: If a single row does not fit.
    """
    try:
        return [solve(rows)]
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        if len(rows) == 1:
            raise MemoryError(
                "not even one sample fits into memory; use a smaller network or device=cpu, and "
                "for a likelihood with the exact trace likelihood.divergence.chunk=1."
            ) from error
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    middle = rows.start + len(rows) // 2
    if told is not None:
        told(f"out of memory with {len(rows)} samples at once; going on with {len(rows) // 2}")
    return [
        *in_halves(solve, range(rows.start, middle), told),
        *in_halves(solve, range(middle, rows.stop), told),
    ]


def out_of_memory(error: RuntimeError) -> bool:
    """On a GPU it has a class of its own, on a CPU only a message."""
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text
