"""The default sampler: Adams rules for v, on steps laid out by a look at the model.

With few steps no rule is best for all data: there the look tries some, and takes the best.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from sde_lib import validation
from sde_lib.grids import FittedGrid, Grid, Karras, UniformLogSNR, UniformTime
from sde_lib.memory import in_halves
from sde_lib.noise import Generator, PerSample
from sde_lib.reverse import Score
from sde_lib.rows import for_others, for_rows, innermost
from sde_lib.samplers.base import FixedStepSampler, InShape, SamplingError, check_samples
from sde_lib.samplers.exponential import PREDICTIONS
from sde_lib.samplers.multistep import DEIS, Multistep, UniPC, lowered
from sde_lib.sde import SDE, Level

NODES, SAMPLES, SEED = 64, 32, 0  # of the pilot
WIDTH = 0.8  # units of log(sigma/alpha) over which its findings are smoothed
FLOOR = 0.05  # of the largest density
BELOW = 8  # steps, where rules are tried; from there on this one was best or within a fifth


@dataclass(frozen=True)
class FlowAdams(Multistep):
    r"""Adams predictor-corrector for v, one evaluation a step, on a grid fitted to the model.

    With :math:`S^2 = \alpha^2 + \sigma^2` and the clock u = log(sigma/alpha) the probability flow
    is :math:`d(x/S)/du = (\alpha\sigma/S^2)\, v(x, u)`. A step integrates the polynomial through
    the last values of v against that weight; the next evaluation corrects it. v is of order one
    at both ends, where an estimate of the noise or of the data alone has lost what it says.

    The grid is dense where v bends along the paths of a few samples of the model
    (:func:`fitted_grid`, 64 evaluations of 32 samples); :meth:`fitted` does that beforehand. This
    object remembers it for the latest score function, until the weights of the module that this
    is a method of are written to; of another callable it cannot know what is behind it.

    Below 8 steps the same samples are solved once more by each of five rules, this one and DEIS
    or UniPC on some grids (:data:`RULES`), and the one whose ends are nearest to the pilot's is
    used: with so few, the best rule changes with the data.

    Args:
        steps: Evaluations, and one more for the denoise.
        grid: Where they are; fitted to the model if not given.
        order: 1 to 4, of predictor and corrector. If not given it is chosen by the steps: 3 below
            40, then 4; and below 70 the predictor's falls at the end, where no evaluation comes
            after to set right what was extrapolated. If given, no other rule is tried.
    """

    steps: int = 20
    grid: Grid | None = None
    order: int | None = None
    memory: dict[Hashable, Fit] = field(
        default_factory=dict, init=False, compare=False, repr=False
    )
    most: ClassVar[int] = 4
    of: ClassVar[str] = "v"
    stochastic: ClassVar[bool] = False
    correctable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.grid is not None:
            super().__post_init__()
        else:
            object.__setattr__(self, "steps", self._somewhere().steps)
        if self.order is not None:
            order = validation.count("FlowAdams", "order", self.order)
            object.__setattr__(self, "order", order)
            if order > self.most:
                raise ValueError(f"FlowAdams has orders 1 to {self.most}; got order={order}.")

    @property
    def chosen_order(self) -> int:
        """The order asked for, or that of the number of steps."""
        return self.order or (3 if self.steps < 40 else 4)

    def orders(self) -> list[int]:
        """Of each step's predictor."""
        orders = [min(self.chosen_order, n + 1) for n in range(self.steps)]
        if self.order is not None or self.steps >= 70:
            return orders
        return lowered(orders, 1 if self.steps < 25 else 2)

    def corrections(self) -> list[int]:
        """Predictions that each corrector goes through."""
        return [min(self.chosen_order, n + 2) for n in range(self.steps - 1)]

    def levels(self, sde: SDE) -> Level:
        """Of the grid, which has to be there: see :meth:`fitted`."""
        if self.grid is None:
            raise ValueError(
                "FlowAdams has no grid yet; use the sampler that fitted(score, sde, like) returns."
            )
        return super().levels(sde)

    def check(self, sde: SDE, dtype: torch.dtype = torch.float32) -> None:
        """A fitted grid always fits."""
        super(FlowAdams, self._somewhere()).check(sde, dtype)

    def _somewhere(self) -> FlowAdams:
        return self if self.grid is not None else replace(self, grid=UniformLogSNR())

    @property
    def tries(self) -> bool:
        """Whether rules are tried on a model."""
        return self.grid is None and self.order is None and self.steps < BELOW

    def fitted(self, score: Score, sde: SDE, like: Tensor) -> FixedStepSampler:
        """What suits the model, if no grid was given: this sampler on a grid, or another rule."""
        if self.grid is not None:
            return self
        key = (score, _state(score), sde, tuple(like.shape[1:]), like.dtype, str(like.device))
        try:
            hash(key)
        except TypeError:  # nothing to remember it by
            return self.settled(self.fit(score, sde, like))
        if key not in self.memory:
            self.memory.clear()
            self.memory[key] = self.fit(score, sde, like)
        return self.settled(self.memory[key])

    @torch.no_grad()
    def fit(self, score: Score, sde: SDE, like: Tensor) -> Fit:
        """A grid for the model, and below 8 steps the best of the rules."""
        pilot = _look(score, sde, like, SAMPLES, SEED)
        rule = _best_rule(self, pilot, score, sde) if self.tries else OWN
        return Fit(pilot.grid, rule)

    def settled(self, fit: Fit) -> FixedStepSampler:
        """The sampler that ``fit`` stands for, with these steps."""
        return RULES[fit.rule](self, fit.grid)

    def trajectory(
        self, score: Score, sde: SDE, x: Tensor, *, generator: Generator = None
    ) -> Iterator[tuple[float, Tensor]]:
        """The states on the way, as (time, x), the first at t_max and the last the result."""
        if self.grid is not None:
            return super().trajectory(score, sde, x, generator=generator)
        return self.fitted(score, sde, x).trajectory(score, sde, x, generator=generator)


