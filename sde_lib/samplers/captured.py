"""A whole trajectory as one CUDA graph: recorded once, then replayed without Python."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sde_lib.counting import Counted
from sde_lib.noise import Generator, noise_over
from sde_lib.reverse import Score
from sde_lib.samplers.base import (
    Move,
    Noise,
    NoiseOver,
    PlannedSampler,
    Sampler,
    SamplingError,
    shortest,
)
from sde_lib.sde import SDE


@dataclass(frozen=True)
class Captured(Sampler):
    """A planned sampler whose trajectory is captured as a CUDA graph, and replayed from then on.

    The loop of Python is gone; all noise of a trajectory is drawn before each replay, and takes
    the time and the memory that it takes. The graph belongs to one score function, process, shape
    and dtype; another one is captured anew, at the cost of about a trajectory: it pays from the
    third batch of the same shape on. The score function must not wait for the device, nor change
    between calls but in its weights.

    Args:
        sampler: One whose moves are laid out beforehand: any but the adaptive ones and torchsde's.
    """

    sampler: PlannedSampler
    _graphs: dict[Any, _Graph] = field(default_factory=dict, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.sampler, type) or not hasattr(self.sampler, "follow"):
            raise ValueError(
                "Captured needs a sampler with a plan, of steps that are known beforehand; "
                f"{self.sampler!r} has none. Leave out cuda_graph, or use another."
            )

    @property
    def stochastic(self) -> bool:
        """As the sampler is."""
        return self.sampler.stochastic

    @property
    def converges(self) -> int | None:
        """As the sampler does."""
        return self.sampler.converges

    @property
    def wanted(self) -> frozenset[str]:
        """As the sampler does."""
        return self.sampler.wanted

    def given(self, found: Mapping[str, Any]) -> Captured:
        """Of the sampler with what it wanted."""
        return Captured(self.sampler.given(found))

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
        bare = score.function if isinstance(score, Counted) else score
        sampler = self.sampler.fitted(bare, sde, x)
        key = bare, sde, sampler, x.shape, x.dtype, x.device
        if key not in self._graphs:
            self._graphs.clear()  # one at a time: each holds the noise of a whole trajectory
            with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(x.device):
                self._graphs[key] = _Graph(sampler, bare, sde, x)
        graph = self._graphs[key]
        if bare is not score:
            score.nfe += graph.nfe  # a replay calls nothing that could count
        over = noise_over(x, generator, shortest(graph.tape.moves))
        return iter(graph.replay(x, over))


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
        self.start, moves, counted = torch.empty_like(x), sampler.plan(sde).on(x), Counted(score)
        self.tape = Tape(moves, x)
        last = rehearse(sampler, sde, x, self.tape)
        wanted = {round(k * last / 10) for k in range(11)}
        side, before = torch.cuda.Stream(x.device), torch.cuda.current_stream(x.device)
        side.wait_stream(before)
        with torch.cuda.stream(side):
            for move in moves[:: max(1, len(moves) // 3)]:  # libraries settle on their kernels
                score(self.start.zero_(), move.now.t)
        before.wait_stream(side)
        self.graph, self.states = torch.cuda.CUDAGraph(), []
        try:
            with torch.cuda.graph(self.graph, stream=side):
                way = sampler.follow(moves, counted, self.start, self.tape.play())
                self.states = [state for i, state in enumerate(way) if i in wanted]
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise SamplingError(
                f"{sampler} cannot be captured with this score function, which waits for the "
                "device, copies to it, or does something else that a graph cannot hold; leave out "
                f"cuda_graph. CUDA says: {str(error).splitlines()[0]}"
            ) from error
        finally:
            torch.cuda.set_stream(before)  # a capture that fails leaves its own behind
        self.nfe = counted.nfe

    def replay(self, x: Tensor, over: NoiseOver) -> list[tuple[float, Tensor]]:
        """The states shown; copied, since the next replay writes over them."""
        with torch.cuda.device(x.device):
            self.start.copy_(x)
            self.tape.fill(over)
            self.graph.replay()
            return [(t, state.clone()) for t, state in self.states]


def rehearse(sampler: PlannedSampler, sde: SDE, x: Tensor, tape: Tape) -> int:
    """Go the way once with a score of zeros, for the noise that it asks for; the number of its
    last state."""
    states = sampler.follow(
        sampler.plan(sde).on(x), lambda x, t: torch.zeros_like(x), x, tape.count()
    )
    last = -1
    for last, _ in enumerate(states):  # noqa: B007
        pass
    tape.allocate()
    return last
