"""Philox4x32-10: random numbers as a function of a key and a counter, a whole batch at once."""

from __future__ import annotations

import math

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85  # what a round adds to the two words of the key
ROUNDS = 10

Words = tuple[Tensor, ...]


class Philox:
    """Four words of 32 random bits for each counter, under one key or many.

    torch's own generators have a state, one for a batch; this has none, so that number n of
    sample i is the same whatever was drawn before it, beside it, or on which device.

    Reference: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, 2011.

    Args:
        key: Two words in [0, 2^32), int64 of one shape.
    """

    def __init__(self, key: Words) -> None:
        self.key = torch.stack(key)  # [2, ...]
        ones = [1] * key[0].ndim
        step, self.factors = (
            torch.tensor(pair).to(self.key.device).reshape(2, *ones)
            for pair in (WEYL, MULTIPLIERS)
        )
        keys = [(self.key + n * step) & WORD for n in range(ROUNDS)]
        # the two halves of the words change places with every round
        self.rounds = [key if n % 2 else key.flip(0) for n, key in enumerate(keys)]

    def select(self, rows: list[int]) -> Philox:
        """That of some of the keys [B, ...]."""
        return Philox(tuple(self.key[:, rows]))

    def __call__(self, counter: Words) -> tuple[Tensor, Tensor]:
        """The words a and c, and the words b and d, each [2, ...].

        Args:
            counter: Four words, of shapes that broadcast with each other and with the key.
        """
        a, b, c, d = torch.broadcast_tensors(*counter)
        first, second = torch.stack([a, c]), torch.stack([b, d])

        def fit(pair: Tensor) -> Tensor:
            return pair.reshape(2, *[1] * (first.ndim - pair.ndim), *pair.shape[1:])

        factors = fit(self.factors), fit(self.factors.flip(0))
        for n, key in enumerate(self.rounds):
            high, low = _product(first, factors[n % 2])
            first, second = high ^ second.flip(0) ^ fit(key), low
        return first, second


def _product(words: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """Upper and lower 32 bits of products of two words; int64 would overflow, halves do not."""
    low = words * factors  # wraps, which leaves the lower bits right
    high = (words & 0xFFFF).mul_(factors).bitwise_right_shift_(16)
    high.add_((words >> 16).mul_(factors)).bitwise_right_shift_(16)
    return high, low.bitwise_and_(WORD)


def normal(counter: Words, source: Philox) -> Tensor:
    """Four standard normal numbers for each counter and key, float32 [..., 4] (Box-Muller)."""
    first, second = (words.float().add_(0.5).mul_(2.0**-32) for words in source(counter))
    radius, angle = first.log_().mul_(-2).sqrt_(), second.mul_(2 * math.pi)
    return torch.cat([radius * angle.cos(), radius * angle.sin()]).movedim(0, -1)
