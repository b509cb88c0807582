"""Random numbers of some rows of a batch, the same whoever draws the other rows."""

from __future__ import annotations

import hashlib
import math
import operator
from collections.abc import Sequence

import numpy
import torch
from torch import Tensor

BLOCK = 8  # words of 32 bits that one counter of Philox4x64 gives


class BatchRows:
    """Numbers of row i are a function of (key, number of the call, i), whichever rows are drawn.

    Training shares a batch between processes, or works through it in parts: what row i gets must
    depend neither on who asks for it nor on how many rows come at a time. The generator is
    counter-based (Philox4x64-10, numpy's): it starts at the first row asked for at no cost, and
    all of them are one call. Normal numbers follow from it by Box and Muller's formula.

    Reference: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, 2011.

    Args:
        key: Any whole number; another key, other numbers.
        size: Rows of the whole batch, > 0.
        rows: Those drawn here: a range within the batch, of step 1.
    """

    device = torch.device("cpu")

    def __init__(self, key: int, size: int, rows: range | None = None) -> None:
        rows = range(size) if rows is None else rows
        if not (len(rows) and rows.step == 1 and 0 <= rows.start and rows.stop <= size):
            raise ValueError(
                f"BatchRows needs rows of step 1 within a batch of {size}, at least one; got "
                f"{rows!r}."
            )
        self.key, self.size, self.rows = operator.index(key), size, rows
        digest = hashlib.sha256(str(self.key).encode()).digest()
        self._words = numpy.frombuffer(digest[:16], dtype=numpy.uint64)
        self._calls = [0]  # shared with the views of it

    @property
    def whole(self) -> BatchRows:
        """All rows of the batch; its calls count as calls here."""
        return self._view(range(self.size))

    def select(self, rows: Sequence[int]) -> BatchRows:
        """Some of these rows, one after the other, counted from the first of them."""
        first, last = rows[0], rows[-1]
        if list(rows) != list(range(first, last + 1)) or last >= len(self.rows):
            raise ValueError(f"BatchRows.select needs rows one after the other; got {rows!r}.")
        return self._view(range(self.rows.start + first, self.rows.start + last + 1))

    def check(self, batch: int) -> None:
        """Refuse a batch of another size.

        Raises:
            ValueError: With both sizes.
        """
        if batch != len(self.rows):
            raise ValueError(
                f"BatchRows draws for the {len(self.rows)} rows {self.rows!r}; got a batch of "
                f"{batch}."
            )

    def rand(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Uniform numbers in [0, 1), [B, ...]: of 53 bits as float64, else of 24."""
        bits = self._bits(shape, words=2 if dtype == torch.float64 else 1)
        if dtype == torch.float64:
            drawn = ((bits >> 11) & (2**53 - 1)).double().mul_(2.0**-53)
        else:
            drawn = ((bits >> 8) & 0xFFFFFF).float().mul_(2.0**-24)
        return drawn[:, : math.prod(shape[1:])].reshape(tuple(shape)).to(device, dtype)

    def randn(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Standard normal numbers [B, ...], at most 6.8 in size as float32."""
        size = math.prod(shape[1:])
        half = (size + 1) // 2
        if dtype == torch.float64:
            bits = self._bits((shape[0], 2 * half), words=2) >> 11
            uniform = (bits & (2**53 - 1)).double().add_(0.5).mul_(2.0**-53)
        else:
            bits = self._bits((shape[0], 2 * half), words=1)
            uniform = bits.float().mul_(2.0**-32).add_(0.5 + 2.0**-33)
        radius = uniform[:, :half].log().mul_(-2).sqrt_()
        angle = uniform[:, half : 2 * half] * (2 * math.pi)
        drawn = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
        return drawn[:, :size].reshape(tuple(shape)).to(device, dtype)

    def _view(self, rows: range) -> BatchRows:
        view = BatchRows(self.key, self.size, rows)
        view._calls = self._calls
        return view

    def _bits(self, shape: Sequence[int], words: int) -> Tensor:
        """At least prod(shape[1:]) integers a row, of ``words`` words each: [B, ...] signed."""
        self.check(shape[0])
        call, self._calls[0] = self._calls[0], self._calls[0] + 1
        blocks = max(1, -(-math.prod(shape[1:]) * words // BLOCK))
        source = numpy.random.Philox(
            key=self._words, counter=numpy.array([self.rows.start * blocks, 0, call, 0], "uint64")
        )
        raw = source.random_raw(shape[0] * blocks * BLOCK // 2)
        kind = numpy.int32 if words == 1 else numpy.int64
        return torch.from_numpy(raw.view(kind)).reshape(shape[0], -1)
