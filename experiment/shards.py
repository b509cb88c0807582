"""Work on a test set: shared by the processes of torchrun, halved where memory runs out."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

import torch

from experiment.errors import RunError
from experiment.progress import say

Part = TypeVar("Part")


def rank() -> int:
    """Which of the processes this is; 0 where there is one."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Which of the processes of this machine this is."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """How many processes share the work; torchrun says so in the environment."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def alone(mode: str) -> None:
    """Refuse more than one process where the work is not shared.

    Raises:
        RunError: Naming the mode.
    """
    if world_size() > 1:
        raise RunError(
            f"mode={mode} runs in one process; got {world_size()} of torchrun, which share only "
            "mode=likelihood. Start it with python."
        )


def share(count: int) -> range:
    """The samples, of ``count``, that this process works on: a contiguous part."""
    here, all_of_them = rank(), world_size()
    return range(count * here // all_of_them, count * (here + 1) // all_of_them)


def gathered(parts: list[Part]) -> list[Part]:
    """The parts of all processes, in the order of their ranks, in every process.

    The only communication of an evaluation, and it comes after all solves.
    """
    if world_size() == 1:
        return parts
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo")
    everyone: list[list[Part]] = [[] for _ in range(world_size())]
    dist.all_gather_object(everyone, parts)
    return [part for one in everyone for part in one]


def halving(solve: Callable[[range], Part], rows: range) -> list[Part]:
    """``solve`` over ``rows``, in halves of halves as far as memory asks for it.

    Sample i takes its randomness from its own stream, so that no result depends on the halves.

    Raises:
        MemoryError: If a single sample does not fit.
    """
    try:
        return [solve(rows)]
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        if len(rows) == 1:
            raise MemoryError(
                "not even one sample fits into memory; use a smaller network, "
                "likelihood.divergence.chunk=1 with an exact trace, or device=cpu."
            ) from error
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    middle = rows.start + len(rows) // 2
    say(f"out of memory with {len(rows)} samples at once; going on with {len(rows) // 2}")
    return [
        *halving(solve, range(rows.start, middle)),
        *halving(solve, range(middle, rows.stop)),
    ]


def _out_of_memory(error: RuntimeError) -> bool:
    """On a GPU it has a class of its own, on a CPU only a message."""
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text
