"""The reverse SDE by the solvers of torchsde: an independent implementation to compare with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sde_lib import validation
from sde_lib.brownian import BrownianPaths
from sde_lib.noise import Generator, PerSample
from sde_lib.reverse import ProbabilityFlow, Score, probability_flow
from sde_lib.samplers.base import InShape, Sampler, SamplingError, denoise
from sde_lib.sde import SDE, Level

CALCULUS = {
    "euler": "ito",
    "milstein": "ito",
    "srk": "ito",
    "heun": "stratonovich",
    "midpoint": "stratonovich",
    "euler_heun": "stratonovich",
}


@dataclass(frozen=True)
class TorchSDE(Sampler):
    r"""The reverse SDE by a fixed-step solver of torchsde.

    Solved in the coordinates of :class:`sde_lib.reverse.ProbabilityFlow`, even steps in the clock
    :math:`u = \log(\sigma/\alpha)`, where the reverse SDE reads

    .. math::  dz = \left[(1 + \eta^2)\, \varsigma\, \hat\varepsilon - \varsigma^2 z\right] du
               + \eta \sqrt2\, \varsigma\, d\bar w, \qquad \varsigma^2 = \frac{\sigma^2}{\alpha^2 +
               \sigma^2}

    The noise does not depend on the state, so that Ito and Stratonovich solvers agree. Cost:
    ``steps`` evaluations times the stages of the method, one by which torchsde checks shapes and
    one for the denoise; its Brownian tree costs more than a small network.

    Args:
        steps: Even steps in log(sigma/alpha).
        method: euler, milstein, srk, heun, midpoint or euler_heun. ``reversible_heun`` is refused:
            on stiff reverse-time drifts it is unstable and gives wrong mode weights.
        eta: Amount of fresh noise, > 0; for 0 use AdaptiveODE.
        denoise: Whether the end is E[x_0 | x] at t_min or x at t_min.
    """

    steps: int = 200
    method: str = "euler"
    eta: float = 1.0
    denoise: bool = True

    def __post_init__(self) -> None:
        validation.installed("torchsde")
        object.__setattr__(self, "steps", validation.count("TorchSDE", "steps", self.steps))
        validation.real("TorchSDE", "eta", self.eta, above=0)
        if self.method == "reversible_heun":
            raise ValueError(
                "TorchSDE refuses method='reversible_heun': it is unstable for stiff "
                "reverse-time drifts and "
                f"gives wrong mode weights without a warning; use one of {', '.join(CALCULUS)}."
            )
        validation.choice("TorchSDE", "method", self.method, CALCULUS)
        validation.flag("TorchSDE", "denoise", self.denoise)

    @property
    def stochastic(self) -> bool:
        """Always: fresh noise enters."""
        return True

    def trajectory(
        self, score: Score, sde: SDE, x: Tensor, *, generator: Generator = None
    ) -> Iterator[tuple[float, Tensor]]:
        """Eleven states, evenly spaced in the clock, and the denoised end."""
        from torchsde import sdeint

        score = InShape(score)
        flow = probability_flow(sde, score)
        data_end, noise_end = flow.clock_range()
        per_step = (noise_end - data_end) / self.steps
        marks = torch.linspace(0, self.steps, min(self.steps, 10) + 1, dtype=torch.float64).round()
        levels = flow.level_at(noise_end - marks * per_step)
        scales = flow.scale(levels).to(x)
        yield sde.t_max, x
        # time runs in whole steps: every step ends on a float, and none is left over by rounding,
        # which BrownianInterval would answer with a tree of a million pieces
        span = marks.to(x.dtype)
        problem = _ReverseProblem(
            flow, noise_end, per_step, x.shape, self.eta, CALCULUS[self.method]
        )
        states = sdeint(
            problem,
            (x / scales[0]).flatten(1),
            span,
            method=self.method,
            dt=1.0,
            bm=self._brownian(x, generator, noise_end, per_step),
        )
        if not bool(torch.isfinite(states[-1]).all()):
            raise SamplingError(
                f"{self}: the state is not finite at the end; does the score function return NaN?"
            )
        for t, scale, z in zip(levels.t.tolist()[1:], scales[1:], states[1:], strict=True):
            x = scale * z.reshape(x.shape)
            yield t, x
        if self.denoise:
            yield sde.t_min, denoise(score, x, levels.rows()[-1].like(x))

    def _brownian(self, x: Tensor, generator: Generator, start: float, per_step: float):  # noqa: ANN202
        areas = self.method == "srk"
        if isinstance(generator, BrownianPaths) and not areas:
            return _OnPaths(generator, x, start, per_step)
        return _brownian(x, self.steps, generator, areas=areas)


class _OnPaths:
    """The paths that all samplers follow, over elapsed steps of the clock."""

    levy_area_approximation = "none"

    def __init__(self, paths: BrownianPaths, x: Tensor, start: float, per_step: float) -> None:
        self.paths, self.x, self.start, self.per_step = paths, x, start, per_step
        self.shape, self.dtype, self.device = x.flatten(1).shape, x.dtype, x.device

    def __call__(self, ta, tb=None, return_U=False, return_A=False):  # noqa: ANN001, ANN204, N803
        begin, end = (self.start - float(t) * self.per_step for t in (ta, tb))
        return (
            self.paths.over(self.x, begin, end, shortest=self.per_step)().flatten(1)
            * float(tb - ta) ** 0.5
        )


class _ReverseProblem:
    """Drift and diffusion over elapsed steps of the clock, [B, D] as torchsde wants them."""

    noise_type = "diagonal"

    def __init__(
        self,
        flow: ProbabilityFlow,
        start: float,
        per_step: float,
        shape: torch.Size,
        eta: float,
        calculus: str,
    ) -> None:
        self.flow, self.start, self.per_step, self.shape = flow, start, per_step, shape
        self.eta, self.sde_type = eta, calculus
        self.latest: tuple[float, Level, Tensor] | None = None

    def _level(self, elapsed: Tensor, z: Tensor) -> tuple[Level, Tensor]:
        """The level and its noise share; drift and diffusion ask for the same one in turn."""
        elapsed = float(elapsed)
        if self.latest is None or self.latest[0] != elapsed:
            clock = torch.tensor(self.start - elapsed * self.per_step, dtype=torch.float64)
            level = self.flow.level_at(clock)
            self.latest = elapsed, level, self.flow.noise_share(level).to(z)
        return self.latest[1:]

    def f(self, elapsed: Tensor, z: Tensor) -> Tensor:
        level, share = self._level(elapsed, z)
        noise_part = self.flow.noise_part(z.reshape(self.shape), level).flatten(1)
        return -self.per_step * ((1 + self.eta**2) * noise_part - share.square() * z)

    def g(self, elapsed: Tensor, z: Tensor) -> Tensor:
        return (self.eta * (2 * self.per_step) ** 0.5 * self._level(elapsed, z)[1]).expand_as(z)


class _StackedBrownian:
    """One Brownian path for each sample, so that a path does not depend on the batch."""

    def __init__(
        self, paths: list, shape: tuple[int, int], like: Tensor, temperature: float
    ) -> None:
        self.paths, self.shape, self.dtype, self.device = paths, shape, like.dtype, like.device
        self.std = temperature**0.5
        self.levy_area_approximation = paths[0].levy_area_approximation

    def __call__(self, ta, tb=None, return_U=False, return_A=False):  # noqa: ANN001, ANN204, N803
        drawn = [path(ta, tb, return_U=return_U, return_A=return_A) for path in self.paths]
        if isinstance(drawn[0], tuple):
            return tuple(
                None if part[0] is None else self.std * torch.cat(part)
                for part in zip(*drawn, strict=True)
            )
        return self.std * torch.cat(drawn)


def _brownian(x: Tensor, steps: int, generator: Generator, *, areas: bool):  # noqa: ANN202
    """Brownian motion [B, D] over [0, steps], its entropy drawn from ``generator``."""
    from torchsde import BrownianInterval

    width = x[0].numel()

    def interval(rows: int, source: torch.Generator | None) -> BrownianInterval:
        device = source.device if source is not None else "cpu"
        entropy = int(torch.randint(2**31 - 1, (), generator=source, device=device))
        return BrownianInterval(
            t0=0.0,
            t1=float(steps),
            dt=1.0,
            size=(rows, width),
            dtype=x.dtype,
            device=x.device,
            entropy=entropy,
            levy_area_approximation="space-time" if areas else "none",
        )

    if isinstance(generator, PerSample):
        return _StackedBrownian(
            [interval(1, stream) for stream in generator.streams],
            (len(x), width),
            x,
            generator.temperature,
        )
    return interval(len(x), generator)
