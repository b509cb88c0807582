"""Where randomness enters: a ``torch.Generator``, or one stream of noise for each sample."""

from __future__ import annotations

import hashlib
import math
import operator
import reprlib
from collections.abc import Callable, Sequence
from copy import copy
from functools import partial

import torch
from torch import Tensor

from sde_lib import validation
from sde_lib.batch_rows import BatchRows


class PerSample:
    """One independent stream of random numbers a sample: sample i depends on its own seed alone.

    A ``torch.Generator`` draws a whole batch at once, so that what sample i gets depends on the
    batch it sits in. With this class it does not: the same seed gives the same sample alone, in a
    batch of 7 and in a batch of 64. A stream remembers its place, so passing one object to the
    prior and then to a sampler never uses a number twice.

    Args:
        seeds: One integer in [0, 2^63) for each sample of the batch.
        device: Where the numbers are drawn; CPU and GPU streams differ.
        temperature: Factor on the variance of all normal noise, > 0. Samples of Gaussian data then
            follow :math:`p^{1/T}` exactly, under any sampler whose steps are linear, and so does
            Langevin dynamics at a level; of other data they only move towards the modes (T < 1).
    """

    def __init__(
        self,
        seeds: Sequence[int],
        device: torch.device | str = "cpu",
        *,
        temperature: float = 1.0,
    ) -> None:
        self.temperature = validation.real("PerSample", "temperature", temperature, above=0)
        try:
            self.seeds = [operator.index(seed) for seed in seeds]
        except TypeError:
            self.seeds = []
        if not self.seeds or min(self.seeds) < 0 or max(self.seeds) >= 2**63:
            raise ValueError(
                "PerSample needs at least one seed, each a whole number in [0, 2^63); got "
                f"{reprlib.repr(seeds)}."
            )
        self.device = torch.device(device)
        bits = 32 if self.device.type == "cpu" else 63
        self.streams = [
            torch.Generator(device).manual_seed(_mixed(seed, bits)) for seed in self.seeds
        ]

    def randn(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Normal numbers [B, ...] of variance ``temperature``; row i comes from stream i."""
        drawn = self._stack(torch.randn, shape, dtype, device)
        return drawn if self.temperature == 1 else drawn * math.sqrt(self.temperature)

    def rand(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Uniform numbers in [0, 1), [B, ...]; row i comes from stream i."""
        return self._stack(torch.rand, shape, dtype, device)

    def over(
        self, x: Tensor, start: float, end: float, *, shortest: float | None = None
    ) -> Callable[[], Tensor]:
        """``noise()`` in the shape of ``x`` for a step between two values of log(sigma/alpha)."""
        return partial(randn_like, x, self)

    def select(self, rows: Sequence[int]) -> PerSample:
        """The streams of some rows of the batch, shared: what they draw is used up here too."""
        view = copy(self)
        view.seeds = [self.seeds[i] for i in rows]
        view.streams = [self.streams[i] for i in rows]
        return view

    def check(self, batch: int) -> None:
        """Refuse a batch of another size.

        Raises:
            ValueError: With both sizes.
        """
        if batch != len(self.streams):
            raise ValueError(
                f"one seed a sample: got {len(self.streams)} seeds for a batch of {batch}."
            )

    def _stack(self, draw, shape, dtype, device) -> Tensor:  # noqa: ANN001
        self.check(shape[0])
        rows = [
            draw(tuple(shape[1:]), generator=stream, dtype=dtype, device=stream.device)
            for stream in self.streams
        ]
        return torch.stack(rows).to(device)


def _mixed(seed: int, bits: int) -> int:
    """``bits`` that depend on all 63 of ``seed``: torch's CPU generator takes 32 of them."""
    digest = hashlib.sha256(str(seed).encode()).digest()
    return int.from_bytes(digest[: -(-bits // 8)], "big") & (2**bits - 1)


Generator = torch.Generator | PerSample | BatchRows | None
ROWS = PerSample | BatchRows  # kinds with numbers of their own for each row


def check_generator(owner: str, generator: object, batch: int | None = None) -> None:
    """Refuse what numbers cannot be drawn from, for a batch of this size if it is known.

    Raises:
        ValueError: Saying what can.
    """
    if not (generator is None or isinstance(generator, torch.Generator | ROWS)):
        raise ValueError(
            f"{owner} needs generator to be a torch.Generator, a PerSample or None; got "
            f"{generator!r}. torch.Generator().manual_seed(0) makes one."
        )
    if isinstance(generator, ROWS) and batch is not None:
        generator.check(batch)


def of_rows(generator: Generator, rows: Sequence[int]) -> Generator:
    """The source of numbers for some ``rows`` of a batch alone; a ``torch.Generator`` has none of
    its own for each row, and serves any."""
    return generator.select(rows) if isinstance(generator, ROWS) else generator


def whole_batch(generator: Generator, n: int) -> tuple[Generator, int, slice]:
    """For what is drawn for a batch together, such as stratified times: the source of numbers of
    the whole batch, its size, and which of its rows the ``n`` drawn here are."""
    if isinstance(generator, BatchRows):
        generator.check(n)
        return generator.whole, generator.size, slice(generator.rows.start, generator.rows.stop)
    return generator, n, slice(n)


def _draw(kind: str, shape, generator, device, dtype) -> Tensor:  # noqa: ANN001
    dtype = dtype or torch.get_default_dtype()
    device = torch.device(device or getattr(generator, "device", None) or "cpu")
    if isinstance(generator, ROWS):
        return getattr(generator, kind)(shape, dtype, device)
    source = generator.device if generator is not None else device
    return getattr(torch, kind)(tuple(shape), generator=generator, dtype=dtype, device=source).to(
        device
    )


def randn(
    shape: Sequence[int],
    generator: Generator = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Standard normal numbers of ``shape`` [B, ...] from ``generator``, moved to ``device``."""
    return _draw("randn", shape, generator, device, dtype)


def rand(
    shape: Sequence[int],
    generator: Generator = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Uniform numbers in [0, 1) of ``shape`` [B, ...] from ``generator``, moved to ``device``."""
    return _draw("rand", shape, generator, device, dtype)


def randn_like(x: Tensor, generator: Generator = None) -> Tensor:
    """Standard normal numbers in the shape, dtype and device of ``x`` [B, ...]."""
    return randn(x.shape, generator, device=x.device, dtype=x.dtype)


def noise_over(
    x: Tensor, generator: Generator, shortest: float
) -> Callable[[float, float], Callable[[], Tensor]]:
    """For a step between two values of log(sigma/alpha), its ``noise()`` in the shape of ``x``;
    none of the steps is of less than the length ``shortest``."""
    if isinstance(generator, PerSample):
        return partial(generator.over, x, shortest=shortest)
    noise = partial(randn_like, x, generator)
    return lambda start, end: noise
