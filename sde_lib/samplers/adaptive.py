"""The probability flow by the solvers of torchdiffeq: adaptive ones, and those of fixed steps."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from sde_lib import validation
from sde_lib.noise import Generator
from sde_lib.reverse import ProbabilityFlow, Score, probability_flow
from sde_lib.samplers.base import InShape, Sampler, SamplingError, denoise
from sde_lib.sde import SDE

ADAPTIVE_METHODS = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")
SCIPY = "scipy_solver"  # LSODA, on the CPU; it has an error norm of its own


class FixedMethod(NamedTuple):
    """A fixed-step method of torchdiffeq.

    Attributes:
        order: Order of its error in the number of steps.
        max_order: The option by which torchdiffeq gets an Adams rule of that order.
    """

    order: int
    max_order: int | None = None


FIXED_METHODS = {
    "euler": FixedMethod(1),
    "midpoint": FixedMethod(2),
    "heun2": FixedMethod(2),
    "heun3": FixedMethod(3),
    "rk4": FixedMethod(4),
    # of order 4: by default it is 12, where the explicit rule blows up unless steps are tiny, and
    # both start by steps of order 4
    "explicit_adams": FixedMethod(4, max_order=5),  # torchdiffeq leaves one prediction out
    "implicit_adams": FixedMethod(4, max_order=4),
    "fixed_adams": FixedMethod(4, max_order=4),  # another name of implicit_adams
}

State = Tensor | tuple[Tensor, ...]


def integrate(
    function: Callable[[Tensor, State], State],
    start: State,
    clock: Tensor,
    *,
    method: str,
    rtol: float,
    atol: float | tuple[float, ...],
    max_evaluations: int,
    norm: Callable[[State], Tensor] | None = None,
) -> State:
    """Solve d(state)/du = function(u, state) over ``clock`` by an adaptive torchdiffeq solver.

    Its failures are bare assertions; here they say what happened, where, and what to try.

    Args:
        function: Right-hand side (u [], state) -> rate, a tensor or a tuple of tensors.
        start: State at ``clock[0]``.
        clock: Monotone clock values, [N] float64.
        method: One of ``ADAPTIVE_METHODS``, or ``SCIPY``, which takes no ``norm``.
        rtol: Relative tolerance.
        atol: Absolute tolerance, or one for each tensor of the state.
        max_evaluations: Evaluations after which to give up.
        norm: Norm of the error, of a tensor or tuple like the state; root mean square if not
            given.

    Returns:
        The states at all clock values, stacked.

    Raises:
        SamplingError: If the solver gives up, with the clock value reached and the likely cause.
    """
    from torchdiffeq import odeint

    reached = [float(clock[0]), 0]

    def counted(u: Tensor, state: State) -> State:
        reached[0] = u
        reached[1] += 1
        if reached[1] > max_evaluations:
            raise SamplingError(
                f"{method}: not finished after {max_evaluations} evaluations, at "
                f"log(sigma/alpha) = {float(u):.4g} "
                f"on the way from {float(clock[0]):.4g} to {float(clock[-1]):.4g}; "
                "loosen rtol and atol, or raise max_evaluations."
            )
        return function(u, state)

    options = {} if method == SCIPY else {"dtype": torch.float64}
    options |= {"norm": norm} if norm is not None else {}
    try:
        states = odeint(
            counted, start, clock, rtol=rtol, atol=atol, method=method, options=options
        )
        assert len(states) == len(clock) or isinstance(states, tuple)  # scipy stops in silence
        return states
    except AssertionError as error:
        finite = all(
            bool(torch.isfinite(s).all())
            for s in (start if isinstance(start, tuple) else (start,))
        )
        cause = (
            "the field returns NaN or infinity there"
            if finite
            else "the starting state is not finite"
        )
        raise SamplingError(
            f"{method}: the step size fell to nothing at log(sigma/alpha) = "
            f"{float(reached[0]):.4g} after "
            f"{reached[1]} evaluations; either {cause}, or rtol={rtol:g}, "
            f"atol={atol} ask for more than "
            "the dtype holds."
        ) from error


def check_solver(
    owner: str,
    rtol: float,
    atol: float,
    method: str,
    dtype: torch.dtype = torch.float64,
    methods: tuple[str, ...] = ADAPTIVE_METHODS,
) -> None:
    """Refuse an unknown method, no torchdiffeq, and tolerances below the rounding of ``dtype``."""
    validation.installed("torchdiffeq")
    check_tolerances(owner, rtol, atol, dtype)
    validation.choice(owner, "method", method, methods)


def check_tolerances(owner: str, rtol: float, atol: float, dtype: torch.dtype) -> None:
    """Refuse tolerances of 1 and more, and those below the rounding of ``dtype``."""
    floor = max(1e-12, torch.finfo(dtype).eps / 2)
    for name, value in (("rtol", rtol), ("atol", atol)):
        validation.real(owner, name, value, at_least=floor, below=1)


class _FlowSampler(Sampler):
    """The probability flow as one call of a solver, which returns the states at some marks."""

    stochastic: ClassVar[bool] = False
    denoise: bool

    def trajectory(
        self, score: Score, sde: SDE, x: Tensor, *, generator: Generator = None
    ) -> Iterator[tuple[float, Tensor]]:
        """Eleven states, evenly spaced in the clock, and the denoised end."""
        self.check(sde, x.dtype)
        score = InShape(score)
        flow = probability_flow(sde, score)
        marks = self.marks(flow).to(x.device)
        yield sde.t_max, x
        levels = flow.level_at(marks)
        scales = flow.scale(levels).double()
        states = self.solve(
            lambda u, z: flow.scaled_velocity(z.to(x.dtype), flow.level_at(u)).double(),
            x.double() / scales[0],
            marks,
            x.dtype,
        )
        for t, scale, z in zip(levels.t.tolist()[1:], scales[1:], states[1:], strict=True):
            x = (scale * z).to(x.dtype)
            yield t, x
        if self.denoise:
            yield sde.t_min, denoise(score, x, levels.rows()[-1].like(x))

    def marks(self, flow: ProbabilityFlow) -> Tensor:
        """The clock values at which states are wanted, from noise to data, float64."""
        data_end, noise_end = flow.clock_range()
        return torch.linspace(noise_end, data_end, 11, dtype=torch.float64)

    @abstractmethod
    def solve(
        self,
        function: Callable[[Tensor, Tensor], Tensor],
        z: Tensor,
        marks: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        """The states at ``marks``, [N, B, ...], from ``z`` at the first; the function computes
        in ``dtype``."""


@dataclass(frozen=True)
class AdaptiveODE(_FlowSampler):
    """The probability flow by an adaptive method of torchdiffeq, to a tolerance.

    It integrates in the clock log(sigma/alpha), in the coordinates of
    :class:`sde_lib.reverse.ProbabilityFlow`, where all processes are equally easy. The step size
    is shared by the batch: a sample agrees with itself in another batch to the tolerance, not to
    the bit. The state is integrated in float64, the network runs in the dtype of x.

    Args:
        rtol: Relative tolerance, >= 1e-12.
        atol: Absolute tolerance on the state scaled to order one, >= 1e-12.
        method: dopri5, dopri8, bosh3, fehlberg2, adaptive_heun, or scipy_solver: LSODA, a
            multistep method, with the state on the CPU.
        denoise: Whether the end is E[x_0 | x] at t_min or x at t_min.
        max_evaluations: Evaluations after which to give up.
    """

    rtol: float = 1e-4
    atol: float = 1e-4
    method: str = "dopri5"
    denoise: bool = True
    max_evaluations: int = 10_000

    def __post_init__(self) -> None:
        if self.method in FIXED_METHODS:
            raise ValueError(
                f"AdaptiveODE takes steps by their error, and {self.method} has no estimate of "
                f"it; use FixedODE(steps=..., method={self.method!r})."
            )
        self.check(None, torch.float64)
        validation.flag("AdaptiveODE", "denoise", self.denoise)
        validation.count("AdaptiveODE", "max_evaluations", self.max_evaluations)

    def check(self, sde: SDE | None, dtype: torch.dtype = torch.float32) -> None:
        """The network's rounding bounds what can be asked for."""
        methods = (*ADAPTIVE_METHODS, SCIPY)
        check_solver("AdaptiveODE", self.rtol, self.atol, self.method, dtype, methods)

    def solve(
        self,
        function: Callable[[Tensor, Tensor], Tensor],
        z: Tensor,
        marks: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        return integrate(
            function,
            z,
            marks,
            method=self.method,
            rtol=self.rtol,
            atol=self.atol,
            max_evaluations=self.max_evaluations,
        )


@dataclass(frozen=True)
class FixedODE(_FlowSampler):
    """The probability flow by a fixed-step method of torchdiffeq, for comparison.

    The steps are even in the clock log(sigma/alpha), in the coordinates of
    :class:`sde_lib.reverse.ProbabilityFlow`; no tolerance enters. Adams methods are of order 4
    and start by three steps of rk4. The state is integrated in float64, the network runs in the
    dtype of x.

    Args:
        steps: Number of steps.
        method: euler, midpoint, heun2, heun3, rk4, explicit_adams, or implicit_adams (also named
            fixed_adams), whose equation is solved by iteration, several evaluations a step, until
            the whole batch has settled.
        denoise: Whether the end is E[x_0 | x] at t_min or x at t_min.
    """

    steps: int = 50
    method: str = "rk4"
    denoise: bool = True

    def __post_init__(self) -> None:
        validation.installed("torchdiffeq")
        object.__setattr__(self, "steps", validation.count("FixedODE", "steps", self.steps))
        if self.method in (*ADAPTIVE_METHODS, SCIPY):
            raise ValueError(
                f"FixedODE takes steps of one size, and {self.method} chooses them by their "
                f"error; use AdaptiveODE(rtol=..., atol=..., method={self.method!r})."
            )
        validation.choice("FixedODE", "method", self.method, FIXED_METHODS)
        validation.flag("FixedODE", "denoise", self.denoise)

    @property
    def converges(self) -> int:
        """The order of the method."""
        return FIXED_METHODS[self.method].order

    def marks(self, flow: ProbabilityFlow) -> Tensor:
        """Up to eleven of the clock values that are stepped to."""
        which = torch.linspace(0, self.steps, min(self.steps, 10) + 1, dtype=torch.float64)
        return self._grid(flow.clock_range())[which.round().long()]

    def _grid(self, ends: tuple[float, float]) -> Tensor:
        return torch.linspace(ends[1], ends[0], self.steps + 1, dtype=torch.float64)

    def solve(
        self,
        function: Callable[[Tensor, Tensor], Tensor],
        z: Tensor,
        marks: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        from torchdiffeq import odeint

        grid = self._grid((float(marks[-1]), float(marks[0]))).to(marks)
        options = {"grid_constructor": lambda f, z, u: grid}
        if (max_order := FIXED_METHODS[self.method].max_order) is not None:
            options |= {"max_order": max_order}
        if self.method in ("implicit_adams", "fixed_adams"):
            options |= {"max_iters": 20}
        tolerance = max(1e-10, 100 * torch.finfo(dtype).eps)  # of that iteration; no other's
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Functional iteration did not converge")
            try:
                return odeint(
                    function,
                    z,
                    marks,
                    rtol=tolerance,
                    atol=tolerance,
                    method=self.method,
                    options=options,
                )
            except UserWarning as error:
                raise SamplingError(
                    f"{self}: the equation of an implicit step is not solved to {tolerance:.1g} "
                    "by twenty iterations, so that the steps are too long for it, or the score "
                    "function returns NaN; take more steps, or method=rk4."
                ) from error
