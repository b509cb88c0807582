"""Heun's method with EDM's churn."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sde_lib import validation
from sde_lib.reverse import Score
from sde_lib.samplers.base import Noise, OneStepSampler, Plan, Step
from sde_lib.sde import SDE, Level


@dataclass(frozen=True)
class Heun(OneStepSampler):
    r"""Heun's method on the probability flow :math:`dy/d\rho = \hat\varepsilon`, y = x/alpha, rho
    = sigma/alpha.

    Second order, two evaluations a step. In these coordinates the flow has no stiff linear part.
    With ``churn`` > 0 each step first raises the noise from rho to
    :math:`(1 + \gamma)\rho`, :math:`\gamma = \min(\mathrm{churn}/\mathrm{steps}, \sqrt2 - 1)`,
    while rho lies in [churn_from, churn_to]: the stochastic sampler of EDM, for every process.

    Reference: Karras et al. 2022, algorithms 1 and 2.

    Args:
        churn: Total amount of noise put back, >= 0; 0 is deterministic.
        churn_from: Smallest rho that is churned.
        churn_to: Largest rho that is churned.
        churn_noise: Factor on the standard deviation of the noise put back; EDM uses 1.003 to
            1.007.
    """

    steps: int = 18
    churn: float = 0.0
    churn_from: float = 0.0
    churn_to: float = 1e9
    churn_noise: float = 1.0
    order: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("churn", "churn_from", "churn_to", "churn_noise"):
            validation.real("Heun", name, getattr(self, name), at_least=0)

    @property
    def stochastic(self) -> bool:
        """Whether fresh noise enters."""
        return self.churn > 0

    def plan(self, sde: SDE) -> Plan:
        """Heun steps, each after a move that raises the noise where churn asks for it."""
        levels = self.levels(sde)
        ratio = levels.noise_ratio
        gamma = min(self.churn / self.steps, math.sqrt(2) - 1)
        churned = (ratio >= self.churn_from) & (ratio <= self.churn_to) & (gamma > 0)
        above = sde.time_at(-2 * torch.log(ratio * (1 + gamma)))
        churned &= above > levels.t  # at t_max there is nothing above
        raised = sde.level(torch.where(churned, above, levels.t))
        rows = Level(*(torch.cat(pair) for pair in zip(levels, raised, strict=True)))
        moves: list[tuple[Step, int, int]] = []
        for i, noisier in enumerate(churned[:-1].tolist()):
            top = i + len(ratio) if noisier else i
            moves += [(self.raise_noise, i, top)] * noisier + [(self.step, top, i + 1)]
        return Plan(rows, moves)

    def raise_noise(self, score: Score, x: Tensor, now: Level, nxt: Level, noise: Noise) -> Tensor:
        """One exact forward transition from ``now`` up to the noisier ``nxt``; no evaluation."""
        a, variance = now.transition(nxt)
        return a * x + self.churn_noise * variance.sqrt() * noise()

    def step(self, score: Score, x: Tensor, now: Level, nxt: Level, noise: Noise) -> Tensor:
        d_rho = nxt.noise_ratio - now.noise_ratio
        eps_hat = now.noise(score(x, now.t))
        x_euler = nxt.alpha * (x / now.alpha + d_rho * eps_hat)
        eps_next = nxt.noise(score(x_euler, nxt.t))
        return nxt.alpha * (x / now.alpha + 0.5 * d_rho * (eps_hat + eps_next))
