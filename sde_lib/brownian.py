"""One Brownian path a sample, the same at every number of steps."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from sde_lib.noise import PerSample, randn_like
from sde_lib.philox import normal

DEPTH = 16  # halvings of a unit of the clock: where a path can be looked at


class BrownianPaths(PerSample):
    r"""Streams of noise whose steps follow one Brownian path W(u), u = log(sigma/alpha).

    A step of a sampler from u to the less noisy u' gets the normalised increment

    .. math::  z = \frac{W(u) - W(u')}{\sqrt{u - u'}}

    which is fresh standard normal noise to any one sampler, and the same path to all of them: with
    one seed, more steps refine one picture, and two samplers follow each other. Noise that
    belongs to no such step (Langevin corrections, churn) is drawn from the streams of
    :class:`PerSample`.

    Over each unit of u an increment is a number of its own, and within it W is halved sixteen
    times by Brownian bridges, whose numbers are functions of (seed, place): ends of steps are
    rounded to multiples of 2^-16, which leaves the law of z as it is. A step that vanishes by
    that gets fresh noise. One object is one path: a second trajectory with it follows it again.

    Reference: the bridges are Lévy's construction; the random numbers Philox, without a state.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        device: torch.device | str = "cpu",
        *,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(seeds, device, temperature=temperature)
        digests = [hashlib.sha256(f"path {seed}".encode()).digest() for seed in self.seeds]
        self.keys = tuple(
            torch.tensor([int.from_bytes(d[i : i + 4], "big") for d in digests]) for i in (0, 4)
        )
        self._latest: tuple[int, torch.Size, Tensor] | None = None  # where the last step ended
        self._drawn: dict[tuple[int, int, int], Tensor] = {}  # for it: the next end is near

    def select(self, rows: Sequence[int]) -> BrownianPaths:
        """The paths and streams of some rows of the batch."""
        view = super().select(rows)
        view.keys = tuple(key[list(rows)] for key in self.keys)
        view._latest, view._drawn = None, {}
        return view

    def over(self, x: Tensor, start: float, end: float) -> Callable[[], Tensor]:
        """``noise()`` of a step from clock ``start`` to ``end``: an increment of the path, once.

        Args:
            x: State [B, ...], for shape, dtype and device.
            start: log(sigma/alpha) where the step begins.
            end: Where it ends; not smaller ones get fresh noise.
        """
        upper, lower = round(start * 2**DEPTH), round(end * 2**DEPTH)
        fresh = partial(randn_like, x, self)
        if not lower < upper:
            return fresh
        first = [partial(self._increment, x, upper, lower)]
        return lambda: first.pop()() if first else fresh()

    def _increment(self, x: Tensor, upper: int, lower: int) -> Tensor:
        self._check(x.shape)
        first, last = lower >> DEPTH, upper >> DEPTH  # units, whole ones in between
        above, below = self._within(upper, x), self._within(lower, x)
        self._latest = lower, x.shape, below
        passed = above - below
        if last > first:
            passed = passed + self._numbers([(0, 0, k) for k in range(first, last)], x).sum(0)
        std = math.sqrt((upper - lower) / 2**DEPTH)
        return (passed * (math.sqrt(self.temperature) / std)).to(x.dtype)

    def _within(self, place: int, x: Tensor) -> Tensor:
        """W at ``place`` (in units of 2^-DEPTH) less W at the lower end of its unit, [B, ...]."""
        if self._latest is not None and self._latest[:2] == (place, x.shape):
            return self._latest[2]
        unit, offset = place >> DEPTH, place & (2**DEPTH - 1)
        if not offset:
            return torch.zeros(x.shape, dtype=torch.float64, device=x.device)
        levels = DEPTH + 1 - (offset & -offset).bit_length()  # halvings until it is a midpoint
        nodes = [(level, offset >> (DEPTH - level + 1), unit) for level in range(1, levels + 1)]
        drawn = self._remembered([(0, 0, unit), *nodes], x)
        low, high = torch.zeros_like(drawn[0]), drawn[0]
        for (level, _, _), z in zip(nodes, drawn[1:], strict=True):
            # midpoint of a bridge over a length of 2^(1 - level): variance a quarter of that
            middle = 0.5 * (low + high) + math.sqrt(0.25 * 2.0 ** (1 - level)) * z
            right = offset >> (DEPTH - level) & 1
            low, high = (middle, high) if right else (low, middle)
        return low

    def _remembered(self, nodes: list[tuple[int, int, int]], x: Tensor) -> list[Tensor]:
        known = self._drawn if all(z.shape == x.shape for z in self._drawn.values()) else {}
        new = [node for node in nodes if node not in known]
        known = known | dict(zip(new, self._numbers(new, x) if new else (), strict=True))
        self._drawn = {node: known[node] for node in nodes}
        return list(self._drawn.values())

    def _numbers(self, nodes: list[tuple[int, int, int]], x: Tensor) -> Tensor:
        """One standard normal number [nodes, B, ...] for each (level, index, unit), float64."""
        shape, size = x.shape, x[0].numel()
        table = torch.tensor(nodes)
        if x.is_cuda:  # a copy from pinned memory does not wait for the device
            table = table.pin_memory().to(x.device, non_blocking=True)
        level, index, unit = table.mT[:, :, None, None]
        key = tuple(word.to(x.device)[:, None] for word in self.keys)
        counter = torch.arange(-(-size // 4), device=x.device), index, level, unit & 0xFFFFFFFF
        return normal(counter, key).flatten(2)[..., :size].reshape(len(nodes), *shape)
