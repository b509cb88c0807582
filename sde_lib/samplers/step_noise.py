"""Fresh noise along steps of any size that may have to be taken again: drawn once, then kept."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn.functional import softplus

from sde_lib.noise import Generator, of_rows, randn


class StepNoise(ABC):
    """The noise of the steps of a batch of samples, each of which goes at its own pace.

    Rows are indices into the batch [A]; clocks are log(sigma/alpha) [A], float64, and fall.
    """

    @abstractmethod
    def known(self, rows: Tensor) -> Tensor:
        """How far the noise ahead of each of ``rows`` is known, at first; -inf where it is not."""

    @abstractmethod
    def between(self, rows: Tensor, start: Tensor, end: Tensor) -> Tensor | None:
        """The noise [A, ...] from ``start`` to ``end``, in units of the scale sqrt(alpha² +
        sigma²) at ``end``, None for none. It is kept, until it is forgotten; ``end`` must not lie
        beyond what is known."""

    @abstractmethod
    def forget(self, rows: Tensor) -> None:
        """Samples ``rows`` have gone to the end of the noise last asked for, and go on there."""


class NoNoise(StepNoise):
    """That of an ODE."""

    def known(self, rows: Tensor) -> Tensor:
        return torch.full((len(rows),), -math.inf, dtype=torch.float64)

    def between(self, rows: Tensor, start: Tensor, end: Tensor) -> None:
        return None

    def forget(self, rows: Tensor) -> None:
        pass


class KeptNoise(StepNoise):
    r"""The noise of the reverse SDE, remembered as far as somebody has looked.

    In units of :math:`S = \sqrt{\alpha^2 + \sigma^2}` what comes in from clock a to b < a, see
    :class:`sde_lib.samplers.exponential.VPrediction`, is

    .. math::  n_{ab} = n_{cb} + r_{cb}\, n_{ac}, \qquad n_{ab} \sim N(0, v_{ab}), \qquad
               v_{ab} = 1 - r_{ab}^2, \qquad
               r_{ab} = \left(\frac{1 + e^{2b}}{1 + e^{2a}}\right)^{\eta^2 / 2}

    independent on different stretches. Where a step to b is refused because :math:`n_{ab}` made
    it hard, new numbers for a shorter one to c would favour easy noise. So it is split,

    .. math::  n_{ac} \mid n_{ab} \sim N\left(\frac{r_{cb}\, v_{ac}}{v_{ab}}\, n_{ab},\;
               \frac{v_{ac}\, v_{cb}}{v_{ab}}\right)

    and the rest kept for the steps from c to b. Refused steps make a stack of stretches, the
    nearest on top. Where nothing ahead is known, :math:`r_{cb} = 0`.

    Args:
        x: The batch of states [B, ...], for shape, dtype and device.
        eta: Amount of fresh noise, > 0.
        generator: Where it comes from; sample i of a ``PerSample`` draws from stream i alone, and
            only for its own steps.
    """

    def __init__(self, x: Tensor, eta: float, generator: Generator) -> None:
        self.rate, self.generator = eta**2, generator
        self.depth = torch.zeros(len(x), dtype=torch.long)
        self.ends = torch.zeros(1, len(x), dtype=torch.float64)  # [most stretches, B]
        self.values = x.new_zeros(1, *x.shape)

    def known(self, rows: Tensor) -> Tensor:
        depth = self.depth[rows]
        return torch.where(depth > 0, self.ends[(depth - 1).clamp(min=0), rows], -math.inf)

    def between(self, rows: Tensor, start: Tensor, end: Tensor) -> Tensor:
        ahead = self.known(rows)
        new = end > ahead
        if bool(new.any()):
            self._split(rows[new], start[new], end[new], ahead[new])
        return self.values[self._top(rows)]

    def forget(self, rows: Tensor) -> None:
        self.depth[rows] -= 1

    def _split(self, rows: Tensor, start: Tensor, end: Tensor, ahead: Tensor) -> None:
        """Put the stretch from ``start`` to ``end`` on top of the one that went to ``ahead``."""
        start, to, ahead = (self._elapsed(u) for u in (start, end, ahead))
        near, whole, rest = (
            -torch.expm1(2 * (b - a)) for a, b in ((start, to), (start, ahead), (to, ahead))
        )
        left, held = torch.exp(ahead - to), self._held(rows)
        mean, std, left = (
            c.to(held).reshape(-1, *(1,) * (held.ndim - 1))
            for c in (left * near / whole, (near * rest / whole).sqrt(), left)
        )
        source = of_rows(self.generator, rows.tolist())
        part = mean * held + std * randn(held.shape, source, dtype=held.dtype, device=held.device)
        below = (self.depth[rows] > 0).nonzero()[:, 0]
        self.values[self._top(rows[below])] = (held - left * part)[below.to(held.device)]
        self._push(rows, end, part)

    def _held(self, rows: Tensor) -> Tensor:
        """What is known ahead of ``rows`` [A, ...], zero where nothing is."""
        some = (self.depth[rows] > 0).to(self.values)
        held = self.values[self._top(rows)]
        return held * some.reshape(-1, *(1,) * (held.ndim - 1))

    def _push(self, rows: Tensor, end: Tensor, part: Tensor) -> None:
        if int(self.depth[rows].max()) == len(self.ends):
            self.ends = torch.cat([self.ends, torch.zeros_like(self.ends)])
            self.values = torch.cat([self.values, torch.zeros_like(self.values)])
        self.depth[rows] += 1
        self.ends[self.depth[rows] - 1, rows] = end
        self.values[self._top(rows)] = part

    def _top(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Indices of the nearest stretches, on the device of the values; of the first if none."""
        device = self.values.device
        return (self.depth[rows] - 1).clamp(min=0).to(device), rows.to(device)

    def _elapsed(self, clock: Tensor) -> Tensor:
        """The log of r from minus infinity, which itself is further away than any noise."""
        elapsed = 0.5 * self.rate * softplus(2 * clock)
        return torch.where(clock == -math.inf, -math.inf, elapsed)
