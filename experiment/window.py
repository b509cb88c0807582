"""What a line of the record says of the iterations since the last one."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from experiment.state import State


class Window:
    """Means since the last line of the record, summed on the device."""

    def __init__(self, state: State) -> None:
        self.state = state
        self._empty()

    def _empty(self) -> None:
        self.sums = torch.zeros(4, device=self.state.device)
        self.restart_clock()

    def restart_clock(self) -> None:
        """Forget the time that something else took."""
        self.timed, self.since, self.waited = 0, time.monotonic(), 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """While the batch is waited for."""
        began = time.monotonic()
        yield
        self.waited += time.monotonic() - began

    def add(self, loss: Tensor, norm: Tensor, skip: Tensor, clip: float) -> None:
        """One more iteration; one that was left out counts for nothing but the time."""
        row = torch.stack([loss, norm, (norm > clip).to(loss), torch.ones_like(loss)])
        self.sums += torch.where(skip, torch.zeros_like(row), row.detach()).to(self.sums)
        self.timed += 1

    def close(self, batch_size: int) -> dict[str, float]:
        """The metrics of the window, NaN if all of it was skipped; the next one begins."""
        loss, norm, clipped, _ = (self.sums / self.sums[-1]).tolist()
        seconds = max(time.monotonic() - self.since, 1e-9)
        metrics = {
            "train/loss": loss,
            "train/grad_norm": norm,
            "train/clipped": clipped,
            "train/skipped": self.state.faults.skipped,
            "perf/images_per_s": self.timed * batch_size / seconds,
            "perf/waiting": self.waited / seconds,
            "perf/memory_gb": memory_gb(self.state.device),
        }
        if self.state.scale.moves:
            metrics["train/loss_scale"] = float(self.state.scale.factor)
        self._empty()
        return metrics


def memory_gb(device: torch.device) -> float:
    """The most memory so far: of tensors on a GPU, of the whole process on a CPU; 1e9 bytes."""
    import resource

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
