"""What all samplers share: the plan of moves, laid out up front, and the loop, written once."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from sde_lib import validation
from sde_lib.grids import Grid, Karras, checked
from sde_lib.noise import Generator, check_generator, noise_over
from sde_lib.reverse import Score
from sde_lib.rows import Wrapper
from sde_lib.samplers.remembered import remembered
from sde_lib.sde import SDE, Level

Noise = Callable[[], Tensor]
NoiseOver = Callable[[float, float], Noise]  # of a step between two values of log(sigma/alpha)
Step = Callable[[Score, Tensor, Level, Level, Noise], Tensor]


@dataclass(frozen=True)
class Plan:
    """A trajectory laid out before its first evaluation: moves from row to row of a table.

    Iterating gives each move with the two levels that it joins, on the CPU in float64.

    Args:
        levels: The levels that are visited, fields of shape [M], on the CPU in float64.
        moves: Each with the rows from and to which it goes.
    """

    levels: Level
    moves: list[tuple[Step, int, int]]

    @classmethod
    def of(cls, step: Step, levels: Level) -> Plan:
        """One ``step`` from each level to the next."""
        return cls(levels, [(step, i, i + 1) for i in range(len(levels.t) - 1)])

    def __iter__(self) -> Iterator[tuple[Step, Level, Level]]:
        return ((move.step, move.now, move.nxt) for move in self._with(self.levels))

    def on(self, x: Tensor) -> list[Move]:
        """The moves with their levels where ``x`` is and in its dtype, copied there at once;
        ``t`` stays float64."""
        return self._with(self.levels.like(x))

    def _with(self, levels: Level) -> list[Move]:
        rows, times = levels.rows(), self.levels.t.tolist()
        clock = self.levels.noise_ratio.log().tolist()
        return [
            Move(step, rows[i], rows[j], (times[i], times[j]), (clock[i], clock[j]))
            for step, i, j in self.moves
        ]


class Move(NamedTuple):
    """One step of a plan, the two levels that it joins, and their times and log(sigma/alpha) as
    numbers."""

    step: Step
    now: Level
    nxt: Level
    times: tuple[float, float]
    clocks: tuple[float, float]


class SamplingError(RuntimeError):
    """A trajectory that cannot be finished; the message says where it stopped and why.

    Attributes:
        partial: What was found all the same, if anything was.
    """

    partial: Any = None


class Sampler(ABC):
    """Turns prior samples at t_max into data: ``x0 = sampler(score, sde, x_T, generator=g)``."""

    by_step: ClassVar[bool] = False  # whether the states on the way are those of every step

    @abstractmethod
    def trajectory(
        self, score: Score, sde: SDE, x: Tensor, *, generator: Generator = None
    ) -> Iterator[tuple[float, Tensor]]:
        """The states on the way, as (time, x), the first at t_max and the last the result."""

    @property
    def converges(self) -> int | None:
        """Order at which the error falls with the number of steps, of a deterministic sampler;
        None where it has none."""
        return None if getattr(self, "stochastic", True) else getattr(self, "order", None)

    @property
    def wanted(self) -> frozenset[str]:
        """Names of what has to be found out about a model before there is a trajectory."""
        return frozenset()

    def given(self, found: Mapping[str, Any]) -> Sampler:
        """This sampler with what it :attr:`wanted`, by name."""
        return self

    def fitted(self, score: Score, sde: SDE, like: Tensor) -> Sampler:
        """This sampler with what it wants to know of a model beforehand, found out: itself, for
        most. Worth keeping where one model is sampled from many times.

        Args:
            score: Score function of the model.
            sde: Its process.
            like: A tensor [B, ...] like those to be sampled; its values do not matter.
        """
        return self

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
            ValueError: If ``sde`` is no process, ``x`` no batch of floating-point numbers, or
                ``generator`` nothing to draw from, or of another number of samples.
            SamplingError: If the result is not finite, or a solver gives up.
        """
        check_start(type(self).__name__, sde, x, generator)
        end = x
        for _, end in self.trajectory(score, sde, x, generator=generator):  # noqa: B007
            pass  # one state at a time: a thousand of them would not fit
        check_samples(self, score, sde, x, end)  # the one wait for the device, after the loop
        return end


