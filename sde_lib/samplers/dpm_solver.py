"""DPM-Solver: singlestep exponential integrators, several evaluations within each step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate
from typing import ClassVar

import torch

from sde_lib import validation
from sde_lib.grids import Grid, UniformLogSNR
from sde_lib.samplers.exponential import (
    PREDICTIONS,
    ExponentialSampler,
    Leap,
    Prediction,
    Row,
    Stage,
    of_scores,
    rows,
)
from sde_lib.sde import SDE, Level

INNER = {1: (), 2: (1 / 2,), 3: (1 / 3, 2 / 3)}  # shares of a step in log(alpha/sigma)


@dataclass(frozen=True)
class DPMSolver(ExponentialSampler):
    r"""DPM-Solver 1, 2 and 3, and with ``prediction=data`` DPM-Solver++ 2S and 3S.

    A step of order k evaluates at k points of it, evenly spaced in log(alpha/sigma), and goes on
    by a polynomial through the first and the last of them. ``steps`` counts evaluations, not
    steps: "DPM-Solver-fast" spends them on steps of the wanted order and on one or two of lower
    order at the end, where the noise is least.

    Reference: Lu et al., DPM-Solver, 2022, algorithms 1 and 2, section 3.4; DPM-Solver++, 2022.

    Args:
        steps: Evaluations.
        order: 1 (DDIM), 2 or 3.
        prediction: noise, or data.
        lower_order_final: Whether the last steps are of lower order; without, ``steps`` must be a
            multiple of the order.
    """

    steps: int = 20
    grid: Grid = UniformLogSNR()
    order: int = 3
    prediction: str = "noise"
    lower_order_final: bool = True
    stochastic: ClassVar[bool] = False
    correctable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        order = validation.count("DPMSolver", "order", self.order)
        object.__setattr__(self, "order", order)
        if order > 3:
            raise ValueError(f"DPMSolver has orders 1 to 3; got order={self.order}.")
        validation.choice("DPMSolver", "prediction", self.prediction, ("data", "noise"))
        validation.flag("DPMSolver", "lower_order_final", self.lower_order_final)
        if not self.lower_order_final and self.steps % self.order:
            raise ValueError(
                "DPMSolver without lower_order_final needs steps, which counts evaluations, to be "
                f"a multiple of the order {self.order}; got steps={self.steps}."
            )

    def orders(self) -> list[int]:
        """Of each step; they add up to the number of evaluations."""
        whole, rest = divmod(self.steps, self.order)
        if self.order == 3 and rest == 0 and self.lower_order_final:
            return [3] * (whole - 1) + [2, 1]
        return [self.order] * whole + [rest] * (rest > 0)

    def stages(self, sde: SDE) -> tuple[Level, list[tuple[Stage, int, int]]]:
        prediction, outer, orders = PREDICTIONS[self.prediction], self.levels(sde), self.orders()
        ends = [0, *accumulate(orders)]
        clock = outer.noise_ratio.log()[ends].tolist()
        inner = [
            start + share * (end - start)
            for order, start, end in zip(orders, clock[:-1], clock[1:], strict=True)
            for share in (0.0, *INNER[order])
        ]
        times = sde.time_at(-2 * torch.tensor([*inner, clock[-1]], dtype=torch.float64))
        times[ends] = outer.t[ends]  # free of rounding
        levels = sde.level(times)
        scores = of_scores(prediction, levels)
        stages = []
        for order, first in zip(orders, ends[:-1], strict=True):
            for k, row in enumerate(_rows(prediction, levels, order, first)):
                i = first + k
                stages.append((Stage(scores[i], row, holds=k > 0), i, i + 1))
        return levels, stages


def _rows(prediction: Prediction, levels: Level, order: int, first: int) -> list[Row]:
    """Updates of one step: to each inner point and to the end, through the last prediction and
    the first of the step."""
    leaps: list[Leap] = [(first, first + k + 1, (first + k, first)[: k + 1]) for k in range(order)]
    found = rows(prediction, levels, leaps, midpoint=order == 2)
    if order == 3:
        newest, oldest = found[2].weights
        found[2] = replace(found[2], weights=(newest, 0.0, oldest))
    return found