class Fit(NamedTuple):
    """What a look at a model has found.

    Attributes:
        grid: Steps as dense as v bends.
        rule: Name of one of ``RULES``.
    """

    grid: FittedGrid
    rule: str


def _deis(grid: Grid | None) -> Callable[[FlowAdams, FittedGrid], FixedStepSampler]:
    return lambda asked, fitted: DEIS(asked.steps, grid or fitted, asked.denoise, order=3)


def _unipc(grid: Grid) -> Callable[[FlowAdams, FittedGrid], FixedStepSampler]:
    return lambda asked, fitted: UniPC(asked.steps, grid, asked.denoise, order=3)


OWN = "v"
RULES: dict[str, Callable[[FlowAdams, FittedGrid], FixedStepSampler]] = {
    OWN: lambda asked, fitted: replace(asked, grid=fitted),
    "DEIS 3": _deis(None),
    "DEIS 3, Karras": _deis(Karras()),
    "UniPC 3, log SNR": _unipc(UniformLogSNR()),
    "UniPC 3, time": _unipc(UniformTime()),
}


def _best_rule(asked: FlowAdams, pilot: _Pilot, score: Score, sde: SDE) -> str:
    """The rule whose ends are nearest to the pilot's, in mean square."""
    others = for_others(score, len(pilot.start))

    def error(rule: str) -> float:
        sampler = replace(RULES[rule](asked, pilot.grid), denoise=False)

        def squares(rows: range) -> Tensor:
            part, own = slice(rows.start, rows.stop), for_rows(others, rows)
            for _, end in sampler.trajectory(own, sde, pilot.start[part]):  # noqa: B007
                pass
            return (end - pilot.end[part]).double().square().flatten(1).mean(1)

        found = float(torch.cat(in_halves(squares, range(len(pilot.start)))).mean())
        return found if math.isfinite(found) else math.inf

    errors = {rule: error(rule) for rule in RULES}
    return min(errors, key=errors.get)


