"""One set into a training and a test part, at random."""

from __future__ import annotations

import torch
from torch import Tensor

from experiment.data.samples import Samples, some_rows
from sde_lib import validation


def split(name: str, samples: Samples, test_size: float, seed: int) -> tuple[Samples, Samples]:
    """Shuffle ``samples`` [N, ...] and part them: (train [N - M, ...], test [M, ...]).

    Samples on disk stay there: both parts are views of them.

    Args:
        name: Of the data, for messages.
        samples: All there are.
        test_size: M, or the share of N if below 1 (rounded, at least 2).
        seed: Of the shuffle; the same seed gives the same parts.

    Raises:
        ValueError: If nothing would be left to train on, or ``test_size`` is no such number.
    """
    train, test = split_rows(name, len(samples), test_size, seed)
    return some_rows(samples, train), some_rows(samples, test)


def split_rows(name: str, count: int, test_size: float, seed: int) -> tuple[Tensor, Tensor]:
    """The rows of both parts of ``count`` samples, see :func:`split`: labels go the same way."""
    if validation.real(name, "test_size", test_size, above=0) < 1:
        size = max(2, round(test_size * count))
    else:
        size = validation.count(name, "test_size", test_size)
    if size >= count:
        raise ValueError(
            f"{name}: test_size={test_size:g} leaves nothing to train on; there are {count} "
            "samples in all. Pass a smaller test_size, or more samples."
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[size:], order[:size]
