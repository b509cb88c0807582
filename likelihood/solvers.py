"""How the path of a likelihood is integrated: on a fixed grid of nodes, or adaptively."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from likelihood.divergence import Divergence, Spread
from likelihood.pilot import Pilot
from sde_lib import validation
from sde_lib.adams import Adams, quadrature_weights
from sde_lib.noise import Generator
from sde_lib.reverse import ProbabilityFlow
from sde_lib.samplers.adaptive import check_solver, integrate
from sde_lib.samplers.base import SamplingError
from sde_lib.sde import Level

MOST = 100_000  # nodes
FINE = 80  # from so many on a guess of one order less is near enough, and never overshoots


@dataclass(frozen=True)
class Path:
    """A solved path, in the coordinates of the flow.

    Attributes:
        z: State at t_max, [B, ...] float64.
        volume: Integral of the trace, [B] float64.
        spread: Variance of ``volume`` from the probes, [B], and its degrees of freedom.
        z_other: State at t_max by a coarser solve.
        volume_difference: How far ``volume`` is from that of the coarser one, [B]; NaN if unknown.
        shrink: How many times larger the error of the coarser one is taken to be, less one.
        first, last: Noise estimate [B, ...] and trace [B] at t_min and at t_max.
        clock, trace: At the nodes, [N] and [N, B].
        nfe: Forward passes.
        passes: Backward passes.
        pilot_nfe: Forward passes of the pilot, of one sample each.
        failure: What became of the samples whose values are NaN, if there are any.
    """

    z: Tensor
    volume: Tensor
    spread: Spread
    z_other: Tensor
    volume_difference: Tensor
    shrink: float
    first: tuple[Tensor, Tensor]
    last: tuple[Tensor, Tensor]
    clock: Tensor
    trace: Tensor
    nfe: int
    passes: int
    pilot_nfe: int
    failure: str | None = None


class Solver(ABC):
    """Integrates state and trace from t_min to t_max."""

    @abstractmethod
    def check(self, x: Tensor) -> None:
        """Refuse what this solver cannot do at the dtype of ``x``, before anything is computed."""

    @abstractmethod
    def quick(self) -> Solver:
        """A cheaper one, for a curve."""

    @abstractmethod
    def solve(
        self,
        flow: ProbabilityFlow,
        x: Tensor,
        divergence: Divergence,
        generator: Generator,
        *,
        differentiable: bool,
    ) -> Path:
        """The path that starts at ``x`` [B, ...]."""


@dataclass(frozen=True)
class FixedGrid(Solver):
    r"""An Adams predictor-corrector on nodes laid out beforehand, one evaluation a node.

    That the nodes are fixed makes fresh probes at every node legitimate: each is unbiased for the
    trace there, and their errors average out along the path, where one probe kept along it has one
    error and keeps it. Nodes are dense where the data have structure
    (:class:`likelihood.pilot.Pilot`). The state is float64, the network runs in the dtype of x.

    Args:
        nodes: N, from 8 to 100,000.
        order: Of the predictor-corrector; 3 below 24 nodes, else 4, if not given. The trace is
            integrated one order higher. From 5 on it takes eight nodes an order: with fewer the
            half grid has no order at all, and says nothing of the error.
        fresh: Whether probes are drawn anew at every node, or once for the whole path.
        halve: Whether to solve again with every other node, which measures the solver error of
            each sample for half as many forward passes more.
    """

    nodes: int = 64
    order: int | None = None
    fresh: bool = True
    halve: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "nodes", validation.count("FixedGrid", "nodes", self.nodes, at_least=8)
        )
        if self.nodes > MOST:
            raise ValueError(
                f"FixedGrid takes at most {MOST} nodes; got nodes={self.nodes}. The trace of "
                "every node is kept, and some hundreds leave rounding as the only error."
            )
        if self.order is not None:
            Adams(torch.arange(2.0), self.order)
            if self.order > 4 and self.nodes < 8 * self.order:
                raise ValueError(
                    f"FixedGrid needs nodes >= {8 * self.order} for order {self.order}; got "
                    f"nodes={self.nodes}. Leave order out: it is chosen by the nodes."
                )
        validation.flag("FixedGrid", "fresh", self.fresh)
        validation.flag("FixedGrid", "halve", self.halve)

    @property
    def chosen_order(self) -> int:
        """The order asked for, or that of the number of nodes."""
        return self.order or (4 if self.nodes >= 24 else 3)

    @property
    def fine(self) -> bool:
        """Whether the path is predicted at one order less, see :class:`sde_lib.adams.Adams`."""
        return self.nodes >= FINE

    def check(self, x: Tensor) -> None:
        """Nothing to refuse."""

    def quick(self) -> FixedGrid:
        """At most 32 nodes, and no second look at them."""
        return replace(self, nodes=min(self.nodes, 32), halve=False)

    def solve(
        self,
        flow: ProbabilityFlow,
        x: Tensor,
        divergence: Divergence,
        generator: Generator,
        *,
        differentiable: bool,
    ) -> Path:
        known = len(flow.memory)
        pilot = Pilot.of(flow, x, divergence)
        divergence = pilot.divergence
        clock = pilot.nodes(self.nodes)
        source = divergence.probes(x, generator)
        draw = source if self.fresh else _always(source())
        weights = self._weights(clock, x)
        counts: list[int] | None = None
        if self.fresh and divergence.allots:
            here = quadrature_weights(clock, self.chosen_order + 1)  # without a wait
            counts = pilot.probes_at(clock, here, divergence.allots)
        rule = Adams(clock, self.chosen_order, self.fine)
        z, noise, traces = self._walk(
            flow, x, rule, divergence, draw, counts, differentiable=differentiable
        )
        means = traces.nanmean(1)
        path = Path(
            z=z,
            volume=(weights * means).sum(0),
            spread=self._spread(divergence, weights, traces.detach(), clock),
            z_other=z.detach(),
            volume_difference=torch.full_like(z.detach().flatten(1)[:, 0], math.nan),
            shrink=2.0 ** (self.chosen_order - 1) - 1,
            first=(noise[0], means[0].detach()),
            last=(noise[1], means[-1].detach()),
            clock=clock,
            trace=means.detach(),
            nfe=len(clock),
            passes=len(clock) * divergence.passes(x),
            pilot_nfe=pilot.nfe if len(flow.memory) > known else 0,
        )
        return self._compared(flow, x, path, divergence, traces.detach()) if self.halve else path

    @torch.no_grad()
    def _compared(
        self,
        flow: ProbabilityFlow,
        x: Tensor,
        path: Path,
        divergence: Divergence,
        traces: Tensor,
    ) -> Path:
        """``path`` with what every other node alone would have given, for the error.

        The state is solved again; so is an exact trace, whose differences are added up by size:
        with their signs they may cancel by chance. Estimated traces are taken from the fine path,
        and the part of the difference that is their noise is taken off again.
        """
        some = sorted({*range(0, len(path.clock), 2), len(path.clock) - 1})
        clock = path.clock[some]
        coarse = replace(self, nodes=max(8, len(some)), order=self.chosen_order)
        again = None if divergence.random else divergence
        draw = _nothing if divergence.random else divergence.probes(x)
        rule = Adams(clock, self.chosen_order, self.fine)
        z, _, seen = coarse._walk(flow, x, rule, again, draw, differentiable=False)
        weights = torch.zeros_like(path.trace[:, :1])
        weights[some] = coarse._weights(clock, x)
        fine = self._weights(path.clock, x)
        quadrature = ((fine - weights) * path.trace).sum(0)
        if divergence.random:
            noise = self._spread(divergence, fine - weights, traces, path.clock).variance
            size = (quadrature.square() - noise.nan_to_num(0.0)).clamp(min=0).sqrt()
        else:
            along = weights[some] * (path.trace[some] - seen.mean(1))
            size = torch.hypot(quadrature, along.abs().sum(0))
        return replace(
            path,
            z_other=z,
            volume_difference=size,
            nfe=path.nfe + len(some),
            passes=path.passes + (0 if divergence.random else len(some) * divergence.passes(x)),
        )

    def _walk(
        self,
        flow: ProbabilityFlow,
        x: Tensor,
        rule: Adams,
        divergence: Divergence | None,
        draw: Callable[..., Tensor],
        counts: list[int] | None = None,
        *,
        differentiable: bool,
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """The last state, the noise estimates at both ends, and the traces [N, k, B], NaN where
        ``counts`` has fewer than k for a node; no traces without a ``divergence``."""
        levels = flow.level_at(rule.nodes.to(x.device)).rows()
        traces: list[Tensor] = []
        ends: list[Tensor] = []

        def rate(i: int, z: Tensor) -> Tensor:
            level = levels[i]
            share = flow.noise_share(level)
            state = z.to(x.dtype)
            if divergence is None:
                value = flow.noise_part(state, level)
            else:
                value, trace = divergence(
                    lambda z: flow.noise_part(z, level),
                    state,
                    draw() if counts is None else draw(counts[i]),
                    create_graph=differentiable,
                )
                traces.append(trace.double())
            if i in (0, len(levels) - 1):
                ends.append(value.detach().double() / share)
            return value.double() - share.square() * z

        z = rule.solve(rate, x.double() / flow.scale(levels[0]))
        return z, ends, _padded(traces) if traces else x.new_empty(0)

    def _weights(self, clock: Tensor, x: Tensor) -> Tensor:
        """Quadrature weights [N, 1] of the trace, one order above that of the path."""
        return quadrature_weights(clock, self.chosen_order + 1).to(x.device)[:, None]

    def _spread(
        self, divergence: Divergence, weights: Tensor, traces: Tensor, clock: Tensor
    ) -> Spread:
        """Of the weighted sum of ``traces`` [N, k, B]."""
        if self.fresh:
            return divergence.fresh_variance(traces, clock.to(traces.device), weights[:, 0])
        return divergence.kept_variance((weights[:, None] * traces).sum(0))


def _always(probes: Tensor) -> Callable[[], Tensor]:
    return lambda: probes


def _padded(traces: list[Tensor]) -> Tensor:
    """[N, k, B] of N tensors [k_i, B]; NaN where one has fewer than the largest."""
    k = max(len(trace) for trace in traces)
    return torch.stack(
        [torch.nn.functional.pad(t, (0, 0, 0, k - len(t)), value=math.nan) for t in traces]
    )


def _nothing() -> Tensor:
    return torch.empty(0)


@dataclass(frozen=True)
class Adaptive(Solver):
    """An adaptive Runge-Kutta method of torchdiffeq, with one set of probes kept along the path.

    The same x and probes give the same latent whatever the number of probes: the reproducible
    mode, and an independent check of the fixed grid. State and divergence are integrated together,
    in float64; the error of every sample is bounded, of z by its root mean square, of log p per
    dimension. Step sizes are shared by the batch, so a sample agrees with itself in another batch
    to the tolerance, not to the bit.

    Args:
        rtol: Relative tolerance.
        atol: Absolute tolerance on z.
        log_prob_tol: Absolute tolerance on log p, nats per dimension; ``atol`` if not given.
        method: dopri5, dopri8, bosh3, fehlberg2 or adaptive_heun.
        max_evaluations: Evaluations after which to give up.
        compare: Whether to solve again with ten times the tolerances; how far the two are apart is
            the solver error of each sample.
    """

    rtol: float = 1e-5
    atol: float = 1e-5
    log_prob_tol: float | None = None
    method: str = "dopri5"
    max_evaluations: int = 10_000
    compare: bool = True

    def __post_init__(self) -> None:
        check_solver("Adaptive", self.rtol, self.atol, self.method)
        if self.log_prob_tol is not None:
            validation.real("Adaptive", "log_prob_tol", self.log_prob_tol, above=0, below=1)
        validation.flag("Adaptive", "compare", self.compare)
        object.__setattr__(
            self,
            "max_evaluations",
            validation.count("Adaptive", "max_evaluations", self.max_evaluations),
        )

    def check(self, x: Tensor) -> None:
        """Tolerances below the rounding of the network cannot be met."""
        check_solver("Adaptive", self.rtol, self.atol, self.method, x.dtype)

    def quick(self) -> Adaptive:
        """Tolerances of a thousandth or looser, and no second look."""
        return replace(self, rtol=max(1e-3, self.rtol), atol=max(1e-3, self.atol), compare=False)

    def solve(
        self,
        flow: ProbabilityFlow,
        x: Tensor,
        divergence: Divergence,
        generator: Generator,
        *,
        differentiable: bool,
    ) -> Path:
        if differentiable:
            raise ValueError(
                "an adaptive solver chooses its steps by looking at the numbers, so that its "
                "log p has no useful derivative; use solver=FixedGrid() to differentiate."
            )
        probes = divergence.probes(x, generator)()
        path = self._solved(flow, x, divergence, probes)
        if not self.compare:
            return path
        tolerances = {"rtol": self.rtol, "atol": self.atol, "log_prob_tol": self.log_prob_tol}
        looser = {name: min(10 * tol, 0.5) for name, tol in tolerances.items() if tol is not None}
        other = replace(self, **looser)._solved(flow, x, divergence, probes)
        return replace(
            path,
            z_other=other.z,
            volume_difference=(path.volume - other.volume).abs(),
            nfe=path.nfe + other.nfe,
            passes=path.passes + other.passes,
        )

    def _solved(
        self, flow: ProbabilityFlow, x: Tensor, divergence: Divergence, probes: Tensor
    ) -> Path:
        """The path of ``x``; where a step fails, of one half and of the other, so that a sample
        that cannot be finished costs its batch mates nothing but time."""
        try:
            return self._together(flow, x, divergence, probes)
        except SamplingError as error:
            stuck = error.__cause__ is not None  # else the evaluations are used up
            if len(x) == 1 or not stuck:
                return _nothing_found(x, str(error))
        half = len(x) // 2
        return _joined(
            [
                self._solved(flow.for_rows(rows), x[rows], divergence, probes[:, rows])
                for rows in (slice(half), slice(half, len(x)))
            ]
        )

    def _together(
        self, flow: ProbabilityFlow, x: Tensor, divergence: Divergence, probes: Tensor
    ) -> Path:
        dims = x[0].numel()
        clock = torch.tensor(flow.clock_range(), dtype=torch.float64, device=x.device)
        ends = flow.level_at(clock).rows()
        nfe = 0

        def noise_and_trace(level: Level, z: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal nfe
            nfe += 1
            value, trace = divergence(lambda z: flow.noise_part(z, level), z.to(x.dtype), probes)
            return value.double(), trace.double()

        def rate(u: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            level = flow.level_at(u)
            value, trace = noise_and_trace(level, state[0])
            linear = flow.noise_share(level).square()
            return value - linear * state[0], (trace - linear * dims) / dims

        start = x.double() / flow.scale(ends[0])
        zero = torch.zeros(1 if probes.numel() == 0 else len(probes), len(x)).to(start)
        states, integrals = integrate(
            rate,
            (start, zero),
            clock,
            method=self.method,
            rtol=self.rtol,
            atol=(self.atol, self.log_prob_tol or self.atol),
            max_evaluations=self.max_evaluations,
            norm=_worst_sample,
        )
        first, last = (
            (value / flow.noise_share(level), trace.mean(0))
            for level, (value, trace) in (
                (level, noise_and_trace(level, z))
                for level, z in zip(ends, (start, states[-1]), strict=True)
            )
        )
        linear = -0.5 * torch.log((1 + ends[1].noise_ratio ** 2) / (1 + ends[0].noise_ratio ** 2))
        volumes = dims * (integrals[-1] - linear)
        return Path(
            z=states[-1],
            volume=volumes.mean(0),
            spread=divergence.kept_variance(volumes),
            z_other=states[-1],
            volume_difference=torch.full_like(volumes[0], math.nan),
            shrink=1.0,
            first=first,
            last=last,
            clock=clock[:0].cpu(),
            trace=volumes[:0],
            nfe=nfe,
            passes=nfe * divergence.passes(x),
            pilot_nfe=0,
        )


def _nothing_found(x: Tensor, failure: str) -> Path:
    """NaN for every sample, and why."""
    z = torch.full_like(x, math.nan, dtype=torch.float64)
    row = z.flatten(1)[:, 0]
    none = torch.empty(0, dtype=torch.float64)
    return Path(
        z=z,
        volume=row,
        spread=Spread(row, row),
        z_other=z,
        volume_difference=row,
        shrink=1.0,
        first=(z, row),
        last=(z, row),
        clock=none,
        trace=row[None][:0],
        nfe=0,
        passes=0,
        pilot_nfe=0,
        failure=failure,
    )


def _joined(paths: list[Path]) -> Path:
    """One path of the samples of all, by an adaptive solver."""

    def rows(pick: Callable[[Path], Tensor]) -> Tensor:
        return torch.cat([pick(path) for path in paths])

    failures = [path.failure for path in paths if path.failure is not None]
    return replace(
        paths[0],
        z=rows(lambda p: p.z),
        volume=rows(lambda p: p.volume),
        spread=Spread(rows(lambda p: p.spread.variance), rows(lambda p: p.spread.freedom)),
        z_other=rows(lambda p: p.z_other),
        volume_difference=rows(lambda p: p.volume_difference),
        first=(rows(lambda p: p.first[0]), rows(lambda p: p.first[1])),
        last=(rows(lambda p: p.last[0]), rows(lambda p: p.last[1])),
        trace=rows(lambda p: p.trace.T).T,
        nfe=sum(path.nfe for path in paths),
        passes=sum(path.passes for path in paths),
        failure=failures[0] if failures else None,
    )


def _worst_sample(error: tuple[Tensor, Tensor]) -> Tensor:
    """Norm of a scaled error: no sample hides behind its neighbours, nor log p behind x."""
    z, trace = error
    return torch.maximum(z.flatten(1).square().mean(1).max().sqrt(), trace.abs().max())
