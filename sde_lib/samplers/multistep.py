"""Multistep exponential integrators, one evaluation a step: DEIS, DPM-Solver++, UniPC, Adams."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from sde_lib import validation
from sde_lib.grids import Grid, UniformLogSNR
from sde_lib.samplers.exponential import (
    PREDICTIONS,
    ExponentialSampler,
    Leap,
    Stage,
    of_scores,
    rows,
)
from sde_lib.sde import SDE, Level

FEW = 15  # steps below which the last ones are of low order unless told otherwise


@dataclass(frozen=True)
class Multistep(ExponentialSampler):
    """Steps through a polynomial in log(sigma/alpha) of the last predictions.

    Each subclass says what the network is taken to predict, and whether the new prediction
    corrects the step that led to it.
    """

    most: ClassVar[int] = 3  # order
    midpoint: ClassVar[bool] = False

    @property
    @abstractmethod
    def of(self) -> str:
        """What the network is taken to predict: noise, data or v."""

    @property
    def converges(self) -> int | None:
        """The order, up to 2; None above, where it depends on the problem how long the first
        steps, of lower order, remain without weight."""
        order = super().converges
        return order if order is not None and order <= 2 else None

    def orders(self) -> list[int]:
        """Of each step's predictor, at most one more than the number of steps before it."""
        return [min(self.order, n + 1) for n in range(self.steps)]

    def corrections(self) -> list[int]:
        """How many predictions the corrector of each step but the last goes through; 0 is none."""
        return [0] * (self.steps - 1)

    def stages(self, sde: SDE) -> tuple[Level, list[tuple[Stage, int, int]]]:
        levels, prediction = self.levels(sde), PREDICTIONS[self.of]
        eta = getattr(self, "eta", 0.0)
        steps: list[Leap] = [
            (n, n + 1, tuple(range(n, n - order, -1))) for n, order in enumerate(self.orders())
        ]
        corrections: list[Leap] = [
            (n, n + 1, tuple(range(n + 1, n + 1 - count, -1)))
            for n, count in enumerate(self.corrections())
            if count
        ]
        how = {"eta": eta, "midpoint": self.midpoint}
        predicted = rows(prediction, levels, steps, **how)
        corrected = dict(
            zip(
                (leap[1] for leap in corrections),
                rows(prediction, levels, corrections, **how),
                strict=True,
            )
        )
        scores = of_scores(prediction, levels)
        return levels, [
            (Stage(scores[n], row, corrected.get(n)), n, n + 1) for n, row in enumerate(predicted)
        ]


def lowered(orders: list[int], last: int) -> list[int]:
    """``orders`` that fall to ``last`` at the end: where nothing comes after to set right what was
    extrapolated."""
    return [min(order, last + len(orders) - 1 - n) for n, order in enumerate(orders)]


@dataclass(frozen=True)
class DEIS(Multistep):
    r"""Exponential Adams-Bashforth in the noise estimate: DEIS with polynomials in log rho.

    .. math::  x_{n+1} = \tfrac{\alpha_{n+1}}{\alpha_n} x_n
               + \alpha_{n+1} \sum_j \hat\varepsilon_{n-j} \int \ell_j(\log\varrho)\, d\varrho

    Order 1 is DDIM. One evaluation a step. With fresh noise the noise estimate changes by its own
    size over a long step, and what is extrapolated from it grows: from order 3 on this diverges in
    20 steps, at orders 1 and 2 in 10. DPM-Solver++, in the data, does not.

    Reference: Zhang and Chen, Fast Sampling of Diffusion Models with Exponential Integrator,
    2023.

    Args:
        order: 1 to 4.
        eta: Amount of fresh noise: 0 is the probability flow, 1 the reverse SDE.
        lower_order_final: Whether the order falls to 1 at the end.
    """

    steps: int = 20
    grid: Grid = UniformLogSNR()
    order: int = 3
    eta: float = 0.0
    lower_order_final: bool = False
    of: ClassVar[str] = "noise"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self, most=4)

    def orders(self) -> list[int]:
        return lowered(super().orders(), 1) if self.lower_order_final else super().orders()

    @property
    def stochastic(self) -> bool:
        """Whether fresh noise enters."""
        return self.eta > 0


