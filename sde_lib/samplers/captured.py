"""A whole trajectory as one CUDA graph: recorded once, then replayed without Python."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sde_lib.counting import Counted
from sde_lib.noise import Generator, noise_over
from sde_lib.reverse import Score
from sde_lib.samplers.base import Move, Noise, NoiseOver, PlannedSampler, Sampler
from sde_lib.sde import SDE


@dataclass(frozen=True)
class Captured(Sampler):
    """A planned sampler whose trajectory is captured as a CUDA graph, and replayed from then on.

    The loop of Python is gone: what is left is the time of the kernels. The graph belongs to one
    score function, process, shape and dtype; another one is captured anew. It holds its own
    memory: all noise of a trajectory, drawn before each replay, and the states shown. The score
    function must not wait for the device, nor change between calls but in its weights.

    Args:
        sampler: One whose moves are laid out beforehand: any but the adaptive ones and torchsde's.
    """

    sampler: PlannedSampler
    _graphs: dict[Any, _Graph] = field(default_factory=dict, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not hasattr(self.sampler, "follow"):
            raise ValueError(
                "Captured needs a sampler with a plan, of steps that are known beforehand; "
                f"{type(self.sampler).__name__} has none. Leave out cuda_graph, or use another."
            )

    @property
    def stochastic(self) -> bool:
        """As the sampler is."""
        return self.sampler.stochastic

    @property
    def converges(self) -> int | None:
        """As the sampler does."""
        return self.sampler.converges

    def fitted(self, score: Score, sde: SDE, like: Tensor) -> Captured:
        """On the fitted sampler."""
        return Captured(self.sampler.fitted(score, sde, like))

    def check(self, sde: SDE, dtype: torch.dtype = torch.float32) -> None:
        """What the sampler refuses."""
        self.sampler.check(sde, dtype)

    def trajectory(
        self, score: Score, sde: SDE, x: Tensor, *, generator: Generator = None
    ) -> Iterator[tuple[float, Tensor]]:
        """Up to eleven states on the way, as (time, x), the first at t_max and the last the
        result."""
        if x.device.type != "cuda":
            raise ValueError(
                f"a CUDA graph needs samples on a GPU; got device={x.device}. Leave out "
                "cuda_graph."
            )
        sampler, bare = self.sampler.fitted(score, sde, x), getattr(score, "function", score)
        key = bare, sde, sampler, x.shape, x.dtype, x.device
        if key not in self._graphs:
            self._graphs.clear()  # one at a time: each holds the memory of a whole trajectory
            self._graphs[key] = _Graph(sampler, bare, sde, x)
        graph = self._graphs[key]
        if bare is not score:
            score.nfe += graph.nfe  # a replay calls nothing that could count
        return graph.replay(x, noise_over(x, generator))


class Tape:
    """The noise of a trajectory in one buffer, in the order in which its moves ask for it."""

    def __init__(self, moves: list[Move], x: Tensor) -> None:
        self.moves, self.like = moves, x
        self.calls: list[list[int]] = []  # of each move, the rows of the buffer
        self.buffer = x.new_empty(0)

    def count(self) -> NoiseOver:
        """For a rehearsal: numbers that do not matter, and note how many."""
        self.calls, taken = [], iter(range(10**9))

        def over(start: float, end: float) -> Noise:
            rows: list[int] = []
            self.calls.append(rows)

            def noise() -> Tensor:
                rows.append(next(taken))
                return torch.zeros_like(self.like)

            return noise

        return over

    def allocate(self) -> None:
        """A row of the buffer for each call that was noted."""
        self.buffer = self.like.new_empty((sum(map(len, self.calls)), *self.like.shape))

    def fill(self, over: NoiseOver) -> None:
        """New noise for all of them, as the loop would draw it."""
        for move, rows in zip(self.moves, self.calls, strict=True):
            noise = over(*move.clocks)
            for row in rows:
                self.buffer[row].copy_(noise())

    def play(self) -> NoiseOver:
        """The rows of the buffer, in order."""
        rows = iter(self.buffer)
        return lambda start, end: lambda: next(rows)


class _Graph:
    """One captured trajectory, and its tensors."""

    def __init__(self, sampler: PlannedSampler, score: Score, sde: SDE, x: Tensor) -> None:
        self.start, moves = x.clone(), sampler.plan(sde).on(x)
        self.tape = Tape(moves, x)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side), torch.no_grad():
            for _ in range(2):  # libraries settle on their kernels and workspaces
                again = sampler.plan(sde).on(x)
                for _ in sampler.follow(again, score, self.start, self.tape.count()):
                    pass
        torch.cuda.current_stream().wait_stream(side)
        self.tape.allocate()
        self.graph, counted = torch.cuda.CUDAGraph(), Counted(score)
        with torch.no_grad(), torch.cuda.graph(self.graph):
            states = list(sampler.follow(moves, counted, self.start, self.tape.play()))
        self.nfe, last = counted.nfe, len(states) - 1
        self.states = [states[i] for i in sorted({round(k * last / 10) for k in range(11)})]

    def replay(self, x: Tensor, over: NoiseOver) -> Iterator[tuple[float, Tensor]]:
        self.start.copy_(x)
        self.tape.fill(over)
        self.graph.replay()
        yield from ((t, state.clone()) for t, state in self.states)
