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


def philox(counter: Words, key: Words) -> Words:
    """Four words of 32 random bits, for each counter and key.

    torch's own generators have a state, one for a batch; this has none, so that number n of
    sample i is the same whatever was drawn before it, beside it, or on which device.

    Reference: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, 2011.

    Args:
        counter: Four words in [0, 2^32), int64 of shapes that broadcast.
        key: Two words, likewise.
    """
    a, b, c, d = counter
    first, second = key
    for n in range(ROUNDS):
        if n:
            first, second = (first + WEYL[0]) & WORD, (second + WEYL[1]) & WORD
        (high, low), (upper, lower) = _product(a, MULTIPLIERS[0]), _product(c, MULTIPLIERS[1])
        a, b, c, d = upper ^ b ^ first, lower, high ^ d ^ second, low
    return a, b, c, d


def _product(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Upper and lower 32 bits of a product of two words; int64 would overflow, halves do not."""
    low = word * factor  # wraps, which leaves the lower bits right
    high = ((word >> 16) * factor + (((word & 0xFFFF) * factor) >> 16)) >> 16
    return high, low & WORD


def normal(counter: Words, key: Words) -> Tensor:
    """Four standard normal numbers for each counter and key, float64 [..., 4] (Box-Muller)."""
    a, b, c, d = (((word.double() + 0.5) / 2**32) for word in philox(counter, key))
    radii = [(-2 * u.log()).sqrt() for u in (a, c)]
    angles = [2 * math.pi * u for u in (b, d)]
    pairs = zip(radii, angles, strict=True)
    return torch.stack([r * f(x) for r, x in pairs for f in (torch.cos, torch.sin)], dim=-1)
