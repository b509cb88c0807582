"""Losses and gradients that are not finite: noticed on the device, told when somebody asks."""

from __future__ import annotations

import torch
from torch import Tensor


class Faults:
    """Counts iterations whose loss or gradient is not finite; their update is left out.

    One more than allowed freezes the weights for good: whoever asks later, so that the host need
    not wait for the device in every iteration, finds them as they were.

    Args:
        device: Of the losses.
        allowed: How many are passed over.
        passed: How many were, in an earlier part of the run.
    """

    def __init__(self, device: torch.device, allowed: int = 0, passed: int = 0) -> None:
        self.allowed = allowed
        self.count = torch.tensor(passed, device=device)
        self.fatal = torch.tensor(-1, device=device)
        self.values = torch.zeros(2, device=device)

    def note(self, bad: Tensor, loss: Tensor, norm: Tensor, iteration: int) -> Tensor:
        """Take note of an iteration; whether to leave out its update, a flag on the device."""
        self.count = self.count + (bad & (self.fatal < 0))
        frozen = self.count > self.allowed
        first = frozen & (self.fatal < 0)
        self.fatal = torch.where(first, iteration, self.fatal)
        self.values = torch.where(first, torch.stack([loss, norm]).to(self.values), self.values)
        return bad | frozen

    @property
    def skipped(self) -> int:
        """Iterations that were passed over; the host waits for the device."""
        return int(self.count) - (int(self.fatal) >= 0)