def check_start(owner: str, sde: SDE, x: Tensor, generator: Generator) -> None:
    """Refuse what a sampler cannot start from.

    Raises:
        ValueError: Saying what it needs.
    """
    if not isinstance(sde, SDE):
        raise ValueError(
            f"{owner}(...)(score, sde, x) needs a process, such as VPSDE(), after the score "
            f"function; got {sde!r}."
        )
    if not isinstance(x, Tensor) or not x.is_floating_point() or not x.ndim or not len(x):
        got = (x.dtype, tuple(x.shape)) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(
            f"{owner} starts from samples [B, ...] of floating-point numbers, as sde.prior_sample "
            f"draws them; got {got}."
        )
    check_generator(owner, generator, len(x))


def check_samples(sampler: Sampler, score: Score, sde: SDE, x: Tensor, end: Tensor) -> None:
    """Refuse an ``end`` that is not finite; go the way from ``x`` once more to see where it broke.

    Within the loop nothing is looked at, since that would wait for the device at every step.

    Raises:
        SamplingError: With the step and the time, if they show again.
    """
    finite = torch.isfinite(end)
    if bool(finite.all()):
        return
    if not bool(torch.isfinite(x).all()):
        raise SamplingError(f"{sampler}: the samples that it starts from are not finite.")
    lost = int((~finite.reshape(len(end), -1).all(1)).sum())
    with torch.random.fork_rng():  # what is drawn now is nobody's
        where = _first_bad(sampler, sampler.trajectory(score, sde, x))
    raise SamplingError(
        f"{sampler}: {lost} of {len(end)} samples are not finite at the end, {where}; does the "
        "score function return NaN there? More steps, less fresh noise, or float32 where it runs "
        "in half precision, may help."
    )


def _first_bad(sampler: Sampler, states: Iterator[tuple[float, Tensor]]) -> str:
    step, least = 0, math.inf
    for t, state in states:
        step, least = (step, least) if t >= least else (step + (least < math.inf), t)
        if not bool(torch.isfinite(state).all()):
            return f"first at step {step}, t = {t:.4g}" if sampler.by_step else f"by t = {t:.4g}"
    return "not so in a second try"


@torch.no_grad()
def denoise(score: Score, x: Tensor, level: Level) -> Tensor:
    """E[x_0 | x] at ``level``: takes off the last noise, one evaluation."""
    return level.denoised(x, score(x, level.t))


class PlannedSampler(Sampler):
    """A sampler whose moves are all laid out before the first evaluation.

    All scalars are computed up front, in float64 and then moved to the device, so that nothing in
    the loop waits for it.
    """

    denoise: bool
    by_step: ClassVar[bool] = True
    correctable: ClassVar[bool] = True  # goes on from the state that it is given

    def check(self, sde: SDE, dtype: torch.dtype = torch.float32) -> None:
        """Lay out the plan once: a grid that does not fit the process says so."""
        self.plan(sde)

    @abstractmethod
    def plan(self, sde: SDE) -> Plan:
        """All moves of one trajectory; those that remember are made anew for each."""

    def trajectory(
        self, score: Score, sde: SDE, x: Tensor, *, generator: Generator = None
    ) -> Iterator[tuple[float, Tensor]]:
        """The states on the way, as (time, x), the first at t_max and the last the result."""
        moves = self.plan(sde).on(x)
        return self.follow(moves, score, x, noise_over(x, generator, shortest(moves)))

    def follow(
        self, moves: Sequence[Move], score: Score, x: Tensor, over: NoiseOver
    ) -> Iterator[tuple[float, Tensor]]:
        """The states on the way through ``moves``, whose noise comes from ``over``."""
        inner = InShape(score)
        yield moves[0].times[0], x
        for move in moves:
            x = move.step(inner, x, move.now, move.nxt, over(*move.clocks))
            if inner is not score and inner.fits:
                inner = score  # one answer tells for all
            yield move.times[1], x
        if self.denoise:
            yield move.times[1], denoise(inner, x, move.nxt)


def shortest(moves: Sequence[Move]) -> float:
    """Length of the shortest step towards the data, in log(sigma/alpha); 1 if there is none."""
    return min((a - b for a, b in (move.clocks for move in moves) if a > b), default=1.0)


