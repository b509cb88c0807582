"""What all samplers share: the plan of moves, laid out up front, and the loop, written once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from sde_lib import validation
from sde_lib.grids import Grid, Karras
from sde_lib.noise import Generator, randn_like
from sde_lib.reverse import Score
from sde_lib.sde import SDE, Level

Noise = Callable[[], Tensor]
Move = tuple[Callable[[Score, Tensor, Level, Level, Noise], Tensor], Level, Level]


class SamplingError(RuntimeError):
    """A trajectory that cannot be finished; the message says where it stopped and why.

    Attributes:
        partial: What was found all the same, if anything was.
    """

    partial: Any = None


class Sampler(ABC):
    """Turns prior samples at t_max into data: ``x0 = sampler(score, sde, x_T, generator=g)``."""

    @abstractmethod
    def trajectory(
        self, score: Score, sde: SDE, x: Tensor, *, generator: Generator = None
    ) -> Iterator[tuple[float, Tensor]]:
        """The states on the way, as (time, x), the first at t_max and the last the result."""

    def check(self, sde: SDE, dtype: torch.dtype = torch.float32) -> None:  # noqa: B027
        """Refuse what this sampler cannot do, before anything is computed.

        Args:
            sde: The process it will work on.
            dtype: That of the states.

        Raises:
            ValueError: Naming what refuses and what to use instead.
        """

    @torch.no_grad()
    def __call__(
        self, score: Score, sde: SDE, x: Tensor, *, generator: Generator = None
    ) -> Tensor:
        """Run the whole trajectory and return its end.

        Args:
            score: Score function (x [B, ...], t []) -> [B, ...].
            sde: The forward process.
            x: Prior samples at t_max, [B, ...], from ``sde.prior_sample``.
            generator: Source of all randomness; a ``PerSample`` makes each sample independent
                of its batch.

        Returns:
            Samples [B, ...] in the dtype of ``x``, denoised at t_min.

        Raises:
            SamplingError: If the result is not finite, or a solver gives up.
        """
        end = x
        for _, end in self.trajectory(score, sde, x, generator=generator):  # noqa: B007
            pass  # one state at a time: a thousand of them would not fit
        if not bool(torch.isfinite(end).all()):  # the one wait for the device, after the loop
            raise SamplingError(
                f"{self}: {int((~torch.isfinite(end)).sum())} of {end.numel()} values "
                "are not finite at the end; "
                "does the score function return NaN?"
            )
        return end


@torch.no_grad()
def denoise(score: Score, x: Tensor, level: Level) -> Tensor:
    """E[x_0 | x] at ``level``: takes off the last noise, one evaluation."""
    return level.denoised(x, score(x, level.t))


@dataclass(frozen=True)
class FixedStepSampler(Sampler):
    """A sampler that visits a grid of times laid out before the first evaluation.

    A subclass writes one :meth:`step`. All scalars are computed up front, in float64 and then
    moved to the device, so that nothing in the loop waits for it.

    Args:
        steps: Number of steps, >= 1.
        grid: Where they are.
        denoise: Whether the end is E[x_0 | x] at t_min, one more evaluation, or x at t_min.
    """

    steps: int = 100
    grid: Grid = Karras()
    denoise: bool = True

    def __post_init__(self) -> None:
        steps = validation.count(type(self).__name__, "steps", self.steps)
        object.__setattr__(self, "steps", steps)
        validation.flag(type(self).__name__, "denoise", self.denoise)

    def check(self, sde: SDE, dtype: torch.dtype = torch.float32) -> None:
        """Lay out the plan once: a grid that does not fit the process says so."""
        self.plan(sde)

    @abstractmethod
    def step(self, score: Score, x: Tensor, now: Level, nxt: Level, noise: Noise) -> Tensor:
        """Move ``x`` [B, ...] from the level ``now`` to the less noisy ``nxt``; scalars are [].

        ``noise()`` draws fresh standard normal noise in the shape of ``x``.
        """

    def plan(self, sde: SDE) -> list[Move]:
        """All moves of the trajectory with the levels that each joins, on the CPU in float64."""
        levels = sde.level(self.grid(sde, self.steps)).rows()
        return [(self.step, now, nxt) for now, nxt in pairwise(levels)]

    def trajectory(
        self, score: Score, sde: SDE, x: Tensor, *, generator: Generator = None
    ) -> Iterator[tuple[float, Tensor]]:
        """The states on the way, as (time, x), the first at t_max and the last the result."""
        plan = self.plan(sde)
        times = [float(nxt.t) for _, _, nxt in plan]
        moves = _on_device(plan, x)
        yield sde.t_max, x
        for (move, now, nxt), t in zip(moves, times, strict=True):
            x = move(score, x, now, nxt, partial(randn_like, x, generator))
            yield t, x
        if self.denoise:
            yield times[-1], denoise(score, x, moves[-1][2])


def _on_device(plan: list[Move], x: Tensor) -> list[Move]:
    """The plan with its scalars on the device of ``x``, in one copy; ``t`` keeps float64."""
    rows = torch.stack([torch.stack([*now, *nxt]) for _, now, nxt in plan]).to(x.device)
    width = len(Level._fields)
    scalars = zip(rows.unbind(), rows.to(x.dtype).unbind(), strict=True)
    levels = [
        (Level(exact[0], *row[1:width]), Level(exact[width], *row[width + 1 :]))
        for exact, row in ((e.unbind(), r.unbind()) for e, r in scalars)
    ]
    return [(move, now, nxt) for (move, _, _), (now, nxt) in zip(plan, levels, strict=True)]
