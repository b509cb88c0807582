"""One Brownian path a sample, the same at every number of steps."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from sde_lib.noise import PerSample, randn_like
from sde_lib.philox import WORD, Philox, normal

DEPTH = 20  # most halvings of a unit of the clock
SHARP = 1024  # parts of the shortest step that ends of steps are rounded to
AT_ONCE = 2**22  # numbers that are drawn together


class BrownianPaths(PerSample):
    r"""Streams of noise whose steps follow one Brownian path W(u), u = log(sigma/alpha).

    A step of a sampler from u to the less noisy u' gets the normalised increment

    .. math::  z = \frac{W(u) - W(u')}{\sqrt{u - u'}}

    which is fresh standard normal noise to any one sampler, and the same path to all of them: with
    one seed, more steps refine one picture, and two samplers follow each other. Noise that
    belongs to no such step (Langevin corrections, churn) is drawn from the streams of
    :class:`PerSample`.

    Over each unit of u an increment is a number of its own, and within it W is halved again and
    again by Brownian bridges, whose numbers are functions of (seed, place). Ends of steps are
    rounded to the 2^-n that is a thousandth of the shortest step, which leaves the law of z as it
    is. One object is one path: a second trajectory with it follows it again.
    ``AdaptiveSDE`` and torchsde's ``srk``, whose noise is more than increments over steps known
    beforehand, do not follow it; they draw from the streams.

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
        words = [[int.from_bytes(d[i : i + 4], "big") for d in digests] for i in (0, 4)]
        self.source = Philox(tuple(torch.tensor(word).to(self.device)[:, None] for word in words))
        self._latest: tuple[int, torch.Size, Tensor] | None = None  # where the last step ended

    def select(self, rows: Sequence[int]) -> BrownianPaths:
        """The paths and streams of some rows of the batch."""
        view = super().select(rows)
        view.source = self.source.select(list(rows))
        view._latest = None
        return view

    def over(
        self, x: Tensor, start: float, end: float, *, shortest: float | None = None
    ) -> Callable[[], Tensor]:
        """``noise()`` of a step from clock ``start`` to ``end``: an increment of the path, once.

        Args:
            x: State [B, ...], for shape, dtype and device.
            start: log(sigma/alpha) where the step begins.
            end: Where it ends; not smaller ones get fresh noise.
            shortest: Length of the shortest step that is taken along with it; this one's if not
                given.
        """
        fresh = partial(randn_like, x, self)
        if not end < start:
            return fresh
        depth = min(DEPTH, max(0, math.ceil(math.log2(SHARP / (shortest or start - end)))))
        upper, lower = (round(u * 2**depth) << (DEPTH - depth) for u in (start, end))
        if not lower < upper:  # shorter than can be told apart
            return fresh
        first = [partial(self._increment, x, upper, lower)]
        return lambda: first.pop()() if first else fresh()

    def _increment(self, x: Tensor, upper: int, lower: int) -> Tensor:
        self.check(len(x))
        if self._latest is None or self._latest[:2] != (upper, x.shape):
            (above,) = self._sums([_within(upper)], x)
        else:
            above = self._latest[2]
        between = {(0, 0, unit): 1.0 for unit in range(lower >> DEPTH, upper >> DEPTH)}
        below, units = self._sums([_within(lower), between], x)
        self._latest = lower, x.shape, below
        std = math.sqrt((upper - lower) / 2**DEPTH)
        return ((above - below + units) * (math.sqrt(self.temperature) / std)).to(x.dtype)

    def _sums(self, weights: Sequence[Weights], x: Tensor) -> Tensor:
        """Weighted sums of the numbers at nodes of the tree, [sums, B, ...], float64."""
        nodes = sorted({node for each in weights for node in each})
        found = torch.zeros(len(weights), x.numel(), dtype=torch.float64, device=x.device)
        some = max(1, AT_ONCE // x.numel())
        for part in (nodes[i : i + some] for i in range(0, len(nodes), some)):
            table = [[each.get(node, 0.0) for node in part] for each in weights]
            shares = _on(x.device, torch.tensor(table, dtype=torch.float64))
            found.addmm_(shares, self._numbers(part, x).double())
        return found.reshape(-1, *x.shape)

    def _numbers(self, nodes: list[Node], x: Tensor) -> Tensor:
        """One standard normal number [nodes, B * ...] for each node, float32."""
        size = x[0].numel()
        level, index, unit = _on(x.device, torch.tensor(nodes)).mT[:, :, None, None]
        blocks = torch.arange(-(-size // 4), device=x.device).expand(len(x), -1)
        counter = blocks, index, level, unit & WORD
        return normal(counter, self.source).flatten(2)[..., :size].flatten(1)


Node = tuple[int, int, int]  # halvings, which interval of them, and unit of the clock
Weights = dict[Node, float]


def _within(place: int) -> Weights:
    """How W at ``place`` (in units of 2^-DEPTH) less W at the lower end of its unit is made of
    the numbers there: linear over the unit, and a hat over each interval that is halved on the
    way (Schauder's functions)."""
    unit, offset = place >> DEPTH, place & (2**DEPTH - 1)
    if not offset:
        return {}
    weights = {(0, 0, unit): offset / 2**DEPTH}
    for level in range(1, DEPTH + 2 - (offset & -offset).bit_length()):
        width = 2 ** (DEPTH + 1 - level)
        index, inside = divmod(offset, width)
        # the midpoint of a bridge over a length L has variance L / 4
        std = 0.5 * math.sqrt(width / 2**DEPTH)
        weights[level, index, unit] = std * (1 - abs(2 * inside / width - 1))
    return weights


def _on(device: torch.device, table: Tensor) -> Tensor:
    """``table`` there; from pinned memory, since another copy would wait for the device."""
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table
