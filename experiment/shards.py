"""Work shared by the processes of torchrun, and halved where memory runs out."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from datetime import timedelta
from types import ModuleType
from typing import TypeVar

import torch

from experiment.errors import RunError
from experiment.progress import say
from sde_lib.memory import in_halves

Part = TypeVar("Part")
# how the backends say that a peer is gone, or that its time is over
LOST = ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe", "Timed out")


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
            "mode=train, mode=likelihood and mode=sample. Start it with python."
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
    everyone: list[list[Part]] = [[] for _ in range(world_size())]
    together().all_gather_object(everyone, parts)
    return [part for one in everyone for part in one]


def from_first(value: Part) -> Part:
    """The first process's ``value``, in every process."""
    if world_size() == 1:
        return value
    told = [value]
    together().broadcast_object_list(told, src=0)
    return told[0]


def in_first(action: Callable[[], Part]) -> Part | None:
    """``action`` in the first process alone; the others go on, with None, when it has succeeded.

    If it fails the first process ends, and they with it: see :func:`lost`.
    """
    made = action() if rank() == 0 else None
    from_first(None)
    return made


def lost(error: BaseException) -> bool:
    """Whether ``error`` is that of a process that waits for one that is gone or hangs."""
    return world_size() > 1 and any(mark in str(error) for mark in LOST)


def first_alone(make: Callable[[], Part]) -> Part:
    """``make`` in the first process, then in the others, which find what it has left on disk."""
    if world_size() == 1:
        return make()
    if rank() > 0:
        together().barrier()
        return make()
    made = make()
    together().barrier()
    return made


def together() -> ModuleType:
    """torch.distributed, joined; a process waits for others as long as their work takes."""
    import torch.distributed as dist

    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        try:
            dist.init_process_group(backend, timeout=timedelta(days=30))
        except Exception as error:  # of several types, by what went wrong
            raise RunError(
                f"process {rank()} of {world_size()} cannot reach the others: {error}. Start them "
                "with torchrun, and look at its --rdzv-endpoint."
            ) from error
        atexit.register(dist.destroy_process_group)  # else its threads may end in an abort
    return dist


def halving(solve: Callable[[range], Part], rows: range) -> list[Part]:
    """``solve`` over ``rows``, in halves of halves as far as memory asks for it, and says so.

    Raises:
        MemoryError: If a single sample does not fit.
    """
    return in_halves(solve, rows, say)
