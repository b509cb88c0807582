"""Work on a test set: shared by the processes of torchrun, halved where memory runs out."""

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
            "mode=likelihood and mode=sample. Start it with python."
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
        dist.init_process_group(backend, timeout=timedelta(days=30))
        atexit.register(dist.destroy_process_group)  # else its threads may end in an abort
    return dist


def halving(solve: Callable[[range], Part], rows: range) -> list[Part]:
    """``solve`` over ``rows``, in halves of halves as far as memory asks for it, and says so.

    Raises:
        MemoryError: If a single sample does not fit.
    """
    return in_halves(solve, rows, say)