def _state(score: Score) -> tuple[int, ...]:
    """Tells whether the weights of the module that ``score`` is, or is a method of, have changed
    since: torch counts what is done to a tensor in place."""
    inner = innermost(score)
    owner = getattr(inner, "__self__", inner)
    tensors = owner.parameters() if isinstance(owner, nn.Module) else ()
    return tuple(tensor._version for tensor in tensors)


def fitted_grid(
    score: Score, sde: SDE, like: Tensor, *, samples: int = SAMPLES, seed: int = SEED
) -> FittedGrid:
    """The grid on whose steps v bends about equally.

    Follows a few prior samples down to t_min in even steps of log(sigma/alpha) and takes third
    differences of v; a rule of order three errs by the fourth power of its step times
    that, so that the density of the steps goes with the fourth root. Depends on the model and on
    shape, dtype and device of ``like`` alone.

    Args:
        score: Score function.
        sde: The process.
        like: A tensor [B, ...] like those to be sampled; its values do not matter.
        samples: How many to follow; of a score function with conditions, under its ``others``.
        seed: Of the first; the others have the next ones.
    """
    return _look(score, sde, like, samples, seed).grid


class _Pilot(NamedTuple):
    """The grid, and where the samples that it was found on begin and end, [B, ...]."""

    grid: FittedGrid
    start: Tensor
    end: Tensor


@torch.no_grad()
def _look(score: Score, sde: SDE, like: Tensor, samples: int, seed: int) -> _Pilot:
    sampler = FlowAdams(NODES, grid=UniformLogSNR(), order=4, denoise=False)
    others = for_others(score, samples)
    levels = sampler.levels(sde)
    p, q = (column.tolist() for column in PREDICTIONS["v"].of_score(levels))

    def followed(rows: range) -> tuple[Tensor, Tensor, Tensor]:
        """Mean squares of the third differences of samples ``rows``, [rows, NODES - 3], their
        start and their end."""
        last: list[Tensor] = []
        found: list[Tensor] = []
        own = for_rows(others, rows)
        inner = InShape(own)

        def watched(x: Tensor, t: Tensor) -> Tensor:
            n = len(last) + len(found)
            answer = inner(x, t)
            last.append(p[n] * x + q[n] * answer)
            if len(last) > 3:
                third = last[3] - 3 * (last[2] - last[1]) - last[0]
                found.append(third.double().reshape(len(x), -1).square().mean(1))
                last.pop(0)
            return answer

        streams = PerSample([seed + row for row in rows], like.device)
        shape = (len(rows), *like.shape[1:])
        start = sde.prior_sample(shape, generator=streams, device=like.device, dtype=like.dtype)
        end = start
        for _, end in sampler.trajectory(watched, sde, start):  # noqa: B007
            pass
        try:
            check_samples(sampler, own, sde, start, end)
        except SamplingError as error:
            raise SamplingError(f"looking at the model before sampling, by {error}") from error
        return torch.stack(found, dim=1), start, end

    parts = zip(*in_halves(followed, range(samples)), strict=True)
    squares, start, end = (torch.cat(part) for part in parts)
    squares = squares.mean(0).cpu()
    clock = levels.noise_ratio.log()
    middle = 0.5 * (clock[:-4] + clock[3:-1])
    density = (squares.sqrt() * 0.5 / middle.cosh()) ** 0.25
    kernel = torch.exp(-0.5 * ((clock[:, None] - middle) / WIDTH).square())
    smooth = (kernel * density).sum(1) / kernel.sum(1)
    smooth = smooth / smooth.max().clamp(min=1e-300) + FLOOR
    return _Pilot(FittedGrid(tuple(clock.tolist()), tuple(smooth.tolist())), start, end)
