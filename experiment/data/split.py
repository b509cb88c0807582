"""One set into a training and a test part, at random."""

from __future__ import annotations

import torch
from torch import Tensor

from sde_lib import validation


def split(name: str, samples: Tensor, test_size: float, seed: int) -> tuple[Tensor, Tensor]:
    """Shuffle ``samples`` [N, ...] and part them: (train [N - M, ...], test [M, ...]).

    Args:
        name: Of the data, for messages.
        samples: All there are.
        test_size: M, or the share of N if below 1 (rounded, at least 2).
        seed: Of the shuffle; the same seed gives the same parts.

    Raises:
        ValueError: If nothing would be left to train on, or ``test_size`` is no such number.
    """
    if validation.real(name, "test_size", test_size, above=0) < 1:
        size = max(2, round(test_size * len(samples)))
    else:
        size = validation.count(name, "test_size", test_size)
    if size >= len(samples):
        raise ValueError(
            f"{name}: test_size={test_size:g} leaves nothing to train on; there are "
            f"{len(samples)} samples in all. Pass a smaller test_size, or more samples."
        )
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))
    return samples[order[size:]], samples[order[:size]]