@dataclass(frozen=True)
class FixedStepSampler(PlannedSampler):
    """A sampler that visits a grid of times.

    A subclass lays out its :meth:`plan`.

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
        if not callable(self.grid) or isinstance(self.grid, type):
            raise ValueError(
                f"{type(self).__name__} needs a grid, such as sde_lib.grids.UniformLogSNR(); got "
                f"grid={self.grid!r}."
            )

    @property
    def wanted(self) -> frozenset[str]:
        """What the grid wants."""
        return frozenset({getattr(self.grid, "wanted", None)} - {None})

    def given(self, found: Mapping[str, Any]) -> FixedStepSampler:
        """This sampler with the grid that it wanted."""
        name = getattr(self.grid, "wanted", None)
        return self if name is None else replace(self, grid=self.grid.given(found[name]))

    def check(self, sde: SDE, dtype: torch.dtype = torch.float32) -> None:
        """Lay out the plan once: a grid that does not fit the process says so. What depends on
        a model is laid out when that is there."""
        if not self.wanted:
            self.plan(sde)

    def levels(self, sde: SDE) -> Level:
        """The levels of the grid, [steps + 1] float64."""
        return remembered(_levels, self.grid, sde, self.steps)


class InShape(Wrapper):
    """A score function whose answers are held to the shape and the dtype of its argument."""

    def __init__(self, score: Score) -> None:
        super().__init__(score)
        self.fits = False

    def around(self, function: Score) -> InShape:
        """The same for another score function."""
        return InShape(function)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        found = self.function(x, t)
        if not isinstance(found, Tensor) or found.shape != x.shape:
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"the score function must return a tensor in the shape of x, {tuple(x.shape)}; "
                f"got {got}."
            )
        if not found.is_floating_point():
            raise ValueError(
                f"the score function must return real floating-point numbers; got {found.dtype}."
            )
        self.fits = found.dtype == x.dtype
        return found.to(x.dtype)


@dataclass(frozen=True)
class OneStepSampler(FixedStepSampler):
    """A sampler that needs to know one state alone: a subclass writes its :meth:`step`."""

    @abstractmethod
    def step(self, score: Score, x: Tensor, now: Level, nxt: Level, noise: Noise) -> Tensor:
        """Move ``x`` [B, ...] from the level ``now`` to the less noisy ``nxt``; scalars are [].

        ``noise()`` draws fresh standard normal noise in the shape of ``x``.
        """

    def plan(self, sde: SDE) -> Plan:
        """A step from each level of the grid to the next."""
        return Plan.of(self.step, self.levels(sde))


@dataclass(frozen=True)
class LinearSampler(OneStepSampler):
    r"""A sampler each of whose steps is :math:`x \leftarrow a\, x + b\, s(x, t) + c\, z`.

    A subclass states the :meth:`coefficients`; they are computed once, for all steps, in float64.
    """

    @abstractmethod
    def coefficients(self, now: Level, nxt: Level) -> tuple[Tensor, Tensor, Tensor]:
        """a, b and c of the steps from ``now`` to the less noisy ``nxt``, in the shape of their
        fields."""

    def moves(self, now: Level, nxt: Level) -> list[Step]:
        """The steps from each of the levels ``now``, fields [N], to the same row of ``nxt``."""
        columns = (torch.as_tensor(c).expand(len(now.t)) for c in self.coefficients(now, nxt))
        rows = zip(*(column.tolist() for column in columns), strict=True)
        return [partial(affine, *row) for row in rows]

    def step(self, score: Score, x: Tensor, now: Level, nxt: Level, noise: Noise) -> Tensor:
        (move,) = self.moves(*(Level(*(c.reshape(1) for c in end)) for end in (now, nxt)))
        return move(score, x, now, nxt, noise)

    def plan(self, sde: SDE) -> Plan:
        """The steps as three numbers each, unless a subclass has a step of its own."""
        if type(self).step is not LinearSampler.step:
            return super().plan(sde)
        levels = self.levels(sde)
        now, nxt = (Level(*(c[part] for c in levels)) for part in (slice(0, -1), slice(1, None)))
        moves = self.moves(now, nxt)
        return Plan(levels, [(move, i, i + 1) for i, move in enumerate(moves)])


def affine(
    a: float, b: float, c: float, score: Score, x: Tensor, now: Level, nxt: Level, noise: Noise
) -> Tensor:
    """The step a x + b s(x, t) + c z; without c no noise is drawn."""
    moved = torch.add(x * a, score(x, now.t), alpha=b)
    return moved.add_(noise(), alpha=c) if c else moved


def _levels(grid: Grid, sde: SDE, steps: int) -> Level:
    return sde.level(checked(grid, grid(sde, steps), sde, steps))
