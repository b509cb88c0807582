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
from sde_lib.sde import Level


@dataclass(frozen=True)
class Path:
    """A solved path, in the coordinates of the flow.

    Attributes:
        z: State at t_max, [B, ...] float64.
        volume: Integral of the trace, [B] float64.
        spread: Variance of ``volume`` from the probes, [B], and its degrees of freedom.
        z_other: State at t_max by half of the nodes.
        volume_difference: ``volume`` minus that by half of the nodes, [B]; NaN if unknown.
        order: Of the rule, by which the difference shrinks when the nodes are doubled.
        first, last: Noise estimate [B, ...] and trace [B] at t_min and at t_max.
        clock, trace: At the nodes, [N] and [N, B].
        nfe: Forward passes.
        passes: Backward passes.
        pilot_nfe: Those of the pilot.
    """

    z: Tensor
    volume: Tensor
    spread: Spread
    z_other: Tensor
    volume_difference: Tensor
    order: int
    first: tuple[Tensor, Tensor]
    last: tuple[Tensor, Tensor]
    clock: Tensor
    trace: Tensor
    nfe: int
    passes: int
    pilot_nfe: int


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
        nodes: N, at least 8.
        order: Of the predictor-corrector; 3 below 24 nodes, else 4, if not given. The trace is
            integrated one order higher.
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
        if self.order is not None:
            Adams(torch.arange(2.0), self.order)
        validation.flag("FixedGrid", "fresh", self.fresh)
        validation.flag("FixedGrid", "halve", self.halve)

    @property
    def chosen_order(self) -> int:
        """The order asked for, or that of the number of nodes."""
        return self.order or (4 if self.nodes >= 24 else 3)

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
        z, noise, traces = self._walk(
            flow, x, clock, divergence, draw, differentiable=differentiable
        )
        weights = self._weights(clock, x)
        path = Path(
            z=z,
            volume=(weights * traces.mean(1)).sum(0),
            spread=self._spread(divergence, weights, traces.detach(), clock),
            z_other=z.detach(),
            volume_difference=torch.full_like(z.detach().flatten(1)[:, 0], math.nan),
            order=self.chosen_order,
            first=(noise[0], traces[0].mean(0).detach()),
            last=(noise[1], traces[-1].mean(0).detach()),
            clock=clock,
            trace=traces.mean(1).detach(),
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

        The state is solved again; so is an exact trace. Estimated traces are taken from the fine
        path, and the part of the difference that is their noise is taken off again.
        """
        some = sorted({*range(0, len(path.clock), 2), len(path.clock) - 1})
        clock = path.clock[some]
        coarse = replace(self, nodes=max(8, len(some)), order=self.chosen_order)
        random = divergence.random
        z, _, again = coarse._walk(
            flow,
            x,
            clock,
            None if random else divergence,
            divergence.probes(x),
            differentiable=False,
        )
        weights = torch.zeros_like(path.trace[:, :1])
        weights[some] = coarse._weights(clock, x)
        fine = self._weights(path.clock, x)
        if random:
            difference = ((fine - weights) * path.trace).sum(0)
            noise = self._spread(divergence, fine - weights, traces, path.clock).variance
            size = (difference.square() - noise.nan_to_num(0.0)).clamp(min=0).sqrt()
            difference = size * difference.sign()
        else:
            difference = path.volume.detach() - (weights[some] * again.mean(1)).sum(0)
        return replace(
            path,
            z_other=z,
            volume_difference=difference,
            nfe=path.nfe + len(some),
            passes=path.passes + (0 if random else len(some) * divergence.passes(x)),
        )

    def _walk(
        self,
        flow: ProbabilityFlow,
        x: Tensor,
        clock: Tensor,
        divergence: Divergence | None,
        draw: Callable[[], Tensor],
        *,
        differentiable: bool,
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """The last state, the noise estimates at both ends, and the traces [N, k, B]; no traces
        without a ``divergence``."""
        levels = flow.level_at(clock.to(x.device)).rows()
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
                    draw(),
                    create_graph=differentiable,
                )
                traces.append(trace.double())
            if i in (0, len(levels) - 1):
                ends.append(value.detach().double() / share)
            return value.double() - share.square() * z

        z = Adams(clock, self.chosen_order).solve(rate, x.double() / flow.scale(levels[0]))
        return z, ends, torch.stack(traces) if traces else x.new_empty(0)

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
    """

    rtol: float = 1e-5
    atol: float = 1e-5
    log_prob_tol: float | None = None
    method: str = "dopri5"
    max_evaluations: int = 10_000

    def __post_init__(self) -> None:
        check_solver("Adaptive", self.rtol, self.atol, self.method)
        if self.log_prob_tol is not None:
            validation.real("Adaptive", "log_prob_tol", self.log_prob_tol, above=0, below=1)
        object.__setattr__(
            self,
            "max_evaluations",
            validation.count("Adaptive", "max_evaluations", self.max_evaluations),
        )

    def check(self, x: Tensor) -> None:
        """Tolerances below the rounding of the network cannot be met."""
        check_solver("Adaptive", self.rtol, self.atol, self.method, x.dtype)

    def quick(self) -> Adaptive:
        """Tolerances of a thousandth or looser."""
        return replace(self, rtol=max(1e-3, self.rtol), atol=max(1e-3, self.atol))

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
            order=1,
            first=first,
            last=last,
            clock=clock[:0].cpu(),
            trace=volumes[:0],
            nfe=nfe,
            passes=nfe * divergence.passes(x),
            pilot_nfe=0,
        )


def _worst_sample(error: tuple[Tensor, Tensor]) -> Tensor:
    """Norm of a scaled error: no sample hides behind its neighbours, nor log p behind x."""
    z, trace = error
    return torch.maximum(z.flatten(1).square().mean(1).max().sqrt(), trace.abs().max())
