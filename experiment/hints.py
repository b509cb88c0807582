"""What may be asked for and is likely not meant: one line at the start, and the run goes on."""

from __future__ import annotations

import os

import torch

from experiment.progress import say


def tell_slow_precision(precision: str, device: torch.device) -> None:
    """Say that float16 is not for a CPU, where convolutions were measured to take 16 times as long
    as in float32; bfloat16 has instructions on some, and depends on which.
    """
    if precision == "float16" and device.type == "cpu":
        say("hint: precision=float16 is for GPUs; on a CPU it is many times slower than float32.")


def tell_many_threads(threads: int) -> None:
    """Say that threads beyond the cores of this process only wait for each other."""
    cores = cores_here()
    if threads > cores:
        say(
            f"hint: threads={threads} on {cores} core{'' if cores == 1 else 's'} wait for each "
            f"other; threads={cores} or less is faster."
        )


def cores_here() -> int:
    """Cores that this process may use, where the system says so; else those of the machine."""
    allowed = getattr(os, "sched_getaffinity", None)
    return (os.cpu_count() or 1) if allowed is None else len(allowed(0))