@dataclass(frozen=True)
class DPMSolverPP(Multistep):
    r"""DPM-Solver++ 2M and 3M, and with eta = 1 SDE-DPM-Solver++: multistep in the denoised data.

    .. math::  x_{n+1} = \tfrac{\sigma_{n+1}}{\sigma_n} e^{-\eta^2 h} x_n + \alpha_{n+1}
               (1 - e^{-(1 + \eta^2) h})\, D + \sigma_{n+1} \sqrt{1 - e^{-2 \eta^2 h}}\, z

    with h the step in log(alpha/sigma) and D the polynomial of the last denoised data, at order 2
    taken at the middle of the step, at order 3 integrated. One evaluation a step.

    Reference: Lu et al., DPM-Solver++, 2022, algorithms 2 and 4 (eta of 0 and 1).

    Args:
        order: 1 (DDIM), 2 (2M) or 3 (3M).
        eta: Amount of fresh noise: 0 is the probability flow, 1 the reverse SDE.
        lower_order_final: Whether the order falls to 1 at the end; below 15 steps if not given.
    """

    steps: int = 20
    grid: Grid = UniformLogSNR()
    order: int = 2
    eta: float = 0.0
    lower_order_final: bool | None = None
    of: ClassVar[str] = "data"
    midpoint: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self, most=3)

    def orders(self) -> list[int]:
        lower = self.steps < FEW if self.lower_order_final is None else self.lower_order_final
        return lowered(super().orders(), 1) if lower else super().orders()

    @property
    def stochastic(self) -> bool:
        """Whether fresh noise enters."""
        return self.eta > 0


@dataclass(frozen=True)
class UniPC(Multistep):
    r"""UniPC with B(h) = e^h - 1: a predictor of order p and a corrector that takes in the new
    prediction, of order p + 1, at no evaluation more.

    Both are exponential Adams rules in log(alpha/sigma), but that a rule of two predictions is
    taken at the middle of the step.

    Reference: Zhao et al., UniPC, 2023.

    Args:
        order: p, 1 to 3.
        corrector: Whether to correct; without, this is multistep DPM-Solver(++).
        prediction: data, or noise.
        lower_order_final: Whether the order falls to 1 at the end.
    """

    steps: int = 20
    grid: Grid = UniformLogSNR()
    order: int = 2
    corrector: bool = True
    prediction: str = "data"
    lower_order_final: bool = True
    stochastic: ClassVar[bool] = False
    midpoint: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self, most=3)
        validation.flag("UniPC", "corrector", self.corrector)
        validation.choice("UniPC", "prediction", self.prediction, ("data", "noise"))

    @property
    def of(self) -> str:
        """As it was asked for."""
        return self.prediction

    @property
    def converges(self) -> int | None:
        """That of the corrector, if there is one; None above 3."""
        order = self.order + self.corrector
        return order if order <= 3 else None

    @property
    def correctable(self) -> bool:
        """Without its own corrector."""
        return not self.corrector

    def orders(self) -> list[int]:
        return lowered(super().orders(), 1) if self.lower_order_final else super().orders()

    def corrections(self) -> list[int]:
        counts = [order + 1 for order in self.orders()[:-1]]
        return counts if self.corrector else [0] * len(counts)


def _check(sampler: Multistep, most: int) -> None:
    owner = type(sampler).__name__
    object.__setattr__(sampler, "order", validation.count(owner, "order", sampler.order))
    if sampler.order > most:
        raise ValueError(f"{owner} has orders 1 to {most}; got order={sampler.order}.")
    if hasattr(sampler, "eta"):
        validation.real(owner, "eta", sampler.eta, at_least=0)
    if getattr(sampler, "lower_order_final", None) is not None:
        validation.flag(owner, "lower_order_final", sampler.lower_order_final)
