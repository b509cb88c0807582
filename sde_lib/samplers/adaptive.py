"""The probability flow by the adaptive solvers of torchdiffeq."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sde_lib import validation
from sde_lib.noise import Generator
from sde_lib.reverse import Score, probability_flow
from sde_lib.samplers.base import Sampler, SamplingError, denoise
from sde_lib.sde import SDE

ADAPTIVE_METHODS = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")


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
        method: One of ``ADAPTIVE_METHODS``.
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

    options = {"dtype": torch.float64} | ({"norm": norm} if norm is not None else {})
    try:
        return odeint(counted, start, clock, rtol=rtol, atol=atol, method=method, options=options)
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
    owner: str, rtol: float, atol: float, method: str, dtype: torch.dtype = torch.float64
) -> None:
    """Refuse an unknown method, no torchdiffeq, and tolerances below the rounding of ``dtype``."""
    validation.installed("torchdiffeq")
    floor = max(1e-12, torch.finfo(dtype).eps / 2)
    for name, value in (("rtol", rtol), ("atol", atol)):
        validation.real(owner, name, value, at_least=floor, below=1)
    validation.choice(owner, "method", method, ADAPTIVE_METHODS)


@dataclass(frozen=True)
class AdaptiveODE(Sampler):
    """The probability flow by an adaptive Runge-Kutta method, to a tolerance.

    It integrates in the clock log(sigma/alpha), in the coordinates of
    :class:`sde_lib.reverse.ProbabilityFlow`, where all processes are equally easy. The step size
    is shared by the batch: a sample agrees with itself in another batch to the tolerance, not to
    the bit. The state is integrated in float64, the network runs in the dtype of x.

    Args:
        rtol: Relative tolerance, >= 1e-12.
        atol: Absolute tolerance on the state scaled to order one, >= 1e-12.
        method: dopri5, dopri8, bosh3, fehlberg2 or adaptive_heun.
        denoise: Whether the end is E[x_0 | x] at t_min or x at t_min.
        max_evaluations: Evaluations after which to give up.
    """

    rtol: float = 1e-4
    atol: float = 1e-4
    method: str = "dopri5"
    denoise: bool = True
    max_evaluations: int = 10_000
    stochastic: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_solver("AdaptiveODE", self.rtol, self.atol, self.method)
        validation.flag("AdaptiveODE", "denoise", self.denoise)
        validation.count("AdaptiveODE", "max_evaluations", self.max_evaluations)

    def check(self, sde: SDE, dtype: torch.dtype = torch.float32) -> None:
        """The network's rounding bounds what can be asked for."""
        check_solver("AdaptiveODE", self.rtol, self.atol, self.method, dtype)

    def trajectory(
        self, score: Score, sde: SDE, x: Tensor, *, generator: Generator = None
    ) -> Iterator[tuple[float, Tensor]]:
        """Eleven states, evenly spaced in the clock, and the denoised end."""
        self.check(sde, x.dtype)
        flow = probability_flow(sde, score)
        data_end, noise_end = flow.clock_range()
        clock = torch.linspace(noise_end, data_end, 11, dtype=torch.float64, device=x.device)
        yield sde.t_max, x
        levels = flow.level_at(clock)
        scales = flow.scale(levels).double()
        states = integrate(
            lambda u, z: flow.scaled_velocity(z.to(x.dtype), flow.level_at(u)).double(),
            x.double() / scales[0],
            clock,
            method=self.method,
            rtol=self.rtol,
            atol=self.atol,
            max_evaluations=self.max_evaluations,
        )
        for t, scale, z in zip(levels.t.tolist()[1:], scales[1:], states[1:], strict=True):
            x = (scale * z).to(x.dtype)
            yield t, x
        if self.denoise:
            yield sde.t_min, denoise(score, x, levels.rows()[-1].like(x))
