"""Times of a T-step model: one of T levels, drawn evenly or by how large the losses were."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from score_models.times import TimeSampler, probabilities
from sde_lib import validation
from sde_lib.noise import Generator
from sde_lib.sde import SDE


class LevelTimes(ABC):
    """Draws one of T levels, even in t from t_min to t_max.

    Those are the levels of a ``DiscreteSDE`` that has T of them; any other process is seen at T.

    Attributes:
        levels: T, >= 2.
        stratified: See :class:`TimeSampler`.
    """

    levels: int
    stratified: bool

    def draw(self, n: int, generator: Generator) -> Tensor:
        """What a level is looked up by: uniform numbers [n], float64."""
        return probabilities(n, generator, self.stratified)

    @abstractmethod
    def row(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Level at each ``u`` [n] in [0, 1), counted from 0 at t_min, and its importance: its
        share under even draws over that under these."""

    def time(self, sde: SDE, row: Tensor) -> Tensor:
        """Time of each level ``row`` [n], float64."""
        return sde.t_min + row.double() / (self.levels - 1) * (sde.t_max - sde.t_min)

    def observe(self, u: Tensor, losses: Tensor) -> None:  # noqa: B027
        """Hear of the losses [n] that were drawn by ``u`` [n], importance included."""


@dataclass(frozen=True)
class UniformLevels(TimeSampler, LevelTimes):
    """Each of T levels equally often: how DDPM and NCSN are trained. Every importance is 1.

    Args:
        levels: T: 1000 with ``sde=ddpm``, 232 with ``sde=ncsn``.
    """

    levels: int = 1000

    def __post_init__(self) -> None:
        whole = validation.count("UniformLevels", "levels", self.levels, at_least=2)
        object.__setattr__(self, "levels", whole)

    def row(self, u: Tensor) -> tuple[Tensor, Tensor]:
        row = (u * self.levels).floor().long().clamp(max=self.levels - 1)
        return row, torch.ones_like(u)

    def quantile(self, sde: SDE, u: Tensor) -> tuple[Tensor, Tensor]:
        row, importance = self.row(u)
        return self.time(sde, row), importance


class LossAwareLevels(LevelTimes, nn.Module):
    r"""Draws a level in proportion to the root mean square of its latest losses.

    .. math::  p_t \propto \sqrt{E[L_t^2]}

    from the last ``keep`` losses of each level, once each has as many; evenly until then. Of all
    ways to draw one level a sample this one has the least variance. A share ``floor`` of the
    draws stays even, so that no level is forgotten; the importance keeps the loss unbiased.

    The draw is a number u; its level is looked up where the loss is computed, from the state of
    that moment. The state is a function of the losses of whole batches, in the order of their
    rows, whoever computed which; nothing waits for the device.

    Reference: Nichol and Dhariwal, Improved Denoising Diffusion Probabilistic Models, 2021,
    section 3.3 and appendix.

    Args:
        levels: T, >= 2.
        keep: Losses remembered of each level.
        floor: Share of even draws, in (0, 1].
        stratified: See :class:`TimeSampler`.
    """

    history: Tensor
    counts: Tensor

    def __init__(
        self, levels: int = 1000, keep: int = 10, floor: float = 1e-3, stratified: bool = True
    ) -> None:
        super().__init__()
        self.levels = validation.count("LossAwareLevels", "levels", levels, at_least=2)
        self.keep = validation.count("LossAwareLevels", "keep", keep)
        self.floor = validation.real("LossAwareLevels", "floor", floor, above=0, at_most=1)
        self.stratified = validation.flag("LossAwareLevels", "stratified", stratified)
        self.register_buffer("history", torch.zeros(self.levels, self.keep))
        self.register_buffer("counts", torch.zeros(self.levels, dtype=torch.long))

    def shares(self) -> Tensor:
        """Share of the draws that each level gets, [T], float64."""
        size = self.history.double().square().mean(1).sqrt()
        aware = size / size.sum().clamp(min=1e-300)
        # all losses zero: nothing to prefer
        warm = (self.counts >= self.keep).all() & (size.sum() > 0)
        even = torch.full_like(aware, 1 / self.levels)
        return torch.where(warm, torch.lerp(aware, even, self.floor), even)

    def row(self, u: Tensor) -> tuple[Tensor, Tensor]:
        shares = self.shares()
        upper = shares.cumsum(0)
        row = torch.searchsorted(upper, u.contiguous() * upper[-1], right=True)
        row = row.clamp(max=self.levels - 1)
        return row, 1 / (self.levels * shares[row])

    @torch.no_grad()
    def observe(self, u: Tensor, losses: Tensor) -> None:
        """Remember the loss of each row without its importance; one that is not finite is not."""
        row, importance = self.row(u)
        values = losses.double() / importance
        row = torch.where(values.isfinite(), row, self.levels)
        order = row.argsort(stable=True)
        row, values = row[order], values[order]
        # among rows of one level: how many come before this one, and how many from it on
        before, after = (torch.searchsorted(row, row, right=side) for side in (False, True))
        place = torch.arange(len(row), device=row.device)
        counts = torch.cat([self.counts, self.counts.new_zeros(1)])
        slot = (counts[row] + place - before) % self.keep
        # at most ``keep`` of a level, so that no place is written twice; the rest goes to a spare
        kept = (after - place <= self.keep) & (row < self.levels)
        target = torch.where(kept, row * self.keep + slot, self.history.numel())
        places = torch.cat([self.history.flatten(), self.history.new_zeros(1)])
        places[target] = values.to(places)
        self.history.copy_(places[:-1].view_as(self.history))
        levels = torch.arange(self.levels, device=row.device)
        ends = (torch.searchsorted(row, levels, right=side) for side in (True, False))
        last, first = ends
        self.counts.add_(last - first)
